import json
import math
import shutil
from pathlib import Path

import pytest

from gwp_edge.errors import SpecError
from gwp_edge.export.companions import find_companions, find_dataset, read_statistics

DATA = Path(__file__).parents[1] / "data"
SOURCE = DATA / "reference" / "gwp05"


@pytest.fixture
def run(tmp_path):
    """Return a copy of a training run: checkpoint, statistics, VAE config, prompt."""
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "model.pt").write_bytes(b"x")
    shutil.copy(SOURCE / "norm_stats.json", tmp_path / "run")
    vae = tmp_path / "run" / "base_model" / "vae"
    vae.mkdir(parents=True)
    shutil.copy(SOURCE / "base_model" / "vae" / "config.json", vae)
    shutil.copytree(SOURCE / "t5_embedding", tmp_path / "run" / "t5_embedding")
    return tmp_path / "run"


def test_find_companions_reference_finds_all():
    found = find_companions(SOURCE / "checkpoint")
    assert found.norm_stats == SOURCE / "norm_stats.json"
    assert found.vae == SOURCE / "base_model" / "vae"
    assert found.base_model == SOURCE / "base_model"
    assert found.prompt_files == (SOURCE / "t5_embedding" / "episode_000000.pt",)


@pytest.mark.parametrize("name", [".", "checkpoint", "checkpoint/model.pt"])
def test_find_companions_from_any_level_finds_the_same(run, name):
    found = find_companions(run / name)
    assert found.norm_stats == run / "norm_stats.json"
    assert found.vae == run / "base_model" / "vae"


def test_find_companions_vae_without_base_model_folder(run):
    shutil.move(run / "base_model" / "vae", run / "vae")
    assert find_companions(run / "checkpoint").vae == run / "vae"


@pytest.mark.parametrize(
    ("lost", "flag"),
    [
        ("norm_stats.json", "--norm-stats"),
        ("base_model", "--base-model"),
        ("t5_embedding", "--prompt TEXT or --prompt-embedding"),
    ],
)
def test_find_companions_missing_part_names_its_flag(run, lost, flag):
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SpecError, match=flag):
        find_companions(run / "checkpoint")


