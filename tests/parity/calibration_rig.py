"""Networks with the datasets that calibrate them: two random ones and the trained example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

from gwp_edge.calibration.collect import load_set
from gwp_edge.calibration.forward import Network
from gwp_edge.export.inputs import ExportOptions, read_inputs
from gwp_edge.lerobot.dataset import LeRobotDataset

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
REACH = ROOT / "examples" / "reach"
CASES = {
    "random GWP-0.5": (DATA / "reference" / "gwp05" / "checkpoint", DATA / "dataset", "piper-dual"),
    "random GWP-0": (DATA / "reference" / "gwp0" / "checkpoint", DATA / "dataset", "piper-dual"),
    "trained": (REACH / "policy" / "checkpoint", REACH / "episodes", str(REACH / "layout.json")),
}


@contextmanager
def opened(name: str, how) -> Iterator[SimpleNamespace]:
    """Give network, and samples that calibration sees and does not see, as ``how`` says."""
    checkpoint, data, layout = CASES[name]
    options = ExportOptions(checkpoint=checkpoint, out=Path("unused.gwp"), layout=layout)
    with ExitStack() as stack:
        inputs = read_inputs(options, stack, lambda *_: None)
        network = Network(
            weights=inputs.weights,
            vae_weights=inputs.vae_weights,
            vae=inputs.vae,
            spec=inputs.spec,
        )
        dataset = stack.enter_context(LeRobotDataset.open(data))
        tasks = zip(inputs.spec.tasks, inputs.embeddings, strict=True)
        prompts = {task: embedding.numpy() for task, embedding in tasks}
        seen, unseen = (
            load_set(network, dataset, how, held_out=side, known_prompts=prompts)
            for side in (False, True)
        )
        yield SimpleNamespace(network=network, seen=seen, unseen=unseen, spec=inputs.spec)
