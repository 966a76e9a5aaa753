"""Capture times: every kind of stamp ends on the monotonic clock, and none in the future."""

import pytest

from gwp_edge.drivers.camera_clock import CameraClock

MS = 1_000_000
EPOCH = 1_700_000_000_000_000_000


class Clocks:
    """A wall and a monotonic clock to wind by hand."""

    def __init__(self):
        self.now = 5_000 * MS
        self.offset = EPOCH

    def wall(self):
        return self.now + self.offset

    def make(self):
        return CameraClock(self.wall, lambda: self.now)


@pytest.fixture
def clocks():
    return Clocks()


def test_wall_stamp_is_moved_by_the_offset(clocks):
    clock = clocks.make()
    stamp = clocks.wall() - 12 * MS
    assert clock.capture_time_ns(stamp, "wall", clocks.now, "global") == (
        clocks.now - 12 * MS,
        "global",
    )


def test_wall_stamp_after_the_clock_was_set_uses_a_new_offset(clocks):
    """An operator or NTP sets the clock by an hour: frames must not look an hour old."""
    clock = clocks.make()
    clock.capture_time_ns(clocks.wall(), "wall", clocks.now, "host")
    clocks.now += 30 * MS
    clocks.offset += 3_600_000 * MS
    t_ns, _ = clock.capture_time_ns(clocks.wall() - 7 * MS, "wall", clocks.now, "host")
    assert t_ns == clocks.now - 7 * MS
    assert clock.n_implausible == 0


def test_wall_offset_follows_a_slewed_clock(clocks):
    clock = clocks.make()
    for _ in range(200):
        clocks.now += 100 * MS
        clocks.offset += 50_000  # 0.5 ms per second
        t_ns, _ = clock.capture_time_ns(clocks.wall() - 3 * MS, "wall", clocks.now, "host")
    assert abs(clocks.now - 3 * MS - t_ns) <= 1 * MS


def test_wall_stamp_of_the_future_is_counted_and_arrival_taken(clocks):
    clock = clocks.make()
    t_ns, domain = clock.capture_time_ns(clocks.wall() + 60_000 * MS, "wall", clocks.now, "global")
    assert (t_ns, domain) == (clocks.now, "host")
    assert clock.n_implausible == 1


def test_wall_stamp_that_stays_old_is_of_a_wrong_clock(clocks):
    clock = clocks.make()
    for i in range(40):
        clocks.now += 33 * MS
        t_ns, domain = clock.capture_time_ns(
            clocks.wall() - 2000 * MS, "wall", clocks.now, "global"
        )
        late = i < 29
        assert domain == ("global" if late else "host")
        assert t_ns == clocks.now - (2000 * MS if late else 0)
    assert clock.n_implausible == 11


def test_late_pictures_now_and_then_are_no_wrong_clock(clocks):
    clock = clocks.make()
    for i in range(90):
        clocks.now += 33 * MS
        age_ms = 5 if i % 30 == 29 else 2000
        t_ns, _ = clock.capture_time_ns(clocks.wall() - age_ms * MS, "wall", clocks.now, "global")
        assert clocks.now - t_ns == age_ms * MS
    assert clock.n_implausible == 0


@pytest.mark.parametrize("kind", ["wall", "device"])
def test_pictures_that_waited_in_a_queue_stay_as_old_as_they_are(clocks, kind):
    """A camera process that hung for 1.5 s: its first pictures used to count as fresh."""
    clock = clocks.make()
    for _ in range(20):
        clocks.now += 33 * MS
        stamp = clocks.wall() - 5 * MS if kind == "wall" else clocks.now - 5 * MS
        clock.capture_time_ns(stamp, kind, clocks.now, "hardware")
    begin = clocks.now
    clocks.now += 1500 * MS
    ages = []
    for i in range(10):
        taken = begin + (i + 1) * 33 * MS
        stamp = taken - 5 * MS + (clocks.offset if kind == "wall" else 0)
        t_ns, _ = clock.capture_time_ns(stamp, kind, clocks.now, "hardware")
        ages.append(clocks.now - t_ns)
    assert ages[0] > 1400 * MS
    assert ages == sorted(ages, reverse=True)
    assert clock.n_implausible == 0


def test_device_clock_that_was_set_back_for_good_is_believed_again(clocks):
    clock = clocks.make()
    times = []
    for i in range(100):
        clocks.now += 33 * MS
        # After a gap of four seconds it is two seconds behind, and goes on from there.
        clocks.now += 4000 * MS * (i == 50)
        stamp = clocks.now - 2000 * MS * (i >= 50)
        times.append(clocks.now - clock.capture_time_ns(stamp, "device", clocks.now, "device")[0])
    assert times[49] == times[-1] == 0
    assert times[50] == 2000 * MS


def test_wall_stamp_slightly_early_is_cut_to_arrival(clocks):
    clock = clocks.make()
    t_ns, _ = clock.capture_time_ns(clocks.wall() + 2 * MS, "wall", clocks.now, "global")
    assert t_ns == clocks.now


def test_device_stamp_jitter_of_the_transport_vanishes(clocks):
    clock = clocks.make()
    times = []
    for i in range(60):
        captured = clocks.now + 33 * MS * i
        delay = (4 + (i * 7) % 20) * MS
        t_ns, domain = clock.capture_time_ns(33 * MS * i, "device", captured + delay, "hardware")
        times.append(t_ns - captured)
    assert domain == "hardware"
    # From the moment the least delay was seen, the spacing is the device's own.
    assert set(times[40:]) == {4 * MS}


def test_device_stamp_after_a_wrap_starts_over(clocks):
    clock = clocks.make()
    for i in range(10):
        clock.capture_time_ns(2**32 * 1000 + i * 33 * MS, "device", clocks.now, "hardware")
        clocks.now += 33 * MS
    t_ns, _ = clock.capture_time_ns(5 * MS, "device", clocks.now, "hardware")
    assert t_ns == clocks.now


def test_device_stamp_is_never_in_the_future(clocks):
    clock = clocks.make()
    for i in range(400):
        # A device clock that runs fast by 1 %.
        received = clocks.now + 33 * MS * i
        t_ns, _ = clock.capture_time_ns(round(33.33 * MS * i), "device", received, "hardware")
        assert t_ns <= received
