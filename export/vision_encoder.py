"""The Wan2.2 VAE encoder for a single frame, as the 2-D network that it then is.

With one frame every causal 3-D convolution sees zeros before it, so only its last temporal tap
counts; temporal down-sampling convolutions are skipped on a first frame. The shortcut that
averages over time sees one zero frame in front, which leaves every other channel group empty.

Source: diffusers AutoencoderKLWan (WanEncoder3d, AvgDown3D, patchify), 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.export.ops import Ops, V


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """What the encoder needs of the VAE's config.json.

    Attributes:
        dims: channels of the stem and of each level.
        z_dim: latent channels.
        n_res_blocks: residual blocks per level.
        temporal_downsample: per level but the last.
        patch_px: side of the pixel patches folded into channels.
        mean: latent mean, (z_dim,).
        std: latent standard deviation, (z_dim,).
    """

    dims: tuple[int, ...]
    z_dim: int
    n_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    patch_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> VaeConfig:
        """Read a diffusers AutoencoderKLWan config.

        Raises:
            SpecError: a field is missing, or asks for an encoder that is not this one.
        """

        def want(name: str, default: object = None) -> object:
            value = config.get(name, default)
            if value is None:
                raise SpecError(f"VAE config.json has no {name}: is this an AutoencoderKLWan?")
            return value

        if want("_class_name") != "AutoencoderKLWan":
            raise SpecError(f"VAE is a {config['_class_name']}, expected AutoencoderKLWan")
        if not want("is_residual", default=False) or list(_seq(want("attn_scales", default=[]))):
            raise SpecError(
                "VAE config asks for the Wan2.1 encoder (is_residual false or attn_scales set); "
                "GigaWorld-Policy uses the Wan2.2 VAE: pass its folder with --base-model"
            )
        base, mult = int(str(want("base_dim"))), [int(str(m)) for m in _seq(want("dim_mult"))]
        z_dim = int(str(want("z_dim")))
        mean = tuple(float(str(m)) for m in _seq(want("latents_mean")))
        std = tuple(float(str(s)) for s in _seq(want("latents_std")))
        if len(mean) != z_dim or len(std) != z_dim or min(std) <= 0:
            raise SpecError(f"VAE latents_mean and latents_std must hold {z_dim} values, std > 0")
        patch_px = int(str(want("patch_size")))
        levels = len(mult) - 1
        if patch_px * 2**levels != 16:
            raise SpecError(f"VAE reduces by {patch_px * 2**levels}, expected 16 in each direction")
        temporal = tuple(bool(t) for t in _seq(want("temperal_downsample")))
        if len(temporal) != levels:
            raise SpecError(f"VAE temperal_downsample has {len(temporal)} entries, not {levels}")
        return cls(
            dims=(base, *(base * m for m in mult)),
            z_dim=z_dim,
            n_res_blocks=int(str(want("num_res_blocks", default=2))),
            temporal_downsample=temporal,
            patch_px=patch_px,
            mean=mean,
            std=std,
        )


def _seq(value: object) -> Sequence[object]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise SpecError(f"VAE config.json: expected a list, got {value!r}")
    return value


class VisionEncoder(Generic[V]):
    """The encoder bound to one set of operators. Threads: one owner."""

    def __init__(self, ops: Ops[V], config: VaeConfig) -> None:
        self.ops = ops
        self.config = config

    def _conv(self, x: V, name: str, *, padding: int) -> V:
        return self.ops.conv2d(x, name, padding=padding)

    def _residual(self, x: V, name: str, in_dim: int, out_dim: int) -> V:
        ops = self.ops
        shortcut = x
        if in_dim != out_dim:
            shortcut = self._conv(x, f"{name}.conv_shortcut", padding=0)
        y = ops.silu(ops.channel_norm(x, f"{name}.norm1"))
        y = self._conv(y, f"{name}.conv1", padding=1)
        y = ops.silu(ops.channel_norm(y, f"{name}.norm2"))
        return ops.add(self._conv(y, f"{name}.conv2", padding=1), shortcut)

    def _average_shortcut(
        self, x: V, in_dim: int, out_dim: int, h: int, w: int, *, temporal: bool, spatial: bool
    ) -> V:
        """AvgDown3D of a first frame; (in_dim, h, w) to (out_dim, h', w')."""
        ops = self.ops
        factor_t, factor_s = (2 if temporal else 1), (2 if spatial else 1)
        group = in_dim * factor_t * factor_s**2 // out_dim
        if factor_t * factor_s == 1 and group == 1:
            return x
        if group % factor_s**2:
            raise SpecError(
                f"VAE level {in_dim} to {out_dim} channels averages over part of a square; "
                "this encoder shape is not supported"
            )
        if spatial:
            x, h, w = ops.average_pool2(x), h // 2, w // 2
        if temporal:
            # The frame before the first one is zero: channel c becomes the pair (0, c).
            x = ops.reshape(x, (1, in_dim, 1, h, w))
            x = ops.pad_zeros(x, (0, 0, 1, 0, 0), (0, 0, 0, 0, 0))
            x = ops.reshape(x, (1, in_dim * 2, h, w))
        rest = group // factor_s**2
        if rest > 1:
            parts = ops.split(ops.reshape(x, (1, out_dim, rest, h, w)), [1] * rest, axis=2)
            total = parts[0]
            for part in parts[1:]:
                total = ops.add(total, part)
            mean = ops.mul(total, ops.constant(f"mean.{rest}", np.array(1 / rest, np.float32)))
            x = ops.reshape(mean, (1, out_dim, h, w))
        return x

    def _attention(self, x: V, name: str, dim: int, h: int, w: int) -> V:
        """Single-head attention over all pixels of the smallest level."""
        ops, n = self.ops, h * w
        qkv = self._conv(ops.channel_norm(x, f"{name}.norm"), f"{name}.to_qkv", padding=0)
        q, k, v = ops.split(ops.reshape(qkv, (3 * dim, n)), [dim, dim, dim], axis=0)
        scale = ops.constant(f"{name}.scale", np.array(dim**-0.5, np.float32))
        logits = ops.matmul(ops.transpose(ops.mul(q, scale), (1, 0)), k, f"{name}.qk")
        weights = ops.softmax(logits)
        out = ops.matmul(v, ops.transpose(weights, (1, 0)), f"{name}.pv")
        out = self._conv(ops.reshape(out, (1, dim, h, w)), f"{name}.proj", padding=0)
        return ops.add(x, out)

    def encode(self, canvas: V, height_px: int, width_px: int) -> V:
        """Return the normalised latent mode (1, z, h/16, w/16) of a uint8 canvas (h, w, 3)."""
        ops, cfg = self.ops, self.config
        p = cfg.patch_px
        h, w = height_px // p, width_px // p
        x = ops.to_float(canvas)
        x = ops.mul(x, ops.constant("pixel.scale", np.array(2 / 255, np.float32)))
        x = ops.sub(x, ops.constant("pixel.one", np.array(1, np.float32)))
        # (y, dy, x, dx, c) to channels (c, dx, dy), as the VAE folds its pixel patches.
        x = ops.transpose(ops.reshape(x, (h, p, w, p, 3)), (4, 3, 1, 0, 2))
        x = ops.reshape(x, (1, 3 * p * p, h, w))
        x = self._conv(x, "encoder.conv_in", padding=1)
        n_levels = len(cfg.dims) - 1
        for level in range(n_levels):
            name = f"encoder.down_blocks.{level}"
            in_dim, out_dim = cfg.dims[level], cfg.dims[level + 1]
            spatial = level < n_levels - 1
            temporal = spatial and cfg.temporal_downsample[level]
            shortcut = self._average_shortcut(
                x, in_dim, out_dim, h, w, temporal=temporal, spatial=spatial
            )
            dim = in_dim
            for j in range(cfg.n_res_blocks):
                x = self._residual(x, f"{name}.resnets.{j}", dim, out_dim)
                dim = out_dim
            if spatial:
                x = ops.pad_zeros(x, (0, 0, 0, 0), (0, 0, 1, 1))
                x = ops.conv2d(x, f"{name}.downsampler.resample.1", stride=2)
                h, w = h // 2, w // 2
            x = ops.add(x, shortcut)
        dim = cfg.dims[-1]
        x = self._residual(x, "encoder.mid_block.resnets.0", dim, dim)
        x = self._attention(x, "encoder.mid_block.attentions.0", dim, h, w)
        x = self._residual(x, "encoder.mid_block.resnets.1", dim, dim)
        x = ops.silu(ops.channel_norm(x, "encoder.norm_out"))
        x = self._conv(x, "encoder.conv_out", padding=1)
        x = self._conv(x, "quant_conv", padding=0)
        mode, _ = ops.split(x, [cfg.z_dim, cfg.z_dim], axis=1)
        mean = np.array(cfg.mean, np.float32)[None, :, None, None]
        inverse_std = (1.0 / np.array(cfg.std, np.float64)).astype(np.float32)[None, :, None, None]
        x = ops.sub(mode, ops.constant("latent.mean", mean))
        return ops.mul(x, ops.constant("latent.inverse_std", inverse_std))
