"""A recipe written by hand: layer patterns and their formats, as JSON or TOML.

::

    default = "int8"
    rest = "fp32"
    block = 64

    [layers]
    "blocks.*.ffn.net.2" = "fp32"
    "blocks.0.*" = "w8"

Patterns are shell patterns on layer names; the last one that matches decides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from gwp_edge.errors import SpecError
from gwp_edge.export.precision import FLOAT_FORMATS, INT4_BLOCKS, Format, Recipe


class RecipeFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a recipe file; what is left out stays as ``--precision`` has it."""

    layers: dict[str, Format] = {}
    default: Format | None = None
    rest: Format | None = None
    block: int | None = None


def read_recipe(path: Path, base: Recipe, layers: Sequence[str]) -> Recipe:
    """Return ``base`` with what the file says.

    Args:
        path: JSON, or TOML where it ends in ``.toml``.
        base: recipe of ``--precision``.
        layers: all layers that can be quantized.

    Raises:
        SpecError: the file cannot be read, names an unknown format, or a pattern matches nothing.
    """
    try:
        given = msgspec.convert(_content(path), RecipeFile)
    except (OSError, ValueError, msgspec.ValidationError) as e:
        raise SpecError(f"--recipe {path}: {e}") from e
    if given.rest is not None and given.rest not in FLOAT_FORMATS:
        raise SpecError(f"--recipe {path}: rest must be one of {', '.join(FLOAT_FORMATS)}")
    if given.block is not None and given.block not in INT4_BLOCKS:
        raise SpecError(f"--recipe {path}: block must be one of {INT4_BLOCKS}")
    overrides: dict[str, tuple[Format, str]] = dict(base.overrides)
    for pattern, fmt in given.layers.items():
        found = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not found:
            raise SpecError(
                f"--recipe {path}: no layer is called {pattern!r}; they are called like {layers[0]}"
            )
        overrides |= dict.fromkeys(found, (fmt, f"{path.name}: {pattern}"))
    return replace(
        base,
        default=given.default or base.default,
        rest=given.rest or base.rest,
        block=given.block or base.block,
        overrides=overrides,
    )


def _content(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    text = path.read_text("utf-8-sig")
    return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
