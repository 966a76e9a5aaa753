"""What the policy process hands to the recorder: every chunk with all that made it.

A ring in shared memory, made by the policy process at its first chunk, when the sizes of the
pictures are known. Writing is one copy and never waits: what the recorder is too slow to fetch is
overwritten and counted as lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gwp_edge.chunking import Guidance
from gwp_edge.errors import DeviceError
from gwp_edge.mailbox import RecordRing
from gwp_edge.protocols import Camera, Policy
from gwp_edge.session_format import DOMAINS, METHODS
from gwp_edge.shared_memory import SharedSegment, fence
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Chunk, Observation

if TYPE_CHECKING:
    from gwp_edge.policy import PredictTrace

_HEADER_BYTES: Final = 4096
_N_SLOTS: Final = 8


@runtime_checkable
class Traced(Protocol):
    """A policy that can say what its stages passed on."""

    @property
    def trace(self) -> PredictTrace | None:
        """Of the last ``predict``."""
        ...


@runtime_checkable
class RingBacked(Protocol):
    """A camera whose frames lie in a ring that others may read, too."""

    @property
    def ring_name(self) -> str | None:
        """Name of the ring, None while closed."""
        ...


def tap_dtype(spec: PolicySpec, sizes: Sequence[tuple[int, int]]) -> np.dtype[np.void]:
    """Return the record of one chunk; ``sizes`` are (h, w) of each camera of the spec."""
    canvas = (spec.canvas.height_px, spec.canvas.width_px, 3)
    fields: list[Any] = [
        ("chunk_idx", np.int64),
        ("t_observed_ns", np.int64),
        ("t_state_ns", np.int64),
        ("t_started_ns", np.int64),
        ("t_published_ns", np.int64),
        ("period_ns", np.int64),
        ("previous_idx", np.int64),
        ("method", np.int64),
        ("n_frozen_rows", np.int64),
        ("n_horizon_rows", np.int64),
        ("beta", np.float64),
        ("warm_start_sigma", np.float64),
        ("has_trace", np.int64),
        ("state", np.float64, (spec.n_channels,)),
        ("actions", np.float64, (spec.n_rows, spec.n_channels)),
        ("noise", np.float32, (spec.n_rows, spec.network.n_action_channels)),
        ("latent", np.float32, spec.latent_shape),
        ("canvas", np.uint8, canvas),
    ]
    for i, (h, w) in enumerate(sizes):
        fields += [
            (f"frame_idx_{i}", np.int64),
            (f"t_captured_ns_{i}", np.int64),
            (f"t_received_ns_{i}", np.int64),
            (f"domain_{i}", np.int64),
            (f"image_{i}", np.uint8, (h, w, 3)),
        ]
    return np.dtype(fields)


class PolicyTap:
    """The policy process's end. Threads: one owner.

    Args:
        name: of the segment to make.
        spec: of the policy.
        cameras: those whose frames are in rings are named to the recorder.
    """

    def __init__(self, name: str, spec: PolicySpec, cameras: Sequence[Camera]) -> None:
        self._name = name
        self._spec = spec
        self._rings = {
            c.name: c.ring_name for c in cameras if isinstance(c, RingBacked) and c.ring_name
        }
        self._sizes: list[tuple[int, int]] = []
        self._segment: SharedSegment | None = None
        self._ring: RecordRing | None = None

    def write(
        self,
        chunk: Chunk,
        observation: Observation,
        policy: Policy,
        *,
        t_started_ns: int,
        t_published_ns: int,
        previous_idx: int,
        guidance: Guidance | None,
    ) -> None:
        """Hand over one chunk.

        Args:
            chunk: as published.
            observation: what it answers.
            policy: asked for its trace, if it keeps one.
            t_started_ns: when ``predict`` was called.
            t_published_ns: when the chunk was published.
            previous_idx: the chunk that guided it, -1 for none.
            guidance: how.

        Raises:
            DeviceError: shared memory is short, or a camera has changed its size.
        """
        frames = [observation.frame(camera) for camera in self._spec.cameras]
        sizes = [f.image.shape[:2] for f in frames]
        if self._ring is None:
            self._ring = self._create(sizes)
        elif sizes != self._sizes:
            raise DeviceError(f"recording: pictures were {self._sizes} px, now {sizes}")
        trace = policy.trace if isinstance(policy, Traced) else None
        how = guidance or Guidance(method="none")
        H, A = self._spec.n_rows, self._spec.network.n_action_channels
        canvas = (self._spec.canvas.height_px, self._spec.canvas.width_px, 3)
        record: list[Any] = [
            chunk.chunk_idx,
            chunk.t_observed_ns,
            observation.t_state_ns,
            t_started_ns,
            t_published_ns,
            chunk.period_ns,
            previous_idx,
            METHODS.index(how.method),
            how.n_frozen_rows,
            how.n_horizon_rows,
            how.beta,
            how.warm_start_sigma,
            int(trace is not None),
            observation.state,
            chunk.actions,
            np.zeros((H, A), np.float32) if trace is None else trace.noise,
            np.zeros(self._spec.latent_shape, np.float32) if trace is None else trace.latent,
            np.zeros(canvas, np.uint8) if trace is None else trace.canvas,
        ]
        for f in frames:
            domain = DOMAINS.index(f.domain)
            record += [f.frame_idx, f.t_captured_ns, f.t_received_ns, domain, f.image]
        self._ring.append(tuple(record))

    def close(self) -> None:
        """Unmap; safe to call twice. The recorder takes the name away."""
        if self._ring is not None and self._segment is not None:
            self._ring.release()
            self._segment.close()
            self._ring = self._segment = None

    def _create(self, sizes: list[tuple[int, int]]) -> RecordRing:
        dtype = tap_dtype(self._spec, sizes)
        n_bytes = _HEADER_BYTES + RecordRing.size_bytes(dtype, _N_SLOTS)
        self._sizes = sizes
        self._segment = SharedSegment.create(self._name, n_bytes)
        header = json.dumps({"sizes": sizes, "rings": self._rings}).encode()
        buffer = self._segment.buffer
        buffer[8 : 8 + len(header)] = header
        fence()
        word = buffer[:8].cast("q")
        word[0] = len(header)
        word.release()
        return RecordRing(buffer[_HEADER_BYTES:], dtype, _N_SLOTS)


class TapReader:
    """The recorder's end. Threads: one owner.

    Attributes:
        rings: ring name by camera role.
        n_cameras: of the spec.
    """

    def __init__(self, segment: SharedSegment, spec: PolicySpec) -> None:
        header = bytes(segment.buffer[8 : 8 + segment.buffer[:8].cast("q")[0]])
        content = json.loads(header)
        self.rings: dict[str, str] = content["rings"]
        sizes = [(int(h), int(w)) for h, w in content["sizes"]]
        self.n_cameras = len(sizes)
        self._segment = segment
        self._ring = RecordRing(segment.buffer[_HEADER_BYTES:], tap_dtype(spec, sizes), _N_SLOTS)

    @classmethod
    def attach(cls, name: str, spec: PolicySpec) -> TapReader | None:
        """Open the tap of this name, or return None while the policy has not made it."""
        try:
            segment = SharedSegment.attach(name)
        except DeviceError:
            return None
        if not segment.buffer[:8].cast("q")[0]:
            segment.close()
            return None
        fence()
        return cls(segment, spec)

    @property
    def n_lost(self) -> int:
        """Chunks that were overwritten before they were fetched."""
        return self._ring.n_lost

    def drain(self) -> npt.NDArray[Any]:
        """Return copies of the chunks since the last call, oldest first."""
        return self._ring.drain()

    def close(self) -> None:
        """Unmap and take the name away."""
        self._ring.release()
        self._segment.close()
        self._segment.unlink()
