"""What ``gwp-edge verify`` reports; the JSON file has these names."""

from __future__ import annotations

import msgspec

from gwp_edge.manifest import ChannelError, MeasuredError
from gwp_edge.spec import Unit

SCHEMA = "gwp-edge.verify"
SCHEMA_VERSION = 1

Rows = tuple[tuple[float, ...], ...]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record that JSON can hold."""


class ChannelReport(_Struct, frozen=True, kw_only=True):
    """One joint or gripper.

    Attributes:
        name: as in the spec.
        unit: of both errors.
        all_rows: over every row of the chunk.
        first_rows: over the rows that are executed before the next chunk.
    """

    name: str
    unit: Unit
    all_rows: ChannelError
    first_rows: ChannelError


class RowReport(_Struct, frozen=True, kw_only=True):
    """One row of the chunk, over all samples; None where the robot has no such channel."""

    joints_rad: ChannelError | None
    grippers_m: ChannelError | None


class FlipReport(_Struct, frozen=True, kw_only=True):
    """How often one gripper is commanded open where it should be closed, or the reverse.

    Attributes:
        name: channel.
        threshold_m: opening above which the gripper counts as open.
        all_rows: differing commands among ``n_all_rows``.
        n_all_rows: commands compared.
        first_rows: differing commands among ``n_first_rows``.
        n_first_rows: commands compared.
    """

    name: str
    threshold_m: float
    all_rows: int
    n_all_rows: int
    first_rows: int
    n_first_rows: int


class Comparison(_Struct, frozen=True, kw_only=True):
    """Two sets of chunks, same observations.

    Attributes:
        of: what is judged.
        against: what it should be.
        all_rows: by unit, over every row.
        first_rows: by unit, over the executed rows.
        channels: by joint and gripper.
        rows: by row of the chunk.
        worst: largest difference of each row and channel over the samples, (H, D).
        flips: by gripper.
    """

    of: str
    against: str
    all_rows: MeasuredError
    first_rows: MeasuredError
    channels: tuple[ChannelReport, ...]
    rows: tuple[RowReport, ...]
    worst: Rows
    flips: tuple[FlipReport, ...]


class LayerReport(_Struct, frozen=True, kw_only=True):
    """One layer's output, this bundle's arithmetic against float32, in torch.

    Attributes:
        stage: where it runs.
        name: in the checkpoint.
        format: what it computes in.
        cosine: of the two outputs, everything before the layer included.
        sqnr_db: signal over error of the output, everything before included; None where equal.
        own_sqnr_db: the same when the layer alone is reduced; None where equal.
        steps_sqnr_db: ``sqnr_db`` of every denoising step; empty outside of denoising.
        steps_input_max: largest magnitude of the float32 input in every denoising step, or the
            only one elsewhere.
    """

    stage: str
    name: str
    format: str
    cosine: float
    sqnr_db: float | None
    own_sqnr_db: float | None
    steps_sqnr_db: tuple[float | None, ...]
    steps_input_max: tuple[float, ...]


class Sensitivity(_Struct, frozen=True, kw_only=True):
    """What quantizing one part alone does to the action, as export measured it.

    Attributes:
        name: layer or group of layers.
        p99_rad: 99th percentile of the joint error, rad.
        format: the format that was tried.
    """

    name: str
    p99_rad: float
    format: str


class StepRange(_Struct, frozen=True, kw_only=True):
    """Largest magnitude that calibration saw at one input, for every step it ran in."""

    name: str
    steps: tuple[float, ...]


class RangeGrowth(_Struct, frozen=True, kw_only=True):
    """How the range of one input grew as samples were added.

    Attributes:
        name: the input.
        amax: largest magnitude in each share of the samples.
        thresholds: range that each share gives.
        growth: range of all samples over that of half of them, minus 1.
        is_growing: by more than the tolerance: more samples would change the range.
    """

    name: str
    amax: tuple[float, ...]
    thresholds: tuple[float, ...]
    growth: float
    is_growing: bool


class Settling(_Struct, frozen=True, kw_only=True):
    """Do the ranges still grow with more samples?

    Attributes:
        method: observer that gives the ranges.
        fractions: shares of the samples, to which the columns of ``ranges`` belong.
        ranges: one for each quantized input.
    """

    method: str
    fractions: tuple[float, ...]
    ranges: tuple[RangeGrowth, ...]


class PlotChunk(_Struct, frozen=True, kw_only=True):
    """One sample's chunks for plotting, (H, D) each, rad and m, rounded to 1e-6."""

    episode: int
    frame: int
    task: str
    bundle: Rows
    reference: Rows | None
    recorded: Rows


