"""Name the layer that makes an engine miss the golden output. Not yet run on hardware.

Stage by stage against ONNX Runtime: the latent, then the prefix K/V, which prefill gives away
block by block. The stage at fault is then built once more with its layers' results as debug
tensors, and both run on the same input. Debug tensors cost fusions, so this second engine may
compute rightly what the first did not; that is said where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt_debug import run_debug
from gwp_edge.engines.trt_reference import Reference, layer_tensors, stage_inputs
from gwp_edge.errors import GwpError
from gwp_edge.manifest import Stage
from gwp_edge.types import Float32Array

Arrays = Mapping[str, npt.NDArray[Any]]
# (stage, path to write to, tensors to show)
BuildDebug = Callable[[Stage, Path, frozenset[str]], None]
# Part of a tensor's largest value; 16-bit and quantized layers stay well below when right.
_OFF: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the engines gave on the way to a wrong answer: the latent, and prefix K/V by name."""

    latent: Float32Array
    prefix: Arrays


def relative_error(got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """Return the largest difference over the largest wanted value; infinite for NaN."""
    a, b = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    if not np.isfinite(a).all():
        return float("inf")
    return float(np.abs(a - b).max()) / (float(np.abs(b).max()) or 1.0)


def blame(bundle: Bundle, seen: Seen, folder: Path, build_debug: BuildDebug) -> str:
    """Say which stage, and where debug tensors can tell which layer, is at fault.

    Args:
        bundle: whose golden output is missed.
        seen: what the engines gave for the golden input.
        folder: to build in.
        build_debug: builds an engine that shows its layers.
    """
    latent = bundle.arrays(bundle.manifest.golden.file)["latent"]
    off = relative_error(seen.latent, latent)
    if off > _OFF:
        text = f"already the vision engine's latent is {_how_far(off)}"
        return f"{text}; {_layer(bundle, 'vision', folder, build_debug)}"
    try:
        with Reference(bundle, "prefill") as reference:
            wanted = reference.run(stage_inputs(bundle, "prefill"))
    except GwpError as e:
        return f"the latent is right, so prefill or denoise is at fault ({e})"
    bad = [name for name in wanted if relative_error(seen.prefix[name], wanted[name]) > _OFF]
    if bad:
        off = relative_error(seen.prefix[bad[0]], wanted[bad[0]])
        text = f"prefill is at fault: {bad[0]} is the first K/V that is {_how_far(off)}"
        return f"{text}; {_layer(bundle, 'prefill', folder, build_debug)}"
    text = "latent and prefix K/V are right, so denoise is at fault"
    return f"{text}; {_layer(bundle, 'denoise', folder, build_debug)}"


def _how_far(off: float) -> str:
    return "not finite" if off == float("inf") else f"off by {100 * off:.1f} %"


def _layer(bundle: Bundle, stage: Stage, folder: Path, build_debug: BuildDebug) -> str:
    """Compare the layers of a stage; name the first that is off, and the worst."""
    path = folder / f"{stage}.debug"
    names = layer_tensors(bundle, stage)
    try:
        build_debug(stage, path, frozenset(names.values()))
        feeds = stage_inputs(bundle, stage)
        with Reference(bundle, stage, tuple(names.values())) as reference:
            wanted = reference.run(feeds)
        got = run_debug(path, feeds)
    except GwpError as e:
        return f"no layer can be named: {e}"
    finally:
        path.unlink(missing_ok=True)
    errors = {
        layer: relative_error(got[tensor], wanted[tensor])
        for layer, tensor in names.items()
        if tensor in got and tensor in wanted
    }
    bad = [layer for layer, error in errors.items() if error > _OFF]
    if not errors:
        return "TensorRT showed none of its layers"
    if not bad:
        return (
            f"built to show its {len(errors)} layers it computes them rightly, so a fusion of "
            "the first engine is at fault"
        )
    worst = max(errors, key=lambda layer: errors[layer])
    return (
        f"the first wrong layer is {bad[0]} ({_how_far(errors[bad[0]])}), the worst {worst} "
        f"({_how_far(errors[worst])})"
    )
