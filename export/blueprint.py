"""The manifest that a network of a given size would have, without any weights.

The graphs are recorded as for an export, from shapes alone, so the costs are those of the real
bundle. For planning: a blueprint cannot be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

import gwp_edge
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.export.accounting import Shape, expected_tensors
from gwp_edge.export.graphs import Graph, denoise_graph, prefill_graph, vision_graph
from gwp_edge.export.layout import find_layout
from gwp_edge.export.precision import Format, Recipe, cache_format, make_recipe
from gwp_edge.export.sizes import NetworkSizes
from gwp_edge.export.synthetic import SIZES, Vae, vae_config, vae_shapes
from gwp_edge.export.vision_encoder import VaeConfig
from gwp_edge.export.weight_bank import WeightBank
from gwp_edge.manifest import (
    SCHEMA,
    SCHEMA_VERSION,
    Golden,
    GraphSet,
    Layer,
    Manifest,
    MeasuredError,
    Precision,
    Provenance,
)
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import PolicySpec, Statistics

# 11 words and the padding rows merged into the few that the prompt cache needs.
_TEXT_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shapes:
    """A weight source that knows shapes alone."""

    shapes: Mapping[str, Shape]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise BuildError(f"blueprint: no tensor {name}")
        return tuple(self.shapes[name])

    def load(self, name: str) -> torch.Tensor:
        raise BuildError(f"blueprint: {name} has no values; export a checkpoint instead")


class _AnyRange(dict[str, float]):
    """A calibrated range for every layer: the cost does not depend on it."""

    def get(self, key: str, default: object = None) -> float:
        del key, default
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The native graphs of a network whose weights do not exist."""

    spec: PolicySpec
    recipe: Recipe
    graphs: tuple[Graph, ...]
    bank: WeightBank


def record(
    size: str,
    precision: str,
    *,
    n_steps: int = 10,
    rest: Format | None = None,
    block: int | None = None,
) -> Recorded:
    """Record the graphs of a network of a named size, from shapes alone.

    Args:
        size: one of ``gwp_edge.export.synthetic.SIZES``.
        precision: as for an export.
        n_steps: denoising steps.
        rest: what layers outside a quantized recipe's reach compute in; None as for an export.
        block: inputs that share a scale in ``w4``; None as for an export.

    Raises:
        SpecError: size or precision is not known.
    """
    if size not in SIZES:
        raise SpecError(f"--size {size} is not known; choose from {', '.join(SIZES)}")
    recipe = replace(make_recipe(precision), thresholds=_AnyRange())
    if rest is not None:
        recipe = replace(recipe, rest=rest)
    if block is not None:
        recipe = replace(recipe, block=block)
    spec = _spec(SIZES[size], n_steps)
    # As the synthetic checkpoints of these sizes have it.
    kind: Vae = "small" if size.endswith("-tiny") else "full"
    config = vae_config(kind, SIZES[size].latent_channels, 0)
    vision = VaeConfig.from_json({"_class_name": "AutoencoderKLWan", **config})
    weights = _Shapes(shapes=expected_tensors(SIZES[size]))
    vae = _Shapes(shapes=vae_shapes(config))
    bank = WeightBank()
    graphs = (
        vision_graph(vae, vision, spec, recipe, bank, "native"),
        prefill_graph(weights, spec, recipe, bank, "native"),
        denoise_graph(weights, spec, recipe, bank, "native"),
    )
    return Recorded(spec=spec, recipe=recipe, graphs=graphs, bank=bank)


def blueprint(
    size: str, precision: str, *, n_steps: int = 10, rest: Format | None = None
) -> Manifest:
    """Return the manifest of a network of a named size; arguments as for ``record``.

    Raises:
        SpecError: size or precision is not known.
    """
    found = record(size, precision, n_steps=n_steps, rest=rest)
    return _manifest(size, found.spec, found.recipe, found.graphs)


def _spec(sizes: NetworkSizes, n_steps: int) -> PolicySpec:
    layout = find_layout("piper-dual")
    low, high = (tuple(v for _ in layout.channels) for v in (-1.0, 1.0))
    return PolicySpec(
        network=sizes.network_spec(n_text_rows=_TEXT_ROWS),
        sampler=make_schedule(n_steps),
        canvas=layout.canvas,
        channels=layout.channels,
        statistics=Statistics(state_q01=low, state_q99=high, action_q01=low, action_q99=high),
        n_rows=layout.n_rows,
        period_ns=round(1e9 / layout.rate_hz),
        tasks=("blueprint",),
        embodiment=0,
    )


def _manifest(size: str, spec: PolicySpec, recipe: Recipe, graphs: tuple[Graph, ...]) -> Manifest:
    layers = tuple(
        Layer(
            stage=graph.stage,
            name=cost.name,
            format=cost.format,
            reason=recipe.explain(cost.name)[1],
            flops=cost.flops,
            weight_bytes=cost.weight_bytes,
        )
        for graph in graphs
        for cost in graph.costs
    )
    files = GraphSet(vision="vision.onnx", prefill="prefill.onnx", denoise="denoise.onnx")
    return Manifest(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        bundle_id="blueprint",
        spec=spec,
        precision=Precision(name=recipe.name, cache=cache_format(recipe), layers=layers),
        graphs={"native": files},
        prompts={},
        tables="",
        weights="",
        golden=Golden(file="", task="blueprint", tolerance=0.0, checked_with=()),
        error=MeasuredError(inputs="none", n_chunks=0, joints_rad=None, grippers_m=None),
        files={},
        provenance=Provenance(
            gwp_edge=gwp_edge.__version__,
            created_at="",
            checkpoint={},
            libraries={},
            unused={},
            notes=(f"blueprint of {size}: shapes without weights",),
        ),
    )
