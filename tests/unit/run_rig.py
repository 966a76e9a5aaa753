"""A whole run in real processes on the kinematic robot, with its command log."""

import time

import msgspec
import numpy as np

from gwp_edge.drivers.kinematic import channel_limits
from gwp_edge.motor_options import MotorOptions
from gwp_edge.observe import ObservationLimits
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.robots import load_robot
from gwp_edge.runtime import RunOptions, run
from gwp_edge.status import Mode
from gwp_edge.testing import make_spec, read_commands

ACCELERATION = 5.0
PERIOD_S = 0.005
LATE_NS = 8_000_000
# Generous where a busy machine may be slow: nothing here measures speed.
LIMITS = ObservationLimits(
    frame_age_ns=400_000_000, state_age_ns=2_000_000_000, stall_ns=800_000_000
)
MOTOR = MotorOptions(
    feedback_warn_ns=1_000_000_000, feedback_hold_ns=2_000_000_000, feedback_fault_ns=4_000_000_000
)


class Run:
    """One run with its command log."""

    def __init__(self, tmp_path):
        self.log = tmp_path / "commands"
        self.spec = make_spec()
        self.modes = []
        self.t_trigger_ns = None

    def start(
        self,
        *,
        faults=(),
        enable_s=0.0,
        script="sine",
        policy=None,
        on_status=None,
        keys=None,
        park_share=None,
        replan_hz=None,
        synchronous=False,
        **options,
    ):
        robot = load_robot("kinematic", self.spec)
        if park_share is not None:
            robot = msgspec.structs.replace(robot, park=self.park_pose(park_share))
        world_options = {"command_log": str(self.log), "faults": list(faults), "enable_s": enable_s}
        world = msgspec.structs.replace(robot.world, options=world_options)
        robot = msgspec.structs.replace(robot, world=world)
        options.setdefault("motor", MOTOR)
        # Never the expected end, only the end of a test that would not end.
        options.setdefault("duration_s", 30.0)
        options.setdefault("guardian_timeout_s", 2.0)
        options.setdefault("recover_timeout_s", 0.3)
        options.setdefault("start_timeout_s", 60.0)
        kwargs = {"spec": self.spec, "script": script, "swing_s": 1.0, **(policy or {})}

        def watch(status):
            if not self.modes or self.modes[-1] is not status.mode:
                self.modes.append(status.mode)
            if on_status is not None:
                on_status(status)

        self.summary = run(
            RunOptions(
                spec=self.spec,
                robot=robot,
                policy=PolicyOptions(
                    factory="gwp_edge.testing:create_scripted_policy",
                    kwargs=kwargs,
                    limits=LIMITS,
                    replan_hz=replan_hz,
                    synchronous=synchronous,
                ),
                **options,
            ),
            on_status=watch,
            keys=keys,
        )
        return self.summary

    def park_pose(self, share):
        """Return a pose at a share of every channel's range, by name."""
        limits = channel_limits(self.spec)
        pose = limits.position_min + share * (limits.position_max - limits.position_min)
        return dict(zip((c.name for c in self.spec.channels), pose.tolist(), strict=True))

    def once_running(self, action, *, after_ticks=30):
        """Return a callback that does ``action(status)`` once, in motion."""
        seen = {"ticks": None, "done": False}

        def on_status(status):
            if status.mode is not Mode.RUN or seen["done"]:
                return
            if seen["ticks"] is None:
                seen["ticks"] = status.n_ticks
            if status.n_ticks - seen["ticks"] >= after_ticks:
                seen["done"] = True
                self.t_trigger_ns = time.monotonic_ns()
                action(status)

        return on_status

    def await_standing(self, *, patience_s=30.0):
        """Return whether the newest commands come to stand still, looked at from outside."""
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            _, q = self.commands()
            if len(q) > 3 and (q[-3:] == q[-1]).all():
                return True
            time.sleep(0.02)
        return False

    def commands(self, who="motor"):
        return read_commands(f"{self.log}.{who}", self.spec.n_channels)

    def check_moved_within_limits(self):
        t_ns, q = self.commands()
        v = np.concatenate([np.zeros((1, q.shape[1])), np.diff(q, axis=0) / PERIOD_S])
        change = np.abs(np.diff(v, axis=0))
        # A loop that was kept from running, before a tick or in the midst of the one before it,
        # begins from rest.
        late = np.diff(t_ns) > LATE_NS
        paused = late | np.concatenate([[False], late[:-1]])
        a = np.where(paused[:, None], np.minimum(change, np.abs(v[1:])), change) / PERIOD_S
        assert np.isfinite(q).all()
        assert np.abs(v[:, :6]).max() > 0.02, "the arm never moved"
        assert np.abs(v[:, :6]).max() <= 3.0
        assert np.abs(a[:, :6]).max() <= ACCELERATION + 1e-6
        return q, v

    def check_decelerated_and_holding(self):
        _, v = self.check_moved_within_limits()
        assert np.abs(v[-2:]).max() == 0.0
