"""Frames through shared memory: order, torn reads, failure, names and leftovers."""

import multiprocessing
import zlib

import numpy as np
import pytest

from gwp_edge import shared_memory
from gwp_edge.errors import DeviceError
from gwp_edge.frame_ring import FrameRing
from gwp_edge.shared_memory import LatestRing, SharedSegment, remove_leftovers, unique_name

WIDTH, HEIGHT = 160, 120


@pytest.fixture
def ring():
    ring = FrameRing.create(unique_name("test"), WIDTH, HEIGHT)
    yield ring
    ring.close()
    ring.unlink()


def _image(seed: int) -> np.ndarray:
    """An image whose first four bytes are the checksum of the others."""
    image = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    flat = image.reshape(-1)
    flat[:4] = np.frombuffer(zlib.crc32(flat[4:]).to_bytes(4, "little"), np.uint8)
    return image


def _checksum_fits(image: np.ndarray) -> bool:
    flat = image.reshape(-1)
    return zlib.crc32(flat[4:].tobytes()).to_bytes(4, "little") == flat[:4].tobytes()


def _publish(ring: FrameRing, image: np.ndarray, idx: int = 0) -> None:
    ring.publish(image, t_captured_ns=1000 + idx, t_received_ns=2000, frame_idx=idx, domain="sim")


def _hammer(name: str, n_frames: int) -> None:
    ring = FrameRing.attach(name)
    images = [_image(seed) for seed in range(8)]
    for i in range(n_frames):
        _publish(ring, images[i % len(images)], i)
    ring.close()


def test_latest_before_first_frame_is_none(ring):
    assert ring.latest("cam_high") is None


def test_latest_after_publish_returns_frame_with_its_times(ring):
    _publish(ring, _image(1), 7)
    _publish(ring, _image(2), 8)
    reader = FrameRing.attach(ring.name)
    frame = reader.latest("cam_high")
    assert (frame.camera, frame.frame_idx, frame.domain) == ("cam_high", 8, "sim")
    assert (frame.t_captured_ns, frame.t_received_ns) == (1008, 2000)
    np.testing.assert_array_equal(frame.image, _image(2))
    assert not frame.image.flags.writeable
    assert reader.latest("cam_high") is frame
    reader.close()


def test_frame_kept_by_reader_survives_writer_going_round(ring):
    _publish(ring, _image(1))
    kept = ring.latest("cam_high")
    for i in range(2 * ring.n_slots):
        _publish(ring, _image(2), i)
    np.testing.assert_array_equal(kept.image, _image(1))


def test_reader_of_hammering_writer_never_sees_torn_frame(ring):
    """A writer in another process, as fast as it can; whatever is read must be whole."""
    n_frames = 20_000
    writer = multiprocessing.get_context("spawn").Process(
        target=_hammer, args=(ring.name, n_frames)
    )
    writer.start()
    reader = FrameRing.attach(ring.name)
    seen: list[int] = []
    try:
        while writer.is_alive() or not seen or seen[-1] != n_frames - 1:
            assert writer.exitcode in (None, 0)
            frame = reader.latest("cam_high")
            if frame is None or (seen and frame.frame_idx == seen[-1]):
                continue
            assert _checksum_fits(frame.image), f"torn frame {frame.frame_idx}"
            seen.append(frame.frame_idx)
    finally:
        writer.join()
        reader.close()
    assert seen == sorted(seen)


def test_writing_interrupted_by_error_keeps_frame_before(ring):
    _publish(ring, _image(1), 1)
    with pytest.raises(RuntimeError), ring._ring.writing() as slot:  # noqa: PT012
        slot["image"][...] = 0
        raise RuntimeError
    assert ring.latest("cam_high").frame_idx == 1
    _publish(ring, _image(3), 2)
    np.testing.assert_array_equal(ring.latest("cam_high").image, _image(3))


