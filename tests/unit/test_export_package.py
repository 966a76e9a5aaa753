"""A bundle is written whole or not at all."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")

from gwp_edge.errors import SpecError
from gwp_edge.export.package import check_space, check_target, replacing

pytestmark = pytest.mark.export


def write(folder, text):
    (folder / "manifest.json").write_text(text)


def test_replacing_new_target_appears_whole(tmp_path):
    out = tmp_path / "a.gwp"
    with replacing(out) as work:
        write(work, "one")
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "one"
    assert os.listdir(tmp_path) == ["a.gwp"]


def test_replacing_old_bundle_swaps_it(tmp_path):
    out = tmp_path / "a.gwp"
    out.mkdir()
    write(out, "old")
    with replacing(out) as work:
        write(work, "new")
        assert (out / "manifest.json").read_text() == "old"
    assert (out / "manifest.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.gwp"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_interrupted_keeps_the_old_bundle(tmp_path, error):
    out = tmp_path / "a.gwp"
    out.mkdir()
    write(out, "old")

    def export():
        with replacing(out) as work:
            write(work, "half")
            raise error

    with pytest.raises(error):
        export()
    assert (out / "manifest.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.gwp"]


def test_replacing_removes_what_a_killed_export_left(tmp_path):
    out = tmp_path / "a.gwp"
    stale = tmp_path / ".a.gwp.999999999-dead.tmp"
    stale.mkdir()
    with replacing(out) as work:
        write(work, "one")
    assert os.listdir(tmp_path) == ["a.gwp"]


def test_check_target_refuses_what_is_not_a_bundle(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_text("cat")
    with pytest.raises(SpecError, match="not a bundle"):
        check_target(folder)
    with pytest.raises(SpecError, match="does not exist"):
        check_target(tmp_path / "no" / "a.gwp")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecError, match="not a folder"):
        check_target(tmp_path / "file")


def test_check_space_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(SpecError, match="GB free"):
        check_space(tmp_path / "a.gwp", 10**18)
