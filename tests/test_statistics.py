"""The statistics of a study against SciPy and statsmodels, and against cases that can be done by hand."""
import math

import numpy as np
import pytest
import scipy.stats as st
from flow_study.statistics import (compare_arms, fit_power_law, mean_ranks, nemenyi, paired_test, seed_interval, seeds_needed, smallest_effect,
                                   smallest_p)
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower


def arm(values): return dict(enumerate(values, 42))


@pytest.fixture
def arms():
    "Three arms beside a reference over eight seeds; seeds are harder or easier for all of them alike"
    rng = np.random.default_rng(1)  # one in which `same` is not by chance among the 5 % that look different
    seed = rng.normal(size=8)
    return {name: arm(1 + seed + gap + 0.1*rng.normal(size=8)) for name, gap in dict(reference=0, same=0, better=-0.3, worse=0.5).items()}


def test_interval_is_scipys():
    values = [1.2, 0.9, 1.5, 1.1]
    i = seed_interval(values)
    assert (i.n, i.mean, i.sd) == pytest.approx((4, np.mean(values), np.std(values, ddof=1)))
    assert (i.low, i.high) == pytest.approx(st.t.interval(0.95, 3, np.mean(values), st.sem(values)))


def test_interval_by_hand():
    "1, 2, 3: mean 2, standard deviation 1, and t of 4.302653 for two degrees of freedom"
    i = seed_interval([1, 2, 3])
    assert (i.mean, i.sd) == (2, 1) and i.high - i.mean == pytest.approx(4.302653/math.sqrt(3), rel=1e-6)
    assert seed_interval([1, None, 2, math.nan, 3]) == i


def test_two_seeds_conclude_nothing():
    assert math.isnan(seed_interval([1, 2]).low)
    c = compare_arms(dict(a=arm([1, 2]), b=arm([3, 5])), 'a')['b']
    assert c.verdict == 'nothing can be concluded' and math.isnan(c.p_holm)


def test_paired_is_scipys(arms):
    for name in ('same', 'better', 'worse'):
        t, wanted = paired_test(arms[name], arms['reference']), st.ttest_rel(list(arms[name].values()), list(arms['reference'].values()))
        assert t.p == pytest.approx(wanted.pvalue, rel=1e-9)
        assert (t.low, t.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))


def test_seeds_are_matched_by_number():
    "Seeds that one arm lacks are left out, and the order does not matter"
    a, b = {1: 1.0, 2: 2.1, 3: 2.9, 9: 100.}, {3: 2.0, 2: 1.0, 1: 0.2, 8: -100.}
    assert paired_test(a, b).p == pytest.approx(st.ttest_rel([1.0, 2.1, 2.9], [0.2, 1.0, 2.0]).pvalue)


def test_holm_is_statsmodels(arms):
    found = compare_arms(arms, 'reference')
    raw = [paired_test(arms[k], arms['reference']).p for k in found]
    assert [c.p_holm for c in found.values()] == pytest.approx(list(multipletests(raw, method='holm')[1]))
    assert {k: c.verdict for k, c in found.items()} == dict(same='cannot be told apart', better='better', worse='worse')
    assert {k: c.verdict for k, c in compare_arms(arms, 'reference', better='higher').items()} == dict(same='cannot be told apart', better='worse', worse='better')


@pytest.mark.parametrize('effect', [0.5, 1., 3.])
def test_seeds_needed_have_the_power(effect):
    n = seeds_needed(effect, 1.)
    power = lambda n: TTestPower().power(effect, n, 0.05)
    assert power(n) >= 0.8 and (n == 3 or power(n - 1) < 0.8)


def test_smallest_effect_has_the_power():
    assert TTestPower().power(smallest_effect(5), 5, 0.05) == pytest.approx(0.8, abs=1e-4)
    assert smallest_effect(5) < smallest_effect(5, comparisons=10) < smallest_effect(3, comparisons=10)
    assert smallest_p(5) == 2/2**5


def test_ranks_are_scipys(arms):
    r = mean_ranks(arms)
    table = np.array([list(v.values()) for v in arms.values()])
    assert r.mean == pytest.approx(dict(zip(arms, st.rankdata(table, axis=0).mean(1))))
    assert r.p == pytest.approx(st.friedmanchisquare(*table).pvalue)


def test_nemenyi_is_in_the_tables():
    "Demšar (2006), table 5a: q of 2.343 for three arms, 2.569 for four, at 0.05"
    for k, q in {3: 2.343, 4: 2.569}.items(): assert nemenyi(k, 10) == pytest.approx(q*math.sqrt(k*(k + 1)/60), abs=1e-3)


def test_power_law_is_found_again():
    n = np.array([100, 300, 1000, 3000, 10000, 30000])
    law = fit_power_law(n, 0.2 + 3*n**-0.5)
    assert (law.floor, law.exponent) == pytest.approx((0.2, 0.5), rel=0.02)
