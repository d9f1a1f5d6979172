"""FlashInfer's paged attention for Ampere and newer."""

from __future__ import annotations

from bidispatch.invariance import Invariance
from bidispatch.registry import Implementation, Registry
from bidispatch.requirements import Check, DimIn, Package
from bidispatch_backends.flashinfer import params

__all__ = ["register"]


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
    registry.register(
        Implementation(
            name="flashinfer.paged",
            op="attention",
            load="bidispatch_backends.flashinfer.attention:bind_attention",
            archs=("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
            dtypes=("bfloat16", "float16"),
            requires=(
                Package("flashinfer-python", ">=0.6.13,<0.8"),
                DimIn("head_dim", (64, 128, 256)),
                DimIn("page_size", params.PAGE_SIZES),  # a split is whole pages
                DimIn("window", (0,)),  # its splits would start where a query tile's window does
                Check(params.nothing_else),
            ),
            claims=Invariance.BATCH,
            numerics=params.numerics,
            params=params.PagedParams,
            tile=params.PagedTile,
            tiles=params.tiles,
            libraries=("flashinfer-python",),
            cuda_graph=False,  # its plan is made on the host, from lengths that only the GPU knows
            summary="FlashInfer's fa2 kernels, splits of fixed size; each call waits for the GPU and plans on the host",
        )
    )
