"""Plain torch as a kernel, so that its dependence on the batch is measured by the same comparison. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch.verify.subject import Subject

__all__ = ["stock_subject"]


def stock_subject(problem: Problem, device: torch.device) -> Subject:
    """What plain torch does for a problem, callable as a kernel."""
    op = ops.get(problem.op)
    stock: Callable[..., tuple[torch.Tensor, ...]] = load_attribute(op.stock)
    inputs = len(op.arguments) + len(op.scalars)

    def launch(*everything: Any) -> None:
        results = stock(problem, *everything[:inputs])
        for out, result in zip(everything[inputs:], results, strict=True):
            out.copy_(result)

    return Subject(problem, device, launch)
