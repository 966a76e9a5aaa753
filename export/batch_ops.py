"""Run the action path on many samples at once, reading every weight once for all of them.

A value is a tuple with one tensor for each sample. A layer joins their rows for one product, so a
checkpoint of any size streams through memory once for a whole set of samples, and calibration
sees what each layer is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from gwp_edge.export.ops import Order
from gwp_edge.export.torch_ops import TorchOps

Batch = tuple[torch.Tensor, ...]
# Called with layer name, sample index and the layer's input (n, in).
Watch = Callable[[str, int, torch.Tensor], None]


class BatchOps:
    """The vocabulary of ``export/ops.py`` on tuples of tensors. Threads: one owner.

    Args:
        ops: runs each operator.
        n_samples: length of every value.
        watch: sees the input of every linear layer of every sample.
    """

    def __init__(self, ops: TorchOps, n_samples: int, watch: Watch | None = None) -> None:
        self._ops = ops
        self._n = n_samples
        self._watch = watch

    def shared(self, x: torch.Tensor) -> Batch:
        """Return a value that is the same tensor for every sample."""
        return (x,) * self._n

    def _each(self, f: Callable[..., torch.Tensor], *values: Batch) -> Batch:
        return tuple(f(*parts) for parts in zip(*values, strict=True))

    def _joined(self, f: Callable[[torch.Tensor], torch.Tensor], x: Batch) -> Batch:
        return tuple(torch.split(f(torch.cat(x)), [len(part) for part in x]))

    def linear(self, x: Batch, name: str, *, order: Order | None = None) -> Batch:
        if self._watch is not None:
            for i, part in enumerate(x):
                self._watch(name, i, part)
        return self._joined(lambda rows: self._ops.linear(rows, name, order=order), x)

    def projection(self, x: Batch, name: str, embodiment: int) -> Batch:
        return self._joined(lambda rows: self._ops.projection(rows, name, embodiment), x)

    def patch_projection(self, x: Batch, name: str) -> Batch:
        return self._joined(lambda rows: self._ops.patch_projection(rows, name), x)

    def conv2d(self, x: Batch, name: str, *, stride: int = 1, padding: int = 0) -> Batch:
        return self._each(
            lambda part: self._ops.conv2d(part, name, stride=stride, padding=padding), x
        )

    def layer_norm(self, x: Batch, scale: Batch, shift: Batch) -> Batch:
        return self._each(self._ops.layer_norm, x, scale, shift)

    def layer_norm_affine(self, x: Batch, name: str) -> Batch:
        return self._joined(lambda rows: self._ops.layer_norm_affine(rows, name), x)

    def rms_norm(
        self, x: Batch, name: str, *, order: Order | None = None, gain: float = 1.0
    ) -> Batch:
        return self._joined(lambda rows: self._ops.rms_norm(rows, name, order=order, gain=gain), x)

    def channel_norm(self, x: Batch, name: str) -> Batch:
        return self._each(lambda part: self._ops.channel_norm(part, name), x)

    def matmul(self, a: Batch, b: Batch, name: str) -> Batch:
        return self._each(lambda left, right: self._ops.matmul(left, right, name), a, b)

    def softmax(self, x: Batch) -> Batch:
        return self._each(self._ops.softmax, x)

    def gelu(self, x: Batch, approximate: Literal["tanh", "none"]) -> Batch:
        return self._each(lambda part: self._ops.gelu(part, approximate), x)

    def silu(self, x: Batch) -> Batch:
        return self._each(self._ops.silu, x)

    def add(self, a: Batch, b: Batch) -> Batch:
        return self._each(self._ops.add, a, b)

    def sub(self, a: Batch, b: Batch) -> Batch:
        return self._each(self._ops.sub, a, b)

    def mul(self, a: Batch, b: Batch) -> Batch:
        return self._each(self._ops.mul, a, b)

    def reshape(self, x: Batch, shape: Sequence[int]) -> Batch:
        return self._each(lambda part: self._ops.reshape(part, shape), x)

    def transpose(self, x: Batch, axes: Sequence[int]) -> Batch:
        return self._each(lambda part: self._ops.transpose(part, axes), x)

    def concat(self, parts: Sequence[Batch], axis: int) -> Batch:
        return tuple(self._ops.concat(one, axis) for one in zip(*parts, strict=True))

    def split(self, x: Batch, sizes: Sequence[int], axis: int) -> list[Batch]:
        split = [self._ops.split(part, sizes, axis) for part in x]
        return [tuple(parts) for parts in zip(*split, strict=True)]

    def average_pool2(self, x: Batch) -> Batch:
        return self._each(self._ops.average_pool2, x)

    def pad_zeros(self, x: Batch, before: Sequence[int], after: Sequence[int]) -> Batch:
        return self._each(lambda part: self._ops.pad_zeros(part, before, after), x)

    def to_float(self, x: Batch) -> Batch:
        return self._each(self._ops.to_float, x)

    def constant(self, name: str, value: npt.NDArray[np.float32]) -> Batch:
        return self.shared(self._ops.constant(name, value))

    def parameter(self, name: str) -> Batch:
        return self.shared(self._ops.parameter(name))
