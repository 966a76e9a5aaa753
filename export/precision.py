"""Which number format each layer computes in.

A recipe maps layer names to formats. The same recipe drives the graph writer and the torch
emulation, so an engine's answer can be told from a rounding error.

==========  ==============================================================================
format      arithmetic of ``x @ W + b``
==========  ==============================================================================
fp32        float32
fp16, bf16  operands and product rounded to the type, sums in float32
int8        x and W in int8, symmetric: one scale for x, one for each output of W
fp8         x and W in float8 E4M3FN: scales as int8
w8          W in int8, one scale for each output; x in float32
w4          W in int4, one scale for each block of inputs and output; x in float32
==========  ==============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gwp_edge.errors import SpecError
from gwp_edge.types import Float32Array

Format = Literal["fp32", "fp16", "bf16", "int8", "fp8", "w8", "w4"]
FLOAT_FORMATS: tuple[Format, ...] = ("fp32", "fp16", "bf16")
QUANTIZED_FORMATS: tuple[Format, ...] = ("int8", "fp8", "w8", "w4")
# Formats whose activations are quantized too, so that they need a calibrated range.
STATIC_FORMATS: tuple[Format, ...] = ("int8", "fp8")
PRECISIONS: tuple[Format, ...] = FLOAT_FORMATS + QUANTIZED_FORMATS
INT4_BLOCKS = (32, 64, 128)
# TensorRT documentation, "Quantization Schemes": INT4 "supported block sizes are {64, 128}".
TENSORRT_INT4_BLOCKS = (64, 128)
DEFAULT_INT4_BLOCK = 64

# Small, at the ends of the path, and every error there is an error of the action itself.
_HIGH = re.compile(r"^(state_encoder|action_encoder|action_decoder)\.")
_VISION = re.compile(r"^(encoder\.|quant_conv$)")
_NO_BF16_CONVOLUTION = "ONNX has no bfloat16 convolution before opset 22"
# The linear layers that carry nearly all weights. Text keys and values are computed at export.
_QUANTIZABLE = re.compile(
    r"^blocks\.\d+\.(?:\w+_expert\.)?"
    r"(?:attn1\.to_(?:q|k|v|out\.0)|attn2\.to_(?:q|out\.0)|ffn\.net\.(?:0\.proj|2))$"
)
# What stays high beside those where codes are coarse; docs/quantization.md has the measurements.
# Only layers of the stream that carries the actions: an error of the pictures' tokens reaches the
# actions through attention alone, and was lost in the noise wherever it was measured.
_SENSITIVE: dict[str, tuple[re.Pattern[str], str]] = {
    "int8": (
        re.compile(r"^blocks\.\d+\.(?:action_expert\.)?attn2\.to_out\.0$"),
        "output of the text attention in the action stream: its range follows the prompt, and it "
        "joins the residual without a gate",
    ),
    "fp8": (
        re.compile(r"^blocks\.\d+\.(?:action_expert\.)?attn[12]\.to_out\.0$"),
        "output of attention in the action stream: rows hardly vary, so rounding adds up",
    ),
    "w8": (
        re.compile(r"^blocks\.\d+\.(?:action_expert\.)?attn2\.to_(?:q|out\.0)$"),
        "text attention of the action stream: joins the residual without a gate",
    ),
}
_QKV = re.compile(r"attn1\.to_[qkv]$")


def is_quantizable(layer: str) -> bool:
    """Return whether ``layer`` is a linear layer of a transformer block in the robot's loop."""
    return _QUANTIZABLE.match(layer) is not None


def input_name(layer: str) -> str:
    """Return the name of a layer's input: q, k and v of self-attention read the same one."""
    return _QKV.sub("attn1.qkv", layer)


def scale_key(stage: str, layer: str) -> str:
    """Return the key of a layer's input range: one layer may run in prefill and in denoise."""
    return f"{stage}/{input_name(layer)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Format of every named layer.

    Attributes:
        name: precision of the bundle as the user asked for it.
        default: format of layers that nothing else decides.
        rest: where ``default`` is a quantized format, what the other layers compute in.
        overrides: format of single layers, with the reason.
        thresholds: largest magnitude of the input of a layer that its codes can express, by
            ``scale_key``; needed where activations are quantized.
        means: mean input (in,) of a layer by ``scale_key``. Where it is known, the bias takes up
            what rounding the weights does to the mean output.
        block: inputs that share a scale in ``w4``.
    """

    name: str
    default: Format
    rest: Format = "fp32"
    overrides: Mapping[str, tuple[Format, str]] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, Float32Array] = field(default_factory=dict)
    block: int = DEFAULT_INT4_BLOCK

    def of(self, layer: str) -> Format:
        """Return the format that ``layer`` computes in."""
        return self.explain(layer)[0]

    def explain(self, layer: str) -> tuple[Format, str]:
        """Return format and reason of ``layer``."""
        if layer in self.overrides:
            return self.overrides[layer]
        if self.default != "fp32" and _HIGH.match(layer):
            return "fp32", "encoder or decoder of state and action: small, error goes to the action"
        if self.default in QUANTIZED_FORMATS and not is_quantizable(layer):
            if self.rest == "bf16" and _VISION.match(layer):
                return "fp32", _NO_BF16_CONVOLUTION
            return self.rest, "outside the linear layers of the blocks: few weights, high precision"
        sensitive = _SENSITIVE.get(self.default)
        if sensitive is not None and sensitive[0].match(layer):
            return self.rest, sensitive[1]
        if self.default == "bf16" and _VISION.match(layer):
            return "fp32", _NO_BF16_CONVOLUTION
        return self.default, f"{self.name} bundle"

    def threshold(self, stage: str, layer: str) -> float:
        """Return the clipping threshold of a layer's input.

        Raises:
            SpecError: the layer was not calibrated.
        """
        found = self.thresholds.get(scale_key(stage, layer))
        if found is None:
            raise SpecError(
                f"{layer}: has no calibrated range in {stage}; calibrate with --calibration DATASET"
            )
        return found

    def mean(self, stage: str, layer: str) -> Float32Array | None:
        """Return the mean input of a layer, or None where it was not observed."""
        return self.means.get(scale_key(stage, layer))

    @property
    def is_float32(self) -> bool:
        """Every layer computes in float32, so that there is nothing to round."""
        return self.default == "fp32" and all(f == "fp32" for f, _ in self.overrides.values())


def make_recipe(precision: str) -> Recipe:
    """Return the recipe that ``--precision`` names, without ranges.

    Raises:
        SpecError: ``precision`` is not known.
    """
    for known in PRECISIONS:
        if precision == known:
            return Recipe(name=precision, default=known)
    raise SpecError(f"--precision {precision} is not known; choose from {', '.join(PRECISIONS)}")


def cache_format(recipe: Recipe) -> Format:
    """Return the format of prefix and prompt K/V: the one that attention computes in."""
    return recipe.of("blocks.0.attn1.qk")
