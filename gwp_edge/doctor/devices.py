"""Checks of CAN interfaces and cameras. Not yet run on a real bus or camera."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gwp_edge.doctor.system import (
    CheckResult,
    Status,
    System,
    failed,
    is_jetson,
    passed,
    skipped,
    warned,
)
from gwp_edge.errors import DeviceError

CAN_BITRATE = 1_000_000
CAN_QUEUE_MIN = 64
# USB ids of adapters that the kernel's gs_usb driver serves (candleLight and its kin).
GS_USB_IDS = {("1d50", "606f"), ("1209", "2323"), ("1cd2", "606f"), ("16d0", "10b8")}
_RANK: dict[Status, int] = {"pass": 0, "skip": 0, "warn": 1, "fail": 2}


class _Bitrate(msgspec.Struct):
    bitrate: int = 0


class _Errors(msgspec.Struct):
    tx: int = 0
    rx: int = 0


class _CanData(msgspec.Struct):
    state: str = ""
    restart_ms: int = 0
    bittiming: _Bitrate = msgspec.field(default_factory=_Bitrate)
    bittiming_bitrate: int = 0
    berr_counter: _Errors = msgspec.field(default_factory=_Errors)


class _CanStats(msgspec.Struct):
    bus_error: int = 0
    error_passive: int = 0
    bus_off: int = 0


class _LinkInfo(msgspec.Struct):
    info_kind: str = ""
    info_data: _CanData = msgspec.field(default_factory=_CanData)
    info_xstats: _CanStats = msgspec.field(default_factory=_CanStats)


class _Link(msgspec.Struct):
    ifname: str = ""
    flags: list[str] = []
    txqlen: int = 0
    linkinfo: _LinkInfo = msgspec.field(default_factory=_LinkInfo)


class _Camera(msgspec.Struct):
    name: str = ""
    serial: str = ""
    usb: str = ""
    firmware: str = ""


class _Cameras(msgspec.Struct):
    cameras: list[_Camera] = []
    error: str = ""


def check_can(system: System) -> list[CheckResult]:
    """Judge every CAN interface and who else receives from it; without any, say why."""
    links = check_links(system)
    names = [link.name.removeprefix("can ") for link in links if link.name != "can"]
    return [*links, *check_receivers(system, names)]


def check_piper_driver(_system: System) -> list[CheckResult]:
    """Tell whether the PiPER driver's compiled part is there; nothing else needs it."""
    name = "piper driver"
    try:
        import gwp_edge.drivers.piper_core  # noqa: F401
    except DeviceError as e:
        detail, _, fix = str(e).partition(": ")
        return warned(name, detail, fix)
    return passed(name, "its compiled part is here")


def check_links(system: System) -> list[CheckResult]:
    """Judge every CAN interface; without any, say why there is none."""
    answer = system.run("ip", "-details", "-statistics", "-json", "link", "show", "type", "can")
    if answer is None:
        return skipped("can", "the command ip is missing: sudo apt-get install iproute2")
    if answer.exit_code != 0:
        return skipped("can", f"ip link ended with exit code {answer.exit_code}")
    # ip prints nothing at all, or empty objects, where no interface matches.
    links = msgspec.json.decode(answer.stdout or "[]", type=list[_Link])
    named = [link for link in links if link.ifname]
    if not named:
        return _explain_no_can(system)
    return [_judge_link(system, link) for link in named]


def check_receivers(system: System, interfaces: Sequence[str]) -> list[CheckResult]:
    """Tell whether others receive from each interface; nothing where the kernel does not say.

    Not yet run on hardware.
    """
    if check_piper_driver(system)[0].status != "pass":
        return []  # what it would receive from is unknown, and it cannot run
    # A run's own driver may be opening its socket between two of the lists, which then shows half
    # of it; another program is there at the second look as well.
    looks = [_count_others(system, interfaces) for _ in range(2)]
    results: list[CheckResult] = []
    for interface in interfaces if all(looks) else ():
        name = f"can {interface} receivers"
        n_others = min(look[interface] for look in looks)
        if n_others == 0:
            results += passed(name, "no other program receives from this interface")
            continue
        fix = "stop other programs that drive the arm: their commands may be invisible here"
        plural = "receiver" if n_others == 1 else "receivers"
        results += warned(name, f"{n_others} other {plural} on this interface", fix)
    return results


def _count_others(system: System, interfaces: Sequence[str]) -> dict[str, int]:
    """Return how many others receive from each interface; empty where the kernel does not say."""
    from gwp_edge.drivers import can_interface, piper_can, piper_link

    texts = [system.read(path) or "" for path in can_interface.RECEIVE_LISTS]
    if not any(text.lstrip().startswith("receive list") for text in texts):
        return {}
    receivers = [r for text in texts for r in can_interface.parse_receivers(text)]
    own = piper_can.filter_rows(piper_link.RECEIVED_IDS)
    return {name: can_interface.count_others(name, receivers, own) for name in interfaces}


