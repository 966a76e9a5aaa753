"""Read an observation from an .npz file: one uint8 RGB array per camera, and ``state``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, Frame, Observation


def load_observation(path: Path, spec: PolicySpec) -> Observation:
    """Return the observation in ``path``, stamped with time 0.

    Args:
        path: .npz with an array (h, w, 3) of uint8 RGB for each camera of the spec, any size, and
            ``state`` (D,), rad and m. Other entries are ignored.
        spec: which cameras and how many channels.

    Raises:
        SpecError: unreadable, or an entry is missing or has the wrong type or shape.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise SpecError(
                f"--observation {path}: is one array (.npy); expected an .npz file with one for "
                "each camera, and state"
            )
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise SpecError(f"--observation {path}: no such file") from None
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, EOFError) as e:
        raise SpecError(
            f"--observation {path}: is not an .npz file of plain arrays: {_line(e)}"
        ) from e
    missing = [name for name in (*spec.cameras, "state") if name not in arrays]
    if missing:
        raise SpecError(
            f"--observation {path}: has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(arrays)) or 'nothing'}"
        )
    state = arrays["state"]
    if state.shape != (spec.n_channels,) or not np.issubdtype(state.dtype, np.floating):
        raise SpecError(
            f"--observation {path}: state must be {spec.n_channels} floating-point numbers, got "
            f"{state.dtype} {state.shape}"
        )
    try:
        frames = tuple(_frame(name, arrays[name]) for name in spec.cameras)
    except SpecError as e:
        raise SpecError(f"--observation {path}: {e}") from e
    return Observation(frames=frames, state=state.astype(np.float64), t_state_ns=0)


def _frame(camera: str, image: npt.NDArray[np.uint8]) -> Frame:
    return Frame(
        camera=camera, image=image, t_captured_ns=0, t_received_ns=0, frame_idx=0, domain="recorded"
    )


def load_noise(path: Path, spec: PolicySpec) -> Float32Array:
    """Return starting noise (H, A) from a .npy file of shape (H, A) or (1, H, A).

    Raises:
        SpecError: unreadable, or the wrong type or shape.
    """
    try:
        noise = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise SpecError(f"--noise {path}: no such file") from None
    except (OSError, ValueError, EOFError) as e:
        raise SpecError(f"--noise {path}: is not a .npy file of numbers: {_line(e)}") from e
    shape = (spec.n_rows, spec.network.n_action_channels)
    if not isinstance(noise, np.ndarray) or noise.shape not in (shape, (1, *shape)):
        found = noise.shape if isinstance(noise, np.ndarray) else "several arrays"
        raise SpecError(f"--noise {path}: expected shape {shape}, got {found}")
    if not np.issubdtype(noise.dtype, np.floating) or not np.isfinite(noise).all():
        raise SpecError(f"--noise {path}: expected finite floating-point numbers")
    return np.ascontiguousarray(noise.reshape(shape), dtype=np.float32)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
