"""`bidispatch verify`: what the plan selects, compared bit by bit on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bidispatch import ops as catalogue
from bidispatch.cli import failures, machine, render
from bidispatch.cli.options import DeviceOption, DimOption, JsonOption, ProfileOption, RequireOption, parse_dims
from bidispatch.errors import UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem, parse_dtype
from bidispatch.ops.shapes import read_shapes
from bidispatch.planning.plan import Plan
from bidispatch.planning.plan import plan as make_plan
from bidispatch.records import RecordStore

if TYPE_CHECKING:
    from bidispatch.verify.report import ControlResult, ProblemResult, Report

__all__ = ["command"]

_STYLES = {"passed": "green", "caught": "green", "FAILED": "red", "NOT CAUGHT": "red"}


def command(
    op: Annotated[list[str] | None, typer.Argument(help="Ops to verify.", metavar="[OP]...")] = None,
    every: Annotated[bool, typer.Option("--all", help="Verify every op the plan serves.")] = False,
    level: Annotated[
        str | None,
        typer.Option("--level", help="run, batch or sequence; what each kernel claims by default.", metavar="LEVEL"),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Only this dtype; may be given several times.", metavar="DTYPE")
    ] = None,
    dim: DimOption = None,
    shapes: Annotated[
        Path | None,
        typer.Option("--shapes", help="Also the shapes of this YAML file, for one op.", metavar="FILE"),
    ] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Also compare CUDA graph replay.")] = False,
    classes: Annotated[
        bool, typer.Option("--classes/--no-classes", help="Compare the rungs of each ladder with one another.")
    ] = True,
    full: Annotated[
        bool, typer.Option("--full", help="Every M up to 512 (128 on a CPU), and longer sequences.")
    ] = False,
    part: Annotated[
        str, typer.Option("--part", help="Only every N-th problem from the I-th on, to share a run.", metavar="I/N")
    ] = "1/1",
    record: Annotated[bool, typer.Option("--record", help="Keep what passed, as evidence for plans.")] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Also use rungs whose bits were recorded to differ, to prove them anew.")
    ] = False,
    device: DeviceOption = "auto",
    profile: ProfileOption = None,
    require: RequireOption = None,
    as_json: JsonOption = False,
) -> int:
    """Prove the plan's kernels on this machine, bit by bit.

    A row's result must not depend on the rest of the batch. Kernels broken on purpose run along and must be caught.
    Plain torch runs along too; its differences are shown and fail nothing. With --dim, one op is checked at those
    dims only.

    --require chooses what is verified, as a plan that requires that level would; --level how far it is.

    With --record, what passed becomes evidence, and a rung whose bits differed from its ladder's is used no more.

    Exit code 1: a bit differed, a broken kernel was not caught, or nothing was compared.

    Example: bidispatch verify gemm attention --dtype bf16 --record
    """
    if bool(op) == every:
        raise UsageError("name the ops to verify, or --all for every op: bidispatch verify gemm attention")
    problems = _problems(op or [], dtype or [], parse_dims(dim))
    extra = _problems_of_file(op or [], dtype or [], shapes)
    wanted = Invariance.parse(level) if level else None
    share = _parse_part(part)
    machine.require_torch("verify")
    plan = _plan_to_prove(make_plan(device, profile=profile, require=require), retry)
    machine.require_device(plan.device)
    store = RecordStore(plan.device)
    if record:
        # What cannot be added to is better known before the work than after it.
        store.prepare()
        store.load()
    report = _run(plan, op or None, dtype or None, problems, extra, wanted, cuda_graph, classes, full, share)
    proofs = report.records() if record else []
    refuted, held = report.refutations() if record else ([], [])
    if proofs or refuted or held:
        store.add(proofs, refuted, held)
    if as_json:
        kept = {"recorded": len(proofs), "refuted": len(refuted), "records": str(store.path)}
        render.json_document({**report.as_json(), **kept})
    else:
        _print(report)
        if record:
            render.line(f"recorded {len(proofs)} of {len(report.results)} problems in {store.path}")
        if refuted:
            render.line(f"recorded {len(refuted)} rungs as refuted: plans on this device no longer use them there")
    return 0 if report.passed else failures.FINDING


def _parse_part(text: str) -> tuple[int, int]:
    """`2/6` as (2, 6)."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal()):
        raise UsageError(f"--part {text!r} is not I/N, for example --part 2/6")
    return int(number), int(parts)