def test_record_overwritten_during_read_is_not_accepted():
    """The copy is replaced by one during which the writer goes once round the ring."""
    buffer = memoryview(bytearray(4096))
    ring = LatestRing(buffer, np.dtype([("a", np.int64)]), 2)
    writer = LatestRing(buffer, np.dtype([("a", np.int64)]), 2)

    def write(value: int) -> None:
        with writer.writing() as slot:
            slot["a"] = value

    class Lapped:
        def __init__(self, slot):
            self.slot = slot
            self.n_copies = 0

        def copy(self):
            record = self.slot.copy()
            self.n_copies += 1
            if self.n_copies == 1:
                write(2), write(3)
            return record

    write(1)
    ring._slots[0] = Lapped(ring._slots[0])
    record, count = ring.latest()
    assert (int(record["a"]), count) == (3, 3)


def test_publish_wrong_size_is_refused_and_keeps_frame(ring):
    _publish(ring, _image(1), 1)
    with pytest.raises(DeviceError, match="expected uint8"):
        _publish(ring, np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))
    with pytest.raises(DeviceError, match="expected uint8"):
        _publish(ring, np.zeros((HEIGHT, WIDTH, 3), np.float32))
    assert ring.latest("cam_high").frame_idx == 1


def test_mark_failed_makes_every_reader_raise_first_message(ring):
    _publish(ring, _image(1))
    reader = FrameRing.attach(ring.name)
    assert reader.latest("cam_high") is not None
    ring.mark_failed("camera cam_high: unplugged; plug it in")
    ring.mark_failed("later and less telling")
    with pytest.raises(DeviceError, match="unplugged; plug it in"):
        reader.latest("cam_high")
    reader.close()


def test_create_existing_name_is_refused(ring):
    with pytest.raises(DeviceError, match="exists already"):
        FrameRing.create(ring.name, WIDTH, HEIGHT)


@pytest.mark.parametrize("name", ["", "../etc/passwd", "a/b", "a" * 201])
def test_create_bad_name_is_refused(name):
    with pytest.raises(DeviceError, match="expected 1 to 200"):
        FrameRing.create(name, WIDTH, HEIGHT)


@pytest.mark.parametrize(("width", "height", "n_slots"), [(0, 4, 4), (4, -1, 4), (4, 4, 1)])
def test_create_bad_size_is_refused(width, height, n_slots):
    with pytest.raises(DeviceError, match="expected"):
        FrameRing.create(unique_name("bad"), width, height, n_slots)


def test_create_larger_than_shared_memory_is_refused_and_leaves_nothing():
    name = unique_name("huge")
    with pytest.raises(DeviceError, match="cannot reserve"):
        SharedSegment.create(name, 1 << 50)
    assert not (shared_memory.SHM_DIR / name).exists()


def test_attach_absent_name_is_refused():
    with pytest.raises(DeviceError, match="is not there"):
        FrameRing.attach(unique_name("absent"))


def test_attach_other_segment_is_refused():
    segment = SharedSegment.create(unique_name("other"), 4096)
    with pytest.raises(DeviceError, match="not a frame ring"):
        FrameRing.attach(segment.name)
    segment.close()
    segment.unlink()


def test_close_twice_and_use_after_close():
    ring = FrameRing.create(unique_name("test"), WIDTH, HEIGHT)
    ring.close()
    ring.close()
    with pytest.raises(DeviceError, match="is closed"):
        ring.latest("cam_high")
    ring.unlink()
    ring.unlink()
    assert not (shared_memory.SHM_DIR / ring.name).exists()


def test_remove_leftovers_takes_unused_segments_only(ring):
    abandoned = FrameRing.create(unique_name("abandoned"), WIDTH, HEIGHT)
    assert abandoned.name not in remove_leftovers()
    abandoned.close()  # as the kernel does for a killed process
    removed = remove_leftovers()
    assert abandoned.name in removed
    assert ring.name not in removed
    _publish(ring, _image(1))
