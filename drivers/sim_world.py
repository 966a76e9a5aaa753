"""The simulated table-top in one process: physics, controller, pictures, without a clock.

``SimWorld`` runs as fast as it is stepped, and the same seed and commands give the same states and
pictures: for evaluation, demonstrations and tests. ``sim_process`` runs it in real time.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import numpy as np

from gwp_edge.drivers import piper_model, sim_model
from gwp_edge.drivers.sim_options import SimOptions
from gwp_edge.drivers.sim_render import SceneRenderer, choose_backend, import_mujoco
from gwp_edge.errors import DeviceError, SafetyFault, SpecError
from gwp_edge.types import FloatArray, ImageArray

_NS_PER_S: Final = 1_000_000_000
_MIN_CUBE_DISTANCE_M: Final = 0.09
_PLACEMENT_ATTEMPTS: Final = 1000


class JointController:
    """Moves a set-point to the target within speed and acceleration, as PiPER's controller does.

    Far from the target the speed is the largest from which it can still brake; near it, it falls
    in proportion to the distance, with a time constant of 50 ms (not identified on an arm).
    """

    _GAIN_HZ: Final = 20.0
    _BRAKE_SHARE: Final = 0.8  # the speed loop lags a little; leave it room
    # A blocked joint must not store up a long way to go and let loose when it is freed.
    _LEAD_JOINT_RAD: Final = 0.2
    _LEAD_GRIPPER_M: Final = 0.03

    def __init__(self, n_arms: int, period_s: float) -> None:
        limits = piper_model.joint_limits(n_arms)
        self._velocity_max = limits.velocity_max
        self._velocity_step = limits.acceleration_max * period_s
        self._brake = self._BRAKE_SHARE * limits.acceleration_max
        self._linear = self._brake / self._GAIN_HZ**2
        lead = [self._LEAD_JOINT_RAD] * piper_model.N_JOINTS + [self._LEAD_GRIPPER_M]
        self._lead = np.array(lead * n_arms)
        self._period_s = period_s
        self.position = np.zeros(len(self._lead))
        self.velocity = np.zeros(len(self._lead))

    def reset(self, position: FloatArray) -> None:
        """Rest at ``position``, shape (D,)."""
        self.position = position.copy()
        self.velocity = np.zeros_like(position)

    def step(self, target: FloatArray, measured: FloatArray) -> None:
        """Advance the set-point by one period; all of shape (D,), rad and m."""
        error = target - self.position
        distance = np.abs(error)
        speed = np.where(
            distance <= self._linear,
            self._GAIN_HZ * distance,
            np.sqrt(2.0 * self._brake * np.maximum(distance - self._linear / 2, 0.0)),
        )
        wanted = np.copysign(np.minimum(speed, self._velocity_max), error)
        change = wanted - self.velocity
        self.velocity += np.minimum(np.maximum(change, -self._velocity_step), self._velocity_step)
        position = self.position + self.velocity * self._period_s
        low, high = measured - self._lead, measured + self._lead
        self.position = np.minimum(np.maximum(position, low), high)


class SimWorld:
    """One or two PiPER arms over a table with a red and a blue cube. Threads: one owner.

    Args:
        n_arms: 1 or 2; D is 7 or 14, the left arm first.
        cameras: roles to mount, as in the policy's spec.
        options: see ``SimOptions``.

    Raises:
        SpecError: a camera role has no mount, or the start position does not fit.
        DeviceError: MuJoCo is not installed.
    """

    def __init__(
        self, n_arms: int, cameras: Sequence[str] = (), options: SimOptions | None = None
    ) -> None:
        self._mujoco = import_mujoco()
        self.options = options = options or SimOptions()
        self.n_arms = n_arms
        self.cameras = tuple(cameras)
        self.period_ns = round(_NS_PER_S / options.physics_hz)
        mjcf = sim_model.build_mjcf(
            n_arms,
            sim_model.camera_mounts(n_arms, self.cameras, options.mounts),
            width_px=options.width_px,
            height_px=options.height_px,
            period_s=self.period_ns / _NS_PER_S,
        )
        self._model: Any = self._mujoco.MjModel.from_xml_string(mjcf)
        self._data: Any = self._mujoco.MjData(self._model)
        self._renderer: SceneRenderer | None = None
        self._range = piper_model.command_range(n_arms)
        self._controller = JointController(n_arms, self.period_ns / _NS_PER_S)
        self._feed_forward_s = np.array(sim_model.FEED_FORWARD_S * n_arms)
        self._index_channels()
        self._start = self._check_start(options.start_position)
        self._light = [
            np.array(v)
            for v in (
                self._model.light_diffuse,
                self._model.light_dir,
                self._model.vis.headlight.ambient,
            )
        ]
        self._target = self._start
        self._n_steps = 0
        self.reset(options.seed)

    # -- state ------------------------------------------------------------------------------

    @property
    def n_channels(self) -> int:
        """Number D of joints and grippers."""
        return piper_model.N_CHANNELS * self.n_arms

    @property
    def time_ns(self) -> int:
        """Simulated time since the reset, ns."""
        return self._n_steps * self.period_ns

    @property
    def position(self) -> FloatArray:
        """Joint angles and gripper openings, shape (D,), rad and m."""
        return self._channels_of(self._data.qpos, self._qpos_index)

    @property
    def velocity(self) -> FloatArray:
        """Their velocities, shape (D,), rad/s and m/s."""
        return self._channels_of(self._data.qvel, self._qvel_index)

    @property
    def qpos(self) -> FloatArray:
        """The whole configuration, for ``set_qpos`` of another world; shape (nq,)."""
        return np.array(self._data.qpos)

    @property
    def target(self) -> FloatArray:
        """The command in force, shape (D,), rad and m."""
        return self._target

    def tool_pose(self, arm_idx: int = 0) -> FloatArray:
        """Return the frame between the fingertips of an arm in the world, shape (4, 4), m."""
        prefix = sim_model.arm_prefixes(self.n_arms)[arm_idx]
        site = self._data.site(f"{prefix}_tool")
        return _homogeneous(site.xpos, site.xmat)

    def link_pose(self, arm_idx: int, link_idx: int) -> FloatArray:
        """Return frame ``link_idx`` (0 to 5) of an arm in the world, shape (4, 4), m."""
        prefix = sim_model.arm_prefixes(self.n_arms)[arm_idx]
        return self.body_pose(f"{prefix}_link_{link_idx + 1}")

    def body_pose(self, name: str) -> FloatArray:
        """Return the frame of a body such as ``red_cube`` in the world, shape (4, 4), m.

        Raises:
            SpecError: there is no such body.
        """
        try:
            body = self._data.body(name)
        except KeyError as e:
            raise SpecError(
                f"the sim has no body {name}; cubes are {', '.join(sim_model.CUBES)}"
            ) from e
        return _homogeneous(body.xpos, body.xmat)

    def touching(self, cube: str, arm_idx: int | None = None) -> bool:
        """Say whether a finger of an arm (or of any) touches ``cube`` now."""
        if cube not in sim_model.CUBES:
            raise SpecError(f"the sim has no cube {cube}; cubes are {', '.join(sim_model.CUBES)}")
        prefixes = sim_model.arm_prefixes(self.n_arms)
        chosen = prefixes if arm_idx is None else (prefixes[arm_idx],)
        pads = {self._model.geom(f"{p}_pad_{side}").id for p in chosen for side in "ab"}
        cube_id = self._model.geom(cube).id
        pairs = np.asarray(self._data.contact.geom).reshape(-1, 2)
        return any((a == cube_id and b in pads) or (b == cube_id and a in pads) for a, b in pairs)

    # -- motion -----------------------------------------------------------------------------

    def reset(self, seed: int, *, start: FloatArray | None = None) -> None:
        """Put arms and cubes to the start; ``seed`` decides the poses and the light.

        Args:
            seed: of the cubes' places and the light.
            start: pose of the arms, shape (D,), rad and m; that of the options if None.

        Raises:
            SafetyFault: ``start`` is not a pose that the controller accepts.
        """
        at = self._start if start is None else check_command(start, self._range)
        mujoco, data = self._mujoco, self._data
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self._model, data)
        self._n_steps = 0
        data.qpos[self._qpos_index[:, 0]] = at / self._n_coordinates
        data.qpos[self._qpos_index[:, 1]] = at / self._n_coordinates
        self._place_cubes(rng)
        self._vary_light(rng)
        self._controller.reset(at)
        self._target = at
        self._write_setpoint()
        mujoco.mj_forward(self._model, data)

    def command(self, target: FloatArray) -> None:
        """Set the absolute targets, shape (D,), rad and m; they hold until the next ones.

        Raises:
            SafetyFault: wrong shape, not finite, or outside of what the controller accepts.
        """
        self._target = check_command(target, self._range)

    def step(self, target: FloatArray | None = None, *, n_steps: int = 1) -> None:
        """Advance by ``n_steps`` physics periods towards ``target`` (default: the last one).

        Raises:
            SafetyFault: as in ``command``.
            DeviceError: the physics became unstable.
        """
        if target is not None:
            self.command(target)
        for _ in range(n_steps):
            self._controller.step(self._target, self.position)
            self._write_setpoint()
            self._mujoco.mj_step(self._model, self._data)
        # A step ends with new coordinates and the frames of the old ones.
        self._update_frames()
        self._n_steps += n_steps
        unstable = self._mujoco.mjtWarning.mjWARN_BADQPOS, self._mujoco.mjtWarning.mjWARN_BADQACC
        if any(self._data.warning[int(w)].number for w in unstable):
            raise DeviceError(
                "the simulated physics became unstable; raise physics_hz (now "
                f"{self.options.physics_hz:g})"
            )

    def set_qpos(self, qpos: FloatArray) -> None:
        """Show the configuration of another world of the same make, shape (nq,); for drawing."""
        self._data.qpos[:] = qpos
        self._update_frames()

    # -- pictures ---------------------------------------------------------------------------

    def render(self, camera: str) -> ImageArray:
        """Draw the present moment; return uint8 RGB, shape (height_px, width_px, 3).

        Raises:
            SpecError: no such camera.
            DeviceError: no off-screen renderer works here.
        """
        if camera not in self.cameras:
            have = ", ".join(self.cameras) or "none"
            raise SpecError(f"the sim has no camera {camera}; it was made with {have}")
        if self._renderer is None:
            self._renderer = SceneRenderer(
                self._model, self.options.width_px, self.options.height_px, choose_backend()
            )
        return self._renderer.render(self._data, camera)

    def close(self) -> None:
        """Free the renderer; safe to call twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __enter__(self) -> SimWorld:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------

    def _update_frames(self) -> None:
        mujoco = self._mujoco
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def _index_channels(self) -> None:
        # A joint has one coordinate, a gripper two that add up; a joint is listed as half and half.
        names: list[tuple[str, str]] = []
        for p in sim_model.arm_prefixes(self.n_arms):
            names += [(f"{p}_joint_{i + 1}",) * 2 for i in range(piper_model.N_JOINTS)]
            names.append((f"{p}_finger_a", f"{p}_finger_b"))
        joint = self._model.joint
        self._qpos_index = np.array([[joint(n).qposadr[0] for n in pair] for pair in names])
        self._qvel_index = np.array([[joint(n).dofadr[0] for n in pair] for pair in names])
        self._n_coordinates = np.array([len(set(pair)) for pair in names], np.float64)

    def _channels_of(self, coordinates: FloatArray, index: Any) -> FloatArray:  # noqa: ANN401
        pairs = coordinates[index]
        values: FloatArray = (pairs[:, 0] + pairs[:, 1]) * (0.5 * self._n_coordinates)
        return values

    def _write_setpoint(self) -> None:
        c = self._controller
        self._data.ctrl[:] = c.position + self._feed_forward_s * c.velocity

    def _check_start(self, start: Sequence[float] | None) -> FloatArray:
        position = np.array(sim_model.READY * self.n_arms if start is None else start, np.float64)
        try:
            return check_command(position, self._range)
        except SafetyFault as e:
            raise SpecError(f"start_position: {e}") from e

    def _place_cubes(self, rng: np.random.Generator) -> None:
        x_min, x_max, y_min, y_max = self.options.object_area_m
        taken = [np.array(pose[:2]) for pose in self.options.objects.values()]
        for name in sim_model.CUBES:
            pose = self.options.objects.get(name)
            if pose is None:
                for _ in range(_PLACEMENT_ATTEMPTS):
                    at = rng.uniform((x_min, y_min), (x_max, y_max))
                    if all(np.linalg.norm(at - t) >= _MIN_CUBE_DISTANCE_M for t in taken):
                        break
                else:
                    raise SpecError(
                        f"object_area_m {self.options.object_area_m} has no room for {name} "
                        f"{_MIN_CUBE_DISTANCE_M} m from the other cube; make it larger"
                    )
                taken.append(at)
                pose = (float(at[0]), float(at[1]), float(rng.uniform(-np.pi, np.pi)))
            x, y, yaw = pose
            quaternion = np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)
            self._data.joint(name).qpos[:] = (x, y, sim_model.CUBE_HALF_M, *quaternion)

    def _vary_light(self, rng: np.random.Generator) -> None:
        amount = self.options.lighting
        diffuse, direction, ambient = self._light
        # Drawn even when unused, so that the cubes' places do not depend on the amount.
        gain = 1.0 + amount * rng.uniform(-0.5, 0.5, (len(diffuse), 1))
        tint = 1.0 + amount * rng.uniform(-0.15, 0.15, (1, 3))
        turn = amount * rng.uniform(-0.4, 0.4, direction.shape)
        self._model.light_diffuse[:] = np.clip(diffuse * gain * tint, 0.0, 1.0)
        turned = direction + turn
        self._model.light_dir[:] = turned / np.linalg.norm(turned, axis=1, keepdims=True)
        dim = 1.0 + amount * rng.uniform(-0.4, 0.4)
        self._model.vis.headlight.ambient[:] = np.clip(ambient * dim, 0.0, 1.0)