class Check(_Struct, frozen=True, kw_only=True):
    """One thing that was checked.

    Attributes:
        name: what.
        passed: None where it could not be checked.
        text: one line with numbers.
    """

    name: str
    passed: bool | None
    text: str


class SampleId(_Struct, frozen=True, kw_only=True):
    """Which frame, and under which prompt of the bundle."""

    episode: int
    frame: int
    task: str


class Context(_Struct, frozen=True, kw_only=True):
    """Everything that the numbers depend on.

    Attributes:
        created_at: UTC, ISO 8601.
        gwp_edge: version that measured.
        machine: processor architecture and operating system.
        libraries: versions that took part.
        bundle: folder.
        bundle_id: its identity.
        precision: its precision.
        engine: engine and provider that ran it.
        threads: CPU threads of engine and reference, or None for their own choice.
        against: checkpoint of the float32 reference, or None.
        dataset: name.
        dataset_sha256: fingerprint of its tables.
        split_by: how the frames were kept apart from calibration.
        episodes: those measured on.
        excluded_episodes: those that calibration saw, by the split or by the manifest.
        samples: every frame measured on.
        seed: of split, frames and noise.
        n_first_rows: rows that are executed before the next chunk.
        period_ns: time between rows.
        n_rows: rows of a chunk.
    """

    created_at: str
    gwp_edge: str
    machine: str
    libraries: dict[str, str]
    bundle: str
    bundle_id: str
    precision: str
    engine: str
    threads: int | None
    against: str | None
    dataset: str
    dataset_sha256: str
    split_by: str
    episodes: tuple[int, ...]
    excluded_episodes: tuple[int, ...]
    samples: tuple[SampleId, ...]
    seed: int
    n_first_rows: int
    period_ns: int
    n_rows: int


class VerifyReport(_Struct, frozen=True, kw_only=True):
    """The answer of ``gwp-edge verify``.

    Attributes:
        schema: always ``gwp-edge.verify``.
        schema_version: of this layout.
        passed: no check failed.
        verdict: one line.
        checks: in order.
        notes: what a user must know beside the numbers.
        context: origin.
        recorded_error: what the bundle's manifest says of its error.
        reference: the bundle against the float32 reference, or None without one.
        bundle_open_loop: the bundle against the recorded actions.
        reference_open_loop: the reference against the recorded actions, or None.
        emulation: torch with the bundle's formats against the reference, on few samples; None
            unless layers were asked for.
        layers: by layer; empty unless asked for.
        sensitivity: as the manifest records it; empty where it does not.
        ranges: what calibration saw by step; of all inputs with a calibration record.
        settling: whether those ranges still grow with more samples; None without any.
        chunks: a few samples for plotting: the worst one first.
    """

    schema: str = SCHEMA
    schema_version: int = SCHEMA_VERSION
    passed: bool
    verdict: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    context: Context
    recorded_error: MeasuredError
    reference: Comparison | None
    bundle_open_loop: Comparison
    reference_open_loop: Comparison | None
    emulation: Comparison | None
    layers: tuple[LayerReport, ...]
    sensitivity: tuple[Sensitivity, ...]
    ranges: tuple[StepRange, ...]
    settling: Settling | None = None
    chunks: tuple[PlotChunk, ...]
