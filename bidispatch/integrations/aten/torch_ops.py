"""`torch.ops.bidispatch.aten_*`: what an overridden function becomes where it must stay whole.

A compiled graph, a dispatch mode and autograd see these ops; plain eager code goes to `compute` directly, which saves
some microseconds a call. The number of a plan's kernels is an argument, so that a graph keeps its plan, and kernels and
rungs are looked up when it runs. Backward passes are plain aten: deterministic or not, they are not batch-invariant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bidispatch.integrations.aten import compute
from bidispatch.integrations.aten.kernels import kernels_of
from bidispatch.runtime.torch_ops import NAMESPACE

__all__ = ["bmm", "direct", "linear", "mm", "reduce", "rms_norm", "softmax"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def linear(handle: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] @ weight [n, k].T + bias [n]."""
    if direct(x, weight, bias):
        with torch._C.DisableTorchFunction():
            return compute.linear(kernels_of(handle), x, weight, bias)
    result: torch.Tensor = torch.ops.bidispatch.aten_linear(handle, x, weight, bias)
    return result


def mm(
    handle: int,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """alpha · a @ b + beta · addend, of matrices."""
    out_dtype = out_dtype or a.dtype
    if direct(a, b, addend):
        with torch._C.DisableTorchFunction():
            return compute.mm(kernels_of(handle), a, b, addend, beta, alpha, out_dtype)
    result: torch.Tensor = torch.ops.bidispatch.aten_mm(handle, a, b, addend, beta, alpha, out_dtype)
    return result


def bmm(
    handle: int,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """alpha · a @ b + beta · addend, of batches of matrices."""
    out_dtype = out_dtype or a.dtype
    if direct(a, b, addend):
        with torch._C.DisableTorchFunction():
            return compute.bmm(kernels_of(handle), a, b, addend, beta, alpha, out_dtype)
    result: torch.Tensor = torch.ops.bidispatch.aten_bmm(handle, a, b, addend, beta, alpha, out_dtype)
    return result


def softmax(handle: int, x: torch.Tensor, dim: int, out_dtype: torch.dtype, log: bool) -> torch.Tensor:
    """Softmax over one axis, or its logarithm."""
    if direct(x):
        with torch._C.DisableTorchFunction():
            return compute.softmax(kernels_of(handle), x, dim, out_dtype, log)
    result: torch.Tensor = torch.ops.bidispatch.aten_softmax(handle, x, dim, out_dtype, log)
    return result


def reduce(
    handle: int, x: torch.Tensor, dims: Sequence[int], keepdim: bool, out_dtype: torch.dtype, mean: bool
) -> torch.Tensor:
    """The sum or mean over some axes, or over all when there are none."""
    if direct(x):
        with torch._C.DisableTorchFunction():
            return compute.reduce(kernels_of(handle), x, dims, keepdim, out_dtype, mean)
    result: torch.Tensor = torch.ops.bidispatch.aten_reduce(handle, x, dims, keepdim, out_dtype, mean)
    return result


def rms_norm(handle: int, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x over its root mean square, times a weight of the last axis."""
    if direct(x, weight):
        with torch._C.DisableTorchFunction():
            return compute.rms_norm(kernels_of(handle), x, weight, eps)
    result: torch.Tensor = torch.ops.bidispatch.aten_rms_norm(handle, x, weight, eps)
    return result


def direct(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody is there to see the call: no tracer, no mode, no transform, no gradient."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    grad = torch.is_grad_enabled()
    return all(tensor is None or (type(tensor) in _PLAIN and not (grad and tensor.requires_grad)) for tensor in tensors)


def _define(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any], backward: Any) -> None:
    """Add an op. `run` and `fake` take what the schema says; `backward` is a pair for `register_autograd`."""

    def implementation(handle: int, *arguments: Any) -> Any:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return run(kernels_of(handle), *arguments)

    _library.define(f"{name}(int plan, {signature}) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    formula, keep = backward

    def plain_backward(context: Any, gradient: torch.Tensor) -> Any:
        # Where it runs in the caller's thread, the overrides may be active there; elsewhere they never are.
        with torch._C.DisableTorchFunction():
            return formula(context, gradient)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", plain_backward, setup_context=keep, lib=_library)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _linear_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    rows = gradient.flatten(0, -2)
    _, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        None,
        gradient @ weight if wants_x else None,
        rows.T @ x.flatten(0, -2) if wants_weight else None,
        rows.sum(0) if wants_bias else None,
    )


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, a, b, addend, ctx.beta, ctx.alpha, _ = inputs
    ctx.save_for_backward(a, b)
    ctx.addend = None if addend is None else (addend.shape, addend.dtype)


def _product_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    _, wants_a, wants_b, wants_addend, *_ = ctx.needs_input_grad
    for_addend = None
    if wants_addend:
        shape, dtype = ctx.addend
        for_addend = (gradient * ctx.beta).sum_to_size(shape).to(dtype)
    scaled = gradient.to(a.dtype)
    if ctx.addend is not None:  # without an addend alpha is not applied
        scaled = scaled * ctx.alpha
    return (
        None,
        scaled @ b.mT if wants_a else None,
        a.mT @ scaled if wants_b else None,
        for_addend,
        None,
        None,
        None,
    )


def _keep_softmax(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, x, ctx.dim, _, ctx.log = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    (output,) = ctx.saved_tensors
    formula = torch.ops.aten._log_softmax_backward_data if ctx.log else torch.ops.aten._softmax_backward_data
    return None, formula(gradient, output, ctx.dim, output.dtype).to(ctx.dtype), None, None, None


def _keep_reduce(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, x, ctx.dims, ctx.keepdim, _, ctx.mean = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _reduce_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    ndim = len(ctx.shape)
    reduced = sorted({dim % max(1, ndim) for dim in ctx.dims} if ctx.dims else range(ndim))
    if not ctx.keepdim:
        for dim in reduced if ndim else ():
            gradient = gradient.unsqueeze(dim)
    if ctx.mean:
        gradient = gradient / math.prod(ctx.shape[dim] for dim in reduced)
    return None, gradient.expand(ctx.shape).to(ctx.dtype), None, None, None, None


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wide, scaled = x.float(), gradient.float()
    factor = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + ctx.eps)
    normed = wide * factor
    _, wants_x, wants_weight, _ = ctx.needs_input_grad
    for_x = for_weight = None
    if wants_x:
        along = scaled * weight.float()
        for_x = (factor * (along - normed * (along * normed).mean(-1, keepdim=True))).to(x.dtype)
    if wants_weight:
        for_weight = (scaled * normed).sum_to_size(weight.shape).to(weight.dtype)
    return None, for_x, for_weight, None


def _fake_linear(plan: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_product(
    plan: int,
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None,
    beta: float,
    alpha: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype)


def _fake_softmax(plan: int, x: torch.Tensor, dim: int, out_dtype: torch.dtype, log: bool) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def _fake_rms_norm(plan: int, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_reduce(
    plan: int, x: torch.Tensor, dims: Sequence[int], keepdim: bool, out_dtype: torch.dtype, mean: bool
) -> torch.Tensor:
    return x.new_empty(compute.reduced_shape(x, dims, keepdim), dtype=out_dtype)


_PRODUCT = "Tensor a, Tensor b, Tensor? addend, float beta, float alpha, ScalarType out_dtype"
_define(
    "aten_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    compute.linear,
    _fake_linear,
    (_linear_backward, _keep_linear),
)
_define("aten_mm", _PRODUCT, compute.mm, _fake_product, (_product_backward, _keep_product))
_define("aten_bmm", _PRODUCT, compute.bmm, _fake_product, (_product_backward, _keep_product))
_define(
    "aten_softmax",
    "Tensor x, int dim, ScalarType out_dtype, bool log",
    compute.softmax,
    _fake_softmax,
    (_softmax_backward, _keep_softmax),
)
_define(
    "aten_reduce",
    "Tensor x, int[] dims, bool keepdim, ScalarType out_dtype, bool mean",
    compute.reduce,
    _fake_reduce,
    (_reduce_backward, _keep_reduce),
)
_define(
    "aten_rms_norm",
    "Tensor x, Tensor weight, float eps",
    compute.rms_norm,
    _fake_rms_norm,
    (_rms_norm_backward, _keep_rms_norm),
)
