"""Own a LeRobot robot for other processes: runs in lerobot's interpreter, needs numpy and lerobot.

Started as a script by ``lerobot_bridge`` with its options as one JSON line on stdin. It imports
nothing of gwp_edge, so that lerobot, torch and their versions stay out of the robot's run loop.
Clients connect to a Unix socket; a message is a JSON header and raw arrays, each with its length
ahead, and nothing is ever unpickled.

The process never lets go of the robot on its own: ``Robot.disconnect`` cuts the torque of most
arms, and ``Robot.__del__`` calls it, so that this process ends by ``os._exit`` alone.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_LENGTHS: Final = struct.Struct("<II")
MAX_MESSAGE_BYTES: Final = 64 << 20
_RECEIVE_BYTES: Final = 1 << 20
Message = tuple[dict[str, Any], list[npt.NDArray[Any]]]


class LostConnectionError(ConnectionError):
    """The other end is gone."""


def pack(header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]] = ()) -> bytes:
    """Return one message."""
    shapes = [[a.dtype.str, list(a.shape)] for a in arrays]
    head = json.dumps({**header, "arrays": shapes}).encode()
    body = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    return _LENGTHS.pack(len(head), len(body)) + head + body


class Wire:
    """Messages over one non-blocking stream socket. Threads: one owner."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self.sock = sock
        self._inbox = bytearray()
        self._outbox = memoryview(b"")

    def send(self, header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]] = ()) -> bool:
        """Send a message; return False where it was dropped because an earlier one is still going.

        Raises:
            LostConnectionError: the other end is gone.
        """
        if not self.flush():
            return False
        self._outbox = memoryview(pack(header, arrays))
        self.flush()
        return True

    def flush(self) -> bool:
        """Send what is left of the last message; return whether all of it is out.

        Raises:
            LostConnectionError: the other end is gone.
        """
        try:
            while self._outbox:
                self._outbox = self._outbox[self.sock.send(self._outbox) :]
        except BlockingIOError:
            return False
        except OSError as e:
            raise LostConnectionError(str(e)) from e
        return True

    def receive(self) -> Iterator[Message]:
        """Yield every complete message that is there.

        Raises:
            LostConnectionError: the other end is gone, or speaks something else.
        """
        is_lost = False
        while True:
            try:
                data = self.sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                is_lost = True
                break
            self._inbox += data
        while (message := self._next()) is not None:
            yield message
        if is_lost:
            raise LostConnectionError("the other end closed the connection")

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def _next(self) -> Message | None:
        if len(self._inbox) < _LENGTHS.size:
            return None
        n_head, n_body = _LENGTHS.unpack_from(self._inbox)
        end = _LENGTHS.size + n_head + n_body
        if end > MAX_MESSAGE_BYTES:
            raise LostConnectionError(f"a message of {end} bytes is not of this protocol")
        if len(self._inbox) < end:
            return None
        try:
            header = json.loads(bytes(self._inbox[_LENGTHS.size : _LENGTHS.size + n_head]))
            body, offset = bytes(self._inbox[_LENGTHS.size + n_head : end]), 0
            arrays = []
            for dtype, shape in header.pop("arrays"):
                n = math.prod(shape)
                arrays.append(np.frombuffer(body, np.dtype(dtype), n, offset).reshape(shape))
                offset += arrays[-1].nbytes
        except (ValueError, KeyError, TypeError) as e:
            raise LostConnectionError(f"a message is not of this protocol: {e}") from e
        del self._inbox[:end]
        return header, arrays


class _Client:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.role: str | None = None  # of a camera
        self.is_arm = False
        self.frame_idx = -1


