"""`bidispatch demo`: a small model served twice, with stock torch and under the plan, and what moved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bidispatch.cli import failures, machine, render
from bidispatch.cli.options import DeviceOption, JsonOption
from bidispatch.demo.config import CPU_MODEL, GPU_MODEL, ModelConfig
from bidispatch.demo.problems import decoder_problems
from bidispatch.demo.workload import PAGE_SIZE, Workload, default_workload
from bidispatch.device import Device
from bidispatch.environment import describe
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import Plan
from bidispatch.planning.plan import plan as make_plan

if TYPE_CHECKING:
    from bidispatch.demo.compare import Result
    from bidispatch.demo.kernels import Kernels
    from bidispatch.demo.weights import Weights

__all__ = ["command"]

_TITLES = {"stock": "stock torch", "plan": "bidispatch plan"}


def command(
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A Hugging Face folder of a dense Qwen3 or Llama; random weights if it has none."),
    ] = None,
    device: DeviceOption = "auto",
    requests: Annotated[
        int | None,
        typer.Option("--requests", min=1, help="Requests to serve; 12 on a processor, 24 on a GPU by default."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights and the requests.")] = 0,
    as_json: JsonOption = False,
) -> int:
    """Serve a small model, and see whether logprobs move.

    Each request is served alone and among others, by continuous batching, and compared. Twice: with stock torch, and
    with the kernels of this machine's plan.

    Exit code 1: under the plan a logprob moved, or no two requests were served together.

    Example: bidispatch demo --requests 16
    """
    machine.require_torch("demo")
    plan = make_plan(device)
    machine.require_device(plan.device)
    if plan.device.arch.vendor == "cpu" and model is None:
        _use_one_thread()
    config = ModelConfig.read(model) if model else built_in(plan.device)
    problems = list(dict.fromkeys(decoder_problems(config, dtype_for(plan.device), PAGE_SIZE).values()))
    if not as_json:
        _print_plan(plan, problems)
    gpu = plan.device.arch.vendor != "cpu"
    workload = default_workload(config, gpu=gpu, requests=requests, seed=seed)
    results = _serve(plan, config, model, workload, seed, quiet=as_json)
    met = results["plan"].together.most_requests > 1
    if not met:
        render.warning("no two requests met in a step, so this shows nothing; serve more with --requests")
    if as_json:
        render.json_document(
            {
                **{name: _document(result) for name, result in results.items()},
                "device": plan.device.name,
                "fingerprint": plan.fingerprint(problems),
                "model": asdict(config),
                "environment": describe(plan.device, plan.implementations(problems)),
            }
        )
    return 0 if results["plan"].identical and met else failures.FINDING


def _use_one_thread() -> None:
    """The built-in model's calls are small: on two cores, one of them busy, waiting for threads took 4 of 5 seconds."""
    import torch

    torch.set_num_threads(1)


def built_in(device: Device) -> ModelConfig:
    """The model to run where none is named."""
    return CPU_MODEL if device.arch.vendor == "cpu" else GPU_MODEL


def dtype_for(device: Device) -> str:
    """What the model runs in: fp32 on a processor, bf16 on a GPU."""
    return "float32" if device.arch.vendor == "cpu" else "bfloat16"


def load_weights(config: ModelConfig, model: Path | None, device: Device, seed: int) -> Weights:
    """The folder's weights if it has any, else random ones, on the device."""
    from bidispatch.demo import weights

    dtype, place = dtype_for(device), device.torch_device
    if model and weights.has_safetensors(model):
        return weights.load(model, config, dtype=dtype, device=place)
    return weights.random(config, dtype=dtype, device=place, seed=seed)


def _print_plan(plan: Plan, problems: list[Problem]) -> None:
    render.plan_header(plan, problems)
    render.line()
    render.plan_table([(problem, plan.select_problem(problem)) for problem in problems])
    render.line()


def _serve(
    plan: Plan, config: ModelConfig, model: Path | None, workload: Workload, seed: int, *, quiet: bool
) -> dict[str, Result]:
    from bidispatch.demo.kernels import PlanKernels, StockKernels

    weights = load_weights(config, model, plan.device, seed)
    if not quiet:
        render.line(
            f"{config.model_type}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"vocabulary {config.vocab_size}, {weights.dtype}, weights {weights.source}; "
            f"{len(workload.requests)} requests, {workload.new_tokens} new tokens"
        )
    results = {}
    sides: tuple[Kernels, ...] = (StockKernels(), PlanKernels(plan))
    for kernels in sides:
        results[kernels.name] = _compare(config, weights, kernels, workload)
        if not quiet:
            _print_result(results[kernels.name])
    return results


def _compare(config: ModelConfig, weights: Weights, kernels: Kernels, workload: Workload) -> Result:
    from bidispatch.demo.compare import run

    with render.progress_bar() as bar:
        task = bar.add_task(_TITLES[kernels.name], total=None)

        def progress(phase: str, done: int, total: int) -> None:
            bar.update(task, description=f"{_TITLES[kernels.name]}, {phase}", completed=done, total=total)

        return run(config, weights, kernels, workload, progress=progress)


def _print_result(result: Result) -> None:
    together = result.together
    render.line()
    render.line(_TITLES[result.kernels])
    render.line(f"  Logprob difference: {result.max_logprob_difference:.10f}")
    render.line(f"  differing bit patterns: {result.values_differ} of {result.values_compared}")
    render.line(f"  tokens that differ: {result.tokens_differ} of {result.tokens_compared}")
    render.line(
        f"  {result.seconds:.1f} s; together in {together.steps} steps of up to {together.most_requests} requests: "
        f"{together.partial_prefills} chunks of prompts, {together.mixed_steps} steps of prefill and decode mixed, "
        f"{together.graph_replays} CUDA graph replays"
    )


def _document(result: Result) -> dict[str, Any]:
    return {**asdict(result), "identical": result.identical}
