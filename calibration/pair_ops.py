"""Where in the network the error arises: every layer in float32 beside its reduced form.

One pass carries two values everywhere, what float32 gives and what the bundle's arithmetic gives,
so that no output has to be kept and each layer is judged twice: with all that went wrong before
it, and alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gwp_edge.calibration.verify_schema import LayerReport
from gwp_edge.export.ops import Order
from gwp_edge.export.precision import Format
from gwp_edge.export.torch_ops import TorchOps

# So that an output that should be zero and is not still gets a number.
_SILENCE = 1e-300


class Pair(NamedTuple):
    """One value of the network, computed twice."""

    exact: torch.Tensor
    reduced: torch.Tensor


def same(x: torch.Tensor) -> Pair:
    """Return a value that both computations share."""
    return Pair(x, x)


@dataclass
class _Signal:
    """Sums over one output, or one step of it."""

    power: float = 0.0
    reduced_power: float = 0.0
    product: float = 0.0
    error: float = 0.0
    own_error: float = 0.0

    def add(self, exact: torch.Tensor, reduced: torch.Tensor, alone: torch.Tensor) -> None:
        a, b = exact.double(), reduced.double()
        self.power += float(a.square().sum())
        self.reduced_power += float(b.square().sum())
        self.product += float((a * b).sum())
        self.error += float((a - b).square().sum())
        self.own_error += float((a - alone.double()).square().sum())


def _sqnr_db(power: float, error: float) -> float | None:
    """Return signal over error in dB; None where there is no error."""
    if error == 0:
        return None
    return 10 * math.log10(max(power, _SILENCE) / error)


@dataclass
class LayerMeter:
    """Collects what layers give. Threads: one owner.

    Attributes:
        stage: set by whoever runs the network.
        step: denoising step, 0 elsewhere.
    """

    stage: str = "vision"
    step: int = 0
    _signals: dict[tuple[str, str], dict[int, _Signal]] = field(default_factory=dict)
    _input_max: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def record(self, name: str, given: torch.Tensor, out: Pair, alone: torch.Tensor) -> None:
        """Take one layer's float32 input, its two outputs, and its reduced form on that input."""
        key = (self.stage, name)
        self._signals.setdefault(key, {}).setdefault(self.step, _Signal()).add(*out, alone)
        peaks = self._input_max.setdefault(key, {})
        peaks[self.step] = max(peaks.get(self.step, 0.0), float(given.abs().max()))

    def reports(self, formats: Callable[[str], Format]) -> tuple[LayerReport, ...]:
        """Return one report for each layer, in the order they ran."""
        return tuple(
            _report(stage, name, formats(name), steps, self._input_max[stage, name])
            for (stage, name), steps in self._signals.items()
        )


def _report(
    stage: str, name: str, fmt: Format, steps: dict[int, _Signal], peaks: dict[int, float]
) -> LayerReport:
    power = sum(s.power for s in steps.values())
    norm = math.sqrt(power * sum(s.reduced_power for s in steps.values()))
    return LayerReport(
        stage=stage,
        name=name,
        format=fmt,
        cosine=sum(s.product for s in steps.values()) / norm if norm > 0 else 1.0,
        sqnr_db=_sqnr_db(power, sum(s.error for s in steps.values())),
        own_sqnr_db=_sqnr_db(power, sum(s.own_error for s in steps.values())),
        steps_sqnr_db=tuple(_sqnr_db(s.power, s.error) for _, s in sorted(steps.items()))
        if stage == "denoise"
        else (),
        steps_input_max=tuple(peak for _, peak in sorted(peaks.items())),
    )


