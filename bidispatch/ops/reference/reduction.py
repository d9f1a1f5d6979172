"""References and inputs of the reductions over rows."""

from __future__ import annotations

import torch

from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem

__all__ = ["log_softmax", "mean", "row_inputs", "softmax", "sum"]


def softmax(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """exp(x - max) / sum(exp(x - max)) over each row of x [m, n]: [m, n] in float64."""
    weights = torch.exp(x.double() - x.double().amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True),)


def log_softmax(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x - max - log(sum(exp(x - max))) over each row of x [m, n]: [m, n] in float64."""
    shifted = x.double() - x.double().amax(-1, keepdim=True)
    return (shifted - torch.log(torch.exp(shifted).sum(-1, keepdim=True)),)


def mean(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The mean of each row of x [m, n]: [m] in float64."""
    return (x.double().sum(-1) / problem.size("n"),)


def sum(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: A001  the op's name
    """The sum of each row of x [m, n]: [m] in float64."""
    return (x.double().sum(-1),)


def row_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, n]."""
    shape = (rows, problem.size("n"))
    return [draw(shape, (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)]
