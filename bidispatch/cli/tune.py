"""`bidispatch tune`: the fastest rungs of one class for the shapes at hand, proved, as a file a profile can name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bidispatch import ops
from bidispatch.cli import failures, machine, render
from bidispatch.cli.options import DeviceOption, JsonOption, ProfileOption
from bidispatch.device import Device
from bidispatch.errors import DeviceError, UsageError
from bidispatch.ops import quantize
from bidispatch.ops.schema import DTYPES, Problem
from bidispatch.ops.shapes import Shape, read_shapes
from bidispatch.planning.plan import Plan
from bidispatch.planning.plan import plan as make_plan
from bidispatch.planning.selection import rung_ranges
from bidispatch.profiles.edit import rule_lines
from bidispatch.profiles.load import builtin_folder, user_folder

if TYPE_CHECKING:
    from bidispatch.tune.runner import Outcome, Report

__all__ = ["command"]

_PRODUCTS = ("gemm", "gemm.fp8_block", "gemm.fp8", "gemm.int4")
_TUNABLE = (*_PRODUCTS, "moe.experts", "moe.router", *(op.name for op in quantize.OPS))
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def command(
    op: Annotated[str, typer.Argument(help=f"The op to tune: {', '.join(_TUNABLE)}.", metavar="OP")],
    shapes: Annotated[
        Path | None, typer.Option("--shapes", help="A YAML list of shapes, each {name, dim, dim, ...}.", metavar="FILE")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="A Hugging Face config.json, or its folder: that model's shapes.", metavar="CONFIG"
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tp", help="With --model: how many ranks share a layer; 1 if not given.")
    ] = None,
    expert_parallel: Annotated[
        int | None, typer.Option("--ep", help="With --model and moe.experts: over how many ranks whole experts go.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="The op's first if none is given; may be given several times.", metavar="DTYPE"),
    ] = None,
    rows: Annotated[str | None, typer.Option("--m", help="The M to time, such as 1,16,64.", metavar="M,...")] = None,
    impl: Annotated[
        list[str] | None, typer.Option("--impl", help="Try only this one; may be given several times.", metavar="NAME")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Begin no shape after this long: 10m, 90s, 1h.", metavar="TIME")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what the file has already.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write instead.", metavar="FILE")] = None,
    device: DeviceOption = "auto",
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Find the fastest tiles and rungs inside one numerics class.

    Every winner is compared bit by bit before it is kept. The file is written after each shape, so that an interrupted
    run goes on where it was; a profile uses it by naming it under `tuned`, in the lines printed at the end.

    Exit code 1: a shape got no ladder, or a fast kernel gave other bits than its class.

    Example: bidispatch tune gemm --model Qwen3-8B/config.json --dtype bf16 --budget 10m
    """
    if op not in _TUNABLE:
        raise UsageError(f"tune takes {', '.join(_TUNABLE)}, not {op!r}")
    if (shapes is None) == (model is None):
        raise UsageError("name the shapes with --shapes FILE, or a model with --model CONFIG, and not both")
    found = _shapes(op, shapes, model, tensor_parallel, expert_parallel)
    problems = _problems(op, found, dtype or ops.get(op).dtypes[:1])
    wanted = _rows(rows)
    seconds = _seconds(budget)
    machine.require_torch("tune")
    plan = make_plan(device, profile=profile)
    machine.require_device(plan.device)
    if plan.device.arch.vendor == "cpu":
        raise DeviceError(
            "tune times kernels by CUDA graphs and needs a GPU; the processor's kernels have one shape each"
        )
    unknown = [name for name in impl or () if name not in plan.registry]
    if unknown:
        raise UsageError(f"--impl {unknown[0]}: no backend has it; `bidispatch explain {op}` shows those there are")
    path = out or default_path(plan.device, op)
    report = _run(plan, problems, path, wanted, impl or (), seconds, again)
    if as_json:
        render.json_document({**report.as_json(), "yaml": paste(plan, report)})
    else:
        _print(plan, report)
    if report.interrupted:
        return failures.INTERRUPTED
    return 0 if report.passed else failures.FINDING


def _shapes(
    op: str, shapes: Path | None, model: Path | None, tensor_parallel: int | None, expert_parallel: int | None
) -> list[Shape]:
    """What is to be tuned, from a file of shapes or a model's config. Raises `UsageError`."""
    if expert_parallel is not None and op != "moe.experts":
        raise UsageError("--ep is of moe.experts: it divides no other layers")
    if shapes is not None:
        if tensor_parallel is not None or expert_parallel is not None:
            raise UsageError(
                "--tp divides the layers of --model, --ep its experts; those of --shapes are taken as they are"
            )
        return read_shapes(shapes)
    from bidispatch.tune.models import expert_shapes, model_shapes, router_shape, row_shapes

    config, ranks = Path(str(model)), 1 if tensor_parallel is None else tensor_parallel
    if op == "moe.experts":
        return expert_shapes(config, ranks, 1 if expert_parallel is None else expert_parallel)
    if op == "moe.router":
        return [router_shape(config)]
    if op not in _PRODUCTS:
        return row_shapes(op, config, ranks)
    # A router is no product in fp8: what sets it apart is no dim of those.
    return [shape for shape in model_shapes(config, ranks) if shape.dims.keys() <= set(ops.get(op).dim_names)]


