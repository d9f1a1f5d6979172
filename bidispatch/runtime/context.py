"""What a backend's `bind` function is given, and what it must return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bidispatch.device import Device
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.ops.schema import Problem

if TYPE_CHECKING:
    from bidispatch.runtime.scratch import Scratch

__all__ = ["BindContext", "Kernel", "Limits", "need_max_seq_len", "need_positive_scale"]

Kernel = Callable[..., None]
"""A bound kernel. Called with every argument of the op, then every scalar, then every output, positionally, in the
catalogue's order; an absent optional tensor is None. It writes the outputs and returns nothing. Tensors have been
checked: shapes, dtypes, device, no run-time size 0, no gradient wanted, last axis contiguous.

One that chooses among algorithms by M may have an attribute `edges`: the largest M of each choice but the last."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest call a kernel must be ready for; workspaces are allocated for it when it is bound."""

    max_tokens: int
    max_seqs: int = 1
    max_seq_len: int = 0
    """The longest KV a sequence may have; 0 where an op has no sequences."""
    max_query_len: int = 0
    """The most query rows one sequence may have in a call; 0 means max_tokens."""
    min_tokens: int = 1
    """The fewest rows of a call: more than one where a rung leaves smaller calls to the rung before it."""


@dataclass(frozen=True, slots=True)
class BindContext:
    """Everything a kernel may depend on. The batch is not here."""

    device: Device
    problem: Problem
    params: Any
    """An instance of the implementation's `Params`."""
    tile: Any
    """An instance of its `Tile`, or None."""
    limits: Limits
    scratch: Scratch | None = None
    """Where workspaces that keep nothing between calls may lie; None: a kernel has its own (`scratch.empties`)."""


def need_max_seq_len(context: BindContext) -> None:
    """Raise `UsageError` where a kernel of attention is bound without a longest KV: its workspaces follow it."""
    if context.limits.max_seq_len < 1:
        raise UsageError(
            f"{context.problem} is bound without max_seq_len; bind(..., max_seq_len=<longest KV of a sequence>)"
        )


def need_positive_scale(problem: Problem, scale: float) -> None:
    """Raise `ArgumentError` for a scale of scores that is not above 0: kernels scale a row's maximum by it."""
    if not scale > 0:
        raise ArgumentError(f"{problem}: scale must be above 0, not {scale}")
