"""Random checkpoints of any size, for tests, benchmarks and memory checks.

Written tensor by tensor, so a 6 B one needs little more memory than its largest tensor. Weights
are scaled so that activations stay of order one, and every norm and bias is moved away from its
neutral value, so that a term that an exporter drops shows. The robot must never run one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.export.accounting import Shape, expected_tensors
from gwp_edge.export.sizes import FAMILY_OF_CLASS, NetworkSizes

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "float16", "bfloat16"]
Vae = Literal["small", "full"]
Progress = Callable[[int], None]

_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STEM = "diffusion_pytorch_model"
_N_STATISTICS = 32
_N_CHANNELS = 14
_N_PROMPT_ROWS = 11

_FULL = NetworkSizes(
    family="gwp-0.5",
    n_layers=30,
    n_heads=24,
    head_dim=128,
    visual_dim=3072,
    action_dim=1024,
    visual_ffn_dim=14336,
    action_ffn_dim=4096,
    n_action_channels=32,
    latent_channels=48,
    freq_dim=256,
    text_dim=4096,
    n_embodiments=1,
)
_FULL_DENSE = replace(_FULL, family="gwp-0", action_dim=3072, action_ffn_dim=14336)
_TINY = replace(
    _FULL,
    n_layers=2,
    n_heads=3,
    head_dim=32,
    visual_dim=96,
    action_dim=48,
    visual_ffn_dim=192,
    action_ffn_dim=96,
    freq_dim=64,
    text_dim=64,
    n_embodiments=2,
)
SIZES: dict[str, NetworkSizes] = {
    "gwp05-full": _FULL,
    "gwp0-full": _FULL_DENSE,
    "gwp05-wide4": replace(_FULL, n_layers=4),
    "gwp0-wide4": replace(_FULL_DENSE, n_layers=4),
    "gwp05-tiny": _TINY,
    "gwp0-tiny": replace(_TINY, family="gwp-0", action_dim=96, action_ffn_dim=192),
}


def write_checkpoint(
    out_dir: Path,
    sizes: NetworkSizes,
    *,
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    shard_bytes: int | None = None,
    vae: Vae | None = "small",
    progress: Progress | None = None,
) -> Path:
    """Write a random checkpoint and its companions.

    ``out_dir`` gets ``checkpoint/``, ``norm_stats.json``, ``t5_embedding/`` and
    ``base_model/vae/`` (float32, as released). It is written beside and renamed into place.

    Args:
        out_dir: folder to make; must not exist, or be empty.
        sizes: of the network; :data:`SIZES` has presets.
        dtype: element type of the network's tensors.
        seed: two seeds give different checkpoints, one seed the same, sharded or not.
        shard_bytes: largest shard, bytes; without it one file.
        vae: 4-wide or full-size (0.7 B parameters) Wan2.2 VAE; None for none.
        progress: called with the number of bytes written since the last call; the sum is
            :func:`checkpoint_bytes`.

    Returns:
        the folder of the network, ``out_dir/checkpoint``.

    Raises:
        SpecError: ``out_dir`` is not empty, or the disk is too small.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise SpecError(f"{out_dir}: already there and not an empty folder; choose another name")
    if dtype not in _TAGS:
        raise SpecError(f"element type {dtype!r}: expected {', '.join(_TAGS)}")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    need = checkpoint_bytes(sizes, dtype=dtype, vae=vae)
    free = shutil.disk_usage(out_dir.parent).free
    if free < need:
        raise SpecError(f"{out_dir}: needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB")
    report = progress or (lambda _: None)
    work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        network = work / "checkpoint"
        network.mkdir()
        _write_json(network / "config.json", _config(sizes))
        _write_weights(network, expected_tensors(sizes), dtype, seed, shard_bytes, report)
        if vae is not None:
            _write_vae(work / "base_model" / "vae", vae, sizes.latent_channels, seed, report)
        _write_json(work / "norm_stats.json", _statistics(seed))
        _write_prompt(work / "t5_embedding", sizes.text_dim, seed)
        work.chmod(0o755)
        os.replace(work, out_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out_dir / "checkpoint"


def checkpoint_bytes(sizes: NetworkSizes, *, dtype: Dtype, vae: Vae | None) -> int:
    """Return the bytes of weights that :func:`write_checkpoint` writes."""
    n_bytes = _ELEMENT_BYTES[dtype] * sum(map(math.prod, expected_tensors(sizes).values()))
    if vae is not None:
        n_bytes += 4 * sum(
            map(math.prod, vae_shapes(vae_config(vae, sizes.latent_channels, 0)).values())
        )
    return n_bytes


def random_tensor(name: str, shape: Shape, *, seed: int) -> torch.Tensor:
    """Return the values of one tensor, float32; they depend on nothing but name, shape and seed."""
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mean, deviation = _moments(name, shape)
    return torch.empty(shape).normal_(mean, deviation, generator=generator)


def _moments(name: str, shape: Shape) -> tuple[float, float]:
    leaf = name.rpartition(".")[2]
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if leaf == "bias":
        return 0.0, 0.1
    if leaf.endswith("scale_shift_table"):
        return 0.0, 0.2
    if len(shape) == 3:  # one matrix per embodiment, stored [embodiment, in, out]
        return 0.0, shape[1] ** -0.5
    # Of a causal kernel only the last temporal tap sees a single frame.
    fan_in = shape[1] * math.prod(shape[3:] if len(shape) == 5 else shape[2:])
    return 0.0, fan_in**-0.5


def _write_weights(
    folder: Path,
    shapes: dict[str, Shape],
    dtype: Dtype,
    seed: int,
    shard_bytes: int | None,
    progress: Progress,
) -> None:
    shards = _split(shapes, dtype, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / f"{_STEM}.safetensors", shards[0], dtype, seed, progress)
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{_STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, dtype, seed, progress)
        where |= dict.fromkeys(shard, name)
    total = sum(map(math.prod, shapes.values())) * _ELEMENT_BYTES[dtype]
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / f"{_STEM}.safetensors.index.json", index)


