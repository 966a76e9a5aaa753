"""The calibration record: what was observed, on which samples, in one safetensors file.

It is enough to quantize again without the dataset, and to prove which samples were used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gwp_edge.calibration.histogram import Histogram
from gwp_edge.calibration.observers import ChannelObserver, TensorObserver
from gwp_edge.calibration.sampling import SampleRef
from gwp_edge.console import write_file
from gwp_edge.errors import SpecError
from gwp_edge.types import Float32Array

_VERSION = "2"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """Ranges and their origin.

    Attributes:
        tensors: observers of activation tensors by name.
        channels: observers of channel maxima by name.
        means: mean input (in,) of each layer by name.
        smoothing: factors that the network was folded with before it was observed, by the name
            of what they divide; see :mod:`gwp_edge.export.folding`.
        samples: the samples that were seen, in order.
        is_synthetic: the samples are not recorded data.
        provenance: what else identifies the run, JSON-ready: hashes of checkpoint and dataset,
            seed, number of steps.
    """

    tensors: Mapping[str, TensorObserver]
    channels: Mapping[str, ChannelObserver] = field(default_factory=dict)
    means: Mapping[str, Float32Array] = field(default_factory=dict)
    smoothing: Mapping[str, Float32Array] = field(default_factory=dict)
    samples: tuple[SampleRef, ...] = ()
    is_synthetic: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)


def record_bytes(record: CalibrationRecord) -> bytes:
    """Return the content of a record's file; equal records give equal bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for name, observer in record.tensors.items():
        tables = {"step": observer.step_histograms, "group": observer.group_histograms}
        tensors[name] = {"n_bins": observer.n_bins, "step": {}, "group": {}}
        for kind, table in tables.items():
            for key, histogram in table.items():
                content = histogram.to_dict()
                counts = np.array(content.pop("counts"), dtype=np.int64)
                arrays[f"tensors/{name}/{kind}/{key}"] = counts
                tensors[name][kind][str(key)] = content
    channels = {}
    for name, channel in record.channels.items():
        channels[name] = list(channel.steps)
        for step_idx, amax in channel.step_amax.items():
            arrays[f"channels/{name}/{step_idx}"] = np.asarray(amax)
    vectors = {"means": record.means, "smoothing": record.smoothing}
    for kind, named in vectors.items():
        for vector_name, vector in named.items():
            arrays[f"{kind}/{vector_name}"] = np.asarray(vector, np.float32)
    header = {
        "vectors": {kind: sorted(named) for kind, named in vectors.items()},
        "tensors": tensors,
        "channels": channels,
        "samples": [asdict(ref) for ref in record.samples],
        "is_synthetic": record.is_synthetic,
        "provenance": dict(record.provenance),
    }
    # One key only: the library writes several in no fixed order.
    metadata = {"gwp-edge": json.dumps({"version": _VERSION, **header}, sort_keys=True)}
    return save(dict(sorted(arrays.items())), metadata=metadata)


def save_record(path: Path, record: CalibrationRecord) -> None:
    """Write a record, whole or not at all.

    Raises:
        SpecError: it cannot be written.
    """
    write_file(path, lambda file: file.write(record_bytes(record)))


def load_record(path: Path) -> CalibrationRecord:
    """Read what :func:`save_record` wrote.

    Raises:
        SpecError: the file is missing, damaged, or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("gwp-edge", "{}"))
            if header.get("version") != _VERSION:
                raise SpecError(
                    f"{path}: expected a calibration record of version {_VERSION}, "
                    f"got {header.get('version')}; calibrate again"
                )
            tensors = {
                name: _tensor(file, name, content) for name, content in header["tensors"].items()
            }
            channels = {name: _channel(file, name, s) for name, s in header["channels"].items()}
            vectors = {
                kind: {name: file.get_tensor(f"{kind}/{name}") for name in header["vectors"][kind]}
                for kind in ("means", "smoothing")
            }
            return CalibrationRecord(
                tensors=tensors,
                **vectors,
                channels=channels,
                samples=tuple(SampleRef(**ref) for ref in header["samples"]),
                is_synthetic=bool(header["is_synthetic"]),
                provenance=header["provenance"],
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise SpecError(f"{path}: not a readable calibration record ({e}); calibrate again") from e


def _tensor(file: Any, name: str, content: dict[str, Any]) -> TensorObserver:  # noqa: ANN401
    observer = TensorObserver(name, n_bins=int(content["n_bins"]))
    tables = {"step": observer.step_histograms, "group": observer.group_histograms}
    for kind, table in tables.items():
        for key, histogram in content[kind].items():
            counts = file.get_tensor(f"tensors/{name}/{kind}/{key}")
            table[int(key)] = Histogram.from_dict({**histogram, "counts": counts})
    return observer


def _channel(file: Any, name: str, steps: list[int]) -> ChannelObserver:  # noqa: ANN401
    observer = ChannelObserver(name)
    for step_idx in steps:
        observer.observe(file.get_tensor(f"channels/{name}/{step_idx}"), step_idx=step_idx)
    return observer
