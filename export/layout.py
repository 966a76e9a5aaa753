"""Robot layouts: channels and canvas, which a checkpoint does not say itself."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gwp_edge.errors import SpecError
from gwp_edge.spec import CameraView, CanvasSpec, Channel

N_ARM_JOINTS = 6


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is where in state, action and canvas.

    Attributes:
        channels: joints and grippers in the order of the training data.
        canvas: cameras and their places.
        n_rows: rows of a chunk.
        rate_hz: rows per second.
    """

    channels: tuple[Channel, ...]
    canvas: CanvasSpec
    n_rows: int = 48
    rate_hz: float = 30.0


def _arm(prefix: str) -> tuple[Channel, ...]:
    joints = tuple(
        Channel(name=f"{prefix}joint{i}.pos", unit="rad", kind="delta")
        for i in range(1, N_ARM_JOINTS + 1)
    )
    return (*joints, Channel(name=f"{prefix}gripper.pos", unit="m", kind="absolute"))


_HIGH = CameraView(camera="cam_high", x_px=0, y_px=0, width_px=320, height_px=192)
_LEFT = CameraView(camera="cam_left_wrist", x_px=0, y_px=192, width_px=160, height_px=192)
_RIGHT = CameraView(camera="cam_right_wrist", x_px=160, y_px=192, width_px=160, height_px=192)

LAYOUTS = {
    "piper-dual": Layout(
        channels=(*_arm("left_"), *_arm("right_")),
        canvas=CanvasSpec(width_px=320, height_px=384, views=(_HIGH, _LEFT, _RIGHT)),
    ),
    "piper": Layout(
        channels=_arm(""),
        canvas=CanvasSpec(width_px=320, height_px=384, views=(_HIGH, _LEFT)),
    ),
}


def find_layout(name: str) -> Layout:
    """Return a built-in layout, or the one in a JSON file.

    Raises:
        SpecError: no such layout or file, or the file does not fit; says what is wrong where.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    path = Path(name)
    if not path.is_file():
        raise SpecError(
            f"--layout {name}: not a built-in layout ({', '.join(LAYOUTS)}) and no such file"
        )
    try:
        layout = msgspec.json.decode(path.read_text("utf-8-sig"), type=Layout)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise SpecError(f"--layout {path}: {e}") from e
    if not (0 < layout.rate_hz <= 1000) or not 0 < layout.n_rows <= 1000:
        raise SpecError(f"--layout {path}: n_rows and rate_hz must be in 1..1000")
    return layout
