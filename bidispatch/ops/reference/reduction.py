"""References and inputs of the reductions over rows."""

from __future__ import annotations

import torch

from bidispatch.ops.reference.draw import draw, draw_indices
from bidispatch.ops.schema import Problem

__all__ = ["log_softmax", "mean", "row_inputs", "softmax", "sum", "token_logprob", "token_logprob_inputs"]


def softmax(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """exp(x - max) / sum(exp(x - max)) over each row of x [m, n]: [m, n] in float64."""
    weights = torch.exp(x.double() - x.double().amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True),)


def log_softmax(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x - max - log(sum(exp(x - max))) over each row of x [m, n]: [m, n] in float64."""
    shifted = x.double() - x.double().amax(-1, keepdim=True)
    return (shifted - torch.log(torch.exp(shifted).sum(-1, keepdim=True)),)


def token_logprob(problem: Problem, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """log_softmax of each row of x [m, n] at token_ids [m]: [m] in float64, NaN for a token that is not below n."""
    known = (token_ids >= 0) & (token_ids < problem.size("n"))
    (logprobs,) = log_softmax(problem, x)
    picked = logprobs.gather(-1, torch.where(known, token_ids, 0)[:, None])[:, 0]
    return (torch.where(known, picked, float("nan")),)


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


def token_logprob_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, n] and token_ids [rows] int64, all in the vocabulary."""
    x = row_inputs(problem, rows, device=device, seed=seed, distribution=distribution)
    return [*x, draw_indices((rows,), (seed, "token_ids"), problem.size("n"), device=device)]
