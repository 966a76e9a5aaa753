"""Profile a robot, or an engine alone."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gwp_edge.errors import GwpError, SpecError
from gwp_edge.machine_limits import Limits, Machine, describe_machine
from gwp_edge.manifest import Manifest, read_manifest
from gwp_edge.profiling.build import build_report
from gwp_edge.profiling.collect import Listener, Together, collect_engine
from gwp_edge.profiling.context import make_context
from gwp_edge.profiling.cost import measure_cost
from gwp_edge.profiling.disturb import Around, Disturbances, disturbed_robot
from gwp_edge.profiling.disturbed_policy import create_policy
from gwp_edge.profiling.live import LiveCallback, LiveFeed
from gwp_edge.profiling.raw import Raw
from gwp_edge.profiling.roofline import NO_LIMITS_ELSEWHERE, cached_limits
from gwp_edge.profiling.schema import ProfileReport
from gwp_edge.profiling.system_sampler import SystemSampler
from gwp_edge.protocols import Policy
from gwp_edge.run_options import KeySource, RunOptions, RunStatus, StatusCallback
from gwp_edge.runtime import Watcher, run
from gwp_edge.telemetry import RunSummary

Progress = Callable[[str, int, int], None]
_MAX_S = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """How to profile.

    Attributes:
        duration_s: of the motion, or of the engine's work.
        warmup_s: of the motion, left out of the steady phase.
        repeat: how often.
        sample_system: follow load, clocks, memory and heat.
        limits: measure this machine's limits for the roofline, or take them from the cache.
        remeasure: measure them even where the cache has them.
        disturbances: what to inject.
    """

    duration_s: float = 30.0
    warmup_s: float = 1.0
    repeat: int = 1
    sample_system: bool = True
    limits: bool = True
    remeasure: bool = False
    disturbances: Disturbances = dataclasses.field(default_factory=Disturbances)

    def __post_init__(self) -> None:
        for name, value_s in (("--duration", self.duration_s), ("--warmup", self.warmup_s)):
            if not 0 <= value_s <= _MAX_S:  # neither inf nor NaN is
                raise SpecError(f"{name}: expected 0 to {_MAX_S:.0f} s, got {value_s:g}")
        if self.duration_s == 0:
            raise SpecError("--duration: expected more than 0 s")
        if self.repeat < 1:
            raise SpecError(f"--repeat: expected 1 or more, got {self.repeat}")


def profile_engine(
    bundle: str,
    options: ProfileOptions,
    *,
    engine: str = "ort",
    provider: str = "cpu",
    threads: int | None = None,
    task: str | None = None,
    progress: Progress | None = None,
    on_live: LiveCallback | None = None,
) -> tuple[ProfileReport, list[Raw]]:
    """Profile a bundle's engine on random observations: no robot, no cameras, no motor loop.

    Each repetition loads the bundle anew, so that each has its own cold call. Returns the report
    and what was collected, repetition by repetition. ``on_live`` is called between chunks, about
    twice a second, with the figures so far.

    Raises:
        SpecError: the bundle or an option does not fit.
    """
    if options.disturbances.needs_robot:
        raise SpecError(
            "--disturb transport, observe, drop, bus and stall need a robot: add --robot kinematic "
            "or sim"
        )
    manifest = read_manifest(bundle)
    machine = describe_machine()
    limits, why = _limits(machine, engine, provider, threads, options, progress)
    raws = []
    with Around(options.disturbances) as around:
        for i in range(options.repeat):
            if progress is not None:
                progress("profile", i, options.repeat)
            policy = _policy(bundle, options, engine, provider, threads, task)
            sampler = SystemSampler() if options.sample_system else None
            if sampler is not None:
                sampler.pids = {"engine": os.getpid()}
                sampler.foreign = frozenset(around.pids)
            try:
                raws.append(
                    collect_engine(
                        policy,
                        duration_s=options.duration_s + options.warmup_s,
                        n_max=None,
                        sampler=sampler,
                        on_live=on_live,
                    )
                )
            finally:
                policy.close()
                if sampler is not None:
                    sampler.close()
    if progress is not None:
        progress("profile", options.repeat, options.repeat)
    context = make_context(
        manifest.spec,
        machine,
        manifest=manifest,
        bundle=bundle,
        robot=None,
        engine=engine,
        provider=provider,
        threads=threads,
        motor_hz=None,
        duration_s=options.duration_s,
        warmup_s=options.warmup_s,
        repeat=options.repeat,
        disturbances=options.disturbances.texts,
    )
    report = build_report(
        raws,
        manifest.spec,
        context,
        manifest=manifest,
        limits=limits,
        why_no_limits=why,
        cost_us=measure_cost(manifest.spec),
    )
    return report, raws


def _policy(
    bundle: str,
    options: ProfileOptions,
    engine: str,
    provider: str,
    threads: int | None,
    task: str | None,
) -> Policy:
    return create_policy(
        path=bundle,
        stages=options.disturbances.stages,
        engine=engine,
        provider=provider,
        threads=threads,
        task=task,
        seed=0,
    )


def profile_robot(
    run_options: RunOptions,
    options: ProfileOptions,
    *,
    on_status: StatusCallback | None = None,
    keys: KeySource | None = None,
    progress: Progress | None = None,
    on_live: LiveCallback | None = None,
    watchers: Sequence[Watcher] = (),
    watched_by: Sequence[str] = (),
    execution: str | None = None,
) -> tuple[ProfileReport, RunSummary, list[Raw]]:
    """Run a robot and profile it; the report is there however the run ended.

    Args:
        run_options: what to run; its duration is the profile's, its policy may be any.
        options: how to profile.
        on_status: as ``runtime.run``.
        keys: likewise.
        progress: called while the machine's limits are measured, before anything moves.
        on_live: called from another thread, twice a second, with the figures so far.
        watchers: others that listen to the run.
        watched_by: their names, for the report.
        execution: name of how chunks follow each other, for the report.

    Returns:
        The report, the summary of the last run, and what was collected, run by run.

    Raises:
        SpecError: the options do not fit; nothing was started.
    """
    disturbances = options.disturbances
    kwargs = run_options.policy.kwargs
    robot = disturbed_robot(run_options.robot, disturbances)
    manifest = _manifest(kwargs)
    engine, provider = str(kwargs.get("engine", "")), str(kwargs.get("provider", ""))
    threads = kwargs.get("threads")
    n_threads = threads if isinstance(threads, int) else None
    machine = describe_machine()
    limits, why = _limits(machine, engine, provider, n_threads, options, progress)
    if manifest is None:
        limits, why = None, "the policy is no bundle"
    policy = run_options.policy
    if disturbances.stages:
        if manifest is None:
            raise SpecError("--disturb of a stage of the prediction needs a bundle")
        policy = dataclasses.replace(
            policy,
            factory="gwp_edge.profiling.disturbed_policy:create_policy",
            kwargs={**kwargs, "stages": disturbances.stages},
        )
    run_options = dataclasses.replace(
        run_options,
        robot=robot,
        policy=policy,
        duration_s=options.duration_s + options.warmup_s,
    )
    context = make_context(
        run_options.spec,
        machine,
        manifest=manifest,
        bundle=str(kwargs["path"]) if manifest is not None else None,
        robot=robot.name,
        engine=engine or None,
        provider=provider or None,
        threads=n_threads,
        motor_hz=run_options.motor.rate_hz,
        execution=execution,
        watched_by=watched_by,
        duration_s=options.duration_s,
        warmup_s=options.warmup_s,
        repeat=options.repeat,
        disturbances=disturbances.texts,
    )
    cameras = tuple(c.role for c in robot.cameras)

    def listen(foreign: Sequence[int]) -> Listener:
        return Listener(
            run_options.spec,
            SystemSampler() if options.sample_system else None,
            foreign=foreign,
            feed=LiveFeed(cameras, motor_hz=run_options.motor.rate_hz),
            on_live=on_live,
        )

    raws, summaries = _runs(run_options, options, on_status, keys, listen, watchers)
    report = build_report(
        raws,
        run_options.spec,
        context,
        cameras=cameras,
        manifest=manifest,
        limits=limits,
        why_no_limits=why,
        outcome=summaries[-1].outcome,
        n_holds=sum(s.n_holds for s in summaries),
        faults=tuple(fault for s in summaries for fault in s.faults),
        cost_us=measure_cost(run_options.spec),
    )
    return report, summaries[-1], raws


def _runs(
    run_options: RunOptions,
    options: ProfileOptions,
    on_status: StatusCallback | None,
    keys: KeySource | None,
    listen: Callable[[Sequence[int]], Listener],
    watchers: Sequence[Watcher],
) -> tuple[list[Raw], list[RunSummary]]:
    """Run it as often as asked for, or until it ends badly."""
    raws: list[Raw] = []
    summaries: list[RunSummary] = []
    with Around(options.disturbances) as around:
        for _ in range(options.repeat):
            listener = listen(around.pids)

            def see(status: RunStatus, listener: Listener = listener) -> None:
                listener.see(status)
                around.see(status)
                if on_status is not None:
                    cpu_s = time.thread_time()
                    on_status(status)
                    listener.view_s += time.thread_time() - cpu_s

            everybody = Together((listener, *watchers))
            try:
                summaries.append(run(run_options, on_status=see, keys=keys, watcher=everybody))
            finally:
                everybody.end()
            raws.append(listener.raw())
            if summaries[-1].outcome != "duration":
                break
    return raws, summaries


def _manifest(kwargs: object) -> Manifest | None:
    path = kwargs.get("path") if isinstance(kwargs, dict) else None
    return read_manifest(str(path)) if path else None


def _limits(
    machine: Machine,
    engine: str,
    provider: str,
    threads: int | None,
    options: ProfileOptions,
    progress: Progress | None,
) -> tuple[Limits | None, str | None]:
    """Return the machine's limits, or why there are none that would mean anything."""
    if not options.limits:
        return None, "left out by --no-roofline"
    if engine != "ort" or provider != "cpu":
        return None, NO_LIMITS_ELSEWHERE
    try:
        n_threads = threads or os.cpu_count() or 1
        found = cached_limits(machine, n_threads, again=options.remeasure, progress=progress)
    except (GwpError, ImportError) as e:
        return None, f"limits could not be measured: {e}"
    return found, None
