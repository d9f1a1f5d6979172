"""References and inputs of the matrix products."""

from __future__ import annotations

import torch

from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem

__all__ = ["bmm", "bmm_inputs", "gemm", "gemm_inputs"]

_MATRICES = 3


def gemm(
    problem: Problem, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """x [m, k] @ weight [n, k] transposed + bias [n]: [m, n] in float64."""
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double(),)


def bmm(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """a [matrices, m, k] @ b [matrices, k, n]: [matrices, m, n] in float64."""
    return (a.double() @ b.double(),)


def gemm_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, k]; a weight [n, k] of scale 1/sqrt(k), as trained ones have; bias [n] where the problem has one."""
    n, k = problem.size("n"), problem.size("k")
    x = draw((rows, k), (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)
    weight = draw(
        (n, k), (seed, "weight"), dtype=problem.dtype, device=device, distribution=distribution, scale=k**-0.5
    )
    if not problem.flag("bias"):
        return [x, weight, None]
    return [x, weight, draw((n,), (seed, "bias"), dtype=problem.dtype, device=device, distribution=distribution)]


def bmm_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """a [3, rows, k] and b [3, k, n], b of scale 1/sqrt(k)."""
    n, k = problem.size("n"), problem.size("k")
    a = draw((_MATRICES, rows, k), (seed, "a"), dtype=problem.dtype, device=device, distribution=distribution)
    b = draw(
        (_MATRICES, k, n), (seed, "b"), dtype=problem.dtype, device=device, distribution=distribution, scale=k**-0.5
    )
    return [a, b]
