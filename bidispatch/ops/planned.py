"""Ops the catalogue names and nothing implements yet, so that a plan can say "unsupported" by name."""

from __future__ import annotations

from bidispatch.ops.schema import Op

__all__ = ["OPS"]

OPS = (
    Op(name="lora", summary="low-rank adapters, several in one batch", dtypes=("bfloat16", "float16")),
    Op(name="all_reduce", summary="the sum over the ranks of a group", dtypes=("bfloat16", "float16", "float32")),
)
