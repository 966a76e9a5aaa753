"""Sizes of layers, and the action error of recipes on samples that calibration did not see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gwp_edge.calibration.collect import SampleSet, quantizable_layers
from gwp_edge.calibration.forward import BatchRunner, Network
from gwp_edge.errors import BuildError
from gwp_edge.export.errors_measured import measure_error
from gwp_edge.export.graphs import denoise_graph, prefill_graph
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import Recipe, make_recipe
from gwp_edge.export.weight_bank import WeightBank
from gwp_edge.manifest import MeasuredError
from gwp_edge.types import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """Weights of a layer, and its operations in one chunk."""

    n_values: int
    flops: int


def layer_sizes(network: Network) -> dict[str, LayerSize]:
    """Return all quantizable layers that the graphs run, in order."""
    spec, exact = network.spec, make_recipe("fp32")
    sizes: dict[str, LayerSize] = {}
    wanted = set(quantizable_layers(network))
    for record, n_runs in ((prefill_graph, 1), (denoise_graph, spec.sampler.n_steps)):
        for cost in record(network.weights, spec, exact, WeightBank(), "native").costs:
            if cost.name in wanted:
                known = sizes.get(cost.name)
                flops = cost.flops * n_runs + (known.flops if known else 0)
                sizes[cost.name] = LayerSize(n_values=cost.weight_bytes // 4, flops=flops)
    return {name: sizes[name] for name in quantizable_layers(network) if name in sizes}


class Judge:
    """Measures recipes on held-out samples. Threads: one owner."""

    def __init__(self, network: Network, held_out: SampleSet, device: str, name: str) -> None:
        self._runner = BatchRunner(network, held_out.prepared, device=device)
        self._exact = self._actions(make_recipe("fp32"), network.weights)
        self._channels = network.spec.channels
        episodes = sorted({ref.episode for ref in held_out.refs})
        listed = ", ".join(str(e) for e in episodes)
        self._inputs = (
            f"{len(held_out.refs)} held-out samples of {name} (episode {listed}), "
            "emulated arithmetic"
        )
        self.n_runs = 0

    def _actions(self, recipe: Recipe, weights: WeightSource) -> list[FloatArray]:
        return self._runner.actions(self._runner.run(recipe, weights=weights))

    def measure(self, recipe: Recipe, weights: WeightSource) -> MeasuredError:
        """Return the action error of a recipe against float32, same noise."""
        self.n_runs += 1
        actions = self._actions(recipe, weights)
        if not np.isfinite(np.stack(actions)).all():
            raise BuildError(f"{recipe.name}: actions are not finite; choose another --precision")
        return measure_error(actions, self._exact, self._channels, self._inputs)
