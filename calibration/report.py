"""A verification as JSON and as one page of HTML that needs no network."""

from __future__ import annotations

from importlib.resources import files

import msgspec

from gwp_edge.calibration.verify_schema import VerifyReport
from gwp_edge.errors import SpecError

_PLACE = "@REPORT@"


def to_json(report: VerifyReport) -> bytes:
    """Return the report as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def from_json(data: bytes) -> VerifyReport:
    """Read what :func:`to_json` wrote.

    Raises:
        SpecError: not a report, or of another layout.
    """
    try:
        return msgspec.json.decode(data, type=VerifyReport)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise SpecError(f"not a report of gwp-edge verify: {e}") from e


def to_html(report: VerifyReport) -> str:
    """Return the report as a self-contained page; the report itself is in it as JSON."""
    template = files("gwp_edge.calibration").joinpath("templates/verify.html").read_text("utf-8")
    # Nothing inside a script element may look like markup; JSON can say it with escapes.
    data = msgspec.json.encode(report).decode()
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, _, after = template.partition(_PLACE)
    return before + data + after