def check_command(target: FloatArray, accepted: tuple[FloatArray, FloatArray]) -> FloatArray:
    """Return a read-only copy of ``target`` if the controller accepts it.

    Args:
        target: absolute targets, shape (D,), rad and m.
        accepted: lowest and highest values, from ``piper_model.command_range``.

    Raises:
        SafetyFault: wrong shape, not finite, or out of range.
    """
    low, high = accepted
    command = np.array(target, np.float64)
    if command.shape != low.shape:
        raise SafetyFault(f"command: expected shape {low.shape}, got {command.shape}; nothing sent")
    if not np.isfinite(command).all():
        raise SafetyFault(f"command is not finite: {command.tolist()}; nothing sent")
    # A value that went through limits in float arithmetic may be a rounding error past them.
    outside = np.flatnonzero((command < low - 1e-9) | (command > high + 1e-9))
    if outside.size:
        i = int(outside[0])
        raise SafetyFault(
            f"command channel {i} is {command[i]:.4f}, the controller accepts {low[i]:.4f} to "
            f"{high[i]:.4f}; nothing sent"
        )
    command.setflags(write=False)
    return command


def _homogeneous(position: FloatArray, rotation: FloatArray) -> FloatArray:
    pose = np.eye(4)
    pose[:3, 3] = position
    pose[:3, :3] = np.asarray(rotation).reshape(3, 3)
    return pose