def check_cameras(system: System) -> list[CheckResult]:
    """RealSense cameras: library importable, each on USB 3."""
    name = "cameras"
    answer = system.probe("realsense")
    if answer is None or not answer.stdout:
        return failed(name, "pyrealsense2 crashed or took too long", "unplug the cameras, retry")
    facts = msgspec.json.decode(answer.stdout, type=_Cameras)
    if "No module named" in facts.error:
        return skipped(name, "pyrealsense2 is not installed: pip install 'gwp-edge[realsense]'")
    if "libusb" in facts.error:
        return failed(name, facts.error, "sudo apt-get install libusb-1.0-0")
    if facts.error:
        return failed(name, facts.error, "pip install 'gwp-edge[realsense]'")
    if not facts.cameras:
        return warned(
            name,
            "no RealSense camera listed",
            "plug them in; listed for root only: install librealsense's udev rules",
        )
    return [_judge_camera(camera) for camera in facts.cameras]


def _judge_camera(camera: _Camera) -> CheckResult:
    name = f"camera {camera.serial or 'without serial number'}"
    detail = f"{camera.name}, firmware {camera.firmware or 'unknown'}, USB {camera.usb or '?'}"
    if not camera.usb:
        return CheckResult(name=name, status="skip", detail=f"{detail}: speed not reported")
    if camera.usb.startswith("3"):
        return CheckResult(name=name, status="pass", detail=detail)
    fix = "a USB 3 port and a short USB 3 cable; plug in firmly, turn a USB-C plug round"
    return CheckResult(name=name, status="fail", detail=f"{detail}: too slow", fix=fix)


def bring_up_command(interface: str) -> str:
    """Return the command that configures an interface as the arm needs it."""
    return (
        f"sudo ip link set {interface} down; sudo ip link set {interface} type can "
        f"bitrate {CAN_BITRATE} restart-ms 100; "
        f"sudo ip link set {interface} txqueuelen {CAN_QUEUE_MIN}; sudo ip link set {interface} up"
    )


def _judge_link(system: System, link: _Link) -> CheckResult:
    data, stats = link.linkinfo.info_data, link.linkinfo.info_xstats
    driver = _driver(system, link.ifname)
    bitrate = data.bittiming.bitrate or data.bittiming_bitrate
    problems: list[tuple[Status, str]] = []
    if "UP" not in link.flags:
        problems.append(("fail", "down"))
    elif data.state in ("BUS-OFF", "STOPPED", "SLEEPING"):
        problems.append(("fail", f"controller {data.state}"))
    elif data.state in ("ERROR-PASSIVE", "ERROR-WARNING"):
        problems.append(("warn", f"controller {data.state}: arm off, cable or termination"))
    if bitrate != CAN_BITRATE:
        problems.append(("fail", f"bitrate {bitrate}, the arm speaks {CAN_BITRATE}"))
    if data.restart_ms == 0:
        problems.append(("warn", "restart-ms 0: a bus-off stays until someone restarts it"))
    if link.txqlen < CAN_QUEUE_MIN:
        problems.append(("warn", f"txqueuelen {link.txqlen}: one late tick can overflow it"))
    counted = [
        f"{label} {value}"
        for label, value in (
            ("tx errors", data.berr_counter.tx),
            ("rx errors", data.berr_counter.rx),
            ("bus errors", stats.bus_error),
            ("error-passive", stats.error_passive),
            ("bus-off", stats.bus_off),
        )
        if value > 0
    ]
    if counted:
        problems.append(("warn", f"since start: {', '.join(counted)}"))
    if driver == "mttcan":
        problems.append(
            (
                "warn",
                "the Jetson's own controller (mttcan), not a USB adapter: it"
                " needs a transceiver, and scripts that count interfaces mistake it",
            )
        )
    status: Status = max((s for s, _ in problems), key=_RANK.__getitem__, default="pass")
    found = "; ".join(text for _, text in problems)
    detail = found or f"up, {bitrate} bit/s, restart-ms {data.restart_ms}, queue {link.txqlen}"
    return CheckResult(
        name=f"can {link.ifname}",
        status=status,
        detail=f"{detail} (driver {driver or 'unknown'})",
        fix=bring_up_command(link.ifname) if problems else "",
    )


def _driver(system: System, interface: str) -> str:
    text = system.read(f"/sys/class/net/{interface}/device/uevent") or ""
    rows = (line.removeprefix("DRIVER=") for line in text.splitlines() if "DRIVER=" in line)
    return next(rows, "")


def _explain_no_can(system: System) -> list[CheckResult]:
    plugged = [
        folder
        for folder in (p.rsplit("/", 1)[0] for p in system.glob("/sys/bus/usb/devices/*/idVendor"))
        if (system.read(f"{folder}/idVendor"), system.read(f"{folder}/idProduct")) in GS_USB_IDS
    ]
    loaded = bool(system.glob("/sys/module/gs_usb"))
    module = system.run("modinfo", "-F", "filename", "gs_usb")
    missing = module is not None and module.exit_code != 0 and not loaded
    build = (
        "build the kernel module gs_usb (CONFIG_CAN_GS_USB=m) for this kernel: JetPack 6 comes"
        " without it; see docs/jetson.md"
    )
    if plugged and missing:
        return failed("can", "a USB-CAN adapter is plugged in, the kernel lacks gs_usb", build)
    if plugged:
        return failed(
            "can",
            "a USB-CAN adapter is plugged in but has no interface",
            "sudo modprobe gs_usb; plug the adapter in again; read: sudo dmesg | tail",
        )
    if missing and is_jetson(system):
        return warned("can", "no CAN interface, and the kernel lacks gs_usb", build)
    return skipped("can", "no CAN interface and no USB-CAN adapter plugged in")
