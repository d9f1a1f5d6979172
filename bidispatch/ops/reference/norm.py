"""References and inputs of the root-mean-square norms."""

from __future__ import annotations

import torch

from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem

__all__ = [
    "fused_add_rms_norm",
    "fused_add_rms_norm_inputs",
    "qk_norm",
    "qk_norm_inputs",
    "rms_norm",
    "rms_norm_inputs",
]


def rms_norm(problem: Problem, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """x [m, n] / sqrt(mean(x²) + eps), times weight [n] or, for Gemma, 1 + weight: [m, n] in float64."""
    x, weight = x.double(), weight.double()
    factor = 1 + weight if problem.flag("gemma") else weight
    return (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * factor,)


def fused_add_rms_norm(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    """The norm of x + residual, both [m, n], and that sum: [m, n] each, in float64.

    The sum is rounded to the problem's dtype first, as the op says, since the norm is of the rounded one.
    """
    total = (x.double() + residual.double()).to(x.dtype)
    return (*rms_norm(problem, total, weight, eps), total.double())


def qk_norm(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """The norm of each head of q [m, num_heads, head_dim] and of k [m, num_kv_heads, head_dim], in float64."""
    return (*rms_norm(problem, q, q_weight, eps), *rms_norm(problem, k, k_weight, eps))


def rms_norm_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, n] and weight [n]."""
    n = problem.size("n")
    x = draw((rows, n), (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)
    return [x, draw((n,), (seed, "weight"), dtype=problem.dtype, device=device, distribution=distribution)]


def fused_add_rms_norm_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x and residual [rows, n], and weight [n]."""
    x, weight = rms_norm_inputs(problem, rows, device=device, seed=seed, distribution=distribution)
    shape = (rows, problem.size("n"))
    residual = draw(shape, (seed, "residual"), dtype=problem.dtype, device=device, distribution=distribution)
    return [x, residual, weight]


def qk_norm_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """q [rows, num_heads, head_dim], k [rows, num_kv_heads, head_dim], and the weights [head_dim].

    q and k are slices of one tensor that has room for the values too, as a merged projection gives them.
    """
    heads, kv_heads, head_dim = (problem.size(dim) for dim in ("num_heads", "num_kv_heads", "head_dim"))

    def drawn(shape: tuple[int, ...], name: str) -> torch.Tensor:
        return draw(shape, (seed, name), dtype=problem.dtype, device=device, distribution=distribution)

    packed = drawn((rows, heads + 2 * kv_heads, head_dim), "qkv")
    q, k = packed[:, :heads], packed[:, heads : heads + kv_heads]
    return [q, k, drawn((head_dim,), "q_weight"), drawn((head_dim,), "k_weight")]
