"""norm_stats.json as training computes it."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lerobot_writer import NAMES, write_dataset, write_rows

from gwp_edge.calibration import statistics
from gwp_edge.calibration.quantiles import QuantileSelector
from gwp_edge.calibration.statistics import (
    compute_statistics,
    delta_mask_from_names,
    write_statistics,
)
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset

pytestmark = pytest.mark.export
ROOT = Path(__file__).parents[1] / "data" / "dataset"


def check_equal(got, expected, rtol=1e-6, atol=1e-7):
    assert got.keys() == expected.keys() == {"norm_stats"}
    assert got["norm_stats"].keys() == expected["norm_stats"].keys()
    for key, table in expected["norm_stats"].items():
        assert got["norm_stats"][key].keys() == table.keys()
        for name, values in table.items():
            np.testing.assert_allclose(
                got["norm_stats"][key][name], values, rtol=rtol, atol=atol, err_msg=f"{key} {name}"
            )


def plainly(roots, n_rows, width, mask):
    """Compute the same by holding every window in memory."""
    states, windows = [], []
    for root in roots:
        dataset = LeRobotDataset.open(root)
        for i in range(dataset.n_episodes):
            s, a = dataset.state(i), dataset.action(i)
            states.append(s)
            for t in range(len(s)):
                rows = [a[min(t + h, len(a) - 1)] - np.where(mask, s[t], 0) for h in range(n_rows)]
                windows.append(np.array(rows, np.float32))
    out = {}
    for key, x in (("observation.state", states), ("action", windows)):
        x = np.concatenate(x).astype(np.float32)
        wide = x.astype(np.float64)
        columns = {
            "mean": wide.mean(0),
            "std": wide.std(0),
            "min": x.min(0),
            "max": x.max(0),
            "q01": np.quantile(x, 0.01, axis=0),
            "q99": np.quantile(x, 0.99, axis=0),
        }
        out[key] = {k: np.pad(v, (0, width - len(v))).tolist() for k, v in columns.items()}
    return {"norm_stats": out}


def test_statistics_of_the_real_dataset_equal_training(tmp_path):
    calls = []
    stats = compute_statistics([ROOT], width=32, progress=lambda i, n: calls.append((i, n)))
    check_equal(stats, json.loads((ROOT / "norm_stats.json").read_text()))
    assert calls == [(i, 8) for i in range(1, 9)]
    write_statistics(tmp_path / "norm_stats.json", stats)
    assert json.loads((tmp_path / "norm_stats.json").read_text()) == stats
    assert [p.name for p in tmp_path.iterdir()] == ["norm_stats.json"]


def test_statistics_are_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("norm_stats.json")
    write_statistics(tmp_path / "link", {"norm_stats": {}})
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "norm_stats.json").read_text()) == {"norm_stats": {}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("lerobot")
    one = write_dataset(base / "one", codec="mpeg4")
    two = write_dataset(base / "two", lengths=(9,), files=(0,), codec="mpeg4")
    return [one, two]


@pytest.mark.parametrize("n_starts", [7, 2048])
@pytest.mark.parametrize("mask", [None, (True, False, True)])
def test_statistics_pooled_equal_the_plain_computation(pair, mask, n_starts, monkeypatch):
    monkeypatch.setattr(statistics, "_N_STARTS", n_starts)
    stats = compute_statistics(pair, n_rows=12, width=5, delta_mask=mask)
    expected = plainly(pair, 12, 5, np.array(mask or (True, True, False)))
    check_equal(stats, expected)
    extremes = ("min", "max")
    for key in ("observation.state", "action"):
        for name in extremes:
            assert stats["norm_stats"][key][name] == expected["norm_stats"][key][name]


def test_statistics_memory_does_not_grow_with_the_data(tmp_path):
    """Windows of 60000 frames are 60 MB; streaming must not hold them."""
    root = write_dataset(
        tmp_path, lengths=(30, 30), files=(0, 1), names=[f"joint{i}" for i in range(7)], cameras=()
    )
    n = 30_000
    rng = np.random.default_rng(0)
    starts = np.array([0, n, 2 * n])
    tables = []
    for i in range(2):
        rows = rng.standard_normal((n, 7)).astype(np.float32)
        write_rows(root / f"data/chunk-000/file-{i:03d}.parquet", [(i, rows, rows)], starts, 30, 2)
        tables.append(rows)
    import pyarrow.parquet as pq
    from lerobot_writer import edit_table

    for i in range(2):
        path = root / f"meta/episodes/chunk-000/file-{i:03d}.parquet"
        edit_table(path, "length", lambda _: [n])
        edit_table(path, "dataset_from_index", lambda _, i=i: [i * n])
        edit_table(path, "dataset_to_index", lambda _, i=i: [(i + 1) * n])
        assert pq.read_table(path).num_rows == 1
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"total_frames": 2 * n}))
    tracemalloc.start()
    stats = compute_statistics([root], n_rows=36, width=8)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 50e6
    expected = np.quantile(np.concatenate(tables), 0.01, axis=0)
    got = stats["norm_stats"]["observation.state"]["q01"][:7]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    rows=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 50), st.just(2)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    ),
    q=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    cut=st.integers(0, 50),
)
def test_selected_order_statistics_are_exact(rows, q, cut):
    selector = QuantileSelector(2, q)
    for part in (rows[:cut], rows[cut:]):
        selector.count(part)
    selector.refine(rows)
    n = len(rows)
    ordered = np.sort(rows.astype(np.float64), axis=0)
    got = selector.quantiles()
    for i, share in enumerate(q):
        position = share * (n - 1)
        low = int(position)
        a, b = ordered[low], ordered[min(low + 1, n - 1)]
        np.testing.assert_array_equal(got[i], np.float32(a + (b - a) * (position - low)))


def test_quantiles_of_data_that_changed_between_passes_are_refused():
    selector = QuantileSelector(1, (0.5,))
    selector.count(np.zeros((3, 1), np.float32))
    selector.refine(np.zeros((2, 1), np.float32))
    with pytest.raises(SpecError, match="changed between the passes"):
        selector.quantiles()


def test_delta_mask_follows_the_names():
    assert delta_mask_from_names(["left_joint1.pos", "Left_Gripper.pos", "shoulder_pan.pos"]) == (
        True,
        False,
        True,
    )
    with pytest.raises(SpecError, match="channel base_x: neither"):
        delta_mask_from_names(["base_x"])


def renamed(**names):
    def feature(key):
        return {"dtype": "float32", "shape": [3], "names": names.get(key, list(NAMES))}

    return {"features": {"observation.state": feature("state"), "action": feature("action")}}


OTHER = ["arm_joint2.pos", "arm_joint1.pos", "arm_gripper.pos"]


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ({}, None, {"width": 2}, "at least the 3 channels"),
        ({}, None, {"width": 3, "n_rows": 0}, "n_rows"),
        ({}, None, {"width": 3, "delta_mask": [True]}, "expected 3 entries, got 1"),
        ({"info": renamed(action=OTHER)}, None, {"width": 3}, "channel 0 is arm_joint1.pos and"),
        ({"info": renamed(state=None, action=None)}, None, {"width": 3}, "no names"),
        ({}, {"info": renamed(state=OTHER, action=OTHER)}, {"width": 3}, "b and a have different"),
        ({}, {"names": NAMES[:2]}, {"width": 3}, "channel 2 is nothing and arm_gripper.pos"),
        ({}, {"fps": 15}, {"width": 3}, "15 fps, a at 30"),
    ],
)
def test_statistics_of_datasets_that_do_not_fit_are_refused(
    tmp_path, first, second, options, message
):
    small = {"lengths": (5,), "files": (0,), "cameras": ()}
    roots = [write_dataset(tmp_path / "a", **small | first)]
    if second is not None:
        roots.append(write_dataset(tmp_path / "b", **small | second))
    with pytest.raises(SpecError, match=message):
        compute_statistics(roots, **options)


def test_statistics_without_a_dataset_are_refused(tmp_path):
    with pytest.raises(SpecError, match="expected datasets"):
        compute_statistics([], width=3)
    with pytest.raises(SpecError, match="not a LeRobot dataset"):
        compute_statistics([tmp_path], width=3)
