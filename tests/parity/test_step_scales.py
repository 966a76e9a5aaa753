"""What a range of its own for every denoising step would bring: the reason why there is none.

    pytest -s tests/parity/test_step_scales.py

prints the errors. Only inputs that follow a modulation table can have such ranges without work at
run time: self-attention and the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")
pytest.importorskip("av")

from calibration_rig import opened  # noqa: E402

from gwp_edge.calibration.collect import CollectOptions, collect  # noqa: E402
from gwp_edge.calibration.forward import BatchRunner  # noqa: E402
from gwp_edge.calibration.judge import layer_sizes  # noqa: E402
from gwp_edge.export.precision import make_recipe  # noqa: E402

pytestmark = pytest.mark.export

MODULATED = ("attn1.qkv", "ffn.net.0.proj")


class Ranges(Mapping):
    """Ranges over all steps, or of the present step where a table could carry them."""

    def __init__(self, record, *, by_step):
        self._record = record
        self._by_step = by_step
        self._known = {}
        self.step = 0

    def __getitem__(self, key):
        found = self._record.tensors[key]
        stage, _, name = key.partition("/")
        own = self._by_step and stage == "denoise" and name.endswith(MODULATED)
        step = self.step if own else None
        if (key, step) not in self._known:
            self._known[key, step] = found.threshold("minmax", step_idx=step)
        return self._known[key, step]

    def __iter__(self):
        return iter(self._record.tensors)

    def __len__(self):
        return len(self._record.tensors)


def errors_mrad(name, precision):
    """Return the mean error on joints with one range, and with one for each step."""
    how = CollectOptions(n_samples=8, n_held_out=6, smoothing=False)
    with opened(name, how) as case:
        net = case.network
        record = collect(net, case.seen, how, is_synthetic=False, provenance={})
        runner = BatchRunner(net, case.unseen.prepared)
        exact = runner.actions(runner.run(make_recipe("fp32")))
        is_rad = np.array([c.unit == "rad" for c in case.spec.channels])
        found = []
        for by_step in (False, True):
            ranges = Ranges(record, by_step=by_step)
            recipe = replace(make_recipe(precision), thresholds=ranges, means=record.means)
            assert any(recipe.of(layer) == precision for layer in layer_sizes(net))

            def follow(stage, step, *_, ranges=ranges):
                ranges.step = step if stage == "denoise" else 0

            answers = runner.actions(runner.run(recipe, observe=follow))
            off = np.abs(np.stack(answers) - np.stack(exact))[..., is_rad]
            found.append(1e3 * float(off.mean()))
    return found


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["random GWP-0.5", "trained"])
def test_ranges_of_single_steps_bring_too_little(name, precision):
    one, by_step = errors_mrad(name, precision)
    share = 1.0 - by_step / one
    print(f"\n{name}, {precision}: {one:.3f} mrad, by step {by_step:.3f} mrad ({share:+.1%})")
    assert by_step != one, "the ranges of single steps were not used"
    # Where this fails, per-step scales are worth their second graph form.
    assert share < 0.15
