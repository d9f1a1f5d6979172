"""The forwards that can be audited: the demo's decoder under a plan, and any causal model of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bidispatch.audit.trace import COVERED, UNCOVERED, Entry, Trace
from bidispatch.demo import weights
from bidispatch.demo.config import ModelConfig
from bidispatch.demo.engine import Activity, Engine
from bidispatch.demo.kernels import BoundOp, PlanKernels
from bidispatch.demo.scheduler import EngineLimits, Request
from bidispatch.demo.workload import PAGE_SIZE
from bidispatch.device import Device
from bidispatch.errors import DeviceError, UsageError
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


def audit_transformers(folder: Path, device: Device, *, dtype: str) -> Audit:
    """Run a prefill of two prompts and a decode step of a transformers model, as it is: nothing of a plan is in it.

    The whole model is built, with random weights, from the folder's config. Raises `DeviceError` where transformers
    is not installed, `UsageError` for a folder it cannot read.
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
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device(device.torch_device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"transformers cannot make a causal model of {folder}: {_first_line(error)}") from error
    tokens = torch.arange(12, device=device.torch_device).view(2, 6) % config.get_text_config().vocab_size
    with torch.inference_mode(), Trace() as trace:
        prefill = model(input_ids=tokens, use_cache=True)
        model(input_ids=tokens[:, -1:], past_key_values=prefill.past_key_values, use_cache=True)
    return Audit(f"{config.model_type} (transformers)", "a prefill of 2 x 6 tokens and a decode", tuple(trace.entries))


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__)
