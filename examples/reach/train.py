"""Train the example's policy from demonstrations: autoencoder, latents, then the network.

    python examples/reach/train.py build/reach/policy build/reach/data0 build/reach/data1

Every stage leaves a file in the output folder, with what it was made from, and is skipped when that
file is there; a file made from something else is an error. The last stage saves its state every two
minutes and goes on from it; the autoencoder, stopped half-way, begins anew. ``training.json`` says
what was run and how long it took. ``--no-video`` trains on the action loss alone, for comparison.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import math
import pickle
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from arguments import whole_number
from model import Batch, losses, make_network, prompts, write_checkpoint
from records import TrainingLog, check_same
from stages import Prepared, prepare
from torch.nn.attention import SDPBackend, sdpa_kernel
from vae import MIN_VAE_STEPS

from gwp_edge.errors import GwpError, SpecError
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
        prepared: windows, their latents, and what they were made from.
        n_steps: steps in all.
        with_video: train on the future video too.
        n_copies: noisy copies of the actions per window.
        seed: of weights, batches and noise.
        batch: windows per step.

    Raises:
        SpecError: not as many latents as windows.
    """

    def __init__(
        self,
        out_dir: Path,
        prepared: Prepared,
        *,
        n_steps: int,
        n_copies: int,
        with_video: bool,
        seed: int,
        batch: int = BATCH,
    ) -> None:
        self._state_path = out_dir / "training.pt"
        self._losses_path = out_dir / "losses.csv"
        windows, self._latents = prepared.windows, prepared.latents
        if len(self._latents) != len(windows.frame):
            raise SpecError(
                f"expected latents of {len(windows.frame)} windows, got {len(self._latents)}; "
                "remove latents.pt to make them again"
            )
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
        self._made_from = {
            **prepared.source,
            "n_steps": n_steps,
            "with_video": with_video,
            "n_copies": n_copies,
            "seed": seed,
            "batch": batch,
        }
        self._step = 0
        self.seconds = 0.0
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
        """Train to the last step; return the averaged network.

        Raises:
            SpecError: the state that is there is of another training, or damaged.
        """
        self._resume()
        t_start = t_saved = t_said = time.monotonic()
        before_s = self.seconds
        while self._step < self._n_steps:
            self._train_step()
            now = time.monotonic()
            self.seconds = before_s + now - t_start
            if now - t_said > _SAY_EVERY_S:
                t_said = now
                recent = np.mean([row[1:] for row in self.rows[-100:]], axis=0)
                logger.info(
                    "step %d of %d, %.0f s: action %.4f, video %.4f",
                    *(self._step, self._n_steps, self.seconds, *recent),
                )
            if now - t_saved > _SAVE_EVERY_S or self._step == self._n_steps:
                t_saved = now
                self._save()
        return self.average

    def _save(self) -> None:
        state = {
            "made_from": self._made_from,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
            "step": self._step,
            "seconds": self.seconds,
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
        try:
            state = torch.load(self._state_path, weights_only=True)
            made_from = state["made_from"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            LookupError,
            TypeError,
            pickle.UnpicklingError,
        ) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise SpecError(
                f"{self._state_path}: not the state of a training ({reason}); remove it to "
                "begin anew"
            ) from e
        check_same(self._state_path, made_from, self._made_from)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        self._step, self.seconds = state["step"], state["seconds"]
        self.rows = [tuple(row) for row in state["rows"]]
        logger.info("going on from step %d", self._step)


def read_command(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="folder for checkpoint, VAE, statistics, prompts")
    parser.add_argument("data", type=Path, nargs="+", help="LeRobot datasets from collect.py")
    parser.add_argument("--steps", type=whole_number(1), default=3000)
    parser.add_argument("--vae-steps", type=whole_number(MIN_VAE_STEPS), default=2000)
    parser.add_argument(
        "--copies", type=whole_number(1), default=2, help="noisy copies of each window"
    )
    parser.add_argument("--batch", type=whole_number(1), default=BATCH, help="windows per step")
    parser.add_argument("--no-video", action="store_true", help="train on the action loss alone")
    parser.add_argument("--vae-from", type=Path, help="take autoencoder and latents from there")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    """Do every stage that is not done, and write the checkpoint.

    Raises:
        SpecError: the data does not fit, or files are there that were made from something else.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = {
        "n_steps": args.steps,
        "with_video": not args.no_video,
        "n_copies": args.copies,
        "seed": args.seed,
        "batch": args.batch,
    }
    log = TrainingLog(args.out / "training.json", {**recipe, **_paths(args)})
    prepared = prepare(
        args.out,
        args.data,
        log,
        vae_steps=args.vae_steps,
        vae_from=args.vae_from,
        seed=args.seed,
    )
    logger.info("training on %d windows", len(prepared.windows.frame))
    trainer = Trainer(args.out, prepared, **recipe)
    average = trainer.train()
    write_checkpoint(average.state_dict(), args.out / "checkpoint")
    log.note(
        "network",
        seconds=trainer.seconds,
        steps_per_s=args.steps / trainer.seconds,
        last_losses=np.mean([row[1:] for row in trainer.rows[-100:]], axis=0).tolist(),
        **recipe,
    )
    logger.info("wrote %s after %.0f s", args.out / "checkpoint", trainer.seconds)


def _paths(args: argparse.Namespace) -> dict[str, object]:
    vae_from = None if args.vae_from is None else str(args.vae_from)
    return {"data": list(map(str, args.data)), "vae_from": vae_from, "vae_steps": args.vae_steps}


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    args = read_command(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(args)
    except (GwpError, OSError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")


if __name__ == "__main__":
    main()
