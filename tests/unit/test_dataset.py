"""Reading LeRobot datasets: every frame is the right one, and every fault has a name."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
av = pytest.importorskip("av")

from lerobot_writer import NAMES, edit_table, write_dataset  # noqa: E402

from gwp_edge.errors import SpecError  # noqa: E402
from gwp_edge.lerobot.dataset import LeRobotDataset  # noqa: E402
from gwp_edge.spec import (  # noqa: E402
    CameraView,
    CanvasSpec,
    Channel,
    NetworkSpec,
    PolicySpec,
    SamplerSpec,
    Statistics,
)

pytestmark = pytest.mark.export
ROOT = Path(__file__).parents[1] / "data" / "dataset"


def spec_for(channels, cameras, **changes):
    network = dict.fromkeys(NetworkSpec.__struct_fields__, 1) | {"family": "gwp-0.5", "eps": 1e-6}
    network["n_action_channels"] = 32
    views = tuple(
        CameraView(camera=c, x_px=32 * i, y_px=0, width_px=32, height_px=32)
        for i, c in enumerate(cameras)
    )
    zeros = (0.0,) * len(channels)
    values = {
        "network": NetworkSpec(**network),
        "sampler": SamplerSpec(shift=5.0, sigmas=(1.0, 0.0), timesteps=(1000.0,), rounding="exact"),
        "canvas": CanvasSpec(width_px=32 * len(cameras), height_px=32, views=views),
        "channels": tuple(
            Channel(
                name=n,
                unit="m" if "gripper" in n else "rad",
                kind="absolute" if "gripper" in n else "delta",
            )
            for n in channels
        ),
        "statistics": Statistics(
            state_q01=zeros, state_q99=zeros, action_q01=zeros, action_q99=zeros
        ),
        "n_rows": 48,
        "period_ns": 33_333_333,
        "tasks": ("t",),
        "embodiment": 0,
    }
    return PolicySpec(**(values | changes))


SPEC = spec_for([n.removesuffix(".pos") for n in NAMES], ["front"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a written dataset; read it, never change it."""
    return write_dataset(tmp_path_factory.mktemp("lerobot") / "kitchen")


@pytest.fixture
def copy(shared, tmp_path):
    return Path(shutil.copytree(shared, tmp_path / "kitchen"))


def every_frame(path):
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def check_every_frame(dataset, camera):
    """Compare random access with one plain pass over the files."""
    pictures = {p: every_frame(p) for p in {e.videos[camera].path for e in dataset.episodes}}
    pairs = [(e.idx, f) for e in dataset.episodes for f in range(e.n_frames)]
    for order in (range(len(pairs)), np.random.default_rng(0).permutation(len(pairs))):
        for i in order:
            episode, frame = pairs[i]
            span = dataset.episode(episode).videos[camera]
            expected = pictures[span.path][round(span.t_start_s * dataset.fps) + frame]
            np.testing.assert_array_equal(dataset.image(episode, frame, camera), expected)
    assert sum(map(len, pictures.values())) == dataset.n_frames


@pytest.mark.parametrize("camera", ["cam_high", "cam_left_wrist", "cam_right_wrist"])
def test_image_of_every_frame_of_av1_equals_plain_decoding(camera):
    with LeRobotDataset.open(ROOT) as dataset:
        check_every_frame(dataset, camera)


@pytest.mark.parametrize("codec", ["h264", "mpeg4", "libsvtav1"])
def test_image_with_several_files_and_reordered_frames_is_exact(codec, shared, tmp_path):
    if codec != "h264":
        try:
            av.codec.Codec(codec, "w")
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"PyAV was built without {codec}")
        shared = write_dataset(tmp_path / "d", codec=codec, lengths=(40, 30, 35))
    with LeRobotDataset.open(shared) as dataset:
        check_every_frame(dataset, "front")


