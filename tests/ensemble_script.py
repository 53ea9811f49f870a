"""An ensemble of three seeds on the data of the place: FOLDER of the runs, `--resume` to go on; exit code as of the training script"""
import sys

from flow_study.config import TrainingConfig
from flow_study.ensemble import train_ensemble

if __name__ == '__main__':
    config = TrainingConfig(arch='mlp', size='tiny', flow='icfm', dataset='1k', group='tests', epochs=12, batch_size=50, lr=3e-3, warmup_steps=20, checkpoint_dir=sys.argv[1])
    results = train_ensemble(config, (1, 2, 3), device='cpu', resume='--resume' in sys.argv, trackers=lambda c: [])
    stopped = next((r['signal'] for r in results if r['signal']), None)
    sys.exit(128 + stopped if stopped else int(any(r['state'] == 'failed' for r in results)))
