"""`bidispatch plan`: what serves every op of the catalogue on a device. Works without torch and without the GPU."""

from __future__ import annotations

from typing import Any

from bidispatch.cli import failures, render
from bidispatch.cli.options import DeviceOption, JsonOption, ProfileOption, RequireOption
from bidispatch.errors import SelectionError
from bidispatch.ops.schema import Problem
from bidispatch.planning.decisions import CHOSEN
from bidispatch.planning.overrides import forced_choice
from bidispatch.planning.plan import Plan
from bidispatch.planning.plan import plan as make_plan
from bidispatch.planning.selection import Selection
from bidispatch.requirements import installed_version

__all__ = ["command", "plan_document"]


def command(
    device: DeviceOption = "auto",
    profile: ProfileOption = None,
    require: RequireOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show what serves every op on a device.

    With its class, the evidence for it and the line that says so. The device need not be in this machine, and torch
    need not be installed. Ops are shown at typical dims; `bidispatch explain` takes others.

    Exit code 1: nothing is served, or a choice that was forced, or must be verified, cannot be had; 3: no torch.

    Example: bidispatch plan --device sm103
    """
    made = make_plan(device, profile=profile, require=require)
    results = made.supported()
    served = [problem for problem, result in results if isinstance(result, Selection)]
    if as_json:
        render.json_document(
            {
                **plan_document(made, served),
                "unsupported": [
                    {"op": problem.op, "dtype": problem.dtype, "reason": render.why_not(problem, result)}
                    for problem, result in results
                    if isinstance(result, SelectionError)
                ],
            }
        )
    else:
        render.plan_header(made, served)
        render.line()
        render.plan_table(results)
        render.line()
        render.plan_unsupported(results)
    refused = any(isinstance(result, SelectionError) and _was_wanted(problem, result) for problem, result in results)
    if refused:
        return failures.FINDING
    if not served:
        problem, why = next((problem, why) for problem, why in results if isinstance(why, SelectionError))
        render.error_line(f"error: nothing can be served on {made.device.name}: {render.why_not(problem, why)}")
        return failures.FINDING if made.device.predicted or installed_version("torch") else failures.LACKING
    return 0


def _was_wanted(problem: Problem, error: SelectionError) -> bool:
    """Whether someone asked for what failed: by force, or by a ladder that fits but is unproved or has no top."""
    return forced_choice(problem.op) is not None or any(decision.verdict == CHOSEN for decision in error.decisions)


def plan_document(plan: Plan, problems: list[Problem]) -> dict[str, Any]:
    """A plan for these problems as plain data."""
    device, profile = plan.device, plan.profile
    selections = [plan.select_problem(problem) for problem in problems]
    return {
        "device": {
            "name": device.name,
            "arch": device.arch.name,
            "predicted": device.predicted,
            "compute_units": device.compute_units,
            "memory_bytes": device.memory_bytes,
            "driver": device.driver,
        },
        "profile": {"name": profile.name, "chain": list(profile.chain), "note": profile.note},
        "level": plan.require.label,
        "trust": profile.trust,
        "fingerprint": plan.fingerprint(problems) if problems else None,
        "failed_backends": {name: str(failure) for name, failure in plan.registry.failures.items()},
        "problems": [
            {
                **selection.as_json(),
                "candidates": [
                    {"implementation": d.implementation, "serves": d.serves, "source": d.source}
                    for d in selection.decisions
                    if d.verdict == CHOSEN
                ],
            }
            for selection in selections
        ],
    }
