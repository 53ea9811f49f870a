"""A stand-in for a captured graph that needs no GPU: the operations of one step, recorded as torch carries them out, and repeated on the same memory.

Like a CUDA graph it knows nothing of Python: whatever a step reads from a Python variable stays what it was when the step was recorded. Like the capturing of one it
refuses what a GPU would have to wait for: a number asked for by the host, a shape that depends on numbers, a constant that the host makes.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'equal', '_unique2', 'unique_dim', 'unique_consecutive', 'lift_fresh', 'repeat_interleave'}


def tensors(tree): return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Operations(TorchDispatchMode):
    "Notes every operation with its arguments and results"
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix('aten::')
        if name in WAITS or name.startswith('index') and any(x.dtype == torch.bool for x in tensors(args[1:2])): raise RuntimeError(f'{func} makes the device wait')
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorded:
    "The first call records while it works, as `CUDAGraph.replay` after capturing would; later calls repeat"
    def __init__(self, work): self.work, self.calls, self.replays = work, None, 0

    def replay(self):
        self.replays += 1
        if self.calls is None:
            with Operations() as found: self.work()
            self.calls = found.calls
            return
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for here, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if here.untyped_storage().data_ptr() != new.untyped_storage().data_ptr(): here.copy_(new)
