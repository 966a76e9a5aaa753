"""What one pass of each stage must do, from a bundle's manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gwp_edge.errors import SpecError
from gwp_edge.manifest import STAGES, Layer, Manifest, Stage
from gwp_edge.spec import PolicySpec

Unit = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]

# What multiplies: float32 products run in TF32 on the tensor cores of a GPU, which is a choice
# of the builder; weight-only formats multiply in the type of the activations.
_UNITS: dict[str, Unit] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "w8": "fp32",
    "w4": "fp32",
}
_ELEMENT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "w8": 1.0}
_CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# What an elementwise or norm kernel between two products reads and writes, in float32.
_ACTIVATION_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """One product.

    Attributes:
        name: of the layer.
        unit: what multiplies.
        flops: operations.
        weight_bytes: weights read.
        n_rows: rows of the product, where a weight tells; else None.
        activation_bytes: input and output, estimated.
    """

    name: str
    unit: Unit
    flops: int
    weight_bytes: int
    n_rows: float | None
    activation_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """One pass of one stage.

    Attributes:
        stage: which.
        n_passes: passes for one chunk.
        layers: its products.
        cache_bytes: prompt and prefix K/V that it reads and writes.
    """

    stage: Stage
    n_passes: int
    layers: tuple[LayerWork, ...]
    cache_bytes: int

    @property
    def flops(self) -> int:
        """Operations of one pass."""
        return sum(layer.flops for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Weights of one pass."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def n_kernels(self) -> int:
        """Kernels of one pass: each product, and one fused elementwise kernel after it."""
        return 2 * len(self.layers)


def cache_bytes(spec: PolicySpec, cache_format: str) -> dict[str, int]:
    """Return bytes of the ``prefix`` K/V and of the ``prompt`` K/V of one stream.

    Raises:
        SpecError: the cache is in a format that this version does not know.
    """
    if cache_format not in _CACHE_BYTES:
        raise SpecError(
            f"manifest: K/V caches in {cache_format!r}, known are {', '.join(_CACHE_BYTES)}; "
            "install the gwp-edge that wrote the bundle"
        )
    net = spec.network
    token = 2 * net.n_layers * net.n_heads * net.head_dim * _CACHE_BYTES[cache_format]
    return {"prefix": token * spec.n_prefix, "prompt": token * net.n_text_rows}


def _layer(layer: Layer) -> LayerWork:
    if layer.format not in _UNITS:
        raise SpecError(
            f"{layer.name}: format {layer.format!r} is not known; install the gwp-edge that "
            "wrote the bundle"
        )
    n_rows: float | None = None
    activation = 0
    if layer.weight_bytes > 0:
        values = layer.weight_bytes / _ELEMENT_BYTES.get(layer.format, 0.5)
        n_rows = layer.flops / (2 * values)
        # The sides of the weight are not in the manifest; a square one is within 2x for all.
        activation = int(2 * n_rows * values**0.5 * _ACTIVATION_BYTES)
    return LayerWork(
        name=layer.name,
        unit=_UNITS[layer.format],
        flops=layer.flops,
        weight_bytes=layer.weight_bytes,
        n_rows=n_rows,
        activation_bytes=activation,
    )


def workload(manifest: Manifest) -> dict[Stage, StageWork]:
    """Return what each stage of a bundle must do."""
    spec = manifest.spec
    caches = cache_bytes(spec, manifest.precision.cache)
    n_streams = 2 if spec.network.family == "gwp-0.5" else 1
    touched = {
        "vision": 0,
        "prefill": caches["prefix"] + n_streams * caches["prompt"],
        "denoise": caches["prefix"] + caches["prompt"],
    }
    result: dict[Stage, StageWork] = {}
    for stage in STAGES:
        layers = tuple(_layer(x) for x in manifest.precision.layers if x.stage == stage)
        if not layers:
            raise SpecError(f"manifest lists no layers of {stage}; export the policy again")
        result[stage] = StageWork(
            stage=stage,
            n_passes=spec.sampler.n_steps if stage == "denoise" else 1,
            layers=layers,
            cache_bytes=touched[stage],
        )
    return result
