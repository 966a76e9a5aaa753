"""Closed-loop evaluation: episodes in simulated time, and what their counts allow to say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gwp_edge.chunking import Guidance
from gwp_edge.drivers import piper_model
from gwp_edge.drivers.sim_model import CUBE_HALF_M, READY
from gwp_edge.errors import SpecError
from gwp_edge.evaluation.episode import EpisodeResult
from gwp_edge.evaluation.evaluate import (
    Evaluation,
    evaluate,
    summarise,
    told_instead_of,
    write_failures,
)
from gwp_edge.evaluation.options import EpisodeOptions
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


def test_unknown_task_and_instruction_are_named() -> None:
    with pytest.raises(SpecError, match="--task fold: not known; tasks are touch"):
        find_task("fold")
    with pytest.raises(SpecError, match="no instruction 'touch the green cube'"):
        TouchTask().cube_of("touch the green cube")


def _failure(instruction: str, seed: int) -> EpisodeResult:
    return EpisodeResult(
        seed=seed,
        instruction=instruction,
        outcome="timeout",
        time_s=6.0,
        n_chunks=1,
        limited_share=0.5,
        withheld_p50_rad=0.001,
        withheld_p99_rad=0.01,
        tool_path_m=1.0,
        directness=0.5,
        jerk_rms_rad_s3=300.0,
        pictures=(np.full((8, 12, 3), seed, np.uint8),),
    )


def test_pictures_of_failures_are_shared_among_instructions(tmp_path: Path) -> None:
    """The first twelve in order showed the first instruction alone."""
    results = [_failure(i, seed) for i in (RED, BLUE) for seed in range(20)]
    found = Evaluation(label="a/b", results=tuple(results))
    names = [path.name for path in write_failures(found, tmp_path)]
    assert names == [
        f"a-b-touch-the-{colour}-cube-{seed}-timeout.png"
        for colour in ("red", "blue")
        for seed in range(6)
    ]
    only = Evaluation(label="a", results=tuple(results[:20]))
    assert len(write_failures(only, tmp_path)) == 12


def test_summary_of_twins_is_as_wide_as_that_of_one(tmp_path: Path) -> None:
    """Red and blue share scene and pose: what always goes alike is one observation, not two."""

    def outcomes(instruction: str) -> list[EpisodeResult]:
        failed = [_failure(instruction, seed) for seed in range(40)]
        return [r if r.seed % 4 == 0 else replace(r, outcome="success") for r in failed]

    red = summarise(RED, outcomes(RED))
    both = summarise("all", [*outcomes(RED), *outcomes(BLUE)])
    assert both.success_rate == red.success_rate == 0.75
    assert both.success_low == pytest.approx(red.success_low, abs=0.005)
    assert both.success_high == pytest.approx(red.success_high, abs=0.005)
    assert both.withheld_p99_rad == pytest.approx(0.01)


def test_prompts_are_swapped_in_one_place() -> None:
    task = TouchTask()
    swapped = EpisodeOptions(ablation="swapped-prompt")
    assert told_instead_of(RED, task, EpisodeOptions()) == RED
    assert told_instead_of(RED, task, swapped) == BLUE
    assert told_instead_of(BLUE, task, swapped) == RED
    policy = Blind.__new__(Blind)
    with pytest.raises(SpecError, match=f"no policy that is told {BLUE!r}"):
        evaluate("x", {RED: policy}, task, [0], swapped)


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


class Absurd(Oracle):
    """Plans a hundred turns away."""

    def predict(self, observation: Observation, **rest: object) -> Chunk:
        return Chunk(
            actions=np.full((48, 7), 600.0),
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

    def test_ticks_whose_target_is_rejected_count_as_limited(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An untrained network's plans were rejected for six seconds, and 2 % called limited."""
        monkeypatch.setattr(TouchTask, "time_limit_s", 0.5)
        result = self._run(Absurd(_spec(), "red_cube", 0), RED, 0)
        assert result.outcome == "timeout"
        assert result.limited_share > 0.5
        assert result.withheld_p99_rad > 1.0

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
        with pytest.raises(SpecError, match="demonstrations"):
            evaluate(
                "x",
                {RED: Blind(_spec(), "red_cube", 0)},
                TouchTask(),
                [FIRST_DEMONSTRATION_SEED],
                EpisodeOptions(),
            )
