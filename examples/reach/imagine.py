"""Draw what the policy expects to happen: the future frames of one chunk, beside the real ones.

    python examples/reach/imagine.py build/reach/policy build/reach/data0 strip.png --episode 3

Above is what the policy expects of its own actions, below what the expert did then. For a
workstation: it needs the video head, which bundles leave out. ``--windows 20`` prints how far off
it is, beside what the autoencoder alone costs and what a picture that stands still would.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from arguments import file_to_write, whole_number
from data import Episode, example_layout, make_windows, read_episode
from diffusers import AutoencoderKLWan
from model import ACTION_SHIFT, SIZES, VIDEO_SHIFT, prompts, told
from PIL import Image
from vae import decode, encode, load_vae, scale

from gwp_edge.errors import GwpError, SpecError
from gwp_edge.evaluation.tasks import TouchTask
from gwp_edge.export.unreduced import UnreducedNetwork
from gwp_edge.export.unreduced_serving import load_network
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.sampler import make_schedule
from gwp_edge.types import Float32Array

_N_STEPS = 10
_GAP_PX = 4


@torch.no_grad()
def imagine_latent(
    network: UnreducedNetwork,
    *,
    state: torch.Tensor,
    reference: torch.Tensor,
    prompt: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the normalised latent of the future frame, (1, C, 1, h, w).

    Actions and future are denoised together, as they were trained: both are noisy at once, each on
    its own schedule, and the future sees the actions.

    Args:
        network: trained with the video loss.
        state: (1, 1, A), normalised.
        reference: latent of the present frame, (1, C, 1, h, w), normalised.
        prompt: (1, 64, text).
        generator: of the noise.
    """
    H = example_layout().n_rows
    actions = torch.randn((1, H, SIZES.n_action_channels), generator=generator)
    future = torch.randn(reference.shape, generator=generator)
    of_actions = make_schedule(n_steps=_N_STEPS, shift=ACTION_SHIFT)
    of_future = make_schedule(n_steps=_N_STEPS, shift=VIDEO_SHIFT)
    for i in range(_N_STEPS):
        velocity, video_velocity = network(
            state=state,
            reference=reference,
            actions=actions,
            action_timestep=told(torch.tensor([of_actions.timesteps[i]])),
            prompt=prompt,
            future=future,
            future_timestep=told(torch.tensor([of_future.timesteps[i]])),
        )
        if video_velocity is None:
            raise TypeError("the network gave no video velocity")
        actions = actions + (of_actions.sigmas[i + 1] - of_actions.sigmas[i]) * velocity
        future = future + (of_future.sigmas[i + 1] - of_future.sigmas[i]) * video_velocity
    return future


