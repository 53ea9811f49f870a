"""The engine ray: a node and the driver are killed while run directories are brought back."""
from ray_cluster import a_node_is_killed, cluster, local, ray, sweep


def test_a_node_and_the_driver_are_killed_while_runs_are_brought_back(cluster, local, sweep):
    a_node_is_killed(cluster, local, sweep, bring_back=True, driver_too=True)
