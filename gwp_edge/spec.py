"""The specification inside a bundle: everything the robot must know about a policy.

Read and written by both sides, so it imports nothing heavy. ``msgspec`` checks types, missing and
unknown fields and names the path of what is wrong; ``__post_init__`` checks what types cannot say.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from gwp_edge.types import FloatArray

Family = Literal["gwp-0.5", "gwp-0"]
Unit = Literal["rad", "m"]
ActionKind = Literal["delta", "absolute"]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record whose fields are checked on decoding."""


def _check(condition: bool, message: str) -> None:  # noqa: FBT001 - a guard reads best so
    # msgspec turns ValueError into a ValidationError that carries the JSON path.
    if not condition:
        raise ValueError(message)


class CameraView(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one camera is pasted on the canvas; px, origin at the top left."""

    camera: str
    x_px: int
    y_px: int
    width_px: int
    height_px: int


class CanvasSpec(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The picture that the network sees: views pasted on black, uint8 RGB."""

    width_px: int
    height_px: int
    views: tuple[CameraView, ...]

    def __post_init__(self) -> None:
        _check(
            self.width_px % 32 == 0
            and self.height_px % 32 == 0
            and self.width_px > 0
            and self.height_px > 0,
            "canvas sides must be positive multiples of 32 px",
        )
        _check(len(self.views) > 0, "a canvas needs at least one view")
        _check(len({v.camera for v in self.views}) == len(self.views), "a camera is there twice")
        for i, v in enumerate(self.views):
            _check(
                v.x_px >= 0
                and v.y_px >= 0
                and v.width_px > 0
                and v.height_px > 0
                and v.x_px + v.width_px <= self.width_px
                and v.y_px + v.height_px <= self.height_px,
                f"view {v.camera} leaves the canvas",
            )
            for w in self.views[:i]:
                _check(
                    v.x_px >= w.x_px + w.width_px
                    or w.x_px >= v.x_px + v.width_px
                    or v.y_px >= w.y_px + w.height_px
                    or w.y_px >= v.y_px + v.height_px,
                    f"views {v.camera} and {w.camera} overlap",
                )


class Channel(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One joint or gripper: its name, its unit, and how the network expresses its action."""

    name: str
    unit: Unit
    kind: ActionKind


class Statistics(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """q01 and q99 of state and action over the D real channels; rad and m."""

    state_q01: tuple[float, ...]
    state_q99: tuple[float, ...]
    action_q01: tuple[float, ...]
    action_q99: tuple[float, ...]

    def __post_init__(self) -> None:
        for what in ("state", "action"):
            low = getattr(self, f"{what}_q01")
            high = getattr(self, f"{what}_q99")
            _check(len(low) == len(high), f"{what}: q01 and q99 differ in length")
            for i, (a, b) in enumerate(zip(low, high, strict=True)):
                _check(
                    math.isfinite(a) and math.isfinite(b),
                    f"{what} channel {i}: q01 and q99 must be finite",
                )
                _check(b >= a, f"{what} channel {i}: q99 {b} is below q01 {a}")


class SamplerSpec(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The denoising schedule: N steps from sigma 1 to 0.

    Attributes:
        shift: schedule shift s.
        sigmas: N + 1 values from 1 down to 0.
        timesteps: the N values of t that the network is told, on a scale of 1000.
        rounding: how ``timesteps`` follow from ``sigmas``: to bfloat16 as trained, or exact.
    """

    shift: float
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    rounding: Literal["bfloat16", "exact"]

    def __post_init__(self) -> None:
        _check(len(self.timesteps) >= 1, "a schedule needs at least one step")
        _check(len(self.sigmas) == len(self.timesteps) + 1, "expected one sigma more than steps")
        _check(
            all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)),
            "sigmas must decrease",
        )
        _check(self.sigmas[-1] == 0.0, "the last sigma must be 0")

    @property
    def n_steps(self) -> int:
        """Number of denoising steps N."""
        return len(self.timesteps)


class NetworkSpec(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the network.

    Attributes:
        family: which architecture.
        n_layers: transformer blocks.
        n_heads: attention heads, the same in both experts.
        head_dim: size of one head.
        visual_dim: width D of visual tokens (of all tokens in the dense family).
        action_dim: width E of state and action tokens; equals ``visual_dim`` in the dense family.
        visual_ffn_dim: hidden width of the visual feed-forward.
        action_ffn_dim: hidden width of the action feed-forward.
        n_action_channels: padded action and state width A.
        n_text_rows: text K/V rows in the graphs, equal padding rows merged.
        latent_channels: channels of the VAE latent.
        freq_dim: width of the timestep sinusoid.
        text_dim: width of the prompt embedding.
        eps: epsilon of every norm.
    """

    family: Family
    n_layers: int
    n_heads: int
    head_dim: int
    visual_dim: int
    action_dim: int
    visual_ffn_dim: int
    action_ffn_dim: int
    n_action_channels: int
    n_text_rows: int
    latent_channels: int
    freq_dim: int
    text_dim: int
    eps: float

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name != "family":
                _check(value > 0, f"{name} must be positive, got {value}")


class PolicySpec(_Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy as the robot sees it.

    Attributes:
        network: sizes.
        sampler: denoising schedule.
        canvas: cameras and where they go.
        channels: the D channels of state and action, in order.
        statistics: normalisation of the D channels.
        n_rows: rows H of a chunk.
        period_ns: time between rows.
        tasks: names of the prompts in the bundle; the first is the default.
        embodiment: which per-embodiment projection was exported.
    """

    network: NetworkSpec
    sampler: SamplerSpec
    canvas: CanvasSpec
    channels: tuple[Channel, ...]
    statistics: Statistics
    n_rows: int
    period_ns: int
    tasks: tuple[str, ...]
    embodiment: int

    def __post_init__(self) -> None:
        D = len(self.channels)
        _check(D > 0, "a policy needs at least one channel")
        _check(len({c.name for c in self.channels}) == D, "a channel name is there twice")
        _check(
            self.network.n_action_channels >= D,
            f"{D} channels do not fit the network's {self.network.n_action_channels}",
        )
        _check(
            len(self.statistics.state_q01) == D and len(self.statistics.action_q01) == D,
            f"statistics must have one entry for each of the {D} channels",
        )
        _check(self.n_rows > 0 and self.period_ns > 0, "n_rows and period_ns must be positive")
        _check(
            len(self.tasks) > 0 and len(set(self.tasks)) == len(self.tasks),
            "tasks must be there and differ",
        )
        _check(self.embodiment >= 0, "embodiment must not be negative")

    @property
    def n_channels(self) -> int:
        """Number D of joints and grippers."""
        return len(self.channels)

    @property
    def delta_mask(self) -> FloatArray:
        """1.0 for channels that the network expresses as a delta from the state, shape (D,)."""
        return np.array([float(c.kind == "delta") for c in self.channels])

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras in canvas order."""
        return tuple(v.camera for v in self.canvas.views)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (1, C, h/16, w/16) of the latent."""
        return (
            1,
            self.network.latent_channels,
            self.canvas.height_px // 16,
            self.canvas.width_px // 16,
        )

    @property
    def n_prefix(self) -> int:
        """Number of prefix tokens: one state token and the visual tokens."""
        return 1 + (self.canvas.height_px // 32) * (self.canvas.width_px // 32)
