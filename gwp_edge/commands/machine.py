"""``gwp-edge doctor``: is this machine ready."""

from __future__ import annotations

from gwp_edge.commands.options import JsonFlag
from gwp_edge.console import say, say_json, say_table


def doctor(as_json: JsonFlag = False) -> None:
    """Check machine, bus and cameras; nothing is changed.

    Exits with 1 when a check fails.

    Example: gwp-edge doctor
    """
    import dataclasses

    from gwp_edge.doctor import LocalSystem, run_checks, worst

    results = run_checks(LocalSystem())
    verdict = worst(results)
    if as_json:
        say_json({"verdict": verdict, "checks": [dataclasses.asdict(r) for r in results]})
    else:
        say_table("Doctor", ("check", "", "found"), [(r.name, r.status, r.detail) for r in results])
        for result in results:
            if result.fix:
                say(f"{result.name}: {result.fix}")
    if verdict == "fail":
        raise SystemExit(1)
