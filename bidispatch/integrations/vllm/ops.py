"""Opaque torch ops for vLLM's layers: Dynamo sees a name and tensors, and the rung is chosen when it runs.

A layer's kernel goes by a text, not by a number: vLLM keeps compiled graphs on disk, and a text of another start is
either the same problem or unknown, which is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import ArgumentError, UsageError
from bidispatch.integrations.vllm.warm import Weights, warm
from bidispatch.planning.selection import Selection
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.torch_ops import NAMESPACE

__all__ = [
    "bmm",
    "bound_names",
    "experts",
    "forget",
    "fp8_block_linear",
    "fp8_linear",
    "fused_add_rms_norm",
    "head_norm",
    "int4_linear",
    "linear",
    "register",
    "rms_norm",
    "router",
    "warm_all",
]


class _Entry:
    """A selection with its bound kernel. One that a larger one replaced stays: a CUDA graph may hold its workspace."""

    def __init__(self, selection: Selection, max_tokens: int, weights: Weights) -> None:
        self.selection = selection
        self.weights = weights
        """Of the first layer that is served, until the kernel has run once."""
        self.kernels = [selection.bind(max_tokens=max_tokens)]

    def for_rows(self, rows: int) -> BoundKernel:
        kernel = self.kernels[-1]
        if rows <= kernel.limits.max_tokens:
            return kernel
        problem = self.selection.problem
        if self.selection.device.arch.vendor != "cpu" and torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                f"{problem} needs binding for {rows} rows while a CUDA graph is captured; "
                f"it is bound for {kernel.limits.max_tokens}: raise --max-num-batched-tokens"
            )
        self.kernels.append(self.selection.bind(max_tokens=1 << (rows - 1).bit_length()))
        return self.kernels[-1]


_entries: dict[str, _Entry] = {}


def register(layer: str, selection: Selection, max_tokens: int, weights: Weights | None = None) -> str:
    """Bind a selection for a layer, and return the text that the ops here take for it. weights: what `warm_all` runs
    it on.

    Layers that differ only in their numbers run one after the other, so they share a kernel and its workspace. Others
    may run side by side, as shared experts do beside routed ones, and share none.
    """
    name = f"{re.sub(r'(?<=[.])[0-9]+(?=[.]|$)', '*', layer)} {selection.problem}"
    known = _entries.get(name)
    if known is None or known.selection.ladder_key != selection.ladder_key:
        _entries[name] = _Entry(selection, max_tokens, weights or {})
    return name


def bound_names() -> tuple[str, ...]:
    """The texts that are known, sorted."""
    return tuple(sorted(_entries))


def warm_all() -> None:
    """Run every kernel that is bound once, at each of its rungs, on the weights of the first layer that it serves."""
    for entry in _entries.values():
        for kernel in entry.kernels:
            warm(kernel, entry.weights)
        entry.weights = {}


def forget() -> None:
    """Drop every kernel: for tests, and for what undoes the patches."""
    _entries.clear()


def _kernel(name: str, rows: int) -> BoundKernel:
    entry = _entries.get(name)
    if entry is None:
        raise UsageError(
            f"no kernel was bound for {name!r}: the compiled graph is of another start; "
            "delete vLLM's compile cache (VLLM_CACHE_ROOT/torch_compile_cache)"
        )
    return entry.for_rows(rows)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, last axis], the last axis contiguous."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _linear(
    kernel: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    rows = _rows(x)
    out = _kernel(kernel, rows.shape[0])(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _linear_like(
    kernel: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _fp8(
    quantize: str, product: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = _rows(x)
    m, groups = rows.shape[0], scales.shape[1]
    # Scales of a group side by side, as DeepGEMM reads them: it would copy others, in a launch of its own.
    side_by_side = torch.empty_strided((m, groups), (1, -(-m // 4) * 4), dtype=torch.float32, device=rows.device)
    values, x_scales = _kernel(quantize, m)(rows, scales=side_by_side)
    out = _kernel(product, m)(values, x_scales, weight, scales)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _fp8_like(
    quantize: str, product: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fp8_whole(
    quantize: str,
    product: str,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    rows = _rows(x)
    quantized = _kernel(quantize, rows.shape[0])
    values, x_scales = quantized(rows) if x_scale is None else (quantized(rows, x_scale), None)
    scales = (weight_scale, weight_scales)
    out = _kernel(product, rows.shape[0])(values, x_scale, x_scales, weight, *scales, bias)
    return out.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _fp8_whole_like(
    quantize: str, product: str, x: torch.Tensor, x_scale: Any, weight: torch.Tensor, *others: Any
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _int4(
    kernel: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    rows = _rows(x)
    out = _kernel(kernel, rows.shape[0])(rows, weight, scales, zeros, bias)
    return out.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def _int4_like(kernel: str, x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _norm(kernel: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = _rows(x)
    return _kernel(kernel, rows.shape[0])(rows, weight, eps=eps).view(x.shape)  # type: ignore[no-any-return]


def _norm_like(kernel: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _head_norm(kernel: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = x.new_empty(x.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    first = x.shape[1] - 1
    halves = x[:, :first], x[:, first:]
    _kernel(kernel, x.shape[0])(*halves, weight, weight, eps=eps, q_out=out[:, :first], k_out=out[:, first:])
    return out


def _added_norm(
    kernel: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _rows(x)
    out, total = _kernel(kernel, rows.shape[0])(rows, _rows(residual), weight, eps=eps)
    return out.view(x.shape), total.view(x.shape)


def _added_norm_like(
    kernel: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _router(
    kernel: str, top_k: int, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = _kernel(kernel, logits.shape[0])(_rows(logits), bias)
    return weights, ids


def _router_like(
    kernel: str, top_k: int, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _experts(
    kernel: str,
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    expert_map: torch.Tensor | None,
) -> None:
    optional = (w13_bias, w2_bias, w13_scales, w2_scales, expert_map)
    _kernel(kernel, x.shape[0])(_rows(x), w13, w2, weights, ids, *optional, out=out)


def _written(*arguments: Any) -> None:
    """What is written is an argument: nothing to infer."""


def _bmm(kernel: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _kernel(kernel, a.shape[1])(a, b, out=out)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(name: str, schema: str, run: Callable[..., Any], like: Callable[..., Any]) -> Any:
    """Define an op `vllm_<name>`. schema: its arguments and its results; like: the results' shapes."""
    full = f"vllm_{name}"
    _library.define(f"{full}{schema}")  # type: ignore[no-untyped-call]
    _library.impl(full, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{full}", like, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), full).default


linear = _define(
    "linear",
    "(str kernel, Tensor x, Tensor weight, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _linear,
    _linear_like,
)
"""(kernel, x [..., k], weight [n, k], bias [n] or None, the dtype that the kernel gives): [..., n]."""

fp8_block_linear = _define(
    "fp8_block_linear",
    "(str quantize, str product, Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor",
    _fp8,
    _fp8_like,
)
"""(quantize, product, x [..., k], weight [n, k] in fp8, scales [n/128, k/128], bias [n] or None): [..., n]; the bias is
added after the result is rounded, as vLLM does."""

fp8_linear = _define(
    "fp8_linear",
    "(str quantize, str product, Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, "
    "Tensor? weight_scales, Tensor? bias) -> Tensor",
    _fp8_whole,
    _fp8_whole_like,
)
"""(quantize, product, x [..., k], a given scale [1] or None for one a token, weight [n, k] in fp8, its scale [1] or
scales [n], bias [n] or None): [..., n] in the dtype of x."""

int4_linear = _define(
    "int4_linear",
    "(str kernel, Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor",
    _int4,
    _int4_like,
)
"""(kernel, x [..., k], weight [n, k/8] as `bidispatch.int4` packs it, scales and zero points [groups, n], bias [n] or
None): [..., n]."""

rms_norm = _define("rms_norm", "(str kernel, Tensor x, Tensor weight, float eps) -> Tensor", _norm, _norm_like)
"""(kernel, x [..., n], weight [n], eps): [..., n]."""

head_norm = _define("head_norm", "(str kernel, Tensor x, Tensor weight, float eps) -> Tensor", _head_norm, _norm_like)
"""(kernel of `qk_norm`, x [tokens, heads, n] of any strides but the last, weight [n], eps): [tokens, heads, n].

All heads but the last are its q, and the last is its k: a slice of a merged projection is not copied into rows."""

fused_add_rms_norm = _define(
    "fused_add_rms_norm",
    "(str kernel, Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _added_norm,
    _added_norm_like,
)
"""(kernel, x, residual [..., n], weight [n], eps): the norm of the sum, and the sum."""

router = _define(
    "router", "(str kernel, int top_k, Tensor logits, Tensor? bias) -> (Tensor, Tensor)", _router, _router_like
)
"""(kernel, top_k, logits [m, experts], correction bias [experts] or None): weights and ids [m, top_k]."""

experts = _define(
    "experts",
    "(str kernel, Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor? w13_scales, Tensor? w2_scales, Tensor? expert_map) -> ()",
    _experts,
    _written,
)
"""(kernel, out [m, hidden], x, w13, w2, weights, ids, then biases, scales and expert map or None): `moe.experts` into
`out`."""

bmm = _define("bmm", "(str kernel, Tensor a, Tensor b, Tensor(a!) out) -> ()", _bmm, _written)
"""(kernel, a [matrices, m, k], b [matrices, k, n], out [matrices, m, n]): a @ b into `out`; last axes of a and out
contiguous."""
