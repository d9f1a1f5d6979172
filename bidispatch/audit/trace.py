"""Seeing every torch op that a run executes, and its verdict: covered, row-local, or uncovered.

Covered ops are `torch.ops.bidispatch.*`, which hold a plan's kernels and are opaque here. Row-local ones are listed
in `bidispatch.rowlocal`, with reasons. All others are uncovered, those nobody has heard of included. Kernels that are
launched without being a torch op cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bidispatch.rowlocal import Kind, classify
from bidispatch.runtime.torch_ops import NAMESPACE

__all__ = ["COVERED", "ROW_LOCAL", "UNCOVERED", "Entry", "Trace"]

COVERED = "covered"
ROW_LOCAL = "row-local"
UNCOVERED = "uncovered"

# Measured with torch 2.13 on x86, one element alone against the same in a vector of 4099: silu, gelu, sigmoid,
# softplus, exp2 and pow in fp32, rsqrt and add with alpha in bf16 differ, since the tail of a vector runs other code.
_POINTWISE_ON_CPU = "elementwise, but on a processor the tail of a vector may run other code than its body"


@dataclass(frozen=True, slots=True)
class Entry:
    """An op, on one kind of device, with its verdict."""

    op: str
    device: str
    verdict: str
    reason: str
    calls: int


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that counts every op under it. Composite ops are taken apart into what they run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: dict[tuple[str, str, str, str], int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        # Under inference mode a composite op (linear, matmul, sdpa) arrives whole.
        with self:
            parts = func.decompose(*args, **named)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **named)
        tensors = [leaf for leaf in tree_leaves((args, named, result)) if isinstance(leaf, torch.Tensor)]
        device = next((tensor.device.type for tensor in tensors), "cpu")
        verdict, reason = _verdict(func, args, named, tensors, device)
        key = (str(func), device, verdict, reason)
        self._calls[key] = self._calls.get(key, 0) + 1
        return result

    @property
    def entries(self) -> list[Entry]:
        """Every op seen: uncovered ones first, then covered, then row-local; by name."""
        order = (UNCOVERED, COVERED, ROW_LOCAL)
        found = [Entry(*key, calls=calls) for key, calls in self._calls.items()]
        return sorted(found, key=lambda entry: (order.index(entry.verdict), entry.op, entry.device))


def _verdict(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[torch.Tensor], device: str
) -> tuple[str, str]:
    """The verdict on one call, and why."""
    if func.namespace == NAMESPACE:
        return COVERED, "a kernel of the plan"
    kind, reason = classify(func, args, kwargs, tensors)
    if kind is Kind.EXACT:
        return ROW_LOCAL, reason
    if kind is Kind.POINTWISE:
        return (UNCOVERED, _POINTWISE_ON_CPU) if device == "cpu" else (ROW_LOCAL, reason)
    return UNCOVERED, reason
