"""Sizes of a network: from config.json, checked against the tensors, or from the tensors alone."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gwp_edge.errors import SpecError
from gwp_edge.spec import Family, NetworkSpec

if TYPE_CHECKING:
    from gwp_edge.export.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

DEFAULT_HEAD_DIM = 128
FAMILY_OF_CLASS: dict[str, Family] = {
    "CasualWorldActionTransformer_MoT": "gwp-0.5",
    "CasualWorldActionTransformer": "gwp-0",
}
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
# Flags that would change the arithmetic: the value that is implemented, which is also the default.
_FLAGS: dict[str, object] = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
    "patch_size": [1, 2, 2],
}
_CONFIG_NAMES = {
    "num_layers": "n_layers",
    "in_channels": "latent_channels",
    "out_channels": "latent_channels",
    "ffn_dim": "visual_ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_embodiments": "n_embodiments",
    "in_action_channels": "n_action_channels",
    "out_action_channels": "n_action_channels",
}
_CONFIG_NAMES_MOT = {"action_expert_dim": "action_dim", "action_ffn_dim": "action_ffn_dim"}
# What training configs are known to get wrong while the tensors are right.
_TENSORS_WIN = frozenset({"in_action_channels", "out_action_channels"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSizes:
    """Sizes of a trained network.

    Attributes:
        family: which architecture.
        n_layers: transformer blocks.
        n_heads: attention heads, the same in both experts.
        head_dim: size of one head.
        visual_dim: width D of visual tokens, n_heads * head_dim.
        action_dim: width E of state and action tokens; D in the dense family.
        visual_ffn_dim: hidden width of the visual feed-forward.
        action_ffn_dim: hidden width of the action feed-forward; the visual one in the dense family.
        n_action_channels: padded action and state width A.
        latent_channels: channels of the VAE latent.
        freq_dim: width of the timestep sinusoid.
        text_dim: width of a prompt row.
        n_embodiments: per-embodiment projections.
        eps: epsilon of every norm.
        encoder_dims: hidden widths of the state and action encoders.
        decoder_dims: hidden widths of the action decoder.
    """

    family: Family
    n_layers: int
    n_heads: int
    head_dim: int
    visual_dim: int
    action_dim: int
    visual_ffn_dim: int
    action_ffn_dim: int
    n_action_channels: int
    latent_channels: int
    freq_dim: int
    text_dim: int
    n_embodiments: int
    eps: float = 1e-6
    encoder_dims: tuple[int, int] = (128, 256)
    decoder_dims: tuple[int, int] = (256, 128)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if field.name != "family" and not all(math.isfinite(v) and v > 0 for v in values):
                raise SpecError(f"{field.name} must be positive, got {value}")
        if self.n_heads * self.head_dim != self.visual_dim:
            raise SpecError(
                f"{self.n_heads} heads of {self.head_dim} make {self.n_heads * self.head_dim}, "
                f"but the network is {self.visual_dim} wide"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise SpecError(
                f"head_dim must be even and at least 6 (rotary positions), got {self.head_dim}"
            )
        if self.freq_dim % 2:
            raise SpecError(f"freq_dim must be even (cosines and sines), got {self.freq_dim}")
        if self.family == "gwp-0" and (
            self.action_dim != self.visual_dim or self.action_ffn_dim != self.visual_ffn_dim
        ):
            raise SpecError("the dense family has one width for all tokens")

    def network_spec(self, *, n_text_rows: int) -> NetworkSpec:
        """Return the sizes as the bundle states them."""
        names = set(NetworkSpec.__struct_fields__)
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return NetworkSpec(**known, n_text_rows=n_text_rows)


def network_sizes(checkpoint: Checkpoint, *, head_dim: int | None = None) -> NetworkSizes:
    """Read the sizes of a network.

    Widths and counts are taken from the tensors, whose arithmetic is what runs; config.json adds
    what shapes cannot say (heads, eps, flags) and must agree. Where a training config (one that
    diffusers did not write) or an action channel count disagrees, the tensors win with a warning.

    Args:
        checkpoint: an open checkpoint.
        head_dim: size of one head; without it config.json's, or else 128.

    Raises:
        SpecError: not one of the two families, quantized, contradictory, or a flag that changes
            the arithmetic.
    """
    _refuse_quantized(checkpoint)
    found = _from_tensors(checkpoint)
    config = checkpoint.config or {}
    where = f"{checkpoint.path}: config.json"
    _check_class(config, found["family"], where)
    _check_flags(config, where)
    _check_config(config, found, where)
    width = int(found["visual_dim"])
    size = _head_dim(config, head_dim, where)
    if width % size:
        raise SpecError(
            f"{checkpoint.path}: width {width} does not divide into heads of {size}; "
            "give the head size of the training config with --head-dim"
        )
    n_heads = config.get("num_attention_heads", width // size)
    eps = config.get("eps", 1e-6)
    if not _is_number(n_heads) or not _is_number(eps):
        raise SpecError(f"{where}: num_attention_heads and eps must be numbers")
    try:
        return NetworkSizes(**found, n_heads=int(n_heads), head_dim=size, eps=float(eps))
    except SpecError as e:
        raise SpecError(f"{checkpoint.path}: {e}") from e


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    odd = [n for n in checkpoint.names() if checkpoint.info(n).dtype not in _FLOATS]
    if odd:
        raise SpecError(
            f"{checkpoint.path}: {len(odd)} tensors are not plain floating point, first {odd[0]} "
            f"({checkpoint.info(odd[0]).dtype}); export from the float checkpoint it was made of"
        )


def _from_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    family: Family
    if any(n.startswith("blocks.") and ".visual_expert." in n for n in checkpoint.names()):
        family, block = "gwp-0.5", "blocks.0.visual_expert."
        action_block, stream = "blocks.0.action_expert.", "action_condition_embedder"
    else:
        family, block = "gwp-0", "blocks.0."
        action_block, stream = "blocks.0.", "condition_embedder"
    if "action_encoder.in_proj.weight" not in checkpoint:
        raise SpecError(
            f"{checkpoint.path}: no action_encoder in it; a video model is not a policy, "
            "pass the fine-tuned checkpoint"
        )

    def dim(name: str, axis: int, n_dims: int) -> int:
        shape = checkpoint.info(name).shape
        if len(shape) != n_dims:
            raise SpecError(
                f"{checkpoint.path}: {name}: expected {n_dims} dimensions, got shape {shape}"
            )
        return shape[axis]

    return {
        "family": family,
        "n_layers": _count_layers(checkpoint),
        "visual_dim": dim("patch_embedding.weight", 0, 5),
        "latent_channels": dim("patch_embedding.weight", 1, 5),
        "action_dim": dim(f"{action_block}attn1.to_q.weight", 1, 2),
        "visual_ffn_dim": dim(f"{block}ffn.net.0.proj.weight", 0, 2),
        "action_ffn_dim": dim(f"{action_block}ffn.net.0.proj.weight", 0, 2),
        "n_action_channels": dim("action_encoder.in_proj.weight", 1, 3),
        "n_embodiments": dim("action_encoder.in_proj.weight", 0, 3),
        "freq_dim": dim(f"{stream}.time_embedder.linear_1.weight", 1, 2),
        "text_dim": dim(f"{stream}.text_embedder.linear_1.weight", 1, 2),
        "encoder_dims": (
            dim("action_encoder.in_proj.weight", 2, 3),
            dim("action_encoder.mid_proj.weight", 0, 2),
        ),
        "decoder_dims": (
            dim("action_decoder.in_proj.weight", 0, 2),
            dim("action_decoder.mid_proj.weight", 0, 2),
        ),
    }


def _count_layers(checkpoint: Checkpoint) -> int:
    matches = (re.match(r"blocks\.(\d+)\.", n) for n in checkpoint.names())
    there = {int(m[1]) for m in matches if m}
    gaps = sorted(set(range(max(there, default=-1) + 1)) - there)
    if not there or gaps:
        raise SpecError(
            f"{checkpoint.path}: blocks are missing: {', '.join(map(str, gaps[:8])) or 'all'}"
        )
    return len(there)


def _check_class(config: dict[str, Any], family: Family, where: str) -> None:
    name = config.get("_class_name")
    if name is None:
        return
    if name not in FAMILY_OF_CLASS:
        raise SpecError(
            f"{where} is of {name}; expected {' or '.join(FAMILY_OF_CLASS)}; pass the transformer"
        )
    if FAMILY_OF_CLASS[name] != family:
        raise SpecError(
            f"{where} says {name} ({FAMILY_OF_CLASS[name]}), but the tensors are {family}"
        )


def _check_flags(config: dict[str, Any], where: str) -> None:
    for name, implemented in _FLAGS.items():
        value = config.get(name, implemented)
        value = list(value) if isinstance(value, tuple) else value
        if value != implemented:
            raise SpecError(f"{where}: {name} is {value!r}; only {implemented!r} is implemented")


def _check_config(config: dict[str, Any], found: dict[str, Any], where: str) -> None:
    names = dict(_CONFIG_NAMES)
    if found["family"] == "gwp-0.5":
        names |= _CONFIG_NAMES_MOT
    by_diffusers = "_class_name" in config
    for name, size in names.items():
        if name not in config or config[name] is None or config[name] == found[size]:
            continue
        message = f"{where} says {name} {config[name]!r}, the tensors say {found[size]}"
        # Fewer blocks than trained is a cut-off file, whoever wrote the config.
        if name == "num_layers" or (by_diffusers and name not in _TENSORS_WIN):
            raise SpecError(f"{message}; the config belongs to another checkpoint, or tensors lack")
        logger.warning("%s; the tensors are taken", message)


def _head_dim(config: dict[str, Any], given: int | None, where: str) -> int:
    stated = config.get("attention_head_dim")
    if stated is not None and (not isinstance(stated, int) or stated <= 0):
        raise SpecError(f"{where}: attention_head_dim must be a positive integer, got {stated!r}")
    if given is not None and given <= 0:
        raise SpecError(f"head size must be positive, got {given}")
    if given is not None and stated is not None and given != stated:
        raise SpecError(f"{where} says heads of {stated}, but {given} was asked for")
    return int(given or stated or DEFAULT_HEAD_DIM)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
