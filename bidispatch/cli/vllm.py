"""`bidispatch vllm`: what serves a model's layers in vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bidispatch.cli import failures, render
from bidispatch.cli.options import DeviceOption, JsonOption, ProfileOption, show_help_without_command
from bidispatch.errors import DeviceError
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
    if device == "auto" and made.device.arch.vendor == "cpu":
        raise DeviceError("there is no GPU here to ask for; name one, as with --device sm90")
    rows = rows_of(made, model, tensor_parallel=tensor_parallel, dtype=dtype)
    fingerprint = made.fingerprint()
    if as_json:
        layers = [row.as_json() for row in rows]
        render.json_document(
            {"profile": table.profile_json(made.profile), "fingerprint": fingerprint, "layers": layers}
        )
    else:
        render.line(f"device {made.device.name}, level {made.require.label}")
        for text in [*table.profile_lines(made.profile), *table.lines(rows, fingerprint)]:
            render.line(text)
    return failures.FINDING if table.refusals(rows) else 0


@app.command("check")
def check_command(
    model: Annotated[
        Path,
        typer.Option(
            "--model", help="A Hugging Face folder; only its config.json if weights are random.", metavar="DIR"
        ),
    ],
    load_format: Annotated[
        str, typer.Option("--load-format", help="auto, dummy, bidispatch_random or another of vLLM's.")
    ] = "auto",
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="Ranks.")] = 1,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="ours (if left out), vllm_invariant, stock; several times.")
    ] = None,
    stock: Annotated[bool, typer.Option("--stock/--no-stock", help="A stock engine too, as negative control.")] = True,
    require_control: Annotated[
        bool, typer.Option("--require-control", help="Fail if the stock engine shows no difference.")
    ] = False,
    prompts: Annotated[int, typer.Option("--prompts", help="Requests to serve in every way.")] = 64,
    longest: Annotated[int, typer.Option("--longest", help="Tokens of the longest prompt.")] = 3000,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="New tokens of a request, at most.")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts and orders.")] = 0,
    max_num_batched_tokens: Annotated[int, typer.Option("--max-num-batched-tokens", help="As vLLM's.")] = 8192,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help="As vLLM's.")] = 64,
    max_model_len: Annotated[int, typer.Option("--max-model-len", help="As vLLM's; 0: as long as needed.")] = 0,
    values: Annotated[
        str, typer.Option("--values", help="raw_logprobs or raw_logits: what is compared.")
    ] = "raw_logprobs",
    without: Annotated[
        list[str] | None,
        typer.Option("--without", help="batches, chunking, prefix, mixed, preemption or graphs need not happen."),
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option("--engine-arg", help="For vLLM's EngineArgs; of one arm as ARM:NAME=VALUE.", metavar="NAME=VALUE"),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Serve a model with vLLM in many ways, and see whether any logprob of a request moves.

    Each request alone, then in batches, in other orders, arriving one by one, cut into other chunks, with its prefix
    cached, preempted, and decode against prefill; and the same with stock vLLM. Compared bit by bit, 20 values a token.

    Exit code 1: something moved, or did not happen that must (chunks, prefix hits, mixed steps, preemption, graphs).

    Example: bidispatch vllm check --model Qwen3-8B --load-format bidispatch_random
    """
    from bidispatch.integrations.vllm import check

    options = check.CheckOptions(
        model=model,
        load_format=load_format,
        tensor_parallel=tensor_parallel,
        arms=check.known_arms(arm or (), stock=stock),
        prompts=prompts,
        longest=longest,
        new_tokens=new_tokens,
        seed=seed,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        values=values,
        excused=tuple(without or ()),
        require_control=require_control,
        engine=tuple(engine_arg or ()),
    )
    check.need_vllm()
    report = check.check(options, say=lambda arm, text: None if as_json else render.line(f"[{arm}] {text}"))
    found = check.faults(report, require_control=require_control)
    if as_json:
        render.json_document({**report, "faults": found})
    else:
        for text in check.lines(report):
            render.line(text)
        for text in found:
            render.error_line(f"failed: {text}")
    return failures.FINDING if found else 0
