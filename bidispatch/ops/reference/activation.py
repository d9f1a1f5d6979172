"""References and inputs of the gated activations."""

from __future__ import annotations

import math

import torch

from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem

__all__ = ["gated_inputs", "gelu_tanh_and_mul", "silu_and_mul"]


def silu_and_mul(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """silu(a) · b, where a and b are the halves of x [m, 2 n] and silu(a) = a / (1 + exp(-a)): [m, n] in float64."""
    a, b = x.double().chunk(2, dim=-1)
    return (a / (1 + torch.exp(-a)) * b,)


def gelu_tanh_and_mul(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """gelu(a) · b, where a and b are the halves of x [m, 2 n]: [m, n] in float64.

    gelu is the tanh form of arXiv 1606.08415: a/2 · (1 + tanh(sqrt(2/pi) · (a + 0.044715 a³))).
    """
    a, b = x.double().chunk(2, dim=-1)
    return (0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) * b,)


def gated_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, 2 n]."""
    shape = (rows, 2 * problem.size("n"))
    return [draw(shape, (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)]
