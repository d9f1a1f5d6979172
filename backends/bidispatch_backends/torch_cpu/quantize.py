"""Quantisation to fp8 on the processor: by itself, and behind this backend's kernels of other ops.

Maxima, quotients and conversions are exact roundings in torch's vector and scalar code alike, so their calls may take
any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bidispatch.ops.quantize import GROUP, unfused
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu import rows
from bidispatch_backends.torch_cpu.workspace import workspace

__all__ = [
    "bind_fused_add_rms_norm_fp8_group",
    "bind_quantize_fp8_group",
    "bind_quantize_fp8_tensor",
    "bind_quantize_fp8_token",
    "bind_rms_norm_fp8_group",
    "bind_silu_and_mul_fp8_group",
]

_LARGEST, _LEAST, _LEAST_TOKEN = 448.0, 1e-10, 1 / (448 * 512)
_MANTISSA, _EXPONENT = 0x7FFFFF, 0x7F800000


def bind_quantize_fp8_group(context: BindContext) -> Kernel:
    """Return `kernel(x, q, scales)`; see the op `quantize.fp8_group`."""
    k = context.problem.size("k")
    power_of_two = context.problem["scale_format"] == "ue8m0"

    def quantize(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> None:
        for group, start in enumerate(range(0, k, GROUP)):
            columns = slice(start, min(start + GROUP, k))
            values = x[:, columns].float()
            magnitudes = torch.where(values.isnan(), 0.0, values.abs())
            scale = magnitudes.amax(dim=1).clamp(min=_LEAST) / _LARGEST
            if power_of_two:
                integers = scale.clamp(min=_LEAST).view(torch.int32)
                scale = ((integers + _MANTISSA) & _EXPONENT).view(torch.float32)
            scales[:, group] = scale
            q[:, columns] = (values / scale[:, None]).to(q.dtype)

    return quantize


def bind_quantize_fp8_token(context: BindContext) -> Kernel:
    """Return `kernel(x, q, scales)`; see the op `quantize.fp8_token`."""

    def quantize(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> None:
        values = x.float()
        magnitudes = torch.where(values.isnan(), 0.0, values.abs())
        scales[:] = (magnitudes.amax(dim=1) / _LARGEST).clamp(min=_LEAST_TOKEN)
        q[:] = (values / scales[:, None]).to(q.dtype)

    return quantize


def bind_quantize_fp8_tensor(context: BindContext) -> Kernel:
    """Return `kernel(x, scale, q)`; see the op `quantize.fp8_tensor`."""

    def quantize(x: torch.Tensor, scale: torch.Tensor, q: torch.Tensor) -> None:
        q[:] = (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(q.dtype)

    return quantize


def _behind(context: BindContext, bind: Callable[[BindContext], Kernel]) -> tuple[Kernel, Kernel, torch.Tensor]:
    """The kernel of the op without quantisation, that of the quantisation, and room for what goes between."""
    before, quantization = unfused(context.problem)
    between = workspace(context.limits.max_tokens, quantization.size("k"), dtype=getattr(torch, context.problem.dtype))
    return (
        bind(replace(context, problem=before)),
        bind_quantize_fp8_group(replace(context, problem=quantization)),
        between,
    )


def bind_silu_and_mul_fp8_group(context: BindContext) -> Kernel:
    """Return `kernel(x, q, scales)`; see the op `silu_and_mul.fp8_group`."""
    silu_and_mul, quantize, between = _behind(context, rows.bind_silu_and_mul)

    def fused(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> None:
        out = between[: len(x)]
        silu_and_mul(x, out)
        quantize(out, q, scales)

    return fused


def bind_rms_norm_fp8_group(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, eps, q, scales)`; see the op `rms_norm.fp8_group`."""
    rms_norm, quantize, between = _behind(context, rows.bind_rms_norm)

    def fused(x: torch.Tensor, weight: torch.Tensor, eps: float, q: torch.Tensor, scales: torch.Tensor) -> None:
        out = between[: len(x)]
        rms_norm(x, weight, eps, out)
        quantize(out, q, scales)

    return fused


def bind_fused_add_rms_norm_fp8_group(context: BindContext) -> Kernel:
    """Return `kernel(x, residual, weight, eps, q, scales, residual_out)`; see `fused_add_rms_norm.fp8_group`."""
    add_rms_norm, quantize, between = _behind(context, rows.bind_fused_add_rms_norm)

    def fused(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        q: torch.Tensor,
        scales: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:
        out = between[: len(x)]
        add_rms_norm(x, residual, weight, eps, out, residual_out)
        quantize(out, q, scales)

    return fused
