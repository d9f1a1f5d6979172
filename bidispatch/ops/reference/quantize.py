"""References and inputs of the quantisation to fp8."""

from __future__ import annotations

from typing import Any

import torch

from bidispatch import ops
from bidispatch.ops.quantize import GROUP, unfused
from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute

__all__ = [
    "LARGEST",
    "fp8_group",
    "fp8_tensor",
    "fp8_tensor_inputs",
    "fp8_token",
    "fused",
    "group_scales",
    "row_inputs",
    "spread",
    "token_scales",
]

LARGEST = 448.0
"""The largest finite e4m3."""
_LEAST = 1e-10
"""Of a maximum and, before it is rounded up to a power of two, of a scale."""
_LEAST_TOKEN = 1 / (448 * 512)
"""Of the scale of a token."""
_BIAS, _MANTISSA_BITS = 127, 23


def group_scales(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """The scale of each group of x [m, k], as the op defines it: [m, k/128 rounded up] in fp32."""
    m, k = x.shape
    groups = -(-k // GROUP)
    padded = torch.zeros(m, groups * GROUP, dtype=torch.float32, device=x.device)
    padded[:, :k] = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
    amax = padded.view(m, groups, GROUP).amax(-1).clamp(min=_LEAST)
    # By a tensor: torch on a GPU divides by a Python number through its reciprocal, which is one ulp off at times.
    scales = amax / torch.full_like(amax, LARGEST)
    return _to_power_of_two(scales.clamp(min=_LEAST)) if problem["scale_format"] == "ue8m0" else scales


def _to_power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """Each positive normal fp32 rounded up to a power of two; infinity stays."""
    mantissa, exponent = torch.frexp(scales)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).to(torch.int32)
    # By its bits: a GPU's power of two is not promised to be one.
    rounded = ((exponent + _BIAS) << _MANTISSA_BITS).view(torch.float32)
    return torch.where(scales.isinf(), scales, rounded)


def spread(scales: torch.Tensor, k: int) -> torch.Tensor:
    """The scale of each element, [m, k] in float64, from those of the groups."""
    return scales.double().repeat_interleave(GROUP, dim=-1)[..., :k]


def fp8_group(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [m, k] / the scale of its group, not rounded, and the scales: float64 both.

    The scales are rounded to fp32 first, since the values are divided by the rounded ones.
    """
    scales = group_scales(problem, x)
    return x.double() / spread(scales, x.shape[1]), scales.double()


def fused(problem: Problem, *everything: Any) -> tuple[torch.Tensor, ...]:
    """The op without quantisation, its first result rounded to the problem's dtype and quantised; then its others."""
    before, quantization = unfused(problem)
    out, *others = load_attribute(ops.get(before.op).reference)(before, *everything)
    return (*fp8_group(quantization, out.to(getattr(torch, problem.dtype))), *others)


def token_scales(x: torch.Tensor) -> torch.Tensor:
    """The scale of each row of x [m, k], as `quantize.fp8_token` defines it: [m] in fp32."""
    amax = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)
    return (amax / torch.full_like(amax, LARGEST)).clamp(min=_LEAST_TOKEN)


def fp8_token(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [m, k] / the scale of its row, not rounded, and the scales [m]: float64 both."""
    scales = token_scales(x)
    return x.double() / scales.double()[:, None], scales.double()


def fp8_tensor(problem: Problem, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [m, k] / scale [1], within ±448, not rounded: float64."""
    return ((x.double() / scale.double()).clamp(-LARGEST, LARGEST),)


def fp8_tensor_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, k], and a scale that is no power of two and that a few of the values exceed."""
    shape = (rows, problem.size("k"))
    x = draw(shape, (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)
    return [x, torch.full((1,), 3.1 / LARGEST, dtype=torch.float32, device=device)]


def row_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """x [rows, k]."""
    shape = (rows, problem.size("k"))
    return [draw(shape, (seed, "x"), dtype=problem.dtype, device=device, distribution=distribution)]
