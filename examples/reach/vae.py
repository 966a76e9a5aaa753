"""A small Wan2.2 autoencoder for the example: made, trained, saved, and used to encode clips.

The architecture is the released one (diffusers' ``AutoencoderKLWan``) at a small width. On a CPU
its causal 3-D convolutions are slow, so they run here as 2-D ones over stacked frames, which is the
same sum; a first frame, which sees only zeros before it, needs the last temporal tap alone.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from gwp_edge.errors import SpecError

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 48
FRAMES_PER_CLIP = 5
_CROP_PX = 96
_LEARNING_RATE = 2e-3
_CLIP_EVERY = 3  # every third step trains the temporal path, on crops; the others single frames
_COLOUR_WEIGHT = 20.0
#: The schedule of the learning rate needs some steps to rise and to fall.
MIN_VAE_STEPS = 12


class _FastConv(WanCausalConv3d):  # type: ignore[misc]  # diffusers has no types
    """The causal convolution as one 2-D convolution over neighbouring frames; equal sums."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        taps = self.kernel_size[0]
        if self.stride[0] != 1:  # temporal down-sampling: rare, and one by one in space
            y: torch.Tensor = super().forward(x, cache_x)
            return y
        pad = self._padding[:2][0]
        if cache_x is not None and taps > 1:
            x = torch.cat((cache_x, x), dim=2)
        missing = self._padding[4] - (0 if cache_x is None else cache_x.shape[2])
        if taps > 1 and x.shape[2] == 1 and missing == taps - 1:
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=pad)
            return y[:, :, None]
        x = F.pad(x, (0, 0, 0, 0, max(missing, 0), 0))
        n = x.shape[2] - taps + 1
        stacked = torch.stack([x[:, :, i : i + n] for i in range(taps)], dim=1)  # B, taps, C, n
        b, _, c, _, h, w = stacked.shape
        flat = stacked.permute(0, 3, 1, 2, 4, 5).reshape(b * n, taps * c, h, w)
        weight = self.weight.transpose(1, 2).flatten(1, 2)  # out, taps * C, kh, kw
        y = F.conv2d(flat, weight, self.bias, padding=pad)
        return y.reshape(b, n, -1, *y.shape[2:]).transpose(1, 2)


def make_vae(width: int = 8) -> AutoencoderKLWan:
    """Return an untrained autoencoder; ``width`` is its narrowest."""
    vae = AutoencoderKLWan(
        base_dim=width,
        decoder_base_dim=width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    return quicken(vae)


def quicken(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let the causal convolutions of ``vae`` run as 2-D ones; returns it."""
    for module in vae.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = _FastConv
    return vae


def train_vae(
    vae: AutoencoderKLWan,
    episodes: list[npt.NDArray[np.uint8]],
    *,
    n_steps: int,
    batch: int = 8,
    seed: int = 0,
) -> list[float]:
    """Train ``vae`` in place to reproduce canvases; return the loss of every step.

    Args:
        vae: from :func:`make_vae`.
        episodes: canvases of an episode in order, uint8 (n, h, w, 3).
        n_steps: steps of Adam.
        batch: single frames per step.
        seed: of the choice of pictures.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=n_steps, pct_start=0.1
    )
    losses: list[float] = []
    vae.train()
    t_said = time.monotonic()
    for step in range(n_steps):
        if step % _CLIP_EVERY == _CLIP_EVERY - 1:
            x = _clips(episodes, batch // 2, rng)
        else:
            x = _frames(episodes, batch, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = vae.encode(x).latent_dist.mode()
            # A little noise makes near latents mean near pictures, and keeps their scale.
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample
        difference = (y.float() - x).abs()
        loss = (attention(x) * difference).mean() + 1e-3 * z.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(difference.detach().mean()))
        if time.monotonic() - t_said > 20.0:
            t_said = time.monotonic()
            logger.info("vae step %d of %d: %.4f", step + 1, n_steps, np.mean(losses[-50:]))
    vae.eval()
    return losses


def attention(x: torch.Tensor) -> torch.Tensor:
    """Return how much each pixel of ``x`` (n, 3, ...) counts, (n, 1, ...): colourful ones more.

    The cubes are a hundredth of the picture and all that matters in it; the table is most of it.
    """
    saturation = (x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)) / 2.0
    return 1.0 + _COLOUR_WEIGHT * saturation.square()


def _frames(
    episodes: list[npt.NDArray[np.uint8]], n: int, rng: np.random.Generator
) -> torch.Tensor:
    chosen = []
    for _ in range(n):
        episode = episodes[rng.integers(len(episodes))]
        chosen.append(episode[rng.integers(len(episode))])
    return pixels(np.stack(chosen))[:, :, None]


def _clips(episodes: list[npt.NDArray[np.uint8]], n: int, rng: np.random.Generator) -> torch.Tensor:
    chosen = []
    for _ in range(n):
        episode = episodes[rng.integers(len(episodes))]
        first = rng.integers(len(episode))
        which = np.minimum(first + 3 * np.arange(FRAMES_PER_CLIP), len(episode) - 1)
        _, h, w, _ = episode.shape
        y = rng.integers((h - _CROP_PX) // 2 + 1) * 2
        x = rng.integers((w - _CROP_PX) // 2 + 1) * 2
        chosen.append(episode[which, y : y + _CROP_PX, x : x + _CROP_PX])
    flat = pixels(np.concatenate(chosen))
    return flat.reshape(n, FRAMES_PER_CLIP, *flat.shape[1:]).transpose(1, 2)


def pixels(canvases: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return uint8 canvases (n, h, w, 3) as the network sees them: (n, 3, h, w), -1 to 1."""
    x = torch.from_numpy(canvases).permute(0, 3, 1, 2).contiguous().float()
    return x * (2.0 / 255.0) - 1.0


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clip: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return raw latents (n, 48, f, h/16, w/16) of clips (n, frames, h, w, 3): f is 1 or 2."""
    n, frames = clip.shape[:2]
    flat = pixels(clip.reshape(-1, *clip.shape[2:]))
    x = flat.reshape(n, frames, *flat.shape[1:]).transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z: torch.Tensor = vae.encode(x).latent_dist.mode()
    return z.float()


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latent: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return frames (n, frames, h, w, 3), uint8, of raw latents (n, 48, f, h/16, w/16)."""
    y = vae.decode(latent).sample.float()
    picture = ((y + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return picture.permute(0, 2, 3, 4, 1).numpy()


def save_vae(vae: AutoencoderKLWan, folder: Path, latents: torch.Tensor) -> None:
    """Write ``vae`` in bfloat16 with the statistics of raw ``latents`` (n, 48, f, h, w)."""
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.to(torch.bfloat16).save_pretrained(folder)
    vae.to(torch.float32)
    # diffusers notes the folder that weights were read from, which nobody else has.
    config = folder / "config.json"
    entries = json.loads(config.read_text())
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def load_vae(folder: Path) -> AutoencoderKLWan:
    """Read what :func:`save_vae` wrote, in float32.

    Raises:
        SpecError: there is none.
    """
    if not (folder / "config.json").is_file():  # diffusers would look for it on the internet
        raise SpecError(f"{folder}: no autoencoder there; expected config.json and weights")
    vae: Any = AutoencoderKLWan.from_pretrained(folder)
    return quicken(vae.float().eval())


def scale(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the latents, (1, 48, 1, 1, 1) each."""
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    return (
        torch.tensor(vae.config.latents_mean).reshape(shape),
        torch.tensor(vae.config.latents_std).reshape(shape),
    )
