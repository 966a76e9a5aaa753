"""Is a CAN network interface there, up, set to the right bitrate and ours alone; and what to do.

Who else receives from an interface is read in the format of the kernel's net/can/proc.c; not yet
run on hardware.
"""

from __future__ import annotations

import logging
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from gwp_edge.drivers.piper_codec import BITRATE_BPS
from gwp_edge.errors import DeviceError

logger = logging.getLogger(__name__)

_IFF_UP = 1
_ARPHRD_CAN = 280
_IP_PATIENCE_S = 2.0


#: Where the kernel lists the filters of every CAN socket, by kind of filter.
RECEIVE_LISTS = tuple(
    f"/proc/net/can/rcvlist_{kind}" for kind in ("all", "fil", "inv", "sff", "eff", "err")
)
_ANY_INTERFACE = "any"


class Receiver(NamedTuple):
    """One filter of one CAN socket.

    Attributes:
        interface: its name; ``any`` for a socket that hears all of them.
        row: identifier and mask as the kernel keeps them.
        owner: an opaque name of the socket; empty where the kernel hides it.
    """

    interface: str
    row: tuple[int, int]
    owner: str


class _BitTiming(msgspec.Struct):
    bitrate: int | None = None


class _InfoData(msgspec.Struct):
    state: str | None = None
    bittiming: _BitTiming | None = None


class _LinkInfo(msgspec.Struct):
    info_data: _InfoData | None = None


class _Link(msgspec.Struct):
    linkinfo: _LinkInfo | None = None


def bring_up_commands(name: str) -> str:
    """Return the commands that set the interface ``name`` up for a PiPER."""
    return (
        f"ip link set {name} down; "
        f"ip link set {name} type can bitrate {BITRATE_BPS} restart-ms 100; "
        f"ip link set {name} txqueuelen 64; ip link set {name} up"
    )


def ask_ip(name: str) -> bytes:
    """Return what ``ip`` says about the link ``name`` as JSON; empty where it cannot be asked."""
    command = ["ip", "-json", "-details", "link", "show", "dev", name]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_IP_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        logger.debug("%s: %s", " ".join(command), e)
        return b""
    return done.stdout


def parse_link(text: bytes) -> tuple[int | None, str | None]:
    """Return bitrate (bit/s) and controller state in the JSON of ``ask_ip``; None where absent.

    Virtual interfaces have neither.
    """
    try:
        links = msgspec.json.decode(text, type=list[_Link])
    except msgspec.DecodeError:
        return None, None
    info = links[0].linkinfo if links else None
    data = info.info_data if info is not None else None
    if data is None:
        return None, None
    return (data.bittiming.bitrate if data.bittiming is not None else None), data.state


def check_interface(
    name: str,
    *,
    sysfs: Path = Path("/sys/class/net"),
    ask: Callable[[str], bytes] = ask_ip,
) -> None:
    """Check that the network interface ``name`` is there, is CAN, is up and runs at 1 Mbit/s.

    Where ``ip`` is missing the bitrate stays unchecked; error frames then show it.

    Raises:
        DeviceError: it is not; names the command that helps.
    """
    folder = sysfs / name
    if not folder.is_dir():
        present = sorted(p.name for p in sysfs.glob("*can*")) if sysfs.is_dir() else []
        raise DeviceError(
            f"CAN interface {name} is missing (there: {', '.join(present) or 'none'}): plug its "
            "adapter in, load its driver (gs_usb for most), and name it by USB path with udev"
        )
    try:
        kind = int((folder / "type").read_text())
        flags = int((folder / "flags").read_text(), 0)
    except (OSError, ValueError) as e:
        raise DeviceError(f"CAN interface {name}: cannot read {folder}: {e}") from e
    if kind != _ARPHRD_CAN:
        raise DeviceError(f"interface {name} is not CAN (type {kind}, expected {_ARPHRD_CAN})")
    if not flags & _IFF_UP:
        raise DeviceError(f"CAN interface {name} is down: {bring_up_commands(name)}")
    bitrate_bps, state = parse_link(ask(name))
    if bitrate_bps is not None and bitrate_bps != BITRATE_BPS:
        raise DeviceError(
            f"CAN interface {name} runs at {bitrate_bps} bit/s, a PiPER at {BITRATE_BPS}: "
            f"{bring_up_commands(name)}"
        )
    if state == "BUS-OFF":
        raise DeviceError(
            f"CAN interface {name} is bus-off: check cable and termination (120 ohm at both "
            f"ends), then {bring_up_commands(name)}"
        )


def parse_receivers(text: str) -> list[Receiver]:
    """Return the filters in one of ``RECEIVE_LISTS``; what is no row of its table is left out.

    The columns are device, can_id, can_mask, function, userdata, matches and ident; newer kernels
    may put more before the last three.

    Source: Linux, net/can/proc.c, ``can_print_rcvlist`` (commit 0dd66f13f53e).
    """
    receivers = []
    for line in text.splitlines():
        columns = line.split()
        try:
            interface, can_id, mask, *_, owner, _matches, _ident = columns
            row, is_hidden = (int(can_id, 16), int(mask, 16)), int(owner, 16) == 0
        except ValueError:
            continue
        receivers.append(Receiver(interface, row, "" if is_hidden else owner))
    return receivers


def count_others(name: str, receivers: Iterable[Receiver], own: frozenset[tuple[int, int]]) -> int:
    """Return how many sockets beside our driver's receive from the interface ``name``.

    Such a socket may belong to a program that drives the arm. One that was opened without
    loopback, as piper-sdk 0.6.2 opens its, sends commands that no other socket of this machine is
    shown: this list alone gives it away. A socket that receives nothing is in no list.

    Args:
        name: of the interface.
        receivers: of all lists.
        own: rows of a socket of ours, see ``piper_can.filter_rows``. Whoever has exactly these is
            gwp-edge, whose commands are looped back and seen.

    Returns:
        The number; at least so many where the kernel does not name the sockets.
    """
    rows_of: defaultdict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    for receiver in receivers:
        if receiver.interface in (name, _ANY_INTERFACE):
            rows_of[receiver.owner][receiver.row] += 1
    unnamed = rows_of.pop("", Counter[tuple[int, int]]())
    n_ours = min((unnamed[row] for row in own), default=0)
    unnamed.subtract(dict.fromkeys(own, n_ours))
    n_named = sum(1 for rows in rows_of.values() if frozenset(rows) != own)
    return n_named + max(unnamed.values(), default=0)
