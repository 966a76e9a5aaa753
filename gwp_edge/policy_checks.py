"""What the policy process checks before the arm may move: golden run, cameras, first plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gwp_edge.errors import SpecError, StaleError
from gwp_edge.mailbox import Board
from gwp_edge.observe import Observer
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.preflight import (
    check_cameras,
    check_first_action,
    check_golden,
    check_latency,
    check_loaded,
    check_statistics,
)
from gwp_edge.profiling.stamps import stamp_record
from gwp_edge.protocols import Clock, Policy
from gwp_edge.status import EventKind
from gwp_edge.telemetry import CheckResult
from gwp_edge.types import Chunk, Observation

POLL_NS: Final = 2_000_000
_FIRST_FRAME_NS: Final = 10_000_000_000
_N_WARM_UP: Final = 3


class PolicyChecks:
    """The checks of a policy and its cameras, each said as it ends. Threads: one owner.

    Args:
        board: where checks and the stamps of the calls made for them go.
        policy: to check.
        observer: of its cameras and the arm's states.
        options: of the policy process.
        clock: of the policy process.
        is_over: whether the end of the run has come.
    """

    def __init__(
        self,
        board: Board,
        policy: Policy,
        observer: Observer,
        options: PolicyOptions,
        clock: Clock,
        is_over: Callable[[], bool],
    ) -> None:
        self._board = board
        self._policy = policy
        self._observer = observer
        self._options = options
        self._clock = clock
        self._is_over = is_over
        self._say = board.events["policy"].say

    def run(self) -> int | None:
        """Check everything; return what a warm prediction took, ns, or None: the end came first.

        Raises:
            StaleError: no observation in 10 s.
        """
        spec, loaded_with = self._policy.spec, self._options.kwargs
        for line in check_loaded(loaded_with):
            self._tell(line)
        t_golden_ns = self._clock.now_ns()
        self._tell(check_golden(self._policy))
        n_called = self._stamp_golden(t_golden_ns)
        observation = self._await_observation()
        if observation is None:
            return None
        self._tell(check_cameras(observation, self._clock.now_ns(), self._observer.limits))
        self._tell(check_statistics(spec, observation.state))
        chunk: Chunk | None = None
        latency_ns = 0
        for i in range(_N_WARM_UP):
            fresh = self._await_observation()
            if fresh is None:
                return None
            observation, t_ns = fresh, self._clock.now_ns()
            chunk = self._policy.predict(observation)
            t_predicted_ns = self._clock.now_ns()
            latency_ns = t_predicted_ns - t_ns
            self._board.stamps.append(
                stamp_record(
                    -1 - n_called - i,
                    observation,
                    self._policy.timing,
                    t_started_ns=t_ns,
                    t_built_ns=t_ns,
                    t_predicted_ns=t_predicted_ns,
                    t_published_ns=t_predicted_ns,
                )
            )
        if chunk is not None and self._options.guidance.warm_start_sigma < 1:
            # It takes fewer steps: an engine that captures whole chunks captures that one apart.
            self._policy.predict(observation, previous=chunk, guidance=self._options.guidance)
        self._tell(check_latency(latency_ns, spec, synchronous=self._options.synchronous))
        if chunk is not None:
            self._tell(check_first_action(spec, chunk, observation.state))
        return latency_ns

    def _stamp_golden(self, t_begin_ns: int) -> int:
        """Stamp the golden run as the first call, which is the cold one; return 1 if it was one."""
        t_end_ns = self._clock.now_ns()
        try:
            timing = self._policy.timing
        except SpecError:
            return 0
        if not 0 < timing.total_ns <= t_end_ns - t_begin_ns:
            return 0  # this policy predicts nothing for its golden run
        self._board.stamps.append(
            stamp_record(
                -1,
                None,
                timing,
                t_started_ns=t_end_ns - timing.total_ns,
                t_built_ns=t_end_ns - timing.total_ns,
                t_predicted_ns=t_end_ns,
                t_published_ns=t_end_ns,
            )
        )
        return 1

    def _await_observation(self) -> Observation | None:
        deadline_ns = self._clock.now_ns() + _FIRST_FRAME_NS
        while not self._is_over():
            now_ns = self._clock.now_ns()
            try:
                return self._observer.observe(now_ns)
            except StaleError as e:
                if now_ns > deadline_ns:
                    raise StaleError(f"no observation in {_FIRST_FRAME_NS / 1e9:.0f} s: {e}") from e
            self._clock.sleep_until_ns(now_ns + POLL_NS)
        return None

    def _tell(self, result: CheckResult) -> None:
        kind = EventKind.CHECK_PASSED if result.passed else EventKind.CHECK_FAILED
        self._say(kind, f"{result.name}: {result.detail}")
