"""Closed-loop evaluation: episodes in simulated time, and what their counts allow to say."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gwp_edge.chunking import Guidance
from gwp_edge.drivers import piper_model
from gwp_edge.drivers.sim_model import CUBE_HALF_M, READY
from gwp_edge.errors import SpecError
from gwp_edge.evaluation.statistics import (
    agresti_min_interval,
    compare_pairs,
    design_effect,
    sign_flip_p,
    wilson_interval,
)
from gwp_edge.evaluation.tasks import FIRST_DEMONSTRATION_SEED, TouchTask, find_task
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import (
    CameraView,
    CanvasSpec,
    Channel,
    NetworkSpec,
    PolicySpec,
    Statistics,
)
from gwp_edge.types import Chunk, Float32Array, FloatArray, Observation

RED, BLUE = TouchTask.instructions


def test_wilson_interval_equals_published_values() -> None:
    # Wilson (1927) by hand: 10 of 10 gives 0.7225, 0 of 10 mirrors it, 50 of 100 is symmetric.
    low, high = wilson_interval(10, 10)
    assert (low, high) == pytest.approx((0.72246, 1.0), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_of_impossible_counts_is_refused() -> None:
    with pytest.raises(SpecError, match="expected 0 to 3 successes, got 4"):
        wilson_interval(4, 3)


def test_paired_interval_equals_published_values_and_is_never_of_width_zero() -> None:
    # Cavo et al. (2012) in Fagerland et al., "Statistical Analysis of Contingency Tables", 8.3:
    # 6 and 16 discordant of 161 pairs, -0.0621 (-0.1182 to -0.0045).
    assert agresti_min_interval(16, 6, 161) == pytest.approx((-0.1182, -0.0045), abs=5e-5)
    low, high = agresti_min_interval(0, 0, 200)
    assert high == -low == pytest.approx(1.959964 / 202, abs=1e-6)
    assert agresti_min_interval(0, 3, 3)[1] == 1.0  # the formula alone would go beyond


def test_no_discordant_pair_leaves_an_interval() -> None:
    """The bootstrap gave +0.0 to +0.0 here, as if two runs of 100 episodes proved equality."""
    same = compare_pairs([True] * 90 + [False] * 10, [True] * 90 + [False] * 10)
    assert (same.n_only_first, same.n_only_second, same.difference) == (0, 0, 0.0)
    assert same.low == pytest.approx(-0.0192, abs=1e-4)
    assert same.is_within(0.02)
    assert not same.is_within(0.01)
    assert not compare_pairs([True] * 10, [True] * 10).is_within(0.03)


def test_sign_flips_of_single_pairs_are_mcnemar_s_exact_test() -> None:
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1.0
    assert sign_flip_p([-1] * 5) == pytest.approx(2 / 2**5)
    assert sign_flip_p([1] * 8 + [-1] * 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert sign_flip_p([-1] * 8 + [1] * 2 + [0]) == sign_flip_p([1] * 8 + [-1] * 2)
    assert sign_flip_p([1, -1] * 4) == 1.0
    # Sums of +-2 +-2 +-1: 5, 3, 1, 1 and their opposites; only 5 is as far as 5.
    assert sign_flip_p([2, 2, 1]) == pytest.approx(2 / 8)


def test_episodes_that_share_a_seed_count_for_fewer() -> None:
    seeds = [*range(20), *range(20)]
    alike = [True] * 10 + [False] * 10
    # Twins say nothing new: 40 values are worth 20, up to the n - 1 of the two estimates.
    assert design_effect([*alike, *alike], seeds) == pytest.approx(2.0, rel=0.06)
    assert design_effect([*alike, *alike], range(40)) == pytest.approx(1.0)
    # Opposites would even count for more; they are not allowed to.
    assert design_effect([*alike, *(not x for x in alike)], seeds) == 1.0
    assert design_effect([True] * 40, seeds) == 1.0

    first, second = [True] * 40, [*([False] * 4 + [True] * 16)] * 2
    own, shared = compare_pairs(first, second), compare_pairs(first, second, seeds)
    assert own.difference == shared.difference == pytest.approx(-0.2)
    assert shared.low < own.low
    assert shared.high > own.high
    assert own.p == pytest.approx(2 / 2**8)
    assert shared.p == pytest.approx(2 / 2**4)
    assert (own.verdict, shared.verdict) == ("worse", "no difference shown")
    with pytest.raises(SpecError, match="a seed for each of 2 episodes, got 1"):
        compare_pairs([True, True], [True, True], [0])


def test_pairs_with_a_clear_difference_are_judged_and_others_are_not() -> None:
    first = [True] * 40 + [False] * 10
    worse = compare_pairs(first, [True] * 20 + [False] * 30)
    assert (worse.n_both, worse.n_only_first, worse.n_only_second) == (20, 20, 0)
    assert worse.difference == pytest.approx(-0.4)
    assert worse.low < -0.4 < worse.high < 0
    assert worse.verdict == "worse"
    same = compare_pairs(first, [True] * 39 + [False] + [True] + [False] * 9)
    assert same.difference == 0
    assert same.low < 0 < same.high
    assert same.verdict == "no difference shown"
    assert compare_pairs(first, [True] * 50).verdict == "better"
    with pytest.raises(SpecError, match="equally many"):
        compare_pairs([True], [])


def test_unknown_task_and_instruction_are_named() -> None:
    with pytest.raises(SpecError, match="--task fold: not known; tasks are touch"):
        find_task("fold")
    with pytest.raises(SpecError, match="no instruction 'touch the green cube'"):
        TouchTask().cube_of("touch the green cube")


def _spec(**changes: object) -> PolicySpec:
    channels = (
        *(Channel(name=f"joint{i}", unit="rad", kind="delta") for i in range(1, 7)),
        Channel(name="gripper", unit="m", kind="absolute"),
    )
    flat = {"state_q01": (-1.0,) * 7, "state_q99": (1.0,) * 7}
    spec = PolicySpec(
        network=NetworkSpec(
            family="gwp-0.5",
            n_layers=1,
            n_heads=1,
            head_dim=8,
            visual_dim=8,
            action_dim=8,
            visual_ffn_dim=8,
            action_ffn_dim=8,
            n_action_channels=8,
            n_text_rows=1,
            latent_channels=48,
            freq_dim=8,
            text_dim=8,
            eps=1e-6,
        ),
        sampler=make_schedule(10),
        canvas=CanvasSpec(
            width_px=96,
            height_px=64,
            views=(CameraView(camera="cam_high", x_px=0, y_px=0, width_px=96, height_px=64),),
        ),
        channels=channels,
        statistics=Statistics(**flat, action_q01=(-1.0,) * 7, action_q99=(1.0,) * 7),
        n_rows=48,
        period_ns=33_333_333,
        tasks=(RED, BLUE),
        embodiment=0,
    )
    return msgspec.structs.replace(spec, **changes)


def _down_on(position: FloatArray) -> FloatArray:
    """Joints with the fingertips at ``position``, tool leaning outwards by 0.4 rad."""
    yaw = math.atan2(position[1], position[0])
    out = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    side = np.array([-math.sin(yaw), math.cos(yaw), 0.0])
    along = math.sin(0.4) * out - math.cos(0.4) * np.array([0.0, 0.0, 1.0])
    pose = np.eye(4)
    pose[:3, :3] = np.column_stack((np.cross(side, along), side, along))
    pose[:3, 3] = position
    near = np.array(READY[:6])
    near[0] = yaw
    return piper_model.solve_joints(pose, near)


def _eased(s: FloatArray) -> FloatArray:
    """Minimum-jerk share of the way at share ``s`` of the time."""
    s = np.clip(s, 0.0, 1.0)
    return np.asarray(s**3 * (10.0 - 15.0 * s + 6.0 * s * s))


class Oracle:
    """Knows where the cubes of a seed are, and plans straight to the top of one of them."""

    def __init__(self, spec: PolicySpec, cube: str, seed: int) -> None:
        self.spec = spec
        self.asked: list[tuple[Observation, Float32Array | None]] = []
        task = TouchTask()
        with task.open_world(()) as world:
            task.reset(world, seed)
            at = world.body_pose(cube)[:3, 3]
        above = at + np.array([0.0, 0.0, CUBE_HALF_M])
        self._way = [_down_on(above + np.array([0, 0, z])) for z in (0.08, -0.012)]
        self._start: FloatArray | None = None
        self._t_start_ns = 0

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        self.asked.append((observation, noise))
        here = observation.state[:6]
        if self._start is None:
            self._start, self._t_start_ns = here, observation.t_state_ns
        # One path in time, of which every plan is a part: plans agree wherever they overlap.
        since_ns = observation.t_observed_ns - self._t_start_ns
        t_s = (since_ns + np.arange(48) * self.spec.period_ns)[:, None] / 1e9
        above, touch = self._way
        rows = self._start + (above - self._start) * _eased(t_s / 1.0)
        rows = rows + (touch - above) * _eased((t_s - 0.8) / 0.7)
        actions = np.hstack((rows, np.zeros((48, 1))))
        return Chunk(
            actions=actions,
            t_observed_ns=observation.t_observed_ns,
            period_ns=self.spec.period_ns,
            chunk_idx=0,
        )


class Blind(Oracle):
    """Stays where it is."""

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        self.asked.append((observation, noise))
        return Chunk(
            actions=np.tile(observation.state, (48, 1)),
            t_observed_ns=observation.t_observed_ns,
            period_ns=self.spec.period_ns,
            chunk_idx=0,
        )


@pytest.mark.sim
class TestEpisodes:
    @pytest.fixture(autouse=True)
    def _need_mujoco(self) -> None:
        pytest.importorskip("mujoco")

    def _run(self, policy: Oracle, instruction: str, seed: int, **options: object):  # type: ignore[no-untyped-def]
        from gwp_edge.evaluation.episode import EpisodeRunner
        from gwp_edge.evaluation.options import EpisodeOptions

        runner = EpisodeRunner(
            TouchTask(), policy.spec, EpisodeOptions(**options), keep_pictures=False
        )
        try:
            return runner.run(policy, instruction, seed)
        finally:
            runner.close()

    def test_oracle_touches_the_named_cube(self) -> None:
        for seed in range(3):
            result = self._run(Oracle(_spec(), "blue_cube", seed), BLUE, seed)
            assert result.outcome == "success"
            assert 0.3 < result.time_s < 6.0
            assert 0 < result.directness <= 1
            assert result.n_chunks > 0

    def test_the_other_cube_is_a_failure(self) -> None:
        result = self._run(Oracle(_spec(), "blue_cube", 0), RED, 0)
        assert result.outcome == "wrong object"

    def test_an_arm_that_stays_times_out(self) -> None:
        result = self._run(Blind(_spec(), "red_cube", 0), RED, 0)
        assert result.outcome == "timeout"
        assert result.time_s == pytest.approx(TouchTask.time_limit_s, abs=0.01)
        assert result.limited_share == 0

    def test_same_seed_gives_the_same_episode_and_the_same_noise(self) -> None:
        a, b = Oracle(_spec(), "red_cube", 4), Oracle(_spec(), "red_cube", 4)
        options = {"latency_ms": 60.0, "latency_jitter_ms": 80.0}
        assert self._run(a, RED, 4, **options) == self._run(b, RED, 4, **options)
        assert len(a.asked) == len(b.asked) > 1
        for (x, noise_x), (y, noise_y) in zip(a.asked, b.asked, strict=True):
            np.testing.assert_array_equal(noise_x, noise_y)
            np.testing.assert_array_equal(x.frames[0].image, y.frames[0].image)

    def test_no_inference_begins_while_another_runs(self) -> None:
        asked = Oracle(_spec(), "red_cube", 1)
        result = self._run(asked, RED, 1, latency_ms=400.0, replan_hz=5.0)
        assert result.outcome == "success"
        # 400 ms apart although 200 ms were asked for.
        gaps = np.diff([o.t_state_ns for o, _ in asked.asked])
        assert (gaps == 400_000_000).all()

    def test_camera_delay_ages_the_whole_observation(self) -> None:
        """Pictures of the past came with the state of the present, which no run pairs.

        ``run`` takes the arm's state at the oldest picture's time (``gwp_edge.observe``), so a
        late picture makes a late observation, not a contradictory one.
        """
        delayed = Oracle(_spec(), "red_cube", 1)
        self._run(delayed, RED, 1, camera_delay_ms=100.0, replan_hz=10.0)
        fresh = Oracle(_spec(), "red_cube", 1)
        self._run(fresh, RED, 1, replan_hz=10.0)
        assert all(o.t_state_ns == o.t_observed_ns for o, _ in delayed.asked)
        assert all(o.t_state_ns == o.t_observed_ns for o, _ in fresh.asked)
        # Both plan at 0, 100, 200 ms...; the first plans are one and the same, so at 100 ms the
        # arm has done the same, and the delayed run sees it at 200 ms.
        late, seen = delayed.asked[2][0], fresh.asked[1][0]
        assert late.t_state_ns == seen.t_state_ns
        np.testing.assert_array_equal(late.state, seen.state)
        np.testing.assert_array_equal(late.frames[0].image, seen.frames[0].image)
        assert (late.state != delayed.asked[0][0].state).any()
        assert delayed.asked[2][0].frames[0].t_received_ns - late.t_observed_ns == 100_000_000

    def test_blank_cameras_show_nothing(self) -> None:
        policy = Blind(_spec(), "red_cube", 0)
        self._run(policy, RED, 0, ablation="blank-cameras")
        assert all((o.frames[0].image == 128).all() for o, _ in policy.asked)

    def test_synchronous_execution_plans_when_the_arm_stands(self) -> None:
        policy = Oracle(_spec(), "red_cube", 2)
        result = self._run(
            policy, RED, 2, guidance="none", blend="none", synchronous=True, latency_ms=100.0
        )
        assert result.outcome == "success"
        gaps_s = np.diff([o.t_state_ns for o, _ in policy.asked]) / 1e9
        assert (gaps_s >= 47 / 30).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tasks": (RED,)}, "no prompt 'touch the blue cube'"),
            (
                {
                    "canvas": CanvasSpec(
                        width_px=96,
                        height_px=64,
                        views=(
                            CameraView(camera="cam_low", x_px=0, y_px=0, width_px=96, height_px=64),
                        ),
                    )
                },
                "has no camera cam_low",
            ),
        ],
    )
    def test_policy_of_another_robot_is_refused(
        self, changes: dict[str, object], message: str
    ) -> None:
        from gwp_edge.evaluation.episode import check_fits

        with pytest.raises(SpecError, match=message):
            check_fits(_spec(**changes), TouchTask())

    def test_report_counts_compares_and_shows_failures(self, tmp_path: Path) -> None:
        from gwp_edge.evaluation.evaluate import evaluate, write_failures
        from gwp_edge.evaluation.options import EpisodeOptions

        options = EpisodeOptions()
        good = evaluate("good", {RED: Oracle(_spec(), "red_cube", 5)}, TouchTask(), [5], options)
        bad = evaluate(
            "bad",
            {RED: Blind(_spec(), "red_cube", 5)},
            TouchTask(),
            [5],
            options,
            keep_pictures=True,
        )
        (summary,) = good.summaries()
        assert (summary.n, summary.n_success, summary.n_timeout) == (1, 1, 0)
        assert summary.time_to_success_p50_s == good.results[0].time_s
        assert bad.summaries()[0].time_to_success_p50_s is None
        compared = bad.compared_with(good)
        assert (compared.n_only_first, compared.difference) == (1, -1.0)
        (strip,) = write_failures(bad, tmp_path)
        assert strip.name == "bad-touch-the-red-cube-5-timeout.png"
        assert write_failures(good, tmp_path) == []

    def test_seeds_of_demonstrations_are_refused(self) -> None:
        from gwp_edge.evaluation.evaluate import evaluate
        from gwp_edge.evaluation.options import EpisodeOptions

        with pytest.raises(SpecError, match="demonstrations"):
            evaluate(
                "x",
                {RED: Blind(_spec(), "red_cube", 0)},
                TouchTask(),
                [FIRST_DEMONSTRATION_SEED],
                EpisodeOptions(),
            )
