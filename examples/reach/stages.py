"""The stages before the network: statistics, prompts, autoencoder, latents.

Each leaves a file that is used again by the next run, where it was made from the same data.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Episode, Windows, example_layout, make_windows, read_episodes
from model import SIZES
from records import TrainingLog, data_fingerprint, file_hash, is_made_from, write_made
from vae import LATENT_CHANNELS, encode, load_vae, make_vae, save_vae, scale, train_vae
from words import embed

from gwp_edge.calibration.statistics import compute_statistics, write_statistics
from gwp_edge.errors import SpecError
from gwp_edge.evaluation.tasks import TouchTask

logger = logging.getLogger("reach")

_SAY_EVERY_S = 20.0
_N_SCALE_WINDOWS = 256
_VAE_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the network is trained on.

    Attributes:
        windows: normalised states and actions.
        latents: normalised, of every window, (n, 48, 2, h, w), float16.
        source: what they were made from.
    """

    windows: Windows
    latents: torch.Tensor
    source: Mapping[str, Any]


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
    out_dir: Path,
    roots: Sequence[Path],
    log: TrainingLog,
    *,
    vae_steps: int,
    vae_from: Path | None,
    seed: int,
) -> Prepared:
    """Make statistics, autoencoder and latents, or read those that are there.

    Raises:
        SpecError: a dataset is damaged, or a file that is there was made from something else.
    """
    data = data_fingerprint(roots)
    tasks = list(TouchTask.instructions)
    stats_path = out_dir / "norm_stats.json"
    if not is_made_from(stats_path, {"data": data}):
        t0_s = time.monotonic()
        n_rows = example_layout().n_rows
        stats = compute_statistics(roots, n_rows=n_rows, width=SIZES.n_action_channels)
        write_made(stats_path, {"data": data}, lambda path: write_statistics(path, stats))
        log.note("statistics", seconds=time.monotonic() - t0_s, data=data)
    (out_dir / "t5_embedding").mkdir(exist_ok=True)
    for task in tasks:
        torch.save({"t5_embedding": embed(task)}, out_dir / "t5_embedding" / f"{task}.pt")
    vae_dir, raw_path = out_dir / "base_model" / "vae", out_dir / "latents.pt"
    vae_source = {"data": data, "n_steps": vae_steps, "seed": seed}
    if vae_from is not None:
        _take_over(vae_from, vae_dir, raw_path)
    has_vae = vae_from is not None or is_made_from(vae_dir, vae_source)
    episodes = read_episodes(roots)
    logger.info("read %d episodes", len(episodes))
    windows = make_windows(episodes, tasks, stats_path, SIZES.n_action_channels)
    if not has_vae:
        _make_vae(vae_dir, episodes, windows, log, vae_source)
    vae = {"sha256": file_hash(vae_dir / _VAE_FILE)}
    source = {"data": data, "n_windows": len(windows.frame), "vae": vae}
    if not is_made_from(raw_path, source):
        t0_s = time.monotonic()
        raw = encode_windows(vae_dir, episodes, windows)
        write_made(raw_path, source, lambda path: torch.save(raw, path))
        log.note("latents", seconds=time.monotonic() - t0_s, n_windows=len(raw))
    return Prepared(windows=windows, latents=_normalised(raw_path, vae_dir), source=source)


def _normalised(raw_path: Path, vae_dir: Path) -> torch.Tensor:
    mean, std = scale(load_vae(vae_dir))
    try:
        raw = torch.load(raw_path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise SpecError(f"{raw_path}: damaged ({e}); remove it to make it again") from e
    return ((raw.float() - mean) / std).half()


def _take_over(vae_from: Path, vae_dir: Path, raw_path: Path) -> None:
    """Copy autoencoder and latents of another training, records included."""
    their_vae = vae_from / "base_model" / "vae"
    for path in (their_vae / _VAE_FILE, vae_from / "latents.pt"):
        if not path.is_file():
            raise SpecError(f"--vae-from {vae_from}: has no {path.relative_to(vae_from)}")
    if vae_dir.exists() and file_hash(vae_dir / _VAE_FILE) != file_hash(their_vae / _VAE_FILE):
        raise SpecError(f"--vae-from {vae_from}: {vae_dir} is another autoencoder; remove it first")
    shutil.copytree(their_vae, vae_dir, dirs_exist_ok=True)
    for name in ("latents.pt", "latents.pt.made-from.json", "base_model/vae.made-from.json"):
        beside = raw_path.with_name("copy.part")
        shutil.copy(vae_from / name, beside)
        beside.replace(raw_path.parent / name)


def _make_vae(
    vae_dir: Path,
    episodes: Sequence[Episode],
    windows: Windows,
    log: TrainingLog,
    source: Mapping[str, Any],
) -> None:
    n_steps, seed = source["n_steps"], source["seed"]
    t0_s = time.monotonic()
    torch.manual_seed(seed)
    vae = make_vae()
    history = train_vae(vae, [e.canvases for e in episodes], n_steps=n_steps, seed=seed)
    seconds = time.monotonic() - t0_s
    vae_dir.parent.mkdir(exist_ok=True)

    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        # Twice: the statistics of the latents are those of the weights as they are stored.
        save_vae(vae, folder, torch.zeros(1, LATENT_CHANNELS, 1, 1, 2))
        every = max(1, len(windows.frame) // _N_SCALE_WINDOWS)
        some = Windows(**{k: getattr(windows, k)[::every] for k in Windows.__dataclass_fields__})
        latents = encode_windows(folder, episodes, some).float()
        save_vae(load_vae(folder), folder, latents)

    write_made(vae_dir, source, write)
    (vae_dir.parent.parent / "vae_losses.json").write_text(json.dumps(history))
    log.note("autoencoder", seconds=seconds, n_steps=n_steps, steps_per_s=n_steps / seconds)
    logger.info("vae: %d steps in %.0f s", n_steps, seconds)
