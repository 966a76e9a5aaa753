"""A profile as one page that needs no network: the report is in it as JSON, plots are SVG."""

from __future__ import annotations

from importlib.resources import files

import msgspec

from gwp_edge.profiling.schema import ProfileReport

_PLACE = "@REPORT@"


def to_html(report: ProfileReport) -> str:
    """Return the page."""
    template = files("gwp_edge.profiling").joinpath("templates/profile.html").read_text("utf-8")
    # Nothing inside a script element may look like markup; JSON can say it with escapes.
    data = msgspec.json.encode(report).decode()
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, _, after = template.partition(_PLACE)
    return before + data + after
