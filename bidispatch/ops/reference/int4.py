"""Reference and inputs of `gemm.int4`."""

from __future__ import annotations

import torch

from bidispatch.int4 import dequantize, pack
from bidispatch.ops.int4 import SYMMETRIC_ZERO
from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem

__all__ = ["gemm_int4", "gemm_int4_inputs"]

_LARGEST = 15


def gemm_int4(
    problem: Problem,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """x [m, k] @ the dequantised weight transposed + bias [n]: [m, n] in float64.

    The weight is (q - zero) * scale rounded to the dtype: that is what the integers stand for, not an error of it.
    """
    out = x.double() @ dequantize(weight, scales, zeros).double().T
    return (out if bias is None else out + bias.double(),)


def gemm_int4_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, k]; a weight of scale 1/sqrt(k), rounded to 4 bits as quantisers do; bias [n] where there is one.

    With zero points a group's least and greatest values are 0 and 15; without, its largest magnitude is 7.5 steps.
    """
    n, k, group = problem.size("n"), problem.size("k"), problem.size("group_size")
    x = draw((rows, k), (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)
    full = draw(
        (n, k), (seed, "weight"), dtype="float32", device=device, distribution=distribution, scale=k**-0.5
    ).reshape(n, -1, group)
    dtype: torch.dtype = getattr(torch, problem.dtype)
    if problem.flag("zero_points"):
        least, most = full.amin(-1, keepdim=True).clamp(max=0), full.amax(-1, keepdim=True).clamp(min=0)
        scales = _rounded((most - least) / _LARGEST, dtype)
        zeros = (-least / scales).round().clamp(0, _LARGEST)
    else:
        scales = _rounded(full.abs().amax(-1, keepdim=True) / (_LARGEST / 2), dtype)
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    q = (full / scales + zeros).round().clamp(0, _LARGEST).to(torch.int32).reshape(n, k)
    per_group = [tensor[..., 0].T.contiguous() for tensor in (scales, zeros)]
    return [
        x,
        pack(q),
        per_group[0].to(dtype),
        per_group[1].to(torch.int8) if problem.flag("zero_points") else None,
        draw((n,), (seed, "bias"), dtype=problem.dtype, device=device, distribution=distribution)
        if problem.flag("bias")
        else None,
    ]


def _rounded(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the dtype holds them, and never zero."""
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()
