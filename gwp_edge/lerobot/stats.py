"""Statistics of a LeRobot v3.0 dataset, by episode and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

QUANTILES: Final = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
Stats = dict[str, dict[str, Any]]


def numeric_stats(columns: Mapping[str, npt.NDArray[Any]]) -> Stats:
    """Return the statistics of every column."""
    return {key: column_stats(values, count=len(values)) for key, values in columns.items()}


def column_stats(values: npt.NDArray[Any], *, count: int) -> dict[str, Any]:
    """Return min, max, mean, std, quantiles over the first axis, and ``count`` as given."""
    raw = values.reshape(len(values), -1)
    table = raw.astype(np.float64)
    result: dict[str, Any] = {
        # Of counters these stay whole numbers, as in LeRobot's own tables.
        "min": raw.min(axis=0).tolist(),
        "max": raw.max(axis=0).tolist(),
        "mean": table.mean(axis=0).tolist(),
        "std": table.std(axis=0).tolist(),
        "count": [count],
    }
    return result | {name: np.quantile(table, q, axis=0).tolist() for name, q in QUANTILES.items()}


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Join the statistics of episodes, as LeRobot does: quantiles are means weighted by count."""
    merged: Stats = {}
    for feature in parts[0]:
        mine = [p[feature] for p in parts]
        n = np.array([m["count"][0] for m in mine], np.float64)
        array = {k: np.array([m[k] for m in mine]) for k in mine[0] if k != "count"}
        weight = (n / n.sum()).reshape(-1, *[1] * (array["mean"].ndim - 1))
        mean = (weight * array["mean"]).sum(axis=0)
        variance = (weight * (array["std"] ** 2 + (array["mean"] - mean) ** 2)).sum(axis=0)
        merged[feature] = {
            "min": array["min"].min(axis=0).tolist(),
            "max": array["max"].max(axis=0).tolist(),
            "mean": mean.tolist(),
            "std": np.sqrt(variance).tolist(),
            "count": [int(n.sum())],
            **{q: (weight * array[q]).sum(axis=0).tolist() for q in QUANTILES},
        }
    return merged
