"""The forwards that can be audited: the demo's decoder under a plan, and any causal model of transformers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bidispatch.audit.trace import COVERED, UNCOVERED, Entry, Trace
from bidispatch.demo import weights
from bidispatch.demo.config import ModelConfig
from bidispatch.demo.engine import Activity, Engine
from bidispatch.demo.kernels import BoundOp, PlanKernels
from bidispatch.demo.memory import require_memory
from bidispatch.demo.scheduler import EngineLimits, Request
from bidispatch.demo.workload import PAGE_SIZE
from bidispatch.device import Device
from bidispatch.errors import DeviceError, UsageError
from bidispatch.integrations.aten import aten_overrides
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import Plan
from bidispatch.runtime.context import Limits

__all__ = ["Audit", "audit_builtin", "audit_transformers"]


@dataclass(frozen=True, slots=True)
class Audit:
    """What a forward ran. `passed` when it ran something of a plan's and nothing uncovered."""

    model: str
    steps: str
    """What kinds of steps were run, for people."""
    entries: tuple[Entry, ...]

    @property
    def uncovered(self) -> tuple[Entry, ...]:
        """Ops nothing proves."""
        return tuple(entry for entry in self.entries if entry.verdict == UNCOVERED)

    @property
    def passed(self) -> bool:
        """Whether nothing is uncovered, and not because nothing was seen."""
        return not self.uncovered and any(entry.verdict == COVERED for entry in self.entries)


class _VisibleKernels:
    """A plan's kernels called as torch ops, which a trace sees, and never from a graph, which it would not."""

    name = "plan"
    cuda_graphs = False

    def __init__(self, plan: Plan) -> None:
        self._kernels = PlanKernels(plan, torch_ops=True)

    def bind(self, problem: Problem, limits: Limits) -> BoundOp:
        return self._kernels.bind(problem, limits)


def audit_builtin(plan: Plan, config: ModelConfig, *, dtype: str, seed: int = 0) -> Audit:
    """Serve three requests with the demo's decoder under a plan: whole prompts, chunks of prompts, decodes, mixed.

    Layers repeat, so only the first of each kind is built; weights are random, since ops do not depend on them.
    """
    config = _one_layer_each(config)
    limits = EngineLimits(max_tokens=16, max_seqs=4, max_seq_len=64, page_size=PAGE_SIZE, pages=16)
    requests = [
        Request(0, _prompt(5, config), 4),
        Request(1, _prompt(40, config), 3),
        Request(2, _prompt(9, config), 4, arrival_step=2),
    ]
    drawn = weights.random(config, dtype=dtype, device=plan.device.torch_device, seed=seed)
    engine = Engine(config, drawn, _VisibleKernels(plan), limits)
    with Trace() as trace:
        activity = engine.run(requests, lambda request, index, token, logprobs: None)
    return Audit(f"{config.model_type} (built in)", _describe(activity), tuple(trace.entries))


def _one_layer_each(config: ModelConfig) -> ModelConfig:
    windows = tuple(dict.fromkeys(config.layer_windows))
    return replace(config, num_hidden_layers=len(windows) or 1, layer_windows=windows)


def _prompt(length: int, config: ModelConfig) -> tuple[int, ...]:
    return tuple(index % config.vocab_size for index in range(length))


def _describe(activity: Activity) -> str:
    return (
        f"{activity.steps} steps: {activity.partial_prefills} chunks of prompts, {activity.mixed_steps} with prefill "
        f"and decode mixed, up to {activity.most_requests} requests in one"
    )


def audit_transformers(folder: Path, device: Device, *, dtype: str, overrides: Plan | None = None) -> Audit:
    """Run a prefill of two prompts and a decode step of a transformers model: as it is, or under a plan's overrides.

    It is built from the folder's config, with random weights. Layers repeat, so only as many of the first ones are
    built as hold every kind there is. Raises `DeviceError` where transformers is not installed, `UsageError` for a
    folder it cannot read and for a model bigger than the memory that is free.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise DeviceError(
            "--framework transformers needs the package; `pip install transformers`, or leave --framework out"
        ) from error
    logging.set_verbosity_error()
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True)

        def build(config: Any, place: str) -> Any:
            with torch.device(place):
                return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=getattr(torch, dtype)).eval()

        config, outline = _first_layers(whole, lambda config: build(config, "meta"))
        require_memory(
            sum(tensor.nbytes for tensor in (*outline.parameters(), *outline.buffers())),
            device.torch_device,
            f"{config.model_type} with {_layers(config)} of {_layers(whole)} layers in {dtype}",
            "free some, or lower the widths in a copy of its config.json",
        )
        model = build(config, device.torch_device)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"transformers cannot make a causal model of {folder}: {_first_line(error)}") from error
    tokens = torch.arange(12, device=device.torch_device).view(2, 6) % config.get_text_config().vocab_size
    context = aten_overrides(overrides, uncovered="torch") if overrides else contextlib.nullcontext()
    with torch.inference_mode(), Trace() as trace, context:
        prefill = model(input_ids=tokens, use_cache=True)
        model(input_ids=tokens[:, -1:], past_key_values=prefill.past_key_values, use_cache=True)
    return Audit(f"{config.model_type} (transformers)", "a prefill of 2 x 6 tokens and a decode", tuple(trace.entries))


def _first_layers(whole: Any, outline: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The config with as many of the first layers as hold each kind, at least two, and that model's outline.

    A prefix keeps what a config says by a layer's index. The whole model's, where a prefix of it makes other layers.
    `outline` makes a model without memory.
    """
    full = outline(whole)
    kinds = _kinds_of_layers(whole, full)
    if kinds is None:
        return whole, full
    kept = max(2, 1 + max(kinds.index(kind) for kind in kinds))
    if kept >= len(kinds):
        return whole, full
    config = copy.deepcopy(whole)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(kinds) and "layer" in name:
            setattr(text, name, value[:kept])
    text.num_hidden_layers = kept
    part = outline(config)
    return (config, part) if _kinds_of_layers(config, part) == kinds[:kept] else (whole, full)


def _layers(config: Any) -> int | None:
    count: int | None = getattr(config.get_text_config(), "num_hidden_layers", None)
    return count


def _kinds_of_layers(config: Any, model: torch.nn.Module) -> list[str] | None:
    """Equal texts for layers of one kind: modules, shapes, the kind of attention; None for a model without layers."""
    count = _layers(config)
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not stacks or not count:
        return None
    named = getattr(config.get_text_config(), "layer_types", None) or [""] * count
    return [
        "\n".join([str(named[index]), *(f"{stack[index]} {_shapes(stack[index])}" for stack in stacks)])
        for index in range(count)
    ]


def _shapes(layer: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__)
