"""Reduction params of the `torch_cpu` kernels. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from bidispatch.registry import Params

__all__ = ["AttentionParams", "ProductParams", "RowParams"]


class ProductParams(Params):
    """Of the matrix products."""

    rows: int = Field(default=16, ge=8, le=256, multiple_of=8)
    """Rows of every product. Its cost at one row grows with it, and its speed at many; 16 lies between: at 1 row and
    200 rows, fp32, 1024 x 1024, 2 cores, 8 rows take 0.3 and 8.5 ms, 16 rows 0.4 and 5.8, 64 rows 1.1 and 4.7. Of 7
    rows some are summed otherwise than the rest with 8 threads; no multiple of 8 was seen to do so."""


class RowParams(Params):
    """Of the ops on rows."""

    block: int = Field(default=8192, ge=64, lt=16384, multiple_of=64)
    """Elements a torch call on several rows, or on a piece of one, may see. Below 16384, above which torch shares the
    elements of F.gelu among threads (32768 for the rest) and so moves the scalar tails of its vector loops."""


class AttentionParams(Params):
    """Of paged attention."""

    kv_tile: int = Field(default=128, ge=64, le=256, multiple_of=64)
    """KV positions of a tile; tile t holds positions t · kv_tile and on."""
    rows: int = Field(default=16, ge=8, le=64, multiple_of=8)
    """Rows of every product: pairs of a query position and a query head of one KV head."""
