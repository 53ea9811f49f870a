"""The training script with a network that is slow to validate (`SLOW=network`), or on a slow disk (`SLOW=disk`); files say what it does"""
import os, sys, time
from pathlib import Path

from flow_study import files
from flow_study.models import SimpleVelocityNet, register_model
from flow_study.train import main


class SlowNet(SimpleVelocityNet):
    def forward(self, x, t):
        if os.environ.get('SLOW') == 'network' and not self.training and len(x) > 2:
            with open('validations', 'a') as f: f.write('.')
            time.sleep(0.06)
        return super().forward(x, t)


class SlowDisk:
    "The module `os`, but forcing a file to the disk takes a while"
    def __getattr__(self, name): return getattr(os, name)
    def fsync(self, fd):
        Path('writing').write_text(os.readlink(f'/proc/self/fd/{fd}'))
        time.sleep(0.12)
        os.fsync(fd)
        Path('writing').unlink()


register_model('slow', SlowNet)
if __name__ == '__main__':
    if os.environ['SLOW'] == 'disk': files.os = SlowDisk()
    sys.exit(main())
