"""Gated activations: `silu_and_mul` and `gelu_tanh_and_mul`, elementwise in fp32 and rounded once."""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.triton.launch import ArgumentType, Launch, ceil_div, options, pointer
from bidispatch_backends.triton.params import ElementTile

__all__ = ["bind_gelu_tanh_and_mul", "bind_silu_and_mul", "gated", "gated_kernel", "launches", "swish"]


@triton.jit
def swish(x, logit):
    """x · sigmoid(logit)."""
    return x / (1.0 + tl.exp(-logit))


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """act(gate) · up, in fp32."""
    logit = gate
    if GELU:
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2u)), without the cancellation; u = sqrt(2 / pi) (x + 0.044715 x^3)
        logit = 1.5957691216057308 * tl.fma(0.044715 * gate * gate, gate, gate)
    return swish(gate, logit) * up


@triton.jit
def gated_kernel(x_ptr, out_ptr, stride_x, stride_out, N: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """out[row] = act(x[row, :N]) · x[row, N:], `BLOCK` columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + N + columns, mask=inside, other=0.0).to(tl.float32)
    value = gated(gate, up, GELU)
    tl.store(out_ptr + row * stride_out + columns, value.to(out_ptr.dtype.element_ty), mask=inside)


def launches(problem: Problem, params: Params, tile: ElementTile, arch: Arch) -> tuple[Launch, ...]:
    """The one launch of a gated activation."""
    data, n = pointer(problem.dtype), problem.size("n")
    arguments: dict[str, ArgumentType] = {"x_ptr": data, "out_ptr": data, "stride_x": 2 * n, "stride_out": n}
    constants = {"N": n, "BLOCK": tile.block, "GELU": problem.op == "gelu_tanh_and_mul"}
    return (Launch(gated_kernel, arguments, constants, options(arch, tile.num_warps, num_stages=1, fp_fusion=False)),)


def bind_silu_and_mul(context: BindContext) -> Kernel:
    """`silu_and_mul` or, by the problem's op, `gelu_tanh_and_mul`: x [m, 2n], out [m, n]."""
    (launch,) = launches(context.problem, context.params, context.tile, context.device.arch)
    blocks = ceil_div(context.problem.size("n"), context.tile.block)

    def gate(x: torch.Tensor, out: torch.Tensor) -> None:
        launch((x.shape[0], blocks), x, out, x.stride(0), out.stride(0))

    return gate


bind_gelu_tanh_and_mul = bind_silu_and_mul
