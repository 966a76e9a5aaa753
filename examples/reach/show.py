"""Show a recorded run of the example: a picture strip, and whether the right cube was touched.

    python examples/reach/show.py build/reach-session build/reach.png

The recorded joint commands are played into the simulator again, from the same seed, to see what
the fingers touch first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from gwp_edge.drivers.sim_options import SimOptions
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import GwpError, SpecError
from gwp_edge.evaluation.tasks import TouchTask
from gwp_edge.session_format import Session

_N_PICTURES = 6
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


def strip(session: Session) -> Image.Image:
    """Return pictures of every camera at equal times through the run."""
    rows = []
    for camera_idx in range(len(session.spec.cameras)):
        mine = np.flatnonzero(session.frames["camera"] == camera_idx)
        if len(mine) == 0:
            raise SpecError(f"{session.folder}: camera {session.spec.cameras[camera_idx]} is empty")
        chosen = mine[np.linspace(0, len(mine) - 1, _N_PICTURES).astype(int)]
        rows.append([session.frame(int(row)).image for row in chosen])
    h, w, _ = rows[0][0].shape
    size = (_N_PICTURES * (w + _GAP_PX) - _GAP_PX, len(rows) * (h + _GAP_PX) - _GAP_PX)
    sheet = Image.new("RGB", size, "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (w + _GAP_PX), y * (h + _GAP_PX)))
    return sheet


def main() -> None:
    """Read the command line and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("session", type=Path, help="folder that run --record wrote")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    try:
        session = Session.open(args.session)
        outcome, t_s = judge(session)
        strip(session).save(args.picture)
    except GwpError as e:
        sys.exit(f"error: {e}")
    task = session.header.task
    if outcome != "success":
        sys.exit(f"told to {task!r}: {outcome}; pictures in {args.picture}")
    print(f"told to {task!r}: touched after {t_s:.1f} s; pictures in {args.picture}")


if __name__ == "__main__":
    main()
