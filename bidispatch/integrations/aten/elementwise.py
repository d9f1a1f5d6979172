"""Elementwise functions on a processor, where the tail of a vector loop may round otherwise than its body.

There they run on copies cut into blocks of one length, below what torch shares among threads, so that the arithmetic
of an element does not depend on where it lies (see `bidispatch_backends.torch_cpu.rows`). On a GPU every element runs
the same instructions, and the call is left to torch.
"""

# Arguments have the names that torch gives them, since callers may pass them by name.
# ruff: noqa: A002

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bidispatch.integrations.aten.blocks import to_blocks
from bidispatch.integrations.aten.kernels import DTYPES
from bidispatch.integrations.aten.torch_ops import direct
from bidispatch.runtime.torch_ops import NAMESPACE

__all__ = ["OVERRIDDEN"]

FUNCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "pow": lambda x, exponent: torch.pow(x, exponent),
}


def compute(x: torch.Tensor, function: str, scalars: list[float]) -> torch.Tensor:
    """The function of every element, contiguous, in x's shape."""
    blocks, count = to_blocks(x), x.numel()
    out = torch.empty_like(blocks)
    for source, target in zip(blocks, out, strict=True):
        target.copy_(FUNCTIONS[function](source, *scalars))
    return out.view(-1)[:count].view(x.shape)


def _backward(gradient: torch.Tensor, x: torch.Tensor, function: str, scalars: list[float]) -> torch.Tensor:
    """torch's own gradient."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (result,) = torch.autograd.grad(FUNCTIONS[function](leaf, *scalars), leaf, gradient)
    return result.contiguous()


def _define() -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)

    def run(x: torch.Tensor, function: str, scalars: list[float]) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return compute(x, function, scalars)

    def run_backward(gradient: torch.Tensor, x: torch.Tensor, function: str, scalars: list[float]) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return _backward(gradient, x, function, scalars)

    def fake(x: torch.Tensor, function: str, scalars: list[float]) -> torch.Tensor:
        return x.new_empty(x.shape)

    def fake_backward(gradient: torch.Tensor, x: torch.Tensor, function: str, scalars: list[float]) -> torch.Tensor:
        return x.new_empty(x.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.function, ctx.scalars = inputs
        ctx.save_for_backward(x)

    def formula(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        operation = torch.ops.bidispatch.elementwise_backward
        return operation(gradient, x, ctx.function, ctx.scalars), None, None

    arguments = "Tensor x, str function, float[] scalars) -> Tensor"
    library.define(f"elementwise({arguments}")  # type: ignore[no-untyped-call]
    library.define(f"elementwise_backward(Tensor gradient, {arguments}")  # type: ignore[no-untyped-call]
    library.impl("elementwise", run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.impl("elementwise_backward", run_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::elementwise", fake, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::elementwise_backward", fake_backward, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::elementwise", formula, setup_context=keep, lib=library)


_libraries: list[torch.library.Library] = []
_define()


def _call(x: Any, function: str, scalars: tuple[float, ...] = ()) -> Any:
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.dtype not in DTYPES:
        return NotImplemented
    if x.layout is not torch.strided or not x.numel():
        return NotImplemented
    if direct(x):
        with torch._C.DisableTorchFunction():
            return compute(x, function, list(scalars))
    return torch.ops.bidispatch.elementwise(x, function, list(scalars))


def _into(out: Any, result: Any, x: Any) -> Any:
    if out is None or result is NotImplemented:
        return result
    if out.dtype is not x.dtype or (torch.is_grad_enabled() and (out.requires_grad or x.requires_grad)):
        return NotImplemented  # torch's error, or its cast
    if out.shape != x.shape:
        out.resize_(x.shape)
    return out.copy_(result)


def _unary(name: str) -> Callable[..., Any]:
    def unary(handle: int, input: Any, *, out: Any = None) -> Any:
        return _into(out, _call(input, name), input)

    return unary


def _in_place(name: str) -> Callable[..., Any]:
    def in_place(handle: int, input: Any) -> Any:
        result = _call(input, name)
        return result if result is NotImplemented else input.copy_(result)

    return in_place


def silu(handle: int, input: Any, inplace: bool = False) -> Any:
    """`torch.nn.functional.silu`."""
    result = _call(input, "silu")
    return result if result is NotImplemented or not inplace else input.copy_(result)


def gelu(handle: int, input: Any, approximate: str = "none") -> Any:
    """`torch.nn.functional.gelu`."""
    return _call(input, "gelu_tanh" if approximate == "tanh" else "gelu")


def softplus(handle: int, input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """`torch.nn.functional.softplus`."""
    return _call(input, "softplus", (float(beta), float(threshold)))


def glu(handle: int, input: Any, dim: int = -1) -> Any:
    """`torch.nn.functional.glu`, in fp32."""
    if not isinstance(input, torch.Tensor) or input.device.type != "cpu" or input.dtype not in DTYPES:
        return NotImplemented
    if not input.dim() or input.shape[dim] % 2:
        return NotImplemented
    left, right = input.float().chunk(2, dim)
    gate = _call(right, "sigmoid")
    return NotImplemented if gate is NotImplemented else (left * gate).to(input.dtype)


def power(handle: int, input: Any, exponent: Any, *, out: Any = None) -> Any:
    """`torch.pow` of a tensor and a number; others are torch's."""
    if not isinstance(exponent, (int, float)):
        return NotImplemented
    return _into(out, _call(input, "pow", (float(exponent),)), input)


_UNARY = ("sigmoid", "tanh", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "erf")

OVERRIDDEN: Mapping[Any, Callable[..., Any]] = {
    F.silu: silu,
    F.gelu: gelu,
    F.glu: glu,
    F.softplus: softplus,
    torch.pow: power,
    torch.Tensor.pow: power,
    torch.Tensor.__pow__: power,
    **{getattr(torch, name): _unary(name) for name in _UNARY},
    **{getattr(torch.Tensor, name): _unary(name) for name in _UNARY},
    **{getattr(torch.Tensor, name + "_"): _in_place(name) for name in _UNARY},
}
"""Which of torch's functions are run in blocks; see `mode.OVERRIDDEN`."""
