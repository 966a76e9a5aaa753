"""What the tests of the reach example share: its modules on the path, and four demonstrations."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "reach"

_made: list[Path] = []


def four_episodes(factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of four demonstrations, two for each cube; collected once."""
    import collect

    if not _made:
        root = factory.mktemp("reach") / "data"
        collect.collect(root, 4)
        _made.append(root)
    return _made[0]
