"""Portable Triton kernels for NVIDIA (sm80 and later) and AMD gfx942. `register` imports neither triton nor torch."""

from __future__ import annotations

from bidispatch.registry import Implementation, Registry
from bidispatch.requirements import DimAtMost, Package
from bidispatch_backends.triton import params

__all__ = ["register"]

_ARCHS = ("sm*", "gfx942")
_DTYPES = ("bfloat16", "float16", "float32")
_TRITON = Package("triton", ">=3.2", alternatives=("triton-rocm", "pytorch-triton-rocm"))


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
                numerics=params.gemm_numerics,
                params=params.GemmParams,
                tile=params.GemmTile,
                tiles=params.gemm_tiles,
                libraries=("triton",),
                summary="one tile a program; K in order through the matrix unit, fp32 accumulator",
            )
        )
    for op in ("rms_norm", "fused_add_rms_norm", "softmax", "log_softmax", "mean", "sum"):
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
                summary="one program a row; the order of the sum is spelled out, so no layout can change it",
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
    registry.register(
        Implementation(
            name="triton.paged_attention",
            op="attention",
            load="bidispatch_backends.triton.attention:bind_attention",
            archs=_ARCHS,
            dtypes=_DTYPES,
            requires=(_TRITON, DimAtMost("head_dim", 256)),
            numerics=params.attention_numerics,
            params=params.AttentionParams,
            tile=params.AttentionTile,
            tiles=params.attention_tiles,
            libraries=("triton",),
            summary="KV splits at absolute positions, in parallel or walked, folded in ascending order",
        )
    )
