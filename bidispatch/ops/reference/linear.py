"""References and inputs of the matrix products."""

from __future__ import annotations

import torch

from bidispatch.ops.quantize import GROUP
from bidispatch.ops.reference.draw import draw
from bidispatch.ops.reference.quantize import spread
from bidispatch.ops.schema import Problem

__all__ = [
    "block_scales",
    "bmm",
    "bmm_inputs",
    "gemm",
    "gemm_fp8",
    "gemm_fp8_block",
    "gemm_fp8_block_inputs",
    "gemm_fp8_inputs",
    "gemm_inputs",
    "widened_blocks",
]

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


def widened_blocks(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """weight [n, k] times the scale [n/128, k/128] of each of its 128x128 blocks: [n, k] in float64."""
    n, k = weight.shape
    return weight.double() * spread(scales, k).repeat_interleave(GROUP, dim=0)[:n]


def gemm_fp8_block(
    problem: Problem, x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """x [m, k] @ weight [n, k] transposed, each with its scales: [m, n] in float64."""
    widened = x.double() * spread(x_scales, x.shape[1])
    return (widened @ widened_blocks(weight, weight_scales).T,)


def gemm_fp8(
    problem: Problem,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """x [m, k] @ weight [n, k] transposed, times the scales of both, + bias [n]: [m, n] in float64."""
    out = x.double() @ weight.double().T
    for scales in (x_scale, weight_scale, weight_scales):
        out = out if scales is None else out * scales.double()
    if x_scales is not None:
        out = out * x_scales.double()[:, None]
    return (out if bias is None else out + bias.double(),)


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


def _scales(shape: tuple[int, ...], key: object, device: str | torch.device, around: float) -> torch.Tensor:
    """Positive scales within a factor of two of a value."""
    return around * torch.exp2(draw(shape, key, dtype="float32", device=device).clamp(-1, 1))


def _powers_of_two(problem: Problem, scales: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.log2(scales).round()) if problem["scale_format"] == "ue8m0" else scales


def block_scales(
    problem: Problem, shape: tuple[int, ...], key: object, device: str | torch.device, around: float
) -> torch.Tensor:
    """Scales of blocks or groups within a factor of two of a value, in the problem's format."""
    return _powers_of_two(problem, _scales(shape, key, device, around))


def gemm_fp8_block_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, k] and a weight [n, k], each drawn in fp8, and scales that make the weight's size about 1/sqrt(k)."""
    n, k = problem.size("n"), problem.size("k")
    groups = -(-k // GROUP)
    x = draw((rows, k), (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)
    weight = draw((n, k), (seed, "weight"), dtype=problem.dtype, device=device, distribution=distribution)
    x_scales = block_scales(problem, (rows, groups), (seed, "x_scales"), device, 1.0)
    weight_scales = block_scales(problem, (-(-n // GROUP), groups), (seed, "weight_scales"), device, k**-0.5)
    return [x, x_scales, weight, weight_scales]


def gemm_fp8_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """The same with scales for whole tensors or rows, and a bias [n] where the problem has one."""
    n, k = problem.size("n"), problem.size("k")
    token, channel = problem["x_scaling"] == "token", problem["weight_scaling"] == "channel"
    x = draw((rows, k), (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)
    weight = draw((n, k), (seed, "weight"), dtype=problem.dtype, device=device, distribution=distribution)
    x_scales = _scales((rows if token else 1,), (seed, "x_scales"), device, 1.0)
    weight_scales = _scales((n if channel else 1,), (seed, "weight_scales"), device, k**-0.5)
    bias = None
    if problem.flag("bias"):
        bias = draw((n,), (seed, "bias"), dtype=str(problem["out_dtype"]), device=device, distribution=distribution)
    return [
        *((x, None, x_scales) if token else (x, x_scales, None)),
        *((weight, None, weight_scales) if channel else (weight, weight_scales, None)),
        bias,
    ]