def _split(
    shapes: dict[str, Shape], dtype: Dtype, shard_bytes: int | None
) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name in sorted(shapes):
        n_bytes = math.prod(shapes[name]) * _ELEMENT_BYTES[dtype]
        if shard_bytes is not None and shards[-1] and filled + n_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shapes[name]
        filled += n_bytes
    return shards


def _write_file(
    path: Path, shapes: dict[str, Shape], dtype: Dtype, seed: int, progress: Progress
) -> None:
    """Write a safetensors file: the header from shapes alone, then tensor after tensor."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * _ELEMENT_BYTES[dtype]
        header[name] = {"dtype": _TAGS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target: torch.dtype = getattr(torch, dtype)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values = random_tensor(name, shape, seed=seed).to(target).reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
            progress(values.numel() * values.element_size())


def _write_vae(
    folder: Path, kind: Vae, latent_channels: int, seed: int, progress: Progress
) -> None:
    folder.mkdir(parents=True)
    config = vae_config(kind, latent_channels, seed)
    _write_json(folder / "config.json", {"_class_name": "AutoencoderKLWan", **config})
    _write_weights(folder, vae_shapes(config), "float32", seed, None, progress)


def vae_config(kind: Vae, latent_channels: int, seed: int) -> dict[str, Any]:
    """Return the arguments of the Wan2.2 VAE; ``small`` differs in its widths alone."""
    generator = np.random.default_rng([seed, 1])
    return {
        "base_dim": 160 if kind == "full" else 4,
        "decoder_base_dim": 256 if kind == "full" else 4,
        "z_dim": latent_channels,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": generator.normal(0.0, 0.3, latent_channels).tolist(),
        "latents_std": generator.uniform(0.5, 1.0, latent_channels).tolist(),
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
    }


def vae_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Return the shape of every tensor of a VAE with these arguments, by name."""
    import torch
    from diffusers import AutoencoderKLWan

    build: Any = AutoencoderKLWan  # untyped
    with torch.device("meta"):
        model = build(**config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _config(sizes: NetworkSizes) -> dict[str, Any]:
    names = {family: name for name, family in FAMILY_OF_CLASS.items()}
    config: dict[str, Any] = {
        "_class_name": names[sizes.family],
        "added_kv_proj_dim": None,
        "attention_head_dim": sizes.head_dim,
        "cross_attn_norm": True,
        "eps": sizes.eps,
        "ffn_dim": sizes.visual_ffn_dim,
        "freq_dim": sizes.freq_dim,
        "image_dim": None,
        "in_action_channels": sizes.n_action_channels,
        "in_channels": sizes.latent_channels,
        "num_attention_heads": sizes.n_heads,
        "num_embodiments": sizes.n_embodiments,
        "num_layers": sizes.n_layers,
        "out_action_channels": sizes.n_action_channels,
        "out_channels": sizes.latent_channels,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": sizes.text_dim,
    }
    if sizes.family == "gwp-0.5":
        config["action_expert_dim"] = sizes.action_dim
        config["action_ffn_dim"] = sizes.action_ffn_dim
    return config


def _statistics(seed: int) -> dict[str, Any]:
    """Return statistics of 14 channels, padded with zeros as upstream's script pads them."""
    generator = np.random.default_rng([seed, 2])

    def padded(values: Iterable[float]) -> list[float]:
        row = [float(v) for v in values]
        return row + [0.0] * (_N_STATISTICS - len(row))

    group = {}
    for name in ("observation.state", "action"):
        low = generator.uniform(-1.5, -0.4, _N_CHANNELS)
        high = generator.uniform(0.4, 1.5, _N_CHANNELS)
        group[name] = {
            "q01": padded(low),
            "q99": padded(high),
            "min": padded(low * 1.2),
            "max": padded(high * 1.2),
            "mean": padded((low + high) / 2),
            "std": padded((high - low) / 4),
        }
    return {"norm_stats": group}


def _write_prompt(folder: Path, text_dim: int, seed: int) -> None:
    import torch

    folder.mkdir()
    rows = random_tensor("t5_embedding", (_N_PROMPT_ROWS, text_dim), seed=seed)
    rows *= text_dim**0.5 * 0.2
    torch.save({"t5_embedding": rows}, folder / "episode_000000.pt")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
