"""Show a recorded run of the example: strip, film, and whether the right cube was touched.

    python examples/reach/show.py build/reach-session build/reach.png

The recorded joint commands are played into the simulator again, from the same seed, to see what
the fingers touch first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from arguments import file_to_write
from PIL import Image

from gwp_edge.drivers.sim_options import SimOptions
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import GwpError, SpecError
from gwp_edge.evaluation.tasks import TouchTask
from gwp_edge.session_format import Session

_N_PICTURES = 6
_AFTER_S = 0.5
_GIF_HZ = 10
_GAP_PX = 4


def judge(session: Session) -> tuple[str, float]:
    """Return what the run came to, and when in seconds after its first command.

    Raises:
        SpecError: the session is not one of this task in the simulator.
    """
    task = TouchTask()
    world = session.header.robot.get("world")
    if not isinstance(world, dict) or world.get("kind") != "sim":
        raise SpecError(f"{session.folder}: not recorded in the sim")
    if len(session.commands) == 0:
        raise SpecError(f"{session.folder}: the run sent no command")
    options = msgspec.convert(world.get("options", {}), SimOptions)
    instruction = session.header.task
    with SimWorld(task.n_arms, (), options) as sim:
        sim.reset(options.seed, start=np.asarray(session.states["position"][0], np.float64))
        t0_ns = int(session.commands["t_ns"][0])
        for command in session.commands:
            behind = (int(command["t_ns"]) - t0_ns - sim.time_ns) // sim.period_ns
            for _ in range(max(0, int(behind))):
                sim.step()
                outcome = task.outcome(sim, instruction)
                if outcome in ("success", "wrong object"):
                    return outcome, sim.time_ns * 1e-9
            sim.command(np.asarray(command["position"], np.float64))
    return "timeout", float("nan")


def pictures(session: Session, until_s: float, n: int) -> list[list[Image.Image]]:
    """Return ``n`` times, evenly from the first command to ``until_s`` after it, all cameras each.

    Args:
        session: the recorded run.
        until_s: seconds after its first command; NaN for its end.
        n: number of times.

    Raises:
        SpecError: a camera has no picture.
    """
    first_ns, last_ns = int(session.commands["t_ns"][0]), int(session.commands["t_ns"][-1])
    if np.isfinite(until_s):
        last_ns = min(last_ns, first_ns + round(until_s * 1e9))
    moments: list[list[Image.Image]] = [[] for _ in range(n)]
    for camera_idx, camera in enumerate(session.spec.cameras):
        mine = np.flatnonzero(session.frames["camera"] == camera_idx)
        if len(mine) == 0:
            raise SpecError(f"{session.folder}: camera {camera} is empty")
        t_ns = session.frames["t_captured_ns"][mine]
        for moment, wanted_ns in zip(moments, np.linspace(first_ns, last_ns, n), strict=True):
            nearest = int(mine[np.abs(t_ns - wanted_ns).argmin()])
            moment.append(Image.fromarray(session.frame(nearest).image))
    return moments


def join(images: list[Image.Image], *, across: bool) -> Image.Image:
    """Return ``images`` of one size side by side, or one below the other, with gaps."""
    w, h = images[0].size
    dx, dy = (w + _GAP_PX, 0) if across else (0, h + _GAP_PX)
    size = (w + dx * (len(images) - 1), h + dy * (len(images) - 1))
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i * dx, i * dy))
    return sheet


def show(session: Session, picture: Path, outcome: str, t_s: float) -> None:
    """Write ``picture``, a strip, and beside it the run as an animated GIF."""
    until_s = t_s + _AFTER_S if outcome != "timeout" else float("nan")
    columns = pictures(session, until_s, _N_PICTURES)
    join([join(c, across=False) for c in columns], across=True).save(picture)
    last_s = float(session.commands["t_ns"][-1] - session.commands["t_ns"][0]) * 1e-9
    n = max(2, round(min(last_s, until_s if np.isfinite(until_s) else last_s) * _GIF_HZ))
    film = [join(c, across=True) for c in pictures(session, until_s, n)]
    film[0].save(
        picture.with_suffix(".gif"),
        save_all=True,
        append_images=film[1:],
        duration=round(1000 / _GIF_HZ),
        loop=0,
    )


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("session", type=Path, help="folder that run --record wrote")
    parser.add_argument(
        "picture", type=file_to_write(".png"), help="PNG to write; a GIF goes beside it"
    )
    args = parser.parse_args(words)
    try:
        session = Session.open(args.session)
        outcome, t_s = judge(session)
        show(session, args.picture, outcome, t_s)
    except (GwpError, OSError) as e:
        sys.exit(f"error: {e}")
    task = session.header.task
    if outcome != "success":
        sys.exit(f"told to {task!r}: {outcome}; pictures in {args.picture}")
    print(f"told to {task!r}: touched after {t_s:.1f} s; see {args.picture} and .gif")


if __name__ == "__main__":
    main()