def _problems(op: Sequence[str], dtypes: Sequence[str], dims: dict[str, str]) -> list[Problem] | None:
    """The problems that --dim names; None without it."""
    if not dims:
        return None
    if len(op) != 1:
        raise UsageError("--dim is for one op: bidispatch verify gemm --dim n=6144 --dim k=4096")
    asked = catalogue.get(op[0])
    return [asked.problem(dtype, dims) for dtype in dtypes or asked.dtypes]


def _problems_of_file(op: Sequence[str], dtypes: Sequence[str], shapes: Path | None) -> list[Problem]:
    """The problems of a file of shapes, in each dtype asked for; none without a file."""
    if shapes is None:
        return []
    if len(op) != 1:
        raise UsageError("--shapes is for one op: bidispatch verify gemm --shapes benchmarks/sweeps/gemm.yaml")
    asked = catalogue.get(op[0])
    wanted = [parse_dtype(dtype) for dtype in dtypes] or asked.dtypes
    return [asked.problem(dtype, shape.dims) for dtype in wanted for shape in read_shapes(shapes)]


def _plan_to_prove(plan: Plan, retry: bool) -> Plan:
    """The same plan without the demand for proof, which is made here."""
    profile = replace(plan.profile, trust="claimed")
    return Plan(plan.device, profile, plan.registry, RecordStore(plan.device), plan.require, use_refuted=retry)


def _run(
    plan: Plan,
    op: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    problems: Sequence[Problem] | None,
    extra: Sequence[Problem],
    level: Invariance | None,
    cuda_graph: bool,
    classes: bool,
    full: bool,
    part: tuple[int, int],
) -> Report:
    from bidispatch.verify.runner import verify_plan

    with render.progress_bar() as bar:
        task = bar.add_task("verify", total=None)
        return verify_plan(
            plan,
            ops=None if problems else op,
            dtypes=None if problems else dtypes,
            problems=problems,
            extra=extra,
            level=level,
            cuda_graph=cuda_graph,
            classes=classes,
            effort="full" if full else "quick",
            part=part,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )


def _print(report: Report) -> None:
    render.table(
        (
            *("problem", "implementation", "level", "rows compared", "differ"),
            *("worst error", "of stock's", "stock torch", "s", "result"),
        ),
        [_row(result) for result in report.results],
        _STYLES,
    )
    for skipped in report.skipped:
        render.line(f"skipped {skipped.problem}: {render.why_not(skipped.problem, skipped.error)}")
    render.line()
    render.table(
        ("control", "it must", "result"),
        [_control_row(control) for control in report.controls],
        _STYLES,
    )
    render.line()
    uncompared = [c for result in report.results for c in (*result.checks, *result.classes) if not c.rows]
    for note in dict.fromkeys(str(check) for check in uncompared):
        render.line(note)
    for fault in report.faults:
        render.line(f"fault: {fault}")
    render.line(
        f"{report.comparisons} rows compared on {report.device.name}, {report.differing} differ; "
        f"{sum(result.passed for result in report.results)} of {len(report.results)} problems passed, "
        f"{report.seconds:.1f} s"
    )


def _control_row(control: ControlResult) -> tuple[str, ...]:
    if control.sound:
        return control.name, "pass every check", "passed" if control.caught else "FAILED"
    return control.name, f"be caught by {control.by}", "caught" if control.caught else "NOT CAUGHT"


def _of_stock(result: ProblemResult) -> str:
    """The largest ratio to stock's error among those that are judged; of all, where none is."""
    judged = [accuracy for accuracy in result.accuracy if accuracy.most_of_stock is not None]
    ratios = [a.ratio for a in judged or result.accuracy if a.ratio is not None]
    return f"{max(ratios):.2f}x" if ratios else ""


def _row(result: ProblemResult) -> tuple[str, ...]:
    stock = result.stock
    return (
        str(result.problem),
        "\n".join(result.selection.implementations),
        result.level.label,
        str(result.comparisons),
        str(result.differing),
        f"{max((accuracy.error for accuracy in result.accuracy), default=0.0):.1e}",
        _of_stock(result),
        f"{stock.differing} of {stock.rows} rows differ" if stock else "not run",
        f"{result.seconds:.1f}",
        "passed" if result.passed else "FAILED",
    )
