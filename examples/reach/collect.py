"""Write demonstrations of the touch task as a LeRobot v3.0 dataset.

    python examples/reach/collect.py build/reach/data --episodes 500

Half of the episodes start as the task does; the others start anywhere above the table, so that the
policy has seen how to go on from places where its own mistakes may bring it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from arguments import whole_number
from expert import joints_at, plan
from words import embed

from gwp_edge.drivers import piper_model
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import GwpError, SpecError
from gwp_edge.evaluation.tasks import FIRST_DEMONSTRATION_SEED, TouchTask
from gwp_edge.lerobot.writer import DatasetWriter, EpisodeRows
from gwp_edge.types import FloatArray, ImageArray

FPS = 30
#: Of SVT-AV1.
MAX_CRF = 63
_TICKS_PER_FRAME = 5
_NAMES = [*(f"joint{i}.pos" for i in range(1, 7)), "gripper.pos"]
# Where episodes that start anywhere start: x, y, z of the fingertips, m.
_ANYWHERE = ((0.19, -0.2, 0.07), (0.41, 0.2, 0.22))


def start_anywhere(world: SimWorld, seed: int) -> FloatArray:
    """Return a pose above the table for the episode of ``seed``, shape (7,), rad and m."""
    rng = np.random.default_rng((seed, 2))
    while True:
        try:
            joints = joints_at(rng.uniform(*_ANYWHERE))
        except SpecError:
            continue
        joints = joints + rng.uniform(-0.08, 0.08, len(joints))
        pose = np.append(joints, rng.choice([0.0, rng.uniform(0.0, 0.06)]))
        return np.clip(pose, *piper_model.command_range(1))


def demonstrate(
    task: TouchTask, world: SimWorld, seed: int, instruction: str
) -> tuple[EpisodeRows, dict[str, list[ImageArray]]] | None:
    """Run the expert once; None where it did not succeed."""
    task.reset(world, seed)
    if seed % 2:
        world.reset(seed, start=start_anywhere(world, seed))
        if any(world.touching(cube) for cube in task.instructions.values()):
            return None
    path = plan(world.position, world.body_pose(task.cube_of(instruction))[:3, 3])
    n_frames = int(path.duration_s * FPS)
    ticks_s = np.arange(n_frames * _TICKS_PER_FRAME) / (FPS * _TICKS_PER_FRAME)
    commands = path.at(ticks_s)
    states = []
    pictures: dict[str, list[ImageArray]] = {camera: [] for camera in world.cameras}
    reached = 0
    period_ns, t0_ns = world.period_ns, world.time_ns
    for i, command in enumerate(commands):
        if i % _TICKS_PER_FRAME == 0:
            states.append(world.position)
            for camera, images in pictures.items():
                images.append(world.render(camera))
        due_ns = t0_ns + int((ticks_s[i] + 1.0 / (FPS * _TICKS_PER_FRAME)) * 1e9)
        world.step(command, n_steps=max(1, round((due_ns - world.time_ns) / period_ns)))
        outcome = task.outcome(world, instruction)
        if outcome == "wrong object":
            return None
        reached += outcome == "success"
    if not reached:
        return None
    rows = EpisodeRows(
        state=np.array(states, np.float32),
        action=commands[::_TICKS_PER_FRAME].astype(np.float32),
        task=instruction,
    )
    return rows, pictures


def demonstrations(
    n_episodes: int, first_seed: int
) -> Iterator[tuple[EpisodeRows, dict[str, list[ImageArray]]]]:
    """Give ``n_episodes`` successful demonstrations, the instructions by turns."""
    task = TouchTask()
    instructions = list(task.instructions)
    with task.open_world(list(task.mounts)) as world:
        seed, n_done, n_failed = FIRST_DEMONSTRATION_SEED + first_seed, 0, 0
        while n_done < n_episodes:
            result = demonstrate(task, world, seed, instructions[n_done // 2 % 2])
            seed += 1
            if result is None:
                n_failed += 1
                if n_failed > 20 + n_done // 2:
                    raise SpecError(f"{n_failed} of {n_failed + n_done} demonstrations failed")
                continue
            n_done += 1
            yield result


def collect(root: Path, n_episodes: int, first_seed: int = 0, crf: int = 30) -> int:
    """Write a dataset of ``n_episodes`` into ``root``; return its number of frames.

    Raises:
        SpecError: ``root`` is not empty, the seeds are those of evaluations, or the expert fails
            too often.
    """
    if first_seed < 0:
        raise SpecError(
            f"first seed {first_seed}: expected 0 or more; it counts from "
            f"{FIRST_DEMONSTRATION_SEED}, and the seeds below are for evaluations"
        )
    if root.exists() and any(root.iterdir()):
        raise SpecError(f"{root}: already there and not empty; remove it or choose another name")
    task, options = TouchTask(), TouchTask().options()
    sizes = dict.fromkeys(task.mounts, (options.height_px, options.width_px))
    writer = DatasetWriter(
        root, names=_NAMES, fps=FPS, robot_type="piper_sim", sizes=sizes, crf=crf
    )
    embeddings = root / "t5_embedding"
    embeddings.mkdir()
    n_frames = 0
    for i, (rows, pictures) in enumerate(demonstrations(n_episodes, first_seed)):
        writer.add(rows, {camera: iter(images) for camera, images in pictures.items()})
        torch.save({"t5_embedding": embed(rows.task)}, embeddings / f"episode_{i:06d}.pt")
        n_frames += len(rows.state)
        if (i + 1) % 50 == 0:
            print(f"{i + 1} of {n_episodes} episodes, {n_frames} frames", flush=True)
    writer.close()
    return n_frames


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--episodes", type=whole_number(1), default=500)
    parser.add_argument(
        "--first-seed", type=whole_number(0), default=0, help="two parts need two ranges"
    )
    parser.add_argument(
        "--crf", type=whole_number(0, MAX_CRF), default=30, help="higher is smaller and coarser"
    )
    args = parser.parse_args(words)
    try:
        n = collect(args.root, args.episodes, args.first_seed, args.crf)
    except (GwpError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.root}: {args.episodes} episodes, {n} frames")


if __name__ == "__main__":
    main()
