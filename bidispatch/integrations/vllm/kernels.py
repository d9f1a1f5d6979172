"""The bound kernels of attention layers: one for decode steps, one for all others, of the same bits."""

from __future__ import annotations

import weakref
from functools import lru_cache

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm.limits import StepLimits
from bidispatch.integrations.vllm.warm import warm
from bidispatch.ops.schema import Problem
from bidispatch.planning.decisions import REJECTED, Decision
from bidispatch.planning.overrides import override
from bidispatch.planning.plan import Plan, plan
from bidispatch.planning.selection import Selection
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import Limits
from bidispatch.runtime.scratch import Scratch

__all__ = ["LEVEL", "StepKernels", "select", "serving_plan", "warm_all"]

LEVEL = "sequence"
"""Neighbours decide where a prompt is cut and who is preempted, so `batch` would promise nothing in vLLM."""

_bound: weakref.WeakValueDictionary[tuple[object, ...], BoundKernel] = weakref.WeakValueDictionary()
"""Layers run one after the other, so equal ones share a kernel."""

_scratch = Scratch()
"""For the same reason all kernels of attention share their workspaces: prompts' and decode steps', of every layer."""


@lru_cache(maxsize=16)
def serving_plan(device: str) -> Plan:
    """The plan of a worker. device: `cuda:0`, or `cpu`, where nothing is captured; or an arch, to ask elsewhere."""
    return plan(device, require=LEVEL, cuda_graph=device != "cpu")


def select(chosen: Plan, problem: Problem, implementations: tuple[str, ...] = ()) -> Selection:
    """What serves a layer: the plan's choice, or the first of these that fits, where a vLLM backend was named.

    Raises `SelectionError` with the reasons of every implementation that was asked, nothing else being tried.
    """
    if chosen.require.label not in (LEVEL, "topology"):
        raise SelectionError(f"vLLM needs a plan of level {LEVEL}, this one requires {chosen.require.label}")
    if not implementations:
        return chosen.select_problem(problem)
    decisions: list[Decision] = []
    for name in implementations:
        selection = _try(chosen, problem, name, decisions)
        if selection is not None:
            return selection
    raise SelectionError(
        f"none of {', '.join(implementations)} can be invariant for {problem} on {chosen.device.name}", decisions
    )


def _try(chosen: Plan, problem: Problem, name: str, decisions: list[Decision]) -> Selection | None:
    if name not in chosen.registry and name.partition(".")[0] not in chosen.registry.failures:
        decisions.append(Decision(name, REJECTED, ("no installed backend has it",)))
        return None
    try:
        with override(f"{problem.op}={name}"):
            return chosen.select_problem(problem)
    except SelectionError as error:
        decisions += [decision for decision in error.decisions if decision.implementation == name]
        return None


class StepKernels:
    """A selection bound for a server's steps. Which of the two runs is decided on the host, for a whole step."""

    __slots__ = ("_decode", "_mixed", "limits", "selection")

    def __init__(self, selection: Selection, limits: StepLimits) -> None:
        self.selection, self.limits = selection, limits
        self._mixed = _bind(
            selection, Limits(limits.max_tokens, limits.max_seqs, limits.max_seq_len, limits.max_tokens)
        )
        self._decode = self._mixed
        if limits.decode_query_len:
            self._decode = _bind(
                selection,
                Limits(limits.decode_tokens, limits.max_seqs, limits.max_seq_len, limits.decode_query_len),
            )

    def of(self, decode: bool) -> BoundKernel:
        """The kernel of a step; decode: `StepLimits.is_decode` of it."""
        return self._decode if decode else self._mixed


def _bind(selection: Selection, limits: Limits) -> BoundKernel:
    # Every device has a plan of its own, so its name is in the key; ladder and dims fix everything else.
    key = (selection.device.torch_device, selection.problem, selection.ladder_key, limits)
    kernel = _bound.get(key)
    if kernel is None:
        kernel = _bound[key] = selection.bind(
            max_tokens=limits.max_tokens,
            max_seqs=limits.max_seqs,
            max_seq_len=limits.max_seq_len,
            max_query_len=limits.max_query_len,
            scratch=_scratch,
        )
    return kernel


def warm_all() -> None:
    """Run every kernel that is bound once."""
    for kernel in list(_bound.values()):
        warm(kernel)
