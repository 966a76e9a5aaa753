"""Write LeRobot v3.0 datasets of any shape for tests: several files, odd names, planted faults."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gwp_edge.realtime import ordinary_threads

NAMES = ("arm_joint1.pos", "arm_joint2.pos", "arm_gripper.pos")


def motion(n, D, seed):
    """Return a smooth state and the action that follows it, (n, D) float32."""
    rng = np.random.default_rng(seed)
    t = np.arange(n + 1)[:, None] / 30
    wave = 0.4 * np.sin(2 * np.pi * rng.uniform(0.2, 0.6, D) * t + rng.uniform(0, 6, D))
    return wave[:-1].astype(np.float32), wave[1:].astype(np.float32)


def picture(seed, frame, h=48, w=64):
    """Return a picture whose content says which episode and frame it is."""
    y, x = np.mgrid[:h, :w]
    image = np.stack([(2 * x + 40 * seed) % 200, (3 * y) % 200, (x + y + 7 * frame) % 200], -1)
    image[4:12, 4:12] = (5 * frame) % 250
    return image.astype(np.uint8)


def write_video(path, pictures, fps, codec):
    """Encode ``pictures``; mpeg4 and h264 get B-frames and long groups of pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 25
        if codec == "h264":
            stream.options = {"bf": "3", "preset": "veryfast", "crf": "10", "threads": "1"}
            stream.codec_context.max_b_frames = 3
        with ordinary_threads():  # SVT-AV1 makes the whole process real-time, run as root
            stream.codec_context.open()
        for i, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_dataset(
    root,
    *,
    lengths=(60, 70, 55),
    files=(0, 0, 1),
    names=NAMES,
    cameras=("front",),
    fps=30,
    codec="h264",
    video=picture,
    state=None,
    action=None,
    info=None,
    tasks=("pick", "place"),
):
    """Write a dataset with episode i in data and video file ``files[i]``; return its root.

    ``state`` and ``action``: functions (n, D, episode) of the arrays; ``info``: changes to
    meta/info.json.
    """
    root, D = Path(root), len(names)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows, episodes, clips = {}, [], {}
    for i, n in enumerate(lengths):
        s, a = motion(n, D, seed=i)
        s = s if state is None else state(n, D, i)
        a = a if action is None else action(n, D, i)
        rows.setdefault(files[i], []).append((i, s, a))
        episode = {
            "episode_index": i,
            "tasks": [tasks[i % len(tasks)]],
            "length": n,
            "data/chunk_index": 0,
            "data/file_index": files[i],
            "dataset_from_index": int(starts[i]),
            "dataset_to_index": int(starts[i + 1]),
        }
        for camera in cameras:
            clip = clips.setdefault((camera, files[i]), [])
            prefix = f"videos/observation.images.{camera}/"
            episode[prefix + "chunk_index"] = 0
            episode[prefix + "file_index"] = files[i]
            episode[prefix + "from_timestamp"] = len(clip) / fps
            episode[prefix + "to_timestamp"] = (len(clip) + n) / fps
            clip.extend(video(i, f) for f in range(n))
        episodes.append(episode)
    for (camera, file), clip in clips.items():
        path = f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4"
        write_video(root / path, clip, fps, codec)
    for file, parts in rows.items():
        write_rows(root / f"data/chunk-000/file-{file:03d}.parquet", parts, starts, fps, len(tasks))
    # One episode table for each data file, as LeRobot writes them for long recordings.
    for file in sorted(rows):
        path = root / f"meta/episodes/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = [e for e, f in zip(episodes, files, strict=True) if f == file]
        pq.write_table(pa.Table.from_pylist(mine), path)
    index = {"task_index": list(range(len(tasks))), "__index_level_0__": list(tasks)}
    pq.write_table(pa.table(index), root / "meta/tasks.parquet")
    shape = list(video(0, 0).shape)
    vectors = {"dtype": "float32", "shape": [D], "names": list(names)}
    pictures = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    content = {
        "codebase_version": "v3.0",
        "robot_type": "test",
        "fps": fps,
        "total_episodes": len(lengths),
        "total_frames": int(starts[-1]),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "observation.state": vectors,
            "action": vectors,
            **{f"observation.images.{c}": pictures for c in cameras},
        },
        **(info or {}),
    }
    (root / "meta/info.json").write_text(json.dumps(content))
    return root


def write_rows(path, parts, starts, fps, n_tasks):
    """Write the rows of the episodes ``parts`` = (index, state, action)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        k: []
        for k in ("index", "episode_index", "frame_index", "task_index", "timestamp", "s", "a")
    }
    for i, s, a in parts:
        n = len(s)
        columns["index"].append(starts[i] + np.arange(n))
        columns["episode_index"].append(np.full(n, i))
        columns["frame_index"].append(np.arange(n))
        columns["task_index"].append(np.full(n, i % n_tasks))
        columns["timestamp"].append((np.arange(n) / fps).astype(np.float32))
        columns["s"].append(s)
        columns["a"].append(a)
    joined = {k: np.concatenate(v) for k, v in columns.items()}
    table = {k: joined[k] for k in list(joined)[:5]}
    for key, name in (("s", "observation.state"), ("a", "action")):
        flat = pa.array(np.asarray(joined[key], np.float32).ravel())
        table[name] = pa.FixedSizeListArray.from_arrays(flat, joined[key].shape[1])
    pq.write_table(pa.table(table), path)


def edit_table(path, column, change):
    """Rewrite one column of a Parquet file with ``change(values)``."""
    table = pq.read_table(path)
    values = change(table[column].to_pylist())
    i = table.column_names.index(column)
    pq.write_table(table.set_column(i, column, pa.array(values, table.schema.field(i).type)), path)