class Server:
    """One robot and its clients. Threads: one owner.

    One client may command; anybody else may only read, and hold. A hold takes the right to command
    away, and so does the end of the commanding process: then the robot is told to stay where it is.

    Args:
        robot: a connected LeRobot ``Robot``.
        listener: a listening socket.
        features: scalar features in the order of every vector.
        cameras: camera feature by role.
        period_s: time between observations.
        patience_s: observations may fail for so long.
    """

    def __init__(
        self,
        robot: Any,  # noqa: ANN401 - lerobot is not there when types are checked
        listener: socket.socket,
        *,
        features: Sequence[str],
        cameras: Mapping[str, str],
        period_s: float,
        patience_s: float,
    ) -> None:
        self._robot = robot
        self._listener = listener
        self._features = list(features)
        self._cameras = dict(cameras)
        self._period_s = period_s
        self._patience_s = patience_s
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._clients: list[_Client] = []
        self._commander: _Client | None = None
        self._target: npt.NDArray[np.float64] | None = None
        self._held: npt.NDArray[np.float64] | None = None
        self._position = np.full(len(features), np.nan)
        self._sent = np.full(len(features), np.nan)
        self._images: dict[str, npt.NDArray[np.uint8]] = {}
        self._frame_idx = dict.fromkeys(cameras, -1)
        self._t_ns = 0
        self.stopping = False

    def run(self, parent_pid: int) -> None:
        """Serve until told to stop or the parent is gone; the robot then stays where it is.

        Raises:
            Exception: what the robot raised when it could not be read for ``patience_s``.
        """
        due_s = time.monotonic()
        t_good_s = due_s
        while not self.stopping and os.getppid() == parent_pid:
            try:
                self._act()
                self._observe()
                t_good_s = time.monotonic()
                self._tell()
            except Exception as e:  # lerobot's drivers raise what their libraries raise
                if time.monotonic() - t_good_s > self._patience_s:
                    self._say_error(f"{type(e).__name__}: {e}")
                    raise
            due_s = max(due_s + self._period_s, time.monotonic())
            while (left_s := due_s - time.monotonic()) > 0:
                self._serve(left_s)
            self._serve(0.0)
        self._hold()
        self._act()

    def _observe(self) -> None:
        t_ns = time.monotonic_ns()
        seen = self._robot.get_observation()
        position = np.array([float(seen[name]) for name in self._features])
        for role, feature in self._cameras.items():
            # LeRobot's cameras hand out the same array until there is a new picture.
            if seen[feature] is not self._images.get(role):
                self._images[role] = seen[feature]
                self._frame_idx[role] += 1
        self._position, self._t_ns = position, t_ns

    def _act(self) -> None:
        if self._target is None:
            return
        target, self._target = self._target, None
        sent = self._robot.send_action(dict(zip(self._features, map(float, target), strict=True)))
        self._sent = np.array([float(sent.get(name, math.nan)) for name in self._features])

    def _hold(self) -> None:
        """Have the measured pose sent; the pose of the first call is kept."""
        self._commander = None
        if self._held is None and np.isfinite(self._position).all():
            self._held = self._position.copy()
        self._target = self._held

    def _tell(self) -> None:
        for client in list(self._clients):
            try:
                if client.is_arm:
                    header = {
                        "op": "state",
                        "t_ns": self._t_ns,
                        "commands": client is self._commander,
                    }
                    client.wire.send(header, [self._position, self._sent])
                elif client.role is not None and client.frame_idx < self._frame_idx[client.role]:
                    idx = self._frame_idx[client.role]
                    header = {"op": "frame", "t_ns": self._t_ns, "idx": idx}
                    if client.wire.send(header, [np.asarray(self._images[client.role])]):
                        client.frame_idx = idx
            except LostConnectionError:  # noqa: PERF203 - one client's end is not another's
                self._drop(client)

    def _say_error(self, text: str) -> None:
        for client in list(self._clients):
            try:
                client.wire.send({"op": "error", "text": text})
            except LostConnectionError:  # noqa: PERF203 - as above
                self._drop(client)

    def _serve(self, timeout_s: float) -> None:
        for client in self._clients:
            try:
                client.wire.flush()
            except LostConnectionError:  # noqa: PERF203 - as above
                continue  # receiving notices as well
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                sock, _ = self._listener.accept()
                client = _Client(Wire(sock))
                self._clients.append(client)
                self._selector.register(sock, selectors.EVENT_READ, client)
                continue
            client = key.data
            try:
                for header, arrays in client.wire.receive():
                    self._take(client, header, arrays)
            except LostConnectionError:
                self._drop(client)

    def _take(
        self, client: _Client, header: dict[str, Any], arrays: list[npt.NDArray[Any]]
    ) -> None:
        op = header.get("op")
        if op == "read":
            client.is_arm = True
        elif op == "command":
            client.is_arm = True
            if self._commander is not None:
                client.wire.send({"op": "error", "text": "another process commands this robot"})
                return
            # Whatever target the robot has from before, from now on it is the measured pose.
            self._held = None
            self._target = self._position.copy()
            self._commander = client
        elif op == "camera":
            client.role = str(header.get("role"))
            if client.role not in self._cameras:
                text = f"the robot has no camera {client.role}"
                client.role = None
                client.wire.send({"op": "error", "text": text})
        elif op == "action" and client is self._commander:
            (target,) = arrays
            if target.shape == (len(self._features),) and np.isfinite(target).all():
                self._target = target
        elif op == "hold":
            self._hold()
        elif op == "bye" and client is self._commander:
            self._commander = None  # its last target stays in force

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.remove(client)
        self._selector.unregister(client.wire.sock)
        client.wire.close()
        if client is self._commander:
            self._hold()


