"""What the modules of this integration share in a worker: the plan, vLLM's classes, how a layer is given kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bidispatch import ops as catalogue
from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import ops
from bidispatch.integrations.vllm.table import Row
from bidispatch.ops.schema import DTYPES, DimValue
from bidispatch.planning.plan import Plan
from bidispatch.planning.selection import Selection

__all__ = ["SERVED", "Host", "Unserved", "name_of", "product_text", "refuse_unserved", "unserved"]

SERVED = "bidispatch_kernels"
"""The attribute of a layer that holds the texts of its kernels."""


class Unserved(Exception):  # noqa: N818 - a verdict on a layer, caught where rows are made
    """Why a layer is not served. Never leaves this package."""


@dataclass
class Host:
    """A worker's plan and vLLM's classes, and whether a layer without a kernel may run."""

    plan: Plan
    max_tokens: int
    classes: Mapping[str, Any]
    """By the names of `compat.SEAMS`: the class that holds each seam."""
    rows: list[Row] = field(default_factory=list)

    def take(self, layer: str, kind: str, op: str, dtype: str, **dims: DimValue) -> str:
        """Select and bind for a layer, add its row, and return the text of its kernel.

        Raises `SelectionError` with every candidate's reasons, and `UsageError` for dims that the op does not have.
        """
        selection: Selection = self.plan.select_problem(catalogue.get(op).problem(dtype, dims))
        text = ops.register(layer, selection, self.max_tokens)
        row = Row.of(layer, kind, selection)
        if row not in self.rows:
            self.rows.append(row)
        return text

    def take_product(
        self, layer: str, kind: str, op: str, dtype: str, *, has_bias: bool, **dims: DimValue
    ) -> tuple[str, str]:
        """`take` for a product: its text without a bias, and the one with, empty where the layer has none.

        A layer may leave its bias to others, as row-parallel ones of other ranks do: both are bound.
        """
        plain = self.take(layer, kind, op, dtype, **dims, bias=False)
        return plain, self.take(layer, kind, op, dtype, **dims, bias=True) if has_bias else ""


def product_text(layer: Any, texts: Sequence[str], bias: torch.Tensor | None) -> str:
    """Of `Host.take_product`'s texts the one of a call. Raises `SelectionError` for a bias that was not there."""
    if bias is None:
        return texts[0]
    if not texts[1]:
        raise SelectionError(f"{type(layer).__name__} is given a bias, but had none when it was loaded")
    return texts[1]


def name_of(dtype: torch.dtype, of: str) -> str:
    """torch's dtype by its name. Raises `Unserved` for one that no op takes."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise Unserved(f"{of} is {name}; known are {', '.join(DTYPES)}")
    return name


_refuse = False


def refuse_unserved(wanted: bool) -> None:
    """Whether a layer that was given no kernel may run vLLM's own code from now on: `strict` says no."""
    global _refuse
    _refuse = wanted


def unserved(layer: Any, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run vLLM's own code for a layer that was given nothing, or raise `SelectionError` under `strict`."""
    if _refuse:
        raise SelectionError(
            f"BIDISPATCH_VLLM=strict: {type(layer).__name__} {getattr(layer, 'prefix', '')} runs, "
            "but was not among the model's layers when it was loaded; BIDISPATCH_VLLM=on shows such as not promised"
        )
    return original(*arguments, **named)