def test_open_real_dataset_reads_everything():
    with LeRobotDataset.open(ROOT) as dataset:
        assert (dataset.n_episodes, dataset.n_frames, dataset.fps) == (4, 342, 30.0)
        assert dataset.cameras == ("cam_high", "cam_left_wrist", "cam_right_wrist")
        assert dataset.state_names[6] == "left_gripper.pos"
        assert [e.n_frames for e in dataset.episodes] == [75, 82, 89, 96]
        sample = dataset.sample(3, 90)
        assert sample.task == "pick the lemon"
        assert sample.prompt_path.name == "episode_000003.pt"
        assert set(sample.images) == set(dataset.cameras)
        assert all(image.shape == (240, 320, 3) for image in sample.images.values())
        np.testing.assert_array_equal(sample.state, dataset.state(3)[90])
        # The window ends at the episode's last row, which repeats.
        np.testing.assert_array_equal(sample.actions[:6], dataset.action(3)[90:])
        np.testing.assert_array_equal(sample.actions[6:], np.tile(dataset.action(3)[-1], (42, 1)))
        channels = [n.removesuffix(".pos") for n in dataset.state_names]
        dataset.check_against(spec_for(channels, dataset.cameras))


def test_rows_of_every_episode_are_those_that_were_written(shared):
    from lerobot_writer import motion

    with LeRobotDataset.open(shared) as dataset:
        for i in (2, 0, 1, 2):
            state, action = motion(dataset.episode(i).n_frames, 3, seed=i)
            np.testing.assert_array_equal(dataset.state(i), state)
            np.testing.assert_array_equal(dataset.action(i), action)
        assert [e.data_path.name for e in dataset.episodes] == [
            "file-000.parquet",
            "file-000.parquet",
            "file-001.parquet",
        ]
        assert [s.task for s in dataset.samples([(0, 0), (1, 5)])] == ["pick", "place"]
        assert dataset.sample(0, 0).prompt_path is None


def test_names_under_one_key_are_read(tmp_path):
    feature = {"dtype": "float32", "shape": [3], "names": {"motors": list(NAMES)}}
    front = {"dtype": "video", "shape": [48, 64, 3], "names": None}
    features = {
        "observation.state": feature,
        "action": feature,
        "observation.images.front": front,
    }
    dataset = LeRobotDataset.open(write_dataset(tmp_path, info={"features": features}))
    assert dataset.state_names == NAMES


def test_sample_out_of_range_is_refused(shared):
    with LeRobotDataset.open(shared) as dataset:
        for episode, frame in ((3, 0), (-1, 0), (0, 60), (0, -1)):
            with pytest.raises(SpecError, match=r"episode"):
                dataset.sample(episode, frame)
        with pytest.raises(SpecError, match="no camera wrist; it has front"):
            dataset.image(0, 0, "wrist")
        with pytest.raises(SpecError, match="n_rows"):
            dataset.sample(0, 0, n_rows=0)


# --- a dataset that does not fit the policy


def with_channel(i, **changes):
    channels = list(SPEC.channels)
    channels[i] = Channel(
        **({k: getattr(channels[i], k) for k in ("name", "unit", "kind")} | changes)
    )
    return [c.name for c in channels]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_for([c.name for c in SPEC.channels], ["front", "wrist"]), "needs camera wrist"),
        (spec_for(["arm_joint1", "arm_gripper"], ["front"]), "expected 2 state channels, got 3"),
        (
            spec_for(["arm_joint2", "arm_joint1", "arm_gripper"], ["front"]),
            "channel 0 should be arm_joint2, got arm_joint1.*another order",
        ),
        (spec_for(with_channel(1, name="elbow"), ["front"]), "should be elbow.*not the policy's"),
        (spec_for([c.name for c in SPEC.channels], ["front"], period_ns=20_000_000), "50 fps"),
        (
            spec_for([c.name for c in SPEC.channels], ["front"], n_rows=56),
            "episode 2 has 55 frames, a chunk has 56",
        ),
    ],
)
def test_check_against_other_policy_names_the_difference(shared, spec, message):
    with LeRobotDataset.open(shared) as dataset:
        dataset.check_against(SPEC)
        with pytest.raises(SpecError, match=message):
            dataset.check_against(spec)


def test_check_against_short_episode_left_out_passes(shared):
    spec = spec_for([c.name for c in SPEC.channels], ["front"], n_rows=56)
    LeRobotDataset.open(shared).check_against(spec, episodes=[0, 1])


