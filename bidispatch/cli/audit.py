"""`bidispatch audit`: every op a forward runs, and whether anything proves it."""

from __future__ import annotations

import enum
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bidispatch.cli import failures, machine, render
from bidispatch.cli.demo import built_in, dtype_for
from bidispatch.cli.options import DeviceOption, JsonOption
from bidispatch.demo.config import ModelConfig
from bidispatch.errors import UsageError
from bidispatch.planning.plan import Plan
from bidispatch.planning.plan import plan as make_plan

if TYPE_CHECKING:
    from bidispatch.audit.models import Audit

__all__ = ["Framework", "command"]

_STYLES = {"covered": "green", "row-local": "dim", "uncovered": "red"}


class Framework(str, enum.Enum):
    """Whose forward is run."""

    BUILTIN = "builtin"
    TRANSFORMERS = "transformers"


def command(
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A Hugging Face folder with a config.json; the demo's model by default."),
    ] = None,
    framework: Annotated[
        Framework,
        typer.Option("--framework", help="builtin: the demo's decoder under the plan. transformers: as it is."),
    ] = Framework.BUILTIN,
    overrides: Annotated[
        bool, typer.Option("--overrides", help="Of transformers: run it under `aten_overrides`, by the plan's kernels.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> int:
    """List every op of a forward: covered, row-local, uncovered.

    Uncovered ops are those nothing proves; ops nobody has heard of are among them. Weights are random.

    Exit code 1: something is uncovered.

    Example: bidispatch audit --model Qwen3-8B --framework transformers
    """
    machine.require_torch("audit")
    plan = make_plan(device)
    machine.require_device(plan.device)
    audit = _run(plan, model, framework, overrides)
    if as_json:
        render.json_document(
            {
                "framework": framework.value,
                "overrides": overrides,
                "model": str(model) if model else None,
                "device": plan.device.name,
                "steps": audit.steps,
                "passed": audit.passed,
                "uncovered": len(audit.uncovered),
                "ops": [asdict(entry) for entry in audit.entries],
            }
        )
    else:
        render.line(f"{audit.model} on {plan.device.name}, {audit.steps}")
        render.line()
        rows = [(entry.verdict, entry.op, entry.device, str(entry.calls), entry.reason) for entry in audit.entries]
        render.table(("verdict", "op", "device", "calls", "why"), rows, _STYLES)
        render.line()
        render.line(f"{len(audit.uncovered)} of {len(audit.entries)} ops are uncovered")
    return 0 if audit.passed else failures.FINDING


def _run(plan: Plan, model: Path | None, framework: Framework, overrides: bool) -> Audit:
    from bidispatch.audit.models import audit_builtin, audit_transformers

    dtype = dtype_for(plan.device)
    if framework is Framework.TRANSFORMERS:
        if model is None:
            raise UsageError("--framework transformers needs --model DIR, a folder with a config.json")
        return audit_transformers(model, plan.device, dtype=dtype, overrides=plan if overrides else None)
    if overrides:
        raise UsageError("--overrides is for --framework transformers: the built-in decoder runs by the plan as it is")
    config = ModelConfig.read(model) if model else built_in(plan.device)
    return audit_builtin(plan, config, dtype=dtype)