def test_find_companions_takes_what_is_given(run, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(run / "norm_stats.json", other / "stats.json")
    shutil.copytree(run / "base_model", other / "base")
    shutil.copy(run / "t5_embedding" / "episode_000000.pt", other / "pick.pt")
    found = find_companions(
        run / "checkpoint",
        norm_stats=other / "stats.json",
        base_model=other / "base",
        prompt_embeddings=[other / "pick.pt"],
        calibration=DATA / "dataset",
    )
    assert found.norm_stats == other / "stats.json"
    assert found.vae == other / "base" / "vae"
    assert found.prompt_files == (other / "pick.pt",)
    assert found.dataset == DATA / "dataset"
    assert find_companions(run / "checkpoint", base_model=other / "base" / "vae").base_model == (
        other / "base"
    )


@pytest.mark.parametrize(
    ("argument", "flag"),
    [
        ({"norm_stats": Path("absent.json")}, "--norm-stats absent.json"),
        ({"base_model": Path("absent")}, "--base-model absent"),
        ({"prompt_embeddings": [Path("absent.pt")]}, "--prompt-embedding absent.pt"),
        ({"calibration": Path("absent")}, "--calibration absent"),
    ],
)
def test_find_companions_given_but_absent_refuses(run, argument, flag):
    with pytest.raises(SpecError, match=flag):
        find_companions(run / "checkpoint", **argument)


def test_find_companions_prompt_text_needs_no_embedding(run):
    shutil.rmtree(run / "t5_embedding")
    assert find_companions(run / "checkpoint", has_prompt_text=True).prompt_files == ()


def test_find_companions_two_statistics_refuses_unless_equal(run):
    copy = run / "checkpoint" / "norm_stats.json"
    shutil.copy(run / "norm_stats.json", copy)
    assert find_companions(run / "checkpoint").norm_stats == copy
    copy.write_text(copy.read_text() + " ")
    with pytest.raises(SpecError, match="two different statistics") as caught:
        find_companions(run / "checkpoint")
    assert str(copy) in str(caught.value)
    assert str(run / "norm_stats.json") in str(caught.value)


def test_find_companions_two_vaes_refuses(run):
    shutil.copytree(run / "base_model" / "vae", run / "vae")
    with pytest.raises(SpecError, match="two VAEs"):
        find_companions(run / "checkpoint")


def test_find_companions_other_module_as_vae_refuses(run):
    with pytest.raises(SpecError, match=r"AutoencoderKLWan, got CasualWorldActionTransformer_MoT"):
        find_companions(run / "checkpoint", base_model=SOURCE / "checkpoint")


def test_find_companions_two_prompt_folders_refuses(run):
    shutil.copytree(run / "t5_embedding", run / "checkpoint" / "t5_embedding")
    with pytest.raises(SpecError, match="two prompt folders"):
        find_companions(run / "checkpoint")


def test_find_dataset_beside_the_checkpoint(run, caplog):
    assert find_dataset(run / "checkpoint") is None
    with pytest.raises(SpecError, match="--calibration"):
        find_dataset(run / "checkpoint", needed=True)
    for name in ("demos", "more"):
        (run / name / "meta").mkdir(parents=True)
        (run / name / "meta" / "info.json").write_text("{}")
        if name == "demos":
            assert find_dataset(run / "checkpoint") == run / "demos"
    with pytest.raises(SpecError, match="two datasets"):
        find_dataset(run / "checkpoint", needed=True)
    assert find_dataset(run / "checkpoint") is None
    assert "several datasets" in caplog.text


def test_read_statistics_reference_takes_the_first_channels():
    path = SOURCE / "norm_stats.json"
    group = json.loads(path.read_text())["norm_stats"]
    for n in (7, 14):
        statistics = read_statistics(path, n)
        assert list(statistics.state_q01) == group["observation.state"]["q01"][:n]
        assert list(statistics.state_q99) == group["observation.state"]["q99"][:n]
        assert list(statistics.action_q01) == group["action"]["q01"][:n]
        assert list(statistics.action_q99) == group["action"]["q99"][:n]


@pytest.fixture
def edit(tmp_path):
    def write(change):
        value = json.loads((SOURCE / "norm_stats.json").read_text())
        change(value["norm_stats"])
        path = tmp_path / "norm_stats.json"
        path.write_text(json.dumps(value))
        return path

    return write


def put(group, quantile, channel, value):
    return lambda stats: stats[group][quantile].__setitem__(channel, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("action", "q99", 4, -9.0), r"action channel 4: q99 -9\.0 is below q01"),
        (put("observation.state", "q01", 13, math.nan), r"observation\.state\.q01: channel 13"),
        (put("action", "q01", 0, -math.inf), r"action\.q01: channel 0 is -inf"),
        (put("action", "q01", 0, "x"), r"action\.q01: channel 0 is 'x'"),
        (put("action", "q01", 0, True), r"action\.q01: channel 0 is True"),
        (
            lambda s: s["action"].update(q99=[1.0] * 13),
            r"action\.q99: the layout has 14.*13 values.*--layout",
        ),
        (lambda s: s["action"].pop("q99"), r"action\.q99: expected a list"),
        (lambda s: s.update(action=[1.0]), r"action\.q01: expected a list"),
        (lambda s: s.pop("observation.state"), r"no observation\.state.*it has action"),
    ],
)
def test_read_statistics_that_do_not_fit_refuses_by_name(edit, change, words):
    with pytest.raises(SpecError, match=words) as caught:
        read_statistics(edit(change), 14)
    assert "\n" not in str(caught.value)


def test_read_statistics_beyond_the_channels_is_not_judged(edit):
    read_statistics(edit(put("action", "q01", 14, math.nan)), 14)


def test_read_statistics_of_a_robot_with_more_channels_says_so(caplog):
    """Two arms, exported with the layout of one: half a policy on a robot that it does not know."""
    read_statistics(SOURCE / "norm_stats.json", 14)
    assert "moved in training" not in caplog.text
    read_statistics(SOURCE / "norm_stats.json", 7)
    assert "action channel 7 moved in training, but the layout has 7 channels" in caplog.text


def test_read_statistics_degenerate_channel_warns(edit, caplog):
    def still(stats):
        stats["action"]["q01"][5] = stats["action"]["q99"][5]

    statistics = read_statistics(edit(still), 14)
    assert statistics.action_q01[5] == statistics.action_q99[5]
    assert "action channels 5 never moved" in caplog.text


def test_read_statistics_of_one_embodiment(tmp_path):
    group = json.loads((SOURCE / "norm_stats.json").read_text())["norm_stats"]
    other = json.loads(json.dumps(group))
    other["action"]["q99"][0] = 9.0
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"piper": group, "franka": other}}))
    assert read_statistics(path, 14, embodiment="franka").action_q99[0] == 9.0
    with pytest.raises(SpecError, match="several embodiments, piper, franka"):
        read_statistics(path, 14)
    with pytest.raises(SpecError, match="no statistics of embodiment 'ur5'"):
        read_statistics(path, 14, embodiment="ur5")


def test_read_statistics_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "norm_stats.json"
    path.write_text((SOURCE / "norm_stats.json").read_text(), "utf-8-sig")
    assert read_statistics(path, 14) == read_statistics(SOURCE / "norm_stats.json", 14)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"norm_stats": 1}', "{"])
def test_read_statistics_other_file_refuses(tmp_path, text):
    path = tmp_path / "norm_stats.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"norm_stats\.json"):
        read_statistics(path, 14)
