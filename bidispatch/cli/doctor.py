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

    Exit code 1: the profile in use, or a variable that forces a profile or implementation, is wrong. Exit code 3:
    there is no torch, a GPU that torch cannot use, or two backends of one name.

    Example: bidispatch doctor
    """
    diagnosis = diagnose()
    code = failures.LACKING if diagnosis.lacks else failures.FINDING if diagnosis.faults else 0
    if as_json:
        render.json_document({**asdict(diagnosis), "ready": diagnosis.ready})
        return code
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
    for wrong in (*diagnosis.faults, *diagnosis.lacks):
        render.error_line(f"error: {wrong}")
    if diagnosis.ready and not diagnosis.findings:
        render.line("nothing to complain about")
    return code
