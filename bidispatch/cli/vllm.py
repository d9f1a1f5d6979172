"""`bidispatch vllm`: what serves a model's layers in vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bidispatch.cli import failures, render
from bidispatch.cli.options import DeviceOption, JsonOption, ProfileOption, show_help_without_command
from bidispatch.planning.plan import plan as make_plan

__all__ = ["app"]

LEVEL = "sequence"

app = typer.Typer(help="Layers of a model in vLLM.", add_completion=False)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    show_help_without_command(context)


@app.command("report")
def report(
    model: Annotated[Path, typer.Option("--model", help="A Hugging Face config.json, or its folder.", metavar="DIR")],
    tensor_parallel: Annotated[int, typer.Option("--tp", help="How many ranks share a layer.")] = 1,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the activations, instead of the config's.", metavar="DTYPE")
    ] = None,
    device: DeviceOption = "auto",
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show what serves each kind of layer of a model, from its config, without starting a server.

    The plan is of level sequence, as in vLLM. A server logs the same table of the layers that it built.

    Exit code 1: something is not promised, sampling aside.

    Example: bidispatch vllm report --model Qwen3-8B --device sm90
    """
    from bidispatch.integrations.vllm import table
    from bidispatch.integrations.vllm.from_config import rows_of

    made = make_plan(device, profile=profile, require=LEVEL, cuda_graph=device != "cpu")
    rows = rows_of(made, model, tensor_parallel=tensor_parallel, dtype=dtype)
    fingerprint = made.fingerprint()
    if as_json:
        render.json_document({"fingerprint": fingerprint, "layers": [row.as_json() for row in rows]})
    else:
        render.line(f"device {made.device.name}, profile {made.profile.name}, level {made.require.label}")
        for text in table.lines(rows, fingerprint):
            render.line(text)
    return failures.FINDING if table.refusals(rows) else 0
