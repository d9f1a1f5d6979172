"""The product as batch_invariant_ops, SGLang and vLLM run it where they have no tuned table: one tile for every M.

Persistent programs walk the tiles in groups of 8 rows of tiles, K in order; 128x128x64 in bf16, 128x256x64 in fp16,
128x128x32 in fp32, 8 warps, 3 stages. Written from that description.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

__all__ = ["OPTIONS", "TILES", "bind", "constants", "one_tile_kernel"]

TILES = {torch.bfloat16: (128, 128, 64), torch.float16: (128, 256, 64), torch.float32: (128, 128, 32)}
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
_GROUP_M = 8


@triton.jit(do_not_specialize=["m"])
def one_tile_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    m,
    n,
    k,
    stride_x,
    stride_weight,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out [m, n] = x [m, k] · weight [n, k]: PROGRAMS programs take the tiles in turn."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    in_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first_m = (tile // in_group) * GROUP_M
        height = min(tiles_m - first_m, GROUP_M)
        tile_m = first_m + (tile % in_group) % height
        tile_n = (tile % in_group) // height
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Past the end the first row is read, and its product not stored.
        x_rows = tl.where(rows < m, rows, 0).to(tl.int64)
        weight_rows = tl.where(columns < n, columns, 0).to(tl.int64)
        steps = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, k, BLOCK_K):
            inside = start + steps < k
            x_at = x_ptr + x_rows[:, None] * stride_x + (start + steps)[None, :]
            weight_at = weight_ptr + weight_rows[None, :] * stride_weight + (start + steps)[:, None]
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
        out_at = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def constants(dtype: torch.dtype, out_dtype: torch.dtype, programs: int) -> dict[str, int]:
    """What the kernel is compiled with. fp32 results of fp16's tile exceed Hopper's shared memory: they take bf16's."""
    wide = out_dtype.itemsize > dtype.itemsize
    block_m, block_n, block_k = TILES[torch.bfloat16 if wide else dtype]
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": _GROUP_M,
        "PROGRAMS": programs,
    }


def bind(
    dtype: torch.dtype, out_dtype: torch.dtype, programs: int
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """`launch(x [m, k], weight [n, k], out [m, n])` on at most so many programs: as many as there are SMs."""
    fixed = constants(dtype, out_dtype, programs)
    block_m, block_n = fixed["BLOCK_M"], fixed["BLOCK_N"]

    def launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        (m, k), n = x.shape, weight.shape[0]
        grid = (min(programs, -(-m // block_m) * -(-n // block_n)),)
        strides = x.stride(0), weight.stride(0), out.stride(0)
        one_tile_kernel[grid](x, weight, out, m, n, k, *strides, **fixed, **OPTIONS)

    return launch
