"""Train the example's policy from demonstrations: autoencoder, latents, then the network.

    python examples/reach/train.py build/reach/policy build/reach/data0 build/reach/data1

Every stage leaves a file in the output folder and is skipped when that file is there; the last
stage writes a checkpoint every few minutes and goes on from it. ``--no-video`` trains on the
action loss alone, for comparison.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from data import Episode, Windows, example_layout, make_windows, read_episodes
from model import SIZES, Batch, losses, make_network, prompts, write_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from vae import encode, load_vae, make_vae, save_vae, scale, train_vae
from words import embed

from gwp_edge.calibration.statistics import compute_statistics, write_statistics
from gwp_edge.errors import GwpError
from gwp_edge.evaluation.tasks import TouchTask
from gwp_edge.export.unreduced import UnreducedNetwork

logger = logging.getLogger("reach")

BATCH = 32
_LEARNING_RATE = 1.5e-3
_WARM_UP_STEPS = 100
_EMA = 0.998
_SAVE_EVERY_S = 120.0
_SAY_EVERY_S = 20.0


class Trainer:
    """Trains the network on cached latents; resumes where it was stopped.

    Args:
        out_dir: where state and losses go.
        latents: normalised latents of every window, (n, 48, 2, h, w), float16.
        windows: normalised states and actions.
        n_steps: steps in all.
        with_video: train on the future video too.
        n_copies: noisy copies of the actions per window.
        seed: of weights, batches and noise.
        batch: windows per step.
    """

    def __init__(
        self,
        out_dir: Path,
        latents: torch.Tensor,
        windows: Windows,
        *,
        n_steps: int,
        n_copies: int,
        with_video: bool,
        seed: int,
        batch: int = BATCH,
    ) -> None:
        self._state_path = out_dir / "training.pt"
        self._losses_path = out_dir / "losses.csv"
        self._latents = latents
        self._state = torch.from_numpy(windows.state)
        self._actions = torch.from_numpy(windows.actions)
        self._task = torch.from_numpy(windows.task)
        self._prompts = prompts(list(TouchTask.instructions))
        self._n_steps, self._n_copies, self._with_video = n_steps, n_copies, with_video
        self.network = make_network(seed)
        self.average = copy.deepcopy(self.network)
        for p in self.average.parameters():
            p.requires_grad = False
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self._generator = torch.Generator().manual_seed(seed)
        self._n_batch = batch
        self._step = 0
        self._seconds = 0.0
        self.rows: list[tuple[int, float, float]] = []

    def _rate(self, step: int) -> float:
        if step < _WARM_UP_STEPS:
            return (step + 1) / _WARM_UP_STEPS
        return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self._n_steps)))

    def _batch(self) -> Batch:
        idx = torch.randint(len(self._state), (self._n_batch,), generator=self._generator)
        latent = self._latents[idx].float()
        return Batch(
            state=self._state[idx],
            actions=self._actions[idx],
            reference=latent[:, :, :1],
            future=latent[:, :, 1:] if self._with_video else None,
            prompt=self._prompts[self._task[idx]],
        )

    def _train_step(self) -> None:
        # At these sizes plain attention is faster on a CPU than the fused one, backward above all.
        with (
            warnings.catch_warnings(),
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            # Norms keep float32 weights under autocast on purpose; their fused form is no loss.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            action, video = losses(
                self.network, self._batch(), self._generator, n_copies=self._n_copies
            )
            loss = action + video
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        keep = min(_EMA, (1.0 + self._step) / (10.0 + self._step))
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(p, 1.0 - keep)
        self._step += 1
        self.rows.append((self._step, float(action.detach()), float(video.detach())))

    def train(self) -> UnreducedNetwork:
        """Train to the last step; return the averaged network."""
        self._resume()
        t_start = t_saved = t_said = time.monotonic()
        before_s = self._seconds
        while self._step < self._n_steps:
            self._train_step()
            now = time.monotonic()
            self._seconds = before_s + now - t_start
            if now - t_said > _SAY_EVERY_S:
                t_said = now
                recent = np.mean([row[1:] for row in self.rows[-100:]], axis=0)
                logger.info(
                    "step %d of %d, %.0f s: action %.4f, video %.4f",
                    *(self._step, self._n_steps, self._seconds, *recent),
                )
            if now - t_saved > _SAVE_EVERY_S or self._step == self._n_steps:
                t_saved = now
                self._save()
        return self.average

    def _save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
            "step": self._step,
            "seconds": self._seconds,
            "rows": self.rows,
        }
        beside = self._state_path.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(self._state_path)
        with self._losses_path.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "action", "video"), *self.rows])

    def _resume(self) -> None:
        if not self._state_path.is_file():
            return
        state = torch.load(self._state_path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        self._step, self._seconds = state["step"], state["seconds"]
        self.rows = [tuple(row) for row in state["rows"]]
        logger.info("going on from step %d", self._step)


def encode_windows(
    folder: Path, episodes: Sequence[Episode], windows: Windows, *, batch: int = 8
) -> torch.Tensor:
    """Return raw latents of every window, present and future frame, (n, 48, 2, h, w), float16."""
    vae = load_vae(folder)
    latents = []
    t_said = time.monotonic()
    for first in range(0, len(windows.frame), batch):
        chosen = slice(first, first + batch)
        pairs = zip(windows.episode[chosen], windows.frame[chosen], strict=True)
        clips = np.stack([episodes[e].clip(int(f)) for e, f in pairs])
        latents.append(encode(vae, clips).half())
        if time.monotonic() - t_said > _SAY_EVERY_S:
            t_said = time.monotonic()
            logger.info("encoded %d of %d windows", first + len(clips), len(windows.frame))
    return torch.cat(latents)


def prepare(
    out_dir: Path, roots: Sequence[Path], *, vae_steps: int, vae_from: Path | None
) -> tuple[Windows, torch.Tensor]:
    """Make statistics, autoencoder and latents, or read those that are there."""
    stats_path = out_dir / "norm_stats.json"
    if not stats_path.is_file():
        n_rows = example_layout().n_rows
        stats = compute_statistics(roots, n_rows=n_rows, width=SIZES.n_action_channels)
        write_statistics(stats_path, stats)
    tasks = list(TouchTask.instructions)
    (out_dir / "t5_embedding").mkdir(exist_ok=True)
    for task in tasks:
        torch.save({"t5_embedding": embed(task)}, out_dir / "t5_embedding" / f"{task}.pt")
    episodes = read_episodes(roots)
    logger.info("read %d episodes", len(episodes))
    windows = make_windows(episodes, tasks, stats_path, SIZES.n_action_channels)
    vae_dir = out_dir / "base_model" / "vae"
    raw_path = out_dir / "latents.pt"
    if vae_from is not None and not raw_path.is_file():
        shutil.copytree(vae_from / "base_model" / "vae", vae_dir, dirs_exist_ok=True)
        shutil.copy(vae_from / "latents.pt", raw_path)
    if not vae_dir.is_dir():
        t0 = time.monotonic()
        vae = make_vae()
        history = train_vae(vae, [e.canvases for e in episodes], n_steps=vae_steps)
        beside = out_dir / "vae.part"
        save_vae(vae, beside, torch.zeros(1, 48, 1, 1, 2))
        sample = slice(0, None, max(1, len(windows.frame) // 256))
        some = Windows(**{k: getattr(windows, k)[sample] for k in Windows.__dataclass_fields__})
        save_vae(load_vae(beside), beside, encode_windows(beside, episodes, some).float())
        vae_dir.parent.mkdir(exist_ok=True)
        beside.replace(vae_dir)
        (out_dir / "vae_losses.json").write_text(json.dumps(history))
        logger.info("vae: %d steps in %.0f s", vae_steps, time.monotonic() - t0)
    if not raw_path.is_file():
        torch.save(encode_windows(vae_dir, episodes, windows), raw_path)
    mean, std = scale(load_vae(vae_dir))
    latents = torch.load(raw_path, weights_only=True)
    return windows, ((latents.float() - mean) / std).half()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="folder for checkpoint, VAE, statistics, prompts")
    parser.add_argument("data", type=Path, nargs="+", help="LeRobot datasets from collect.py")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=2, help="noisy copies of each window")
    parser.add_argument("--no-video", action="store_true", help="train on the action loss alone")
    parser.add_argument("--vae-from", type=Path, help="take autoencoder and latents from there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        windows, latents = prepare(
            args.out, args.data, vae_steps=args.vae_steps, vae_from=args.vae_from
        )
    except GwpError as e:
        sys.exit(f"error: {e}")
    logger.info("training on %d windows", len(windows.frame))
    trainer = Trainer(
        args.out,
        latents,
        windows,
        n_steps=args.steps,
        n_copies=args.copies,
        with_video=not args.no_video,
        seed=args.seed,
    )
    write_checkpoint(trainer.train().state_dict(), args.out / "checkpoint")
    logger.info("wrote %s", args.out / "checkpoint")


if __name__ == "__main__":
    main()