@pytest.mark.parametrize(
    ("factor", "name"), [((57.3, 57.3, 1), "arm_joint"), ((1, 1, 1000), "arm_gripper")]
)
def test_check_against_values_in_degrees_or_millimetres_are_found(tmp_path, factor, name):
    def scaled(n, D, i):
        from lerobot_writer import motion

        return motion(n, D, i)[0] * np.float32(factor)

    dataset = LeRobotDataset.open(write_dataset(tmp_path, state=scaled))
    with pytest.raises(SpecError, match=rf"state of {name}.*degrees"):
        dataset.check_against(SPEC)


# --- faults on disk

DATA = "data/chunk-000/file-001.parquet"
VIDEO = "videos/observation.images.front/chunk-000/file-001.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def set_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def replaced(i, value):
    return lambda values: [*values[:i], value, *values[i + 1 :]]


OPEN_FAULTS = {
    "no info": (lambda r: (r / "meta/info.json").unlink(), "not a LeRobot dataset"),
    "v2.1": (lambda r: set_info(r, codebase_version="v2.1"), "got v2.1; convert it"),
    "malformed": (lambda r: (r / "meta/info.json").write_text("{"), "malformed"),
    "wrong type": (lambda r: set_info(r, fps="fast"), r"malformed.*fps"),
    "fps 0": (lambda r: set_info(r, fps=0), "fps"),
    "no state": (lambda r: set_info(r, features={}), r"observation\.state"),
    "no episodes": (lambda r: (r / EPISODES).unlink(), "expected episodes 0 to 2"),
    "no tables": (lambda r: shutil.rmtree(r / "meta/episodes"), "meta/episodes, found none"),
    "episode table cut": (lambda r: truncate(r / EPISODES, 0.7), "corrupt or truncated"),
    "totals": (lambda r: set_info(r, total_frames=999), "expected 999 frames"),
    "length": (lambda r: edit_table(r / EPISODES, "length", replaced(0, 61)), "says 61 frames"),
    "gap": (
        lambda r: [
            edit_table(r / EPISODES, "dataset_from_index", replaced(1, 61)),
            edit_table(r / EPISODES, "length", replaced(1, 69)),
        ],
        "episode 1 should begin at row 60",
    ),
    "no tasks": (lambda r: (r / "meta/tasks.parquet").unlink(), r"tasks\.parquet: file is missing"),
    "outside": (lambda r: set_info(r, data_path="../{chunk_index}{file_index}"), "leaves"),
    "template": (lambda r: set_info(r, data_path="{chunk_index.__class__}"), "asks for"),
    "stored as images": (
        lambda r: set_info(
            r,
            features=json.loads((r / "meta/info.json").read_text())["features"]
            | {"observation.images.front": {"dtype": "image", "shape": [48, 64, 3]}},
        ),
        "stored as video, got image",
    ),
}


@pytest.mark.parametrize("fault", OPEN_FAULTS)
def test_open_damaged_dataset_names_the_fault(copy, fault):
    damage, message = OPEN_FAULTS[fault]
    LeRobotDataset.open(copy)
    damage(copy)
    with pytest.raises(SpecError, match=message):
        LeRobotDataset.open(copy)


