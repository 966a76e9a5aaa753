"""A PiPER driver wired to fake arms in a clock that only moves when somebody sleeps."""

from gwp_edge.drivers.piper import PiperArm
from gwp_edge.drivers.piper_fake import FakePiper
from gwp_edge.drivers.piper_fake_bus import MemoryWire
from gwp_edge.drivers.piper_link import CodecLink
from gwp_edge.drivers.piper_options import parse_options
from gwp_edge.spec import Channel

MS = 1_000_000
TICK_NS = 5 * MS


class RigClock:
    """A clock that sleeping moves, and nothing else; the arms talk meanwhile, heard or not."""

    def __init__(self):
        self.t_ns = 1_000_000_000
        self.wires = []

    def now_ns(self):
        return self.t_ns

    def sleep_until_ns(self, t_ns):
        while self.t_ns < t_ns:
            self.t_ns = min(self.t_ns + MS, t_ns)
            for wire in self.wires:
                wire.run()


def channels(n_arms):
    sides = ("left", "right")[:n_arms]
    return [
        Channel(name=f"{side}_{i}", unit="m" if i == 6 else "rad", kind="delta")
        for side in sides
        for i in range(7)
    ]


class Rig:
    """One or two fake arms and a driver for them.

    Attributes:
        clock, arm: the clock and the driver.
        fakes, buses: one per arm, left first.
    """

    def __init__(self, n_arms=1, fakes=None, **options):
        self.clock = RigClock()
        self.fakes = fakes or [FakePiper() for _ in range(n_arms)]
        names = ["can_left", "can_right"] if n_arms == 2 else ["can0"]
        self.wires = [MemoryWire(f, self.clock) for f in self.fakes]
        self.clock.wires = self.wires
        self.names = names
        self.buses = [w.end(n) for w, n in zip(self.wires, names, strict=True)]
        reach = {"left": names[0], "right": names[1]} if n_arms == 2 else {"can": names[0]}
        self.options = parse_options({**reach, **options})
        self.arm = self._driver(self.buses)

    def _driver(self, buses):
        by_name = dict(zip(self.names, buses, strict=True))
        return PiperArm(
            channels(len(self.fakes)),
            self.options,
            clock=self.clock,
            open_link=lambda name: CodecLink(by_name[name]),
        )

    def second_driver(self):
        """Return another driver on ends of its own, as another program has, and those ends."""
        buses = [w.end(n) for w, n in zip(self.wires, self.names, strict=True)]
        return self._driver(buses), buses

    def inject(self, can_id, data):
        """Put a frame of another node on the first arm's wire."""
        self.bus.queue.append((can_id, data, self.clock.t_ns))

    @property
    def fake(self):
        return self.fakes[0]

    @property
    def bus(self):
        return self.buses[0]

    def run(self, target, n_ticks):
        """Send ``target`` and read for ``n_ticks``; return the last state."""
        state = None
        for _ in range(n_ticks):
            self.clock.t_ns += TICK_NS
            state = self.arm.state()
            self.arm.send(target)
        return state

    def watch(self, n_ticks=1):
        """Read only for ``n_ticks``; return the last state."""
        state = None
        for _ in range(n_ticks):
            self.clock.t_ns += TICK_NS
            state = self.arm.state()
        return state

    def fault_after(self, deadline_ns):
        """Read until a fault shows; return (text, time it took), or fail at the deadline."""
        return self._after(deadline_ns, "fault")

    def caution_after(self, deadline_ns):
        """Read until a caution shows; return (text, time it took), or fail at the deadline."""
        return self._after(deadline_ns, "caution")

    def _after(self, deadline_ns, what):
        begin_ns = self.clock.t_ns
        while self.clock.t_ns - begin_ns <= deadline_ns:
            text = getattr(self.watch(), what)
            if text is not None:
                return text, self.clock.t_ns - begin_ns
        raise AssertionError(f"no {what} within {deadline_ns / MS} ms")
