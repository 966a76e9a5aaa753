"""Which number format each layer computes in.

A recipe maps layer names to formats. The same recipe drives the graph writer and the torch
emulation, so an engine's answer can be told from a rounding error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gwp_edge.errors import SpecError

Format = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Format, ...] = ("fp32", "fp16", "bf16")

# Small, at the ends of the path, and every error there is an error of the action itself.
_HIGH = re.compile(r"^(state_encoder|action_encoder|action_decoder)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Format of every named layer.

    Attributes:
        name: precision of the bundle as the user asked for it.
        default: format of layers that nothing else decides.
        overrides: format of single layers, with the reason.
    """

    name: str
    default: Format
    overrides: Mapping[str, tuple[Format, str]] = field(default_factory=dict)

    def of(self, layer: str) -> Format:
        """Return the format that ``layer`` computes in."""
        return self.explain(layer)[0]

    def explain(self, layer: str) -> tuple[Format, str]:
        """Return format and reason of ``layer``."""
        if layer in self.overrides:
            return self.overrides[layer]
        if self.default != "fp32" and _HIGH.match(layer):
            return "fp32", "encoder or decoder of state and action: small, error goes to the action"
        return self.default, f"{self.name} bundle"


def make_recipe(precision: str) -> Recipe:
    """Return the recipe of a plain floating-point bundle.

    Raises:
        SpecError: ``precision`` is not one of fp32, fp16, bf16.
    """
    for known in PRECISIONS:
        if precision == known:
            return Recipe(name=precision, default=known)
    raise SpecError(f"--precision {precision} is not known; choose from {', '.join(PRECISIONS)}")


def cache_format(recipe: Recipe) -> Format:
    """Return the format of prefix and prompt K/V: the one that attention computes in."""
    return recipe.of("blocks.0.attn1.qk")
