"""The operators that the action path is made of.

The network is written once, in :mod:`gwp_edge.export.network` and
:mod:`gwp_edge.export.vision_encoder`, over this small vocabulary. ``TorchOps`` runs it eagerly,
``OnnxOps`` records it as a graph, and both fetch weights by their checkpoint name, one at a time.
So there is one definition to be right or wrong, a 6 B model never has to be in memory, and
calibration and quantization hook in where a layer is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

V = TypeVar("V")
Order = npt.NDArray[np.int64]


class WeightSource(Protocol):
    """Named tensors, read one at a time. Threads: one owner."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored type; the caller drops it when done."""
        ...


class Ops(Protocol[V]):
    """Operators on values of type V; shapes follow numpy's rules. Threads: one owner."""

    def linear(self, x: V, name: str, *, order: Order | None = None) -> V:
        """``x @ W.T + b`` with ``{name}.weight`` (out, in) and ``{name}.bias`` (out,).

        Args:
            x: shape (n, in).
            name: layer name in the checkpoint.
            order: permutation of the outputs, applied to the weights.
        """
        ...

    def projection(self, x: V, name: str, embodiment: int) -> V:
        """``x @ W[embodiment] + b[embodiment]`` with weights stored [embodiment, in, out]."""
        ...

    def patch_projection(self, x: V, name: str) -> V:
        """Linear layer whose weight is stored as a (out, C, 1, p, p) convolution kernel."""
        ...

    def conv2d(self, x: V, name: str, *, stride: int = 1, padding: int = 0) -> V:
        """2-D convolution, NCHW; a causal 3-D kernel contributes its last temporal tap."""
        ...

    def layer_norm(self, x: V, scale: V, shift: V) -> V:
        """``LN(x) * scale + shift`` over the last axis; ``scale`` and ``shift`` (C,)."""
        ...

    def layer_norm_affine(self, x: V, name: str) -> V:
        """``LN(x) * weight + bias`` with the layer's own parameters."""
        ...

    def rms_norm(self, x: V, name: str, *, order: Order | None = None, gain: float = 1.0) -> V:
        """``x / sqrt(mean(x^2) + eps) * weight * gain`` over the last axis."""
        ...

    def channel_norm(self, x: V, name: str) -> V:
        """``x / max(|x|, 1e-12) * sqrt(C) * gamma`` over the channel axis of NCHW."""
        ...

    def matmul(self, a: V, b: V, name: str) -> V:
        """Product of two activations, batched over leading axes."""
        ...

    def softmax(self, x: V) -> V:
        """Softmax over the last axis."""
        ...

    def gelu(self, x: V, approximate: Literal["tanh", "none"]) -> V:
        """GELU in its tanh or its exact erf form."""
        ...

    def silu(self, x: V) -> V:
        """``x * sigmoid(x)``."""
        ...

    def add(self, a: V, b: V) -> V:
        """Sum with broadcasting."""
        ...

    def sub(self, a: V, b: V) -> V:
        """Difference with broadcasting."""
        ...

    def mul(self, a: V, b: V) -> V:
        """Product with broadcasting."""
        ...

    def reshape(self, x: V, shape: Sequence[int]) -> V:
        """Reshape to a full static shape."""
        ...

    def transpose(self, x: V, axes: Sequence[int]) -> V:
        """Permute axes."""
        ...

    def concat(self, parts: Sequence[V], axis: int) -> V:
        """Concatenate."""
        ...

    def split(self, x: V, sizes: Sequence[int], axis: int) -> list[V]:
        """Split into parts of the given sizes."""
        ...

    def average_pool2(self, x: V) -> V:
        """Mean over 2 x 2 squares of NCHW."""
        ...

    def pad_zeros(self, x: V, before: Sequence[int], after: Sequence[int]) -> V:
        """Put zeros before and after each axis."""
        ...

    def to_float(self, x: V) -> V:
        """Cast uint8 to float32."""
        ...

    def constant(self, name: str, value: npt.NDArray[np.float32]) -> V:
        """A float32 array that belongs to the graph."""
        ...

    def parameter(self, name: str) -> V:
        """A checkpoint tensor as it is, in float32."""
        ...