def default_path(device: Device, op: str) -> Path:
    """In a checkout beside the built-in profiles, else beside the user's own."""
    builtin = builtin_folder()
    checkout = builtin.parent / "pyproject.toml"
    folder = builtin if checkout.is_file() and os.access(builtin, os.W_OK) else user_folder()
    return folder / "tiles" / device.slug / f"{op}.json"


def _problems(op: str, shapes: Sequence[Shape], dtypes: Sequence[str]) -> list[Problem]:
    """One ladder serves with a bias and without: shapes that differ in nothing else are one problem, without."""
    dims = [{name: value for name, value in shape.dims.items() if name != "bias"} for shape in shapes]
    found = [ops.get(op).problem(dtype, each) for dtype in dtypes for each in dims]
    return list(dict.fromkeys(found))


def _rows(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--m {text!r} is not a list of numbers such as 1,16,64")
    return tuple(sorted({int(word) for word in words}))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise UsageError(f"--budget {text!r} is not a time such as 10m, 90s or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _run(
    plan: Plan,
    problems: Sequence[Problem],
    path: Path,
    rows: tuple[int, ...] | None,
    only: Sequence[str],
    budget: float | None,
    again: bool,
) -> Report:
    from bidispatch.tune.runner import ROWS, tune
    from bidispatch.tune.search import gpu_timer

    with render.progress_bar() as bar:
        task = bar.add_task("tune", total=len(problems))
        return tune(
            plan,
            problems,
            path,
            gpu_timer(plan.device),
            rows=rows or ROWS,
            only=only,
            budget=budget,
            again=again,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )


def _print(plan: Plan, report: Report) -> None:
    render.table(
        ("shape", "dtype", "M", "implementation", "tile", "µs", "rows compared"),
        [_row(outcome) for outcome in report.outcomes],
    )
    render.line()
    for outcome in report.outcomes:
        for refused in outcome.refused:
            render.line(f"refused for {outcome.problem}: {refused}")
        if outcome.error:
            render.line(f"no ladder for {outcome.problem}: {outcome.error}")
    tuned = sum(outcome.entry is not None for outcome in report.outcomes)
    kept = sum(outcome.kept for outcome in report.outcomes)
    skipped = sum(outcome.skipped for outcome in report.outcomes)
    if skipped:
        render.line(f"{skipped} of the kernels tried could not be bound or run at some M, and take no part there")
    render.line(f"{tuned} shapes in {report.path}, {kept} of them from before; {report.seconds:.0f} s")
    if report.left:
        why = "interrupted" if report.interrupted else "the budget is over"
        render.line(f"{why}: {len(report.left)} shapes are left; the same command goes on with {report.left[0]}")
    lines = paste(plan, report)
    if lines:
        render.line()
        render.line(f"in a profile that extends this one, such as {user_folder() / plan.device.arch.name}.yaml:")
        render.line()
        for text in lines:
            render.line(text)


def _row(outcome: Outcome) -> tuple[str, ...]:
    problem, entry = outcome.problem, outcome.entry
    known = ops.get(problem.op)
    plain = {dim.name: dim.default for dim in known.dims} | {"out_dtype": problem.dtype}
    dims = " ".join(f"{name}={value}" for name, value in problem.dims.items() if value != plain[name])
    if entry is None:
        return dims, DTYPES[problem.dtype], "", "", "", "", outcome.error.partition("\n")[0]
    spans = rung_ranges([rung.max_m for rung in entry.rungs])
    return (
        dims,
        DTYPES[problem.dtype],
        "\n".join(f"{first} to {last}" if last else f"{first} and more" for first, last in spans),
        "\n".join(rung.impl for rung in entry.rungs),
        "\n".join(" ".join(f"{k}={v}" for k, v in (rung.tile or {}).items()) for rung in entry.rungs),
        "\n".join("" if rung.us is None else f"{rung.us:.1f}" for rung in entry.rungs),
        "kept" if outcome.kept else str(entry.comparisons),
    )


def paste(plan: Plan, report: Report) -> list[str]:
    """The rules of an op, whole, since a profile replaces them whole, with the file in those it has ladders for.

    With its whole path: a relative one would hold for profiles in one folder only.
    """
    tuned = [outcome.problem for outcome in report.outcomes if outcome.entry is not None]
    if not tuned:
        return []
    lines = ["ops:"]
    for op in dict.fromkeys(problem.op for problem in tuned):
        lines.append(f"  {op}:")
        for rule in plan.profile.rules[op]:
            served = [p for p in tuned if p.op == op and _first_rule(plan, p) is rule]
            lines += rule_lines(rule, [report.path] if served else [])
    return lines


def _first_rule(plan: Plan, problem: Problem) -> object:
    return next((rule for rule in plan.profile.rules[problem.op] if rule.mismatch(problem) is None), None)
