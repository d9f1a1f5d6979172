"""`bidispatch doctor`: what is in this machine, and what keeps it from what."""

from __future__ import annotations

from dataclasses import asdict

from bidispatch.cli import failures, render
from bidispatch.cli.options import JsonOption
from bidispatch.doctor import diagnose

__all__ = ["command"]


def command(as_json: JsonOption = False) -> int:
    """Show what is in this machine, and what is missing.

    GPUs, driver, packages, backends that failed and why, profiles, records, and environment variables that change
    bits behind a plan's back.

    Exit code 3: there is no torch, or a GPU that torch cannot use.

    Example: bidispatch doctor
    """
    diagnosis = diagnose()
    if as_json:
        render.json_document({**asdict(diagnosis), "ready": diagnosis.ready})
        return 0 if diagnosis.ready else failures.LACKING
    for section, entries in diagnosis.sections.items():
        render.line(section)
        width = max((len(name) for name in entries), default=0) + 2
        for name, text in entries.items():
            render.line(f"  {name:<{width}}{text}")
        if not entries:
            render.line("  none")
    render.line()
    for finding in diagnosis.findings:
        render.warning(finding)
    for lack in diagnosis.lacks:
        render.error_line(f"error: {lack}")
    if not (diagnosis.findings or diagnosis.lacks):
        render.line("nothing to complain about")
    return 0 if diagnosis.ready else failures.LACKING