@dataclass(frozen=True, kw_only=True)
class Window:
    """One moment of a recorded episode.

    Attributes:
        clip: the canvases now and at H/4, H/2, 3H/4 and H, (5, h, w, 3), uint8.
        state: (1, 1, A), normalised.
        task: instruction.
    """

    clip: npt.NDArray[np.uint8]
    state: Float32Array
    task: str


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far off futures are: latents as mean square (normalised), pixels as mean of 0 to 255.

    Attributes:
        latent: of what is imagined.
        latent_swapped: imagined when told the other instruction.
        latent_still: of the present frame.
        pixel: of what is imagined.
        pixel_ceiling: of the real future through the autoencoder and back.
        pixel_still: of the present frame.
    """

    latent: float
    latent_swapped: float
    latent_still: float
    pixel: float
    pixel_ceiling: float
    pixel_still: float


class Imagination:
    """A trained policy with its video head. Threads: one owner.

    Args:
        policy: folder that train.py wrote.
        seed: of the noise.

    Raises:
        SpecError: a file is missing or does not fit.
    """

    def __init__(self, policy: Path, seed: int = 0) -> None:
        self._vae: AutoencoderKLWan = load_vae(policy / "base_model" / "vae")
        self._mean, self._std = scale(self._vae)
        self._network = load_network(policy / "checkpoint")
        self._seed = seed

    def future(self, window: Window, task: str | None = None) -> torch.Tensor:
        """Return the normalised latent that is expected, told ``task`` or the window's own."""
        return imagine_latent(
            self._network,
            state=torch.from_numpy(window.state),
            reference=self._latent(window.clip)[:, :, :1],
            prompt=prompts([window.task if task is None else task]),
            generator=torch.Generator().manual_seed(self._seed),
        )

    def frames(self, window: Window, future: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Return the present and the four frames of ``future``, (5, h, w, 3)."""
        latent = torch.cat((self._latent(window.clip)[:, :, :1], future), dim=2)
        frames: npt.NDArray[np.uint8] = decode(self._vae, latent * self._std + self._mean)[0]
        return frames

    def errors(self, window: Window) -> Errors:
        """Measure one window."""
        both = self._latent(window.clip)
        present, real = both[:, :, :1], both[:, :, 1:]
        imagined = self.future(window)
        swapped = self.future(window, TouchTask().opposite_of(window.task))
        still = np.repeat(window.clip[:1], len(window.clip), axis=0)
        return Errors(
            latent=float((imagined - real).square().mean()),
            latent_swapped=float((swapped - real).square().mean()),
            latent_still=float((present - real).square().mean()),
            pixel=_apart(self.frames(window, imagined), window.clip),
            pixel_ceiling=_apart(self.frames(window, real), window.clip),
            pixel_still=_apart(still, window.clip),
        )

    def _latent(self, clip: npt.NDArray[np.uint8]) -> torch.Tensor:
        return (encode(self._vae, clip[None]) - self._mean) / self._std


def _apart(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Return the mean difference of the future frames, 0 to 255."""
    return float(np.abs(a[1:].astype(np.float64) - b[1:]).mean())


def window_at(policy: Path, episode: Episode, frame: int) -> Window:
    """Return the window that begins at ``frame`` of ``episode``.

    Raises:
        SpecError: no window begins there.
    """
    if frame not in episode.anchors():
        raise SpecError(f"frame {frame}: expected one of {', '.join(map(str, episode.anchors()))}")
    tasks = list(TouchTask.instructions)
    windows = make_windows([episode], tasks, policy / "norm_stats.json", SIZES.n_action_channels)
    at = episode.anchors().index(frame)
    return Window(clip=episode.clip(frame), state=windows.state[at : at + 1], task=episode.task)


def spread_windows(policy: Path, dataset: LeRobotDataset, n: int) -> list[Window]:
    """Return ``n`` windows, evenly over the episodes and over the first half of each."""
    windows = []
    for i in range(n):
        episode = read_episode(dataset, i % dataset.n_episodes, example_layout())
        early = episode.anchors()[: max(1, len(episode.anchors()) // 2)]
        at = (i // dataset.n_episodes) * len(early) // -(-n // dataset.n_episodes)
        windows.append(window_at(policy, episode, early[at]))
    return windows


def mean_errors(found: Sequence[Errors]) -> Errors:
    """Return the mean of each error."""
    return Errors(
        **{k: float(np.mean([getattr(e, k) for e in found])) for k in Errors.__dataclass_fields__}
    )


def strip(rows: list[npt.NDArray[np.uint8]]) -> Image.Image:
    """Return rows of pictures, (n, h, w, 3) each, on one white sheet."""
    n, h, w, _ = rows[0].shape
    size = (n * (w + _GAP_PX) - _GAP_PX, len(rows) * (h + _GAP_PX) - _GAP_PX)
    sheet = Image.new("RGB", size, "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (w + _GAP_PX), y * (h + _GAP_PX)))
    return sheet


def run(args: argparse.Namespace) -> None:
    """Draw, and measure where asked."""
    imagination = Imagination(args.policy, args.seed)
    with LeRobotDataset.open(args.dataset) as dataset:
        episode = read_episode(dataset, args.episode, example_layout())
        window = window_at(args.policy, episode, args.frame)
        frames = imagination.frames(window, imagination.future(window))
        strip([frames, window.clip]).save(args.picture)
        print(f"{args.picture}: above imagined from the policy's own actions, below the expert's")
        if not args.windows:
            return
        found = spread_windows(args.policy, dataset, args.windows)
    e = mean_errors([imagination.errors(w) for w in found])
    print(
        f"{args.windows} windows, latent: imagined {e.latent:.2f}, told the other instruction "
        f"{e.latent_swapped:.2f}, standing still {e.latent_still:.2f}"
    )
    print(
        f"{args.windows} windows, pixels of 255: imagined {e.pixel:.1f}, autoencoder alone "
        f"{e.pixel_ceiling:.1f}, standing still {e.pixel_still:.1f}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("policy", type=Path, help="folder that train.py wrote")
    parser.add_argument("dataset", type=Path, help="LeRobot dataset from collect.py")
    parser.add_argument("picture", type=file_to_write(".png", ".jpg"), help="file to write")
    parser.add_argument("--episode", type=whole_number(0), default=0)
    parser.add_argument("--frame", type=whole_number(0), default=0)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--windows", type=whole_number(0), default=0, help="measure so many")
    args = parser.parse_args(words)
    try:
        run(args)
    except (GwpError, OSError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")


if __name__ == "__main__":
    main()