class PairOps:
    """The vocabulary of ``export/ops.py`` on pairs of tensors. Threads: one owner.

    Args:
        exact: runs the first of each pair.
        reduced: runs the second.
        meter: sees every layer that carries weights and every product of activations.
    """

    def __init__(self, exact: TorchOps, reduced: TorchOps, meter: LayerMeter) -> None:
        self._exact = exact
        self._reduced = reduced
        self._meter = meter

    def _both(self, f: Callable[..., torch.Tensor], *values: Pair) -> Pair:
        return Pair(f(*(v.exact for v in values)), f(*(v.reduced for v in values)))

    def _metered(self, name: str, f: Callable[..., torch.Tensor], *values: Pair) -> Pair:
        """Run a layer three times: exact, reduced, and reduced on what the exact one is given."""
        given = [v.exact for v in values]
        out = Pair(f(self._exact, *given), f(self._reduced, *(v.reduced for v in values)))
        self._meter.record(name, given[0], out, f(self._reduced, *given))
        return out

    def linear(self, x: Pair, name: str, *, order: Order | None = None) -> Pair:
        return self._metered(name, lambda ops, v: ops.linear(v, name, order=order), x)

    def projection(self, x: Pair, name: str, embodiment: int) -> Pair:
        return self._metered(name, lambda ops, v: ops.projection(v, name, embodiment), x)

    def patch_projection(self, x: Pair, name: str) -> Pair:
        return self._metered(name, lambda ops, v: ops.patch_projection(v, name), x)

    def conv2d(self, x: Pair, name: str, *, stride: int = 1, padding: int = 0) -> Pair:
        return self._metered(
            name, lambda ops, v: ops.conv2d(v, name, stride=stride, padding=padding), x
        )

    def matmul(self, a: Pair, b: Pair, name: str) -> Pair:
        return self._metered(name, lambda ops, v, w: ops.matmul(v, w, name), a, b)

    def layer_norm(self, x: Pair, scale: Pair, shift: Pair) -> Pair:
        return self._both(self._exact.layer_norm, x, scale, shift)

    def layer_norm_affine(self, x: Pair, name: str) -> Pair:
        return Pair(
            self._exact.layer_norm_affine(x.exact, name),
            self._reduced.layer_norm_affine(x.reduced, name),
        )

    def rms_norm(
        self, x: Pair, name: str, *, order: Order | None = None, gain: float = 1.0
    ) -> Pair:
        return Pair(
            self._exact.rms_norm(x.exact, name, order=order, gain=gain),
            self._reduced.rms_norm(x.reduced, name, order=order, gain=gain),
        )

    def channel_norm(self, x: Pair, name: str) -> Pair:
        return Pair(
            self._exact.channel_norm(x.exact, name), self._reduced.channel_norm(x.reduced, name)
        )

    def softmax(self, x: Pair) -> Pair:
        return self._both(self._exact.softmax, x)

    def gelu(self, x: Pair, approximate: Literal["tanh", "none"]) -> Pair:
        return self._both(lambda v: self._exact.gelu(v, approximate), x)

    def silu(self, x: Pair) -> Pair:
        return self._both(self._exact.silu, x)

    def add(self, a: Pair, b: Pair) -> Pair:
        return self._both(self._exact.add, a, b)

    def sub(self, a: Pair, b: Pair) -> Pair:
        return self._both(self._exact.sub, a, b)

    def mul(self, a: Pair, b: Pair) -> Pair:
        return self._both(self._exact.mul, a, b)

    def reshape(self, x: Pair, shape: Sequence[int]) -> Pair:
        return self._both(lambda v: self._exact.reshape(v, shape), x)

    def transpose(self, x: Pair, axes: Sequence[int]) -> Pair:
        return self._both(lambda v: self._exact.transpose(v, axes), x)

    def concat(self, parts: Sequence[Pair], axis: int) -> Pair:
        return Pair(
            self._exact.concat([p.exact for p in parts], axis),
            self._exact.concat([p.reduced for p in parts], axis),
        )

    def split(self, x: Pair, sizes: Sequence[int], axis: int) -> list[Pair]:
        exact = self._exact.split(x.exact, sizes, axis)
        reduced = self._exact.split(x.reduced, sizes, axis)
        return [Pair(a, b) for a, b in zip(exact, reduced, strict=True)]

    def average_pool2(self, x: Pair) -> Pair:
        return self._both(self._exact.average_pool2, x)

    def pad_zeros(self, x: Pair, before: Sequence[int], after: Sequence[int]) -> Pair:
        return self._both(lambda v: self._exact.pad_zeros(v, before, after), x)

    def to_float(self, x: Pair) -> Pair:
        return self._both(self._exact.to_float, x)

    def constant(self, name: str, value: npt.NDArray[np.float32]) -> Pair:
        return same(self._exact.constant(name, value))

    def parameter(self, name: str) -> Pair:
        return Pair(self._exact.parameter(name), self._reduced.parameter(name))
