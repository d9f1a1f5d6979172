"""cuBLASLt, pinned in the call: no workspace, no split of K, algorithms fixed when a layer is built."""

from __future__ import annotations

from bidispatch.registry import Implementation, Registry
from bidispatch.requirements import Check, Package
from bidispatch_backends.cublaslt import params

__all__ = ["register"]


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
    registry.register(
        Implementation(
            name="cublaslt.pinned",
            op="gemm",
            load="bidispatch_backends.cublaslt.gemm:bind_gemm",
            archs=("sm*",),
            dtypes=("bfloat16", "float16", "float32"),
            requires=(Package("nvmath-python", ">=0.6"), Check(params.aligned_rows), Check(params.known_result)),
            numerics=params.cublaslt_numerics,
            params=params.CublasLtParams,
            tile=params.CublasLtTile,
            tiles=params.cublaslt_tiles,
            search="bidispatch_backends.cublaslt.algorithms:search",
            libraries=("nvmath-python", "nvidia-cublas", "nvidia-cublas-cu12"),
            chooses_inside=True,
            summary="cuBLASLt without workspace or split K; each algorithm is compared with its class before it serves",
        )
    )
