"""``gwp-edge lag``: how far the arm trails its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gwp_edge.commands.options import DriverOption
from gwp_edge.console import (
    EXIT_INTERRUPTED,
    Interrupted,
    fail,
    raise_on_signals,
    require_writable,
    say,
    write_json,
)
from gwp_edge.errors import SpecError


def lag(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; names the channels.")] = Path(
        "policy.gwp"
    ),
    robot: Annotated[str, typer.Option("--robot", help="As for run.")] = ...,  # type: ignore[assignment]  # typer's way to ask for a value
    driver: DriverOption = None,
    channel: Annotated[
        str | None, typer.Option("--channel", help="Name; the first if none.")
    ] = None,
    amplitude: Annotated[
        float, typer.Option("--amplitude", help="rad or m, to either side.")
    ] = 0.03,
    frequency: Annotated[float, typer.Option("--frequency", help="Hz.")] = 0.5,
    yes: Annotated[
        bool, typer.Option("--yes", help="The arm may move: nobody is near it.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure the lag of one joint by a small slow sine; pass the result to run --lead-ms.

    Example: gwp-edge lag policy.gwp --robot robot.toml --channel joint2.pos --yes
    """
    from gwp_edge.lag import LagOptions, measure_lag
    from gwp_edge.manifest import read_spec
    from gwp_edge.robot_limits import intersect_limits
    from gwp_edge.robots import create_arm, create_world, load_robot
    from gwp_edge.workspace import find_arms

    require_writable(json_file)
    spec = read_spec(bundle)
    config = load_robot(robot, spec, driver=driver)
    names = [c.name for c in spec.channels]
    name = names[0] if channel is None else channel
    if name not in names:
        raise SpecError(f"--channel {name} is not known; choose from {', '.join(names)}")
    options = LagOptions(amplitude=amplitude, frequency_hz=frequency)
    if not config.is_simulated and not yes:
        raise SpecError(
            f"this moves {name} of a real arm by {amplitude:g} to either side; clear its "
            "surroundings, have the e-stop at hand, and add --yes"
        )
    raise_on_signals()  # a kill brakes the arm like Ctrl-C does
    world = create_world(config, spec)
    try:
        arm = create_arm(config, spec, world.start() if world is not None else {})
        is_open = False
        try:
            arm.open(enable=True)
            is_open = True
            limits = intersect_limits(arm.limits, config.limits, arm.channels)
            boxes = find_arms(config.workspace, arm.channels, config.arm.kind)
            result = measure_lag(arm, names.index(name), limits, options, workspace=boxes)
        except Interrupted:
            # Not "nothing was left behind": the motors are on, as after every run.
            what = "the arm was braked and holds" if is_open else "motors may have power already"
            fail(f"interrupted; {what}", EXIT_INTERRUPTED)
        finally:
            arm.close()
    finally:
        if world is not None:
            world.close()
    say(
        f"{result.channel} trails by {result.lag_ms:.0f} ms at {frequency:g} Hz "
        f"(gain {result.gain:.2f}, fit {result.fit:.3f}); run with --lead-ms {result.lag_ms:.0f}"
    )
    if json_file is not None:
        write_json(json_file, result.to_dict())
