"""Run the action path eagerly in torch, fetching one weight at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from gwp_edge.export.ops import Order, WeightSource
from gwp_edge.export.precision import (
    QUANTIZED_FORMATS,
    STATIC_FORMATS,
    Format,
    Recipe,
    make_recipe,
)
from gwp_edge.export.quantize import bias_correction, quantize_weight, quantized_product

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def rounded(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return float32 values that ``fmt`` can hold; quantized formats round where they multiply."""
    return x if fmt not in _DTYPES else x.to(_DTYPES[fmt]).to(torch.float32)


def last_tap(weight: torch.Tensor) -> torch.Tensor:
    """Return the 2-D kernel (out, in, h, w) that a causal 3-D kernel is for a single frame."""
    return weight[:, :, -1] if weight.ndim == 5 else weight


class TorchOps:
    """Float32 arithmetic, with the operands and results of a layer rounded to its format.

    That is what a unit with reduced-precision operands and float32 accumulation computes. Weights
    go to ``device`` one at a time. A GPU: not yet run on hardware. Threads: one owner.

    Attributes:
        stage: ``prefill`` or ``denoise``: which calibrated range a layer's input has.
    """

    def __init__(
        self,
        weights: WeightSource,
        recipe: Recipe | None = None,
        *,
        eps: float = 1e-6,
        device: str = "cpu",
    ) -> None:
        self._weights = weights
        self._recipe = recipe or make_recipe("fp32")
        self._eps = eps
        self._device = device
        self.stage = "prefill"

    def parameter(self, name: str) -> torch.Tensor:
        return self._weights.load(name).to(self._device, torch.float32)

    def _weight(self, name: str, fmt: Format) -> torch.Tensor:
        # Moved as it is stored: fewer bytes than in float32.
        weight = self._weights.load(name).to(self._device)
        if weight.dtype == _DTYPES.get(fmt):
            return weight.to(torch.float32)
        return rounded(weight.to(torch.float32), fmt)

    def linear(self, x: torch.Tensor, name: str, *, order: Order | None = None) -> torch.Tensor:
        fmt = self._recipe.of(name)
        weight, bias = self._weight(f"{name}.weight", fmt), self.parameter(f"{name}.bias")
        if fmt in QUANTIZED_FORMATS:
            y = self._quantized(x, name, weight, fmt) + bias
        else:
            y = rounded(F.linear(rounded(x, fmt), weight), fmt) + bias
        # Few results are moved rather than many weights.
        return y if order is None else y[..., order]

    def _quantized(
        self, x: torch.Tensor, name: str, weight: torch.Tensor, fmt: Format
    ) -> torch.Tensor:
        recipe = self._recipe
        threshold = recipe.threshold(self.stage, name) if fmt in STATIC_FORMATS else 0.0
        quantized = quantize_weight(weight.t(), fmt, recipe.block)
        y = quantized_product(x, quantized, fmt, threshold=threshold, block=recipe.block)
        mean = recipe.mean(self.stage, name)
        if mean is None:
            return y
        given = torch.from_numpy(np.array(mean)).to(self._device)
        return y + bias_correction(weight.t(), quantized, given, recipe.block)

    def projection(self, x: torch.Tensor, name: str, embodiment: int) -> torch.Tensor:
        fmt = self._recipe.of(name)
        weight = rounded(self.parameter(f"{name}.weight")[embodiment], fmt)
        bias = self.parameter(f"{name}.bias")[embodiment]
        return rounded(rounded(x, fmt) @ weight, fmt) + bias

    def patch_projection(self, x: torch.Tensor, name: str) -> torch.Tensor:
        fmt = self._recipe.of(name)
        weight = self._weight(f"{name}.weight", fmt).flatten(1)
        return rounded(F.linear(rounded(x, fmt), weight), fmt) + self.parameter(f"{name}.bias")

    def conv2d(
        self, x: torch.Tensor, name: str, *, stride: int = 1, padding: int = 0
    ) -> torch.Tensor:
        fmt = self._recipe.of(name)
        weight = rounded(last_tap(self.parameter(f"{name}.weight")), fmt)
        y = F.conv2d(rounded(x, fmt), weight, stride=stride, padding=padding)
        return rounded(y, fmt) + self.parameter(f"{name}.bias")[None, :, None, None]

    def layer_norm(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], scale, shift, self._eps)

    def layer_norm_affine(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self.layer_norm(x, scale, shift)

    def rms_norm(
        self, x: torch.Tensor, name: str, *, order: Order | None = None, gain: float = 1.0
    ) -> torch.Tensor:
        weight = self.parameter(f"{name}.weight") * gain
        weight = weight if order is None else weight[order]
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self._eps) * weight

    def channel_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gamma = self.parameter(f"{name}.gamma").reshape(1, -1, 1, 1)
        y: torch.Tensor = F.normalize(x, dim=1) * (gamma * x.shape[1] ** 0.5)
        return y

    def matmul(self, a: torch.Tensor, b: torch.Tensor, name: str) -> torch.Tensor:
        fmt = self._recipe.of(name)
        return rounded(rounded(a, fmt) @ rounded(b, fmt), fmt)

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)

    def gelu(self, x: torch.Tensor, approximate: Literal["tanh", "none"]) -> torch.Tensor:
        return F.gelu(x, approximate=approximate)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def reshape(self, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return x.reshape(tuple(shape))

    def transpose(self, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        return x.permute(tuple(axes))

    def concat(self, parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(tuple(parts), axis)

    def split(self, x: torch.Tensor, sizes: Sequence[int], axis: int) -> list[torch.Tensor]:
        return list(torch.split(x, list(sizes), axis))

    def average_pool2(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 2)

    def pad_zeros(
        self, x: torch.Tensor, before: Sequence[int], after: Sequence[int]
    ) -> torch.Tensor:
        pads = zip(reversed(before), reversed(after), strict=True)
        return F.pad(x, [side for pair in pads for side in pair])

    def to_float(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32)

    def constant(self, name: str, value: npt.NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.array(value)).to(self._device)
