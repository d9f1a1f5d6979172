"""Grouped queries: what the numbers of heads must satisfy, in every op that has both."""

from __future__ import annotations

from collections.abc import Mapping

from bidispatch.ops.schema import DimValue

__all__ = ["heads_conflict"]


def heads_conflict(dims: Mapping[str, DimValue]) -> str | None:
    """Why the query heads cannot share the key and value heads evenly, or None."""
    heads, kv_heads = int(dims["num_heads"]), int(dims["num_kv_heads"])
    if heads % kv_heads:
        return f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}"
    return None
