"""`bidispatch explain OP`: every candidate for one problem, with its verdict and all reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from bidispatch import ops
from bidispatch.bench.prices import COMMAND, RESULTS_VARIABLE, Price, command_for, prices, results_file
from bidispatch.cli import failures, render
from bidispatch.cli.options import DeviceOption, DimOption, JsonOption, ProfileOption, RequireOption, parse_dims
from bidispatch.device import Device
from bidispatch.errors import RecordError, SelectionError
from bidispatch.ops.schema import Problem
from bidispatch.planning.decisions import CHOSEN, REJECTED, SPARE, UNLISTED, Decision
from bidispatch.planning.plan import Plan
from bidispatch.planning.plan import plan as make_plan
from bidispatch.planning.select import tuned_elsewhere
from bidispatch.planning.selection import Selection, rung_ranges, verify_command

__all__ = ["command"]

_STYLES = {CHOSEN: "green", REJECTED: "red", SPARE: "dim", UNLISTED: "dim"}


def command(
    op: Annotated[str, typer.Argument(help="An op of the catalogue, such as gemm.", metavar="OP")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16, fp16, fp32, ...; the op's first by default.", metavar="DTYPE")
    ] = None,
    dim: DimOption = None,
    device: DeviceOption = "auto",
    profile: ProfileOption = None,
    require: RequireOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show every candidate for a problem, and all reasons.

    Each with its verdict, its class, and the file and line it is from. Without --dim, typical dims are used; with
    any, all that have no default must be given.

    Exit code 1: nothing fits.

    Example: bidispatch explain gemm --dtype bf16 --dim n=6144 --dim k=4096 --device sm90
    """
    asked = ops.get(op)
    wanted = dtype or asked.dtypes[0]
    dims = parse_dims(dim)
    problem = asked.problem(wanted, dims) if dims else asked.typical(wanted)
    plan = make_plan(device, profile=profile, require=require)
    try:
        result: Selection | SelectionError = plan.select_problem(problem)
    except SelectionError as error:
        result = error
    if as_json:
        render.json_document(_document(plan, problem, result))
    else:
        _print(plan, problem, result)
    return failures.FINDING if isinstance(result, SelectionError) else 0


def _print(plan: Plan, problem: Problem, result: Selection | SelectionError) -> None:
    render.line(str(problem))
    render.plan_header(plan, [problem] if isinstance(result, Selection) else [])
    if isinstance(result, Selection):
        render.line(f"{'class':<13}{result.numerics}")
        render.line(f"{'claims':<13}{result.level.label}, {_evidence(result)}")
    for note in tuned_elsewhere(problem, plan.profile, plan.device):
        render.line(f"{'tuned':<13}{note}")
    found, notes = _price_notes(plan, problem)
    for note in (*map(str, found), *notes):
        render.line(f"{'price':<13}{note}")
    render.line()
    if result.decisions:
        rows = [
            (d.implementation, d.verdict, d.serves, d.numerics, d.source, "\n".join(d.reasons))
            for d in result.decisions
        ]
        render.table(("implementation", "verdict", "serves", "class", "source", "reasons"), rows, _STYLES)
        render.line()
    if isinstance(result, Selection):
        ranges = rung_ranges([rung.max_m for rung in result.rungs])
        render.table(
            ("M", "implementation", "params", "tile"),
            [
                (_rows(*span), rung.implementation.name, _fields(rung.params), _fields(rung.tile))
                for span, rung in zip(ranges, result.rungs, strict=True)
            ],
        )
        summaries = {rung.implementation.name: rung.implementation.summary for rung in result.rungs}
        render.line()
        for name, summary in summaries.items():
            if summary:
                render.line(f"{name}: {summary}")
    else:
        render.error_line(f"error: {render.why_not(problem, result)}")


def _price_notes(plan: Plan, problem: Problem) -> tuple[Sequence[Price], Sequence[str]]:
    """What each level costs, of an op that has one for whole sequences, and how to find out or ask for another."""
    if not ops.get(problem.op).sequences:
        return (), ()
    file = results_file(plan.device)
    try:
        read = prices(problem, file)
    except RecordError as error:  # prices are an aside: without them the candidates are still explained
        return (), (str(error), _other_level(plan))
    if read is None:
        return (), (_not_timed(plan.device, file), _other_level(plan))
    return read.found, (*read.notes, _other_level(plan))


def _not_timed(device: Device, file: Path) -> str:
    """A prediction has no file of its own: results go by the name of the device that gave them."""
    if device.predicted:
        return f"{device.name} is predicted, and only a device that is here has prices: `{COMMAND}` on one"
    return f"there is no {file}: `{command_for(file)}` in a checkout makes it; {RESULTS_VARIABLE} names another folder"


def _other_level(plan: Plan) -> str:
    required = plan.require.label
    other = "sequence" if required == "batch" else "batch"
    asking = f"profile {plan.profile.name} requires" if plan.require == plan.profile.require else "--require asks for"
    return (
        f"{asking} level {required}; `invariance: {{require: {other}}}` in a profile, `--require {other}` or "
        f'`bid.plan(require="{other}")` asks for {other}'
    )


def _evidence(selection: Selection) -> str:
    if selection.evidence is None:
        there = f", on {selection.device.arch.name}" if selection.device.predicted else ""
        return f"not proved here: `{verify_command(selection.problem, selection.asked)}`{there}"
    return f"verified here, {selection.evidence.comparisons} rows, {selection.evidence.made}"


def _rows(first: int, last: int | None) -> str:
    if last is None:
        return "any" if first == 1 else f"{first} and more"
    return f"{first} to {last}"


def _fields(model: BaseModel | None) -> str:
    return " ".join(f"{name}={value}" for name, value in model.model_dump().items()) if model else ""


def _document(plan: Plan, problem: Problem, result: Selection | SelectionError) -> dict[str, Any]:
    served = isinstance(result, Selection)
    decisions: Sequence[Decision] = result.decisions
    found, notes = _price_notes(plan, problem)
    return {
        "problem": {"op": problem.op, "dtype": problem.dtype, "dims": dict(problem.dims)},
        "device": {"name": plan.device.name, "arch": plan.device.arch.name, "predicted": plan.device.predicted},
        "profile": {"name": plan.profile.name, "chain": list(plan.profile.chain), "note": plan.profile.note},
        "require": plan.require.label,
        "selection": result.as_json() if isinstance(result, Selection) else None,
        "tuned_elsewhere": tuned_elsewhere(problem, plan.profile, plan.device),
        "prices": [{**asdict(price), "file": str(results_file(plan.device))} for price in found],
        "price_notes": list(notes),
        "decisions": [{**asdict(decision), "serves": decision.serves} for decision in decisions],
        **({} if served else {"error": failures.as_json_error(result)}),  # type: ignore[arg-type]
    }