READ_FAULTS = {
    "data missing": (lambda r: (r / DATA).unlink(), r"file-001\.parquet: file is missing"),
    "data truncated": (lambda r: truncate(r / DATA, 0.5), r"file-001\.parquet: .*truncated"),
    "data is text": (lambda r: (r / DATA).write_text("hello"), "corrupt or truncated"),
    "time runs back": (
        lambda r: edit_table(r / DATA, "timestamp", replaced(7, 0.0)),
        "time stamps do not increase at frame 7",
    ),
    "other rate": (
        lambda r: edit_table(r / DATA, "timestamp", lambda v: [1.5 * t for t in v]),
        "expected frame 1 at 0.0333 s for 30 fps, got 0.0500 s",
    ),
    "frame numbers": (
        lambda r: edit_table(r / DATA, "frame_index", replaced(3, 9)),
        "frame_index does not count",
    ),
    "other episode": (
        lambda r: edit_table(r / DATA, "episode_index", replaced(3, 0)),
        "belong to another episode",
    ),
    "row lost": (lambda r: edit_table(r / DATA, "index", replaced(54, 999)), "incomplete"),
    "not finite": (
        lambda r: edit_table(r / DATA, "action", replaced(4, [0.0, float("nan"), 0.0])),
        "action is not finite in row 4",
    ),
    "video missing": (lambda r: (r / VIDEO).unlink(), r"file-001\.mp4: video file is missing"),
    "video header lost": (
        lambda r: truncate(r / VIDEO, 0.5),
        r"file-001\.mp4: video is corrupt or truncated",
    ),
    "video is text": (lambda r: (r / VIDEO).write_text("hello"), "corrupt or truncated"),
}


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_sample_of_damaged_dataset_names_the_fault(copy, fault):
    damage, message = READ_FAULTS[fault]
    damage(copy)
    with LeRobotDataset.open(copy) as dataset:
        dataset.sample(0, 10)
        with pytest.raises(SpecError, match=message):
            dataset.sample(2, 50)


def test_image_of_video_shorter_than_its_episodes_is_refused(copy):
    edit_table(
        copy / "meta/episodes/chunk-000/file-001.parquet",
        "videos/observation.images.front/from_timestamp",
        lambda v: [t + 0.5 for t in v],
    )
    with LeRobotDataset.open(copy) as dataset:
        dataset.image(2, 30, "front")
        with pytest.raises(SpecError, match="video ends before"):
            dataset.image(2, 45, "front")


def test_image_of_video_at_another_rate_is_refused(copy, tmp_path):
    slow = write_dataset(tmp_path / "slow", fps=20)
    shutil.copy(slow / VIDEO, copy / VIDEO)
    with (
        LeRobotDataset.open(copy) as dataset,
        pytest.raises(SpecError, match="does not match the episode table"),
    ):
        dataset.image(2, 10, "front")


def test_image_of_other_size_is_refused(copy, tmp_path):
    from lerobot_writer import picture

    big = write_dataset(tmp_path / "big", video=lambda i, f: picture(i, f, 64, 64))
    shutil.copy(big / VIDEO, copy / VIDEO)
    with (
        LeRobotDataset.open(copy) as dataset,
        pytest.raises(SpecError, match=r"expected pictures of \(48, 64, 3\), got \(64, 64, 3\)"),
    ):
        dataset.image(2, 10, "front")


def test_sample_is_read_only(shared):
    with LeRobotDataset.open(shared) as dataset:
        sample = dataset.sample(0, 1)
    for array in (sample.state, sample.actions, sample.images["front"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.frame = 2


def test_image_of_overwritten_bytes_is_right_or_refused_never_wrong(copy, shared):
    content = bytearray((shared / VIDEO).read_bytes())
    half = len(content) // 2
    content[half : half + 300] = np.random.default_rng(0).bytes(300)
    (copy / VIDEO).write_bytes(content)
    n_refused = 0
    with LeRobotDataset.open(copy) as damaged, LeRobotDataset.open(shared) as good:
        for frame in range(55):
            try:
                image = damaged.image(2, frame, "front")
            except SpecError:
                n_refused += 1
            else:
                np.testing.assert_array_equal(image, good.image(2, frame, "front"))
    assert 0 < n_refused < 55


def test_image_when_the_container_seeks_too_far_is_still_exact(shared):
    """Some containers index key frames by decoding time and land behind the frame asked for."""
    from gwp_edge.lerobot.video import VideoReader

    class LateSeek:
        def __init__(self, container):
            self.container, self.decode, self.targets = container, container.decode, []

        def seek(self, target, *, stream):
            self.targets.append(target)
            late = round(0.9 / float(stream.time_base)) if target else 0
            self.container.seek(target + late, stream=stream)

    path = shared / "videos/observation.images.front/chunk-000/file-000.mp4"
    pictures = every_frame(path)
    reader = VideoReader(path, fps=30)
    late = reader._container = LateSeek(reader._container)
    for i in (110, 40, 7, 90):
        np.testing.assert_array_equal(reader.frame(i / 30), pictures[i])
    assert len(late.targets) > 4
    late.container.close()
