"""Portable Triton kernels for NVIDIA (sm80 and later) and AMD gfx942. `register` imports neither triton nor torch."""

from __future__ import annotations

from bidispatch.ops.quantize import FP8
from bidispatch.registry import Implementation, Params, Registry
from bidispatch.requirements import Check, DimAtMost, DimIn, DimMultipleOf, Package
from bidispatch_backends.triton import (
    attention_params,
    fp8_params,
    gemm_params,
    int4_params,
    mla_params,
    moe_params,
    params,
)

__all__ = ["register"]

_ARCHS = ("sm*", "gfx942")
_DTYPES = ("bfloat16", "float16", "float32")
_LONGEST_ROW = params.RowParams().block
"""Of a norm that quantises what it has in registers."""
_ROCM = ("triton-rocm", "pytorch-triton-rocm")
_TRITON = Package("triton", ">=3.2", alternatives=_ROCM)
_TRITON_RECENT = Package("triton", ">=3.6", alternatives=_ROCM)  # the oldest that what needs it was compiled with


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
    for op in ("gemm", "bmm"):
        registry.register(
            Implementation(
                name=f"triton.{op}",
                op=op,
                load=f"bidispatch_backends.triton.gemm:bind_{op}",
                archs=_ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON,),
                numerics=gemm_params.gemm_numerics,
                params=gemm_params.GemmParams,
                tile=gemm_params.GemmTile,
                tiles=gemm_params.gemm_tiles,
                search="bidispatch_backends.triton.search:gemm_tiles_for",
                libraries=("triton",),
                summary="one tile a program; K in order through the matrix unit, fp32 accumulator",
            )
        )
    registry.register(
        Implementation(
            name="triton.gemm_split_k",
            op="gemm",
            load="bidispatch_backends.triton.split_gemm:bind_gemm_split_k",
            archs=_ARCHS,
            dtypes=_DTYPES,
            requires=(_TRITON,),
            numerics=gemm_params.gemm_numerics,
            params=gemm_params.SplitParams,
            tile=gemm_params.GemmTile,
            tiles=gemm_params.split_tiles,
            search="bidispatch_backends.triton.search:split_tiles_for",
            libraries=("triton",),
            summary="chunks of K in parallel, added in ascending order by the program that comes last",
        )
    )
    for kernel, kernel_params, tiles, summary in (
        ("int4", int4_params.Int4Params, int4_params.int4_tiles, "one tile a program; K in order"),
        (
            "int4_split_k",
            int4_params.SplitInt4Params,
            int4_params.int4_split_tiles,
            "chunks of K in parallel, added in ascending order by the program that comes last",
        ),
    ):
        registry.register(
            Implementation(
                name=f"triton.{kernel}",
                op="gemm.int4",
                load=f"bidispatch_backends.triton.int4:bind_{kernel}",
                archs=_ARCHS,
                dtypes=("bfloat16", "float16"),
                requires=(_TRITON_RECENT, DimMultipleOf("n", 16)),
                numerics=int4_params.int4_numerics,
                params=kernel_params,
                tile=int4_params.Int4Tile,
                tiles=tiles,
                search="bidispatch_backends.triton.int4_params:int4_tiles_for",
                libraries=("triton",),
                summary=f"weights unpacked in registers, rounded to the dtype; {summary}",
            )
        )
    for op in ("rms_norm", "fused_add_rms_norm", "qk_norm", "mean", "sum"):
        module = "norm" if op.endswith("norm") else "reduction"
        registry.register(
            Implementation(
                name=f"triton.{op}",
                op=op,
                load=f"bidispatch_backends.triton.{module}:bind_{op}",
                archs=_ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON,),
                numerics=params.row_numerics,
                params=params.RowParams,
                tile=params.RowTile,
                tiles=params.row_tiles,
                libraries=("triton",),
                summary="whole rows a program; the order of the sum is spelled out, so no layout can change it",
            )
        )
    for op in ("softmax", "log_softmax", "token_logprob"):
        registry.register(
            Implementation(
                name=f"triton.{op}",
                op=op,
                load=f"bidispatch_backends.triton.softmax:bind_{op}",
                archs=_ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON,),
                numerics=params.softmax_numerics,
                params=params.SoftmaxParams,
                tile=params.SoftmaxTile,
                tiles=params.softmax_tiles,
                libraries=("triton",),
                summary="chunks at fixed columns, each from its own maximum, merged in one order",
            )
        )
    for op in ("silu_and_mul", "gelu_tanh_and_mul"):
        registry.register(
            Implementation(
                name=f"triton.{op}",
                op=op,
                load=f"bidispatch_backends.triton.activation:bind_{op}",
                archs=_ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON,),
                numerics=params.element_numerics,
                tile=params.ElementTile,
                tiles=params.element_tiles,
                libraries=("triton",),
                summary="elementwise in fp32, rounded once",
            )
        )
    for op in ("quantize.fp8_group", "silu_and_mul.fp8_group"):
        kernel = op.replace(".", "_")
        registry.register(
            Implementation(
                name=f"triton.{kernel}",
                op=op,
                load=f"bidispatch_backends.triton.quantize:bind_{kernel}",
                archs=fp8_params.ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON,),
                numerics=params.element_numerics,
                tile=params.ElementTile,
                tiles=params.element_tiles,
                search="bidispatch_backends.triton.search:element_tiles_for",
                libraries=("triton",),
                summary="elementwise, whole groups a program: a maximum is exact in any order",
            )
        )
    for op, summary in (
        ("quantize.fp8_token", "a row a program, read twice: a maximum is exact in any order"),
        ("quantize.fp8_tensor", "elementwise over a given scale"),
    ):
        kernel = op.replace(".", "_")
        registry.register(
            Implementation(
                name=f"triton.{kernel}",
                op=op,
                load=f"bidispatch_backends.triton.quantize_whole:bind_{kernel}",
                archs=fp8_params.ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON,),
                numerics=params.element_numerics,
                tile=params.ElementTile,
                tiles=params.element_tiles,
                search="bidispatch_backends.triton.search:element_tiles_for",
                libraries=("triton",),
                summary=summary,
            )
        )
    for op in ("rms_norm.fp8_group", "fused_add_rms_norm.fp8_group"):
        kernel = op.replace(".", "_")
        registry.register(
            Implementation(
                name=f"triton.{kernel}",
                op=op,
                load=f"bidispatch_backends.triton.quantize:bind_{kernel}",
                archs=fp8_params.ARCHS,
                dtypes=_DTYPES,
                requires=(_TRITON, DimAtMost("n", _LONGEST_ROW)),
                numerics=params.row_numerics,
                params=params.RowParams,
                tile=params.RowTile,
                tiles=params.row_tiles,
                search="bidispatch_backends.triton.search:row_tiles_for",
                libraries=("triton",),
                summary="whole rows a program, summed as the norm sums them and quantised while in registers",
            )
        )
    for op, kernel, numerics, made_of in (
        ("gemm.fp8_block", "fp8_block", fp8_params.block_numerics, fp8_params.Fp8BlockParams),
        ("gemm.fp8", "fp8", fp8_params.fp8_numerics, fp8_params.Fp8Params),
    ):
        registry.register(
            Implementation(
                name=f"triton.{kernel}",
                op=op,
                load=f"bidispatch_backends.triton.fp8_gemm:bind_{kernel}",
                archs=fp8_params.ARCHS,
                dtypes=("float8_e4m3fn",),
                requires=(_TRITON,),
                numerics=numerics,
                params=made_of,
                tile=gemm_params.ProductTile,
                tiles=fp8_params.fp8_tiles,
                search="bidispatch_backends.triton.fp8_params:fp8_tiles_for",
                libraries=("triton",),
                summary="one tile a program; each step of K from a fresh accumulator, added in fp32 in ascending order",
            )
        )
    registry.register(
        Implementation(
            name="triton.paged_attention",
            op="attention",
            load="bidispatch_backends.triton.attention:bind_attention",
            archs=_ARCHS,
            dtypes=_DTYPES,
            requires=(_TRITON_RECENT, DimAtMost("head_dim", 256), Check(attention_params.fp8_unmet)),
            numerics=attention_params.attention_numerics,
            params=attention_params.AttentionParams,
            tile=attention_params.AttentionTile,
            tiles=attention_params.attention_tiles,
            search="bidispatch_backends.triton.search:attention_tiles_for",
            libraries=("triton",),
            summary="KV splits at absolute positions, in parallel or walked, folded in ascending order",
        )
    )
    registry.register(
        Implementation(
            name="triton.mla",
            op="attention.mla",
            load="bidispatch_backends.triton.mla:bind_mla",
            archs=_ARCHS,
            dtypes=("bfloat16", "float16"),
            requires=(_TRITON_RECENT, DimAtMost("kv_lora_rank", 512), DimAtMost("rope_dim", 64)),
            numerics=mla_params.mla_numerics,
            params=mla_params.MlaParams,
            tile=mla_params.MlaTile,
            tiles=mla_params.mla_tiles,
            search="bidispatch_backends.triton.mla_params:mla_tiles_for",
            libraries=("triton",),
            summary="absorbed in every phase; KV splits at absolute positions, in parallel or walked, folded in order",
        )
    )
    registry.register(
        Implementation(
            name="triton.moe_router",
            op="moe.router",
            load="bidispatch_backends.triton.moe_router:bind_router",
            archs=_ARCHS,
            dtypes=_DTYPES,
            requires=(_TRITON, DimAtMost("experts", 4096), DimAtMost("top_k", 64), DimAtMost("n_group", 64)),
            numerics=moe_params.router_numerics,
            tile=params.RowTile,
            tiles=moe_params.router_tiles,
            search="bidispatch_backends.triton.search:row_tiles_for",
            libraries=("triton",),
            summary="rounds of the best score that is left; ties go to the lower index",
        )
    )
    for name, weights, numerics, kind, archs in (
        ("triton.moe", ("bfloat16", "float16"), moe_params.experts_numerics, Params, _ARCHS),
        ("triton.moe_fp8_block", (FP8,), moe_params.experts_fp8_numerics, fp8_params.Fp8BlockParams, fp8_params.ARCHS),
    ):
        registry.register(
            Implementation(
                name=name,
                op="moe.experts",
                load="bidispatch_backends.triton.moe:bind_experts",
                archs=archs,
                dtypes=("bfloat16", "float16"),
                requires=(
                    _TRITON_RECENT,
                    DimIn("weight_dtype", weights),
                    DimAtMost("experts", 2047),
                    DimAtMost("top_k", 64),
                ),
                numerics=numerics,
                params=kind,
                tile=moe_params.ExpertsTile,
                tiles=moe_params.experts_tiles,
                search="bidispatch_backends.triton.moe_params:experts_tiles_for",
                libraries=("triton",),
                summary="blocks of rows of one expert; K in order, gate with up; parts added in the order of slots",
            )
        )
