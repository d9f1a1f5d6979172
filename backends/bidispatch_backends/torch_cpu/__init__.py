"""The `torch_cpu` backend: every op of the catalogue on the processor, with no library but torch.

This file only registers; it imports no torch. The kernels are in `linear`, `rows` and `attention`. All rest on one
idea: torch's result for a row follows the shape of the call (which BLAS kernel, which elements fall to the scalar tail
of a vector loop, how threads share the work), so every call is made with a shape that the batch cannot change.
"""

from __future__ import annotations

from collections.abc import Callable

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Params, Registry
from bidispatch.requirements import Package
from bidispatch_backends.torch_cpu.params import AttentionParams, ProductParams, RowParams

__all__ = ["register"]


def _product_class(params: Params, problem: Problem) -> str:
    widened = "" if problem["out_dtype"] == problem.dtype else ", operands=float32"
    return f"torch_mm_blocks({_fields(params)}{widened})"


def _row_class(params: Params, problem: Problem) -> str:
    return f"torch_row_blocks({_fields(params)})"


def _attention_class(params: Params, problem: Problem) -> str:
    return f"torch_kv_tiles({_fields(params)})"


def _fields(params: Params) -> str:
    return ", ".join(f"{name}={value}" for name, value in params)


_KERNELS: tuple[tuple[str, str, type[Params], Callable[[Params, Problem], str], str], ...] = (
    # op, bind function, params, class label, summary
    ("gemm", "linear:bind_gemm", ProductParams, _product_class, "torch.mm on zero-padded blocks of rows"),
    ("bmm", "linear:bind_bmm", ProductParams, _product_class, "torch.mm on zero-padded blocks of each matrix"),
    ("gemm.int4", "linear:bind_int4", ProductParams, _product_class, "dequantised at each call, then as gemm"),
    ("rms_norm", "rows:bind_rms_norm", RowParams, _row_class, "fp32, on padded blocks of rows"),
    ("fused_add_rms_norm", "rows:bind_fused_add_rms_norm", RowParams, _row_class, "fp32, on padded blocks of rows"),
    ("qk_norm", "rows:bind_qk_norm", RowParams, _row_class, "fp32, on padded blocks of heads"),
    ("silu_and_mul", "rows:bind_silu_and_mul", RowParams, _row_class, "F.silu in fp32 on padded blocks"),
    ("gelu_tanh_and_mul", "rows:bind_gelu_tanh_and_mul", RowParams, _row_class, "F.gelu in fp32 on padded blocks"),
    ("softmax", "rows:bind_softmax", RowParams, _row_class, "F.softmax in fp32 on padded blocks of rows"),
    ("log_softmax", "rows:bind_log_softmax", RowParams, _row_class, "F.log_softmax in fp32 on padded blocks of rows"),
    (
        "token_logprob",
        "rows:bind_token_logprob",
        RowParams,
        _row_class,
        "F.log_softmax in fp32 on padded blocks of rows, then one value of each",
    ),
    ("mean", "rows:bind_mean", RowParams, _row_class, "fp32, on padded blocks of rows"),
    ("sum", "rows:bind_sum", RowParams, _row_class, "fp32, on padded blocks of rows"),
    (
        "attention",
        "attention:bind_paged_attention",
        AttentionParams,
        _attention_class,
        "online softmax in fp32 over KV tiles at absolute positions",
    ),
    (
        "attention.mla",
        "mla:bind_attention_mla",
        AttentionParams,
        _attention_class,
        "the same with one KV head, whose first columns are the values",
    ),
)


_DTYPES = ("float32", "bfloat16", "float16")
_NAMES = {"gemm.int4": "int4", "attention": "paged_attention", "attention.mla": "mla"}


def register(registry: Registry) -> None:
    """Add the backend's implementations; the entry point `torch_cpu` of the group `bidispatch.backends`."""
    for op, bind, params, numerics, summary in _KERNELS:
        registry.register(
            Implementation(
                name="torch_cpu." + _NAMES.get(op, op),
                op=op,
                load=f"bidispatch_backends.torch_cpu.{bind}",
                archs=("cpu",),
                dtypes=tuple(dtype for dtype in _DTYPES if dtype in ops.get(op).dtypes),
                numerics=numerics,
                requires=(Package("torch"),),
                params=params,
                libraries=("torch",),
                cuda_graph=False,
                summary=summary,
            )
        )
