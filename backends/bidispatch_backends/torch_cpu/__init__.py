"""The `torch_cpu` backend: every op of the catalogue on the processor, with no library but torch.

This file only registers; it imports no torch. The kernels are in `linear`, `rows`, `attention`, `mla` and `moe`. All
rest on one idea: torch's result for a row follows the shape of the call (which BLAS kernel, which elements fall to the
scalar tail of a vector loop, how threads share the work), so every call is made with a shape that the batch cannot
change.
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


def _experts_class(params: Params, problem: Problem) -> str:
    weights = ", weights=fp8" if problem["weight_dtype"] == "float8_e4m3fn" else ""
    return f"torch_moe({_fields(params)}{weights})"


def _row_class(params: Params, problem: Problem) -> str:
    return f"torch_row_blocks({_fields(params)})"


def _exact_class(params: Params, problem: Problem) -> str:
    return "elementwise"


def _attention_class(params: Params, problem: Problem) -> str:
    return f"torch_kv_tiles({_fields(params)})"


def _fields(params: Params) -> str:
    return ", ".join(f"{name}={value}" for name, value in params)


_KERNELS: tuple[tuple[str, str, type[Params], Callable[[Params, Problem], str], str], ...] = (
    # op, bind function, params, class label, summary
    ("gemm", "linear:bind_gemm", ProductParams, _product_class, "torch.mm on zero-padded blocks of rows"),
    ("bmm", "linear:bind_bmm", ProductParams, _product_class, "torch.mm on zero-padded blocks of each matrix"),
    ("gemm.fp8_block", "linear:bind_fp8_block", ProductParams, _product_class, "torch.mm of widened operands, as gemm"),
    (
        "gemm.fp8",
        "linear:bind_fp8",
        ProductParams,
        _product_class,
        "torch.mm of widened operands, then scales and bias",
    ),
    ("quantize.fp8_group", "quantize:bind_quantize_fp8_group", Params, _exact_class, "a group of every row at a time"),
    ("quantize.fp8_token", "quantize:bind_quantize_fp8_token", Params, _exact_class, "maxima and quotients of rows"),
    ("quantize.fp8_tensor", "quantize:bind_quantize_fp8_tensor", Params, _exact_class, "quotients, then a cast"),
    *(
        (
            f"{op}.fp8_group",
            f"quantize:bind_{op}_fp8_group",
            RowParams,
            _row_class,
            f"torch_cpu.{op}, then torch_cpu.quantize_fp8_group",
        )
        for op in ("silu_and_mul", "rms_norm", "fused_add_rms_norm")
    ),
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
    ("moe.router", "moe:bind_moe_router", RowParams, _row_class, "fp32, on padded blocks of rows; ties by index"),
    (
        "moe.experts",
        "moe:bind_moe",
        ProductParams,
        _experts_class,
        "torch.mm in fp32 on zero-padded blocks of an expert's rows; parts added in the order of slots",
    ),
)


_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
_NAMES = {"attention": "paged_attention", "attention.mla": "mla", "moe.router": "moe_router", "moe.experts": "moe"}
_NAMES |= {"gemm.fp8_block": "fp8_block", "gemm.fp8": "fp8", "gemm.int4": "int4"}


def register(registry: Registry) -> None:
    """Add the backend's implementations; the entry point `torch_cpu` of the group `bidispatch.backends`."""
    for op, bind, params, numerics, summary in _KERNELS:
        registry.register(
            Implementation(
                name="torch_cpu." + _NAMES.get(op, op.replace(".", "_")),
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
