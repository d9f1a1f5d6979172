"""Class labels that several backends share: kernels of one label give the same bits for a row. Imports no torch."""

from __future__ import annotations

from bidispatch.ops.schema import Problem

__all__ = ["fp8_block_numerics", "product_numerics"]


def product_numerics(problem: Problem, input_precision: str, k_chunk: int) -> str:
    """The class of a matrix product that walks K in ascending order into fp32 accumulators.

    `k_sequential` where one accumulator takes all of K, `k_chunks.<c>` where each `k_chunk` of K has one of its own and
    these are added in ascending order; for fp32 with the precision of the products. K no longer than a chunk is walked
    whole in both.
    """
    whole = k_chunk == 0 or problem.size("k") <= k_chunk
    label = "k_sequential" if whole else f"k_chunks.{k_chunk}"
    return f"{label}.{input_precision}" if problem.dtype == "float32" else label


def fp8_block_numerics(products: str) -> str:
    """The class of an fp8 product with scales of 128 of K: `fp8_blocks.<products>`, by what the matrix unit multiplies.

    Every 128 of K from a fresh accumulator of the matrix unit, in one chain of its instructions; then, in ascending
    order, fma(partial sum, x_scale · weight_scale, sum) in fp32, the product of the scales rounded.
    """
    return f"fp8_blocks.{products}"
