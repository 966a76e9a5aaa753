"""Draw what the policy expects to happen: the future frames of one chunk, beside the real ones.

    python examples/reach/imagine.py build/reach/policy build/reach/data0 --episode 3 strip.png

For a workstation: it needs the video head, which bundles leave out. The actions are denoised first,
as on the robot; then the future frame of the clip, seeing those actions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from data import example_layout, make_windows, read_episode
from model import ACTION_SHIFT, SIZES, VIDEO_SHIFT, prompts, told
from PIL import Image
from vae import decode, encode, load_vae, scale

from gwp_edge.errors import GwpError, SpecError
from gwp_edge.evaluation.tasks import TouchTask
from gwp_edge.export.unreduced import UnreducedNetwork
from gwp_edge.export.unreduced_serving import load_network, sample
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.sampler import make_schedule

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

    Args:
        network: trained with the video loss.
        state: (1, 1, A), normalised.
        reference: latent of the present frame, (1, C, 1, h, w), normalised.
        prompt: (1, 64, text).
        generator: of the noise.
    """
    H = example_layout().n_rows
    schedule = make_schedule(n_steps=_N_STEPS, shift=ACTION_SHIFT)
    noise = torch.randn((1, H, SIZES.n_action_channels), generator=generator)
    actions, _, _ = sample(
        network,
        state=state,
        reference=reference,
        prompt=prompt,
        noise=noise,
        timesteps=schedule.timesteps,
        sigmas=schedule.sigmas,
    )
    x = torch.randn(reference.shape, generator=generator)
    schedule = make_schedule(n_steps=_N_STEPS, shift=VIDEO_SHIFT)
    for i, t in enumerate(schedule.timesteps):
        _, velocity = network(
            state=state,
            reference=reference,
            actions=actions,
            action_timestep=torch.zeros(1),
            prompt=prompt,
            future=x,
            future_timestep=told(torch.tensor([t])),
        )
        if velocity is None:
            raise TypeError("the network gave no video velocity")
        x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity
    return x


def strip(rows: list[npt.NDArray[np.uint8]]) -> Image.Image:
    """Return rows of pictures, (n, h, w, 3) each, on one white sheet."""
    n, h, w, _ = rows[0].shape
    size = (n * (w + _GAP_PX) - _GAP_PX, len(rows) * (h + _GAP_PX) - _GAP_PX)
    sheet = Image.new("RGB", size, "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (w + _GAP_PX), y * (h + _GAP_PX)))
    return sheet


def imagine(policy: Path, dataset: Path, episode_idx: int, frame: int, seed: int) -> Image.Image:
    """Return the strip: above what is imagined from ``frame`` on, below what happened.

    Raises:
        SpecError: no such episode or frame, or files that do not fit.
    """
    with LeRobotDataset.open(dataset) as opened:
        episode = read_episode(opened, episode_idx, example_layout())
    if frame not in episode.anchors():
        raise SpecError(f"frame {frame}: expected one of {', '.join(map(str, episode.anchors()))}")
    tasks = list(TouchTask.instructions)
    windows = make_windows([episode], tasks, policy / "norm_stats.json", SIZES.n_action_channels)
    at = episode.anchors().index(frame)
    vae = load_vae(policy / "base_model" / "vae")
    mean, std = scale(vae)
    clip = episode.clip(frame)
    reference = encode(vae, clip[None, :1])
    future = imagine_latent(
        load_network(policy / "checkpoint"),
        state=torch.from_numpy(windows.state[at : at + 1]),
        reference=(reference - mean) / std,
        prompt=prompts([episode.task]),
        generator=torch.Generator().manual_seed(seed),
    )
    imagined = decode(vae, torch.cat((reference, future * std + mean), dim=2))[0]
    return strip([imagined, clip])


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("policy", type=Path, help="folder that train.py wrote")
    parser.add_argument("dataset", type=Path, help="LeRobot dataset from collect.py")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--episode", type=int, default=0)
    parser.add_argument("--frame", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        imagine(args.policy, args.dataset, args.episode, args.frame, args.seed).save(args.picture)
    except GwpError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