def make_robot(kind: str, config: Mapping[str, Any], plugins: Sequence[str]) -> Any:  # noqa: ANN401
    """Return an unconnected LeRobot robot of the registered type ``kind``.

    Raises:
        LookupError: no such type; names the ones there are.
    """
    robots: Any = importlib.import_module("lerobot.robots")
    draccus: Any = importlib.import_module("draccus")
    for plugin in plugins:
        importlib.import_module(plugin)
    choices = robots.RobotConfig.get_known_choices
    if kind not in choices():
        utils: Any = importlib.import_module("lerobot.utils.import_utils")
        getattr(utils, "register_third_party_plugins", lambda: None)()
    # A type is known once its package was imported, and packages are not named like types.
    for package in pkgutil.iter_modules(robots.__path__, "lerobot.robots."):
        if kind in choices():
            break
        if package.ispkg:
            try:
                importlib.import_module(package.name)
            except ImportError as e:
                sys.stderr.write(f"{package.name} cannot be imported: {e}\n")
    if kind not in choices():
        raise LookupError(f"lerobot knows no robot {kind!r}; it has {', '.join(sorted(choices()))}")
    config_class = robots.RobotConfig.get_choice_class(kind)
    given = dict(config)
    # Letting go must not let the arm fall.
    if "disable_torque_on_disconnect" in getattr(config_class, "__dataclass_fields__", {}):
        given["disable_torque_on_disconnect"] = False
    return robots.make_robot_from_config(draccus.decode(config_class, given))


def check_features(robot: Any, features: Sequence[str], cameras: Mapping[str, str]) -> None:  # noqa: ANN401
    """Check that the robot reads and takes ``features`` and shows ``cameras``.

    Raises:
        LookupError: it does not; names what it has.
    """
    seen, taken = robot.observation_features, robot.action_features
    scalars = [name for name, kind in seen.items() if not isinstance(kind, tuple | list)]
    pictures = [name for name, kind in seen.items() if isinstance(kind, tuple | list)]
    for name in features:
        if name not in scalars or name not in taken:
            raise LookupError(
                f"feature {name!r}: the robot measures {', '.join(scalars)} "
                f"and takes {', '.join(taken)}; set the option features"
            )
    left_out = sorted(set(taken) - set(features))
    if left_out:
        raise LookupError(f"nothing would be sent for {', '.join(left_out)}; the policy lacks them")
    for role, name in cameras.items():
        if name not in pictures:
            have = ", ".join(pictures) or "none"
            raise LookupError(f"camera {role} is feature {name!r}; the robot's cameras are {have}")


def check_calibrated(robot: Any) -> None:  # noqa: ANN401
    """Check that a connected robot is calibrated.

    Raises:
        LookupError: it is not; calibrating asks a person.
    """
    if not robot.is_calibrated:
        raise LookupError("the robot is not calibrated; run lerobot-calibrate for it first")


def main() -> None:
    """Connect the robot and serve it; never returns."""
    # The script's own folder holds gwp-edge's drivers, which nobody here may import by accident.
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    try:
        options = json.loads(sys.stdin.readline())
        robot = make_robot(options["type"], options["config"], options["plugins"])
        check_features(robot, options["features"], options["cameras"])
        robot.connect(calibrate=False)
        check_calibrated(robot)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server = Server(
            robot,
            listener,
            features=options["features"],
            cameras=options["cameras"],
            period_s=1.0 / options["rate_hz"],
            patience_s=options["patience_s"],
        )
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "stopping", True))
        # Bound under another name first: whoever sees the name can connect.
        listener.bind(options["socket"] + ".new")
        listener.listen(16)
        os.rename(options["socket"] + ".new", options["socket"])
        server.run(options["parent_pid"])
    except Exception as e:  # the process's top
        traceback.print_exc()
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
