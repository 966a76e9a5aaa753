"""How the episodes of an evaluation are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from gwp_edge.chunking import Method
from gwp_edge.errors import SpecError
from gwp_edge.schedule import Blend

Ablation = Literal["none", "blank-cameras", "swapped-prompt"]
ABLATIONS: Final[tuple[Ablation, ...]] = get_args(Ablation)

#: Period of the simulated motor loop.
TICK_NS: Final = 5_000_000
_MAX_DELAY_MS: Final = 2000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeOptions:
    """How chunks are executed, and what is disturbed.

    Attributes:
        guidance: method inside the denoising loop.
        blend: between plans.
        synchronous: plan, execute all of it, stand, plan again.
        replan_hz: new chunks per second, at most.
        lead_ms: how far ahead to command.
        latency_ms: simulated time from observation to chunk.
        latency_jitter_ms: uniform, added to it.
        camera_delay_ms: how old pictures are when they arrive. The state is the one of their
            moment, as in a run, so the whole observation is that old.
        ablation: what is taken from the policy; ``evaluate`` swaps prompts, an episode blanks.
    """

    guidance: Method = "soft"
    blend: Blend = "seam"
    synchronous: bool = False
    replan_hz: float = 5.0
    lead_ms: float = 0.0
    latency_ms: float = 0.0
    latency_jitter_ms: float = 0.0
    camera_delay_ms: float = 0.0
    ablation: Ablation = "none"

    def __post_init__(self) -> None:
        for name in ("lead_ms", "latency_ms", "latency_jitter_ms", "camera_delay_ms"):
            if not 0.0 <= getattr(self, name) <= _MAX_DELAY_MS:
                raise SpecError(f"{name}: expected 0 to {_MAX_DELAY_MS:g} ms")
        if not 0.1 <= self.replan_hz <= 1e9 / TICK_NS:
            raise SpecError(f"replan_hz: expected 0.1 to {1e9 / TICK_NS:g}, got {self.replan_hz}")
