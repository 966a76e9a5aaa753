"""What a target can compute and read, said before an hour of calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gwp_edge.errors import SpecError
from gwp_edge.export.precision import (
    PRECISIONS,
    QUANTIZED_FORMATS,
    TENSORRT_INT4_BLOCKS,
    Format,
    Recipe,
)

# TensorRT quantizes weights alone for int4 and no other type ("Working with Quantized Types",
# 10.11): it folds the dequantization of int8 weights into float ones when it builds.
_NO_W8 = "TensorRT keeps weights alone quantized in int4 only and expands int8 ones"
_NO_FP8 = "its tensor cores have no fp8 (SM89 and newer have)"
# Asked for by name, but no graph of ours carries it.
_NVFP4 = (
    "is not written: its two-level block scales have no ONNX operator, only TensorRT's own; use "
    "--precision fp8 (thor, blackwell) or w4"
)
_NOT_WRITTEN: Mapping[str, str] = {
    "nvfp4": _NVFP4,
    "fp4": _NVFP4,
    "int4": "with quantized inputs is not written; use --precision w4 (weights only) or int8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a family of devices can do.

    Attributes:
        without: precisions that it cannot have, and why.
        release: oldest TensorRT that its graphs must be readable for; None where none reads them.
        rest: what a quantized recipe leaves unquantized computes in. A strongly typed network
            computes in the types of its graph, so float32 would run without tensor cores.
    """

    without: Mapping[Format, str] = field(default_factory=dict)
    release: str | None = "10.13"
    rest: Format = "fp16"


# Compute capability 8.7 (Orin) is Ampere; FP8 units came with 8.9 (Ada) and 9.0 (Hopper).
TARGETS: Mapping[str, Target] = {
    "cpu": Target(release=None, rest="fp32"),
    # 10.3 of JetPack 6; JetPack 7.2 has 10.16, which reads everything that 10.3 does.
    "orin": Target(without={"fp8": _NO_FP8, "w8": _NO_W8}, release="10.3"),
    "ampere": Target(without={"fp8": _NO_FP8, "w8": _NO_W8}),
    "ada": Target(without={"w8": _NO_W8}),
    "hopper": Target(without={"w8": _NO_W8}),
    "thor": Target(without={"w8": _NO_W8}),
    "blackwell": Target(without={"w8": _NO_W8}),
}


def find_target(name: str) -> Target:
    """Return a target.

    Raises:
        SpecError: no target has that name.
    """
    if name not in TARGETS:
        raise SpecError(f"--target {name} is not known; choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def check_target_precision(target: str, precision: str) -> None:
    """Refuse a precision that the target cannot have.

    Raises:
        SpecError: an unknown target or precision, or one that does not fit the other; says which
            would.
    """
    found = find_target(target)
    if precision in _NOT_WRITTEN:
        raise SpecError(f"--precision {precision} {_NOT_WRITTEN[precision]}")
    known = next((p for p in PRECISIONS if p == precision), None)
    if known is None:
        raise SpecError(
            f"--precision {precision} is not known; choose from {', '.join(PRECISIONS)}"
        )
    why = found.without.get(known)
    if why is not None:
        others = [p for p in QUANTIZED_FORMATS if p not in found.without]
        raise SpecError(
            f"--target {target}: not --precision {precision}: {why}; use --precision "
            f"{' or '.join(others)}"
        )


def with_whole_blocks(recipe: Recipe, target: str, widths: Mapping[str, int]) -> Recipe:
    """Return ``recipe`` with int4 only where ``target`` can have it, and the reason elsewhere.

    ONNX lets the last block of a weight be shorter, TensorRT does not.

    Args:
        recipe: of the export.
        target: device family.
        widths: inputs of every layer that can be quantized.

    Raises:
        SpecError: TensorRT has no blocks of the recipe's size, or the recipe asks by name for int4
            in a layer that does not divide into them.
    """
    layers = [layer for layer in widths if recipe.of(layer) == "w4"]
    if find_target(target).release is None or not layers:
        return recipe
    if recipe.block not in TENSORRT_INT4_BLOCKS:
        known = " or ".join(map(str, TENSORRT_INT4_BLOCKS))
        raise SpecError(
            f"--target {target}: TensorRT has no int4 blocks of {recipe.block}; use --block {known}"
        )
    ragged = [layer for layer in layers if widths[layer] % recipe.block]
    for layer in ragged:
        if layer in recipe.overrides:
            raise SpecError(
                f"--target {target}: {layer} has {widths[layer]} inputs, TensorRT's int4 wants "
                f"whole blocks of {recipe.block}; give that layer another format in the recipe"
            )
    kept = {
        layer: (
            recipe.rest,
            f"{widths[layer]} inputs are not whole blocks of {recipe.block}, as TensorRT takes",
        )
        for layer in ragged
    }
    return replace(recipe, overrides={**recipe.overrides, **kept})


def rest_format(target: str) -> Format:
    """Return what a quantized recipe leaves unquantized computes in, where nobody says."""
    return find_target(target).rest
