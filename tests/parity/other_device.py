"""A device that is not this one: meta by name, with values behind it, that takes no CPU operand.

A GPU refuses an operand that was left on the CPU; torch's own meta device lets some through and has
no values. These tensors say that they are on meta, compute on the CPU, and refuse as a GPU does.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
# Operators that move values between devices, or take indices from the CPU as CUDA does.
_MOVES = {"aten::_to_copy", "aten::to", "aten::copy_"}
_INDEXED = {"aten::index", "aten::index_put_"}


class Elsewhere(torch.Tensor):
    """Values of a CPU tensor under another device's name."""

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE
        )
        made.values_here = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran outside of OtherDevice")


class OtherDevice(TorchDispatchMode):
    """Runs operators on both devices' tensors and refuses a mixture.

    Attributes:
        n_ops: operators that ran on the other device.
        mixed: operators that were given operands of both, with their shapes.
    """

    def __init__(self):
        super().__init__()
        self.n_ops = 0
        self.mixed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, Elsewhere)]
        # A number from the CPU, of no dimensions, is taken by every device.
        here = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
        name = func._schema.name
        if name in _INDEXED:
            here = [x for x in here if x.dtype != torch.int64]
        if there and here and name not in _MOVES:
            self.mixed.append((name, [(str(x.device), tuple(x.shape)) for x in tensors]))
        # Named as a keyword by some operators, in its place by others; none leaves it as it is.
        devices = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
        is_there = devices[0].type == DEVICE if devices else bool(there)
        args, kwargs = tree_map(_values, (args, kwargs))
        answer = func(*args, **kwargs)
        if not is_there:
            return answer
        self.n_ops += 1
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, answer)


def _values(x):
    """Return what stands behind an argument on the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.values_here if isinstance(x, Elsewhere) else x
