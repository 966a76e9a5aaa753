"""The table of faults names tests that exist, and the page for operators has its rows."""

import re
from pathlib import Path

import pytest
import test_piper_faults

TESTS = Path(__file__).parents[1]
SAFETY = TESTS.parent / "docs" / "safety.md"


def rows():
    lines = (test_piper_faults.__doc__ or "").splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]


def names_of(module):
    if module == "here":
        module = "test_piper_faults"
    (path,) = TESTS.glob(f"*/{module}.py")
    return re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip().replace(" ", "-"))
def test_every_row_names_tests_that_exist(row):
    for part in row[1].split(";"):
        module, _, fragments = part.strip().partition(":")
        names = names_of(module)
        assert names
        for fragment in filter(None, (f.strip().rstrip("*") for f in fragments.split(","))):
            assert any(fragment in name for name in names), (module, fragment)


def test_page_has_a_row_for_every_event_of_the_table():
    page = SAFETY.read_text()
    section = page[page.index("## Faults") : page.index("## Try it")]
    n_page = len([line for line in section.splitlines() if line.startswith("| ")]) - 1
    # Two rows of the table are people's doing (Ctrl-C, e-stop), told above the page's own table.
    assert n_page >= len(rows()) - 2
    assert "Ctrl-C" in page
    assert "SIGUSR1" in page
