"""What every tick of the PiPER driver repeats for every frame; compiled from piper_c/."""

from collections.abc import Iterable, Sequence

API: int

class FrameStore:
    """The newest of every frame that one arm sends by itself. Threads: one owner.

    The three joint frames become a pose only when their stamps lie within 3 ms, so two halves of
    different moments are never shown as one. A frame whose values no arm can have is not taken.

    Attributes:
        joint_mdeg: six angles of one moment, 0.001 degree; zeros before the first whole pose.
        gripper_um: total opening, 0.001 mm; None before the first frame.
        t_pose_ns: stamp of the oldest of the three frames of ``joint_mdeg``; 0: never.
        t_oldest_ns: stamp of what has not been heard for longest of pose, gripper, status and the
            six motor_slow frames; 0: never.
        n_poses: whole poses.
        n_frames: frames taken, good and bad.
        n_bad: frames of a wrong length or with impossible values.
    """

    @property
    def joint_mdeg(self) -> list[int]: ...
    @property
    def gripper_um(self) -> int | None: ...
    @property
    def t_pose_ns(self) -> int: ...
    @property
    def t_oldest_ns(self) -> int: ...
    @property
    def n_poses(self) -> int: ...
    @property
    def n_frames(self) -> int: ...
    @property
    def n_bad(self) -> int: ...
    def clear(self) -> None:
        """Forget everything."""

    def forget_judged(self) -> None:
        """Return the next frame of each kind as news, even if it says nothing new."""

    def take_frames(
        self, frames: Iterable[tuple[int, bytes, int]]
    ) -> list[tuple[int, bytes, int]] | None:
        """Take frames, return those that may say something that has to be judged, or None.

        These are the frames that do not come by themselves, every status frame that differs from
        the last one, and those of gripper and motor_slow whose status byte does.

        Args:
            frames: (identifier with error flag, data, receive time in ns), in order of arrival.
        """

    def data_of(self, can_id: int) -> bytes | None:
        """Return the newest data of ``can_id``; None before the first frame of it."""

    def t_ns_of(self, can_id: int) -> int:
        """Return the stamp of the newest frame of ``can_id``; 0: never."""

class SocketPort:
    """A non-blocking socket of equal packets, many per system call. Threads: one owner.

    Args:
        fd: the socket; stays the caller's, who must close it after the last call here.
        wanted: identifiers to deliver, beside error frames, from a Unix socket whose packets are a
            struct can_frame and a monotonic time in ns; None for a raw CAN socket, which filters
            by itself.

    Attributes:
        emptied: the last ``drain`` came to the end of the queue.
    """

    def __new__(cls, fd: int, wanted: Iterable[int] | None) -> SocketPort: ...
    @property
    def emptied(self) -> bool: ...
    def drain(
        self,
        store: FrameStore | None,
        offset_ns: int = 0,
        first_ns: int = 0,
        last_ns: int = 0,
        /,
    ) -> list[tuple[int, bytes, int]] | None:
        """Move waiting frames, 512 at most, into ``store``; return what ``take_frames`` does.

        Args:
            store: None: return all frames instead.
            offset_ns: of a CAN socket, what makes a CLOCK_REALTIME stamp a monotonic time.
            first_ns: of a CAN socket, the earliest time that a frame can have.
            last_ns: of a CAN socket, the latest, and that of frames without a stamp.

        Raises:
            OSError: the socket fails.
            EOFError: the other side has closed.
        """

    def send(self, frames: Sequence[tuple[int, bytes]]) -> int:
        """Send (identifier, 8 bytes) each, 16 at most; return how many the kernel took.

        Raises:
            OSError: the first one was refused.
            ValueError: too many, an identifier of more than 11 bits, or not 8 bytes.
        """

def read_arms(stores: tuple[FrameStore, ...]) -> tuple[bytes, bytes, int, int] | None:
    """Return the state of arms, or None while one has no whole pose or no gripper.

    Returns:
        (positions, velocities, t_position_ns, t_oldest_ns): the first two are float64 of shape
        (7 * arms,), per arm six joints in rad and rad/s and the gripper in m; NaN where no speed
        is known, as for grippers. The times are those of the oldest position, and of what has not
        been heard for longest of all that comes by itself.
    """

def encode_arms(
    targets: list[float], ranges: bytes, effort_mnm: int
) -> tuple[tuple[tuple[int, bytes], ...], ...] | None:
    """Return the four frames of each arm, or None if a target is not in its range or no number.

    Args:
        targets: per arm six joints, rad, and the gripper's opening, m.
        ranges: float64 of shape (targets, 2): the least and the largest that is accepted.
        effort_mnm: gripper torque, 0.001 N.m, 0 to 2000.

    Raises:
        ValueError: not as many targets as ranges, or the effort is out of range.
        TypeError: a target is no number at all.
    """
