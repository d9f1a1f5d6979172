"""Chunks of K in parallel give the bits of chunks walked in turn: `gemm_split_k` and the fold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DTYPES, TOLERANCE, bind, draw_inputs, reference, relative_error, run, same_bits, tiles

from bidispatch import ops
from bidispatch.device import ARCHS
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton.fold import bind_fold
from bidispatch_backends.triton.gemm_params import GemmParams, SplitParams, gemm_numerics

CHUNK = 256
SPLIT = "triton.gemm_split_k"


def gemm(dtype: str, n: int, k: int, **dims: Any) -> Problem:
    return ops.get("gemm").problem(dtype, {"n": n, "k": k, **dims})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 255, 256, 257, 1000])
def test_split_and_walked_chunks_give_the_same_bits(dtype: str, k: int) -> None:
    """The interpreter multiplies a block by one call, so one block_k is used for both."""
    problem = gemm(dtype, 40, k, out_dtype="float32", bias=True)
    for tile in tiles(problem, SplitParams(k_chunk=CHUNK), SPLIT):
        walk = bind(problem, params=GemmParams(k_chunk=CHUNK), tile=tile)
        split = bind(problem, params=SplitParams(k_chunk=CHUNK), tile=tile, name=SPLIT)
        for m in (1, tile.block_m + 1):
            arguments = draw_inputs(problem, m)
            (walked,), (parallel,) = run(problem, arguments, walk), run(problem, arguments, split)
            assert same_bits(walked, parallel)
            assert same_bits(run(problem, arguments, split)[0], parallel)  # the counters are back at zero
            assert relative_error(parallel, reference(problem, arguments)[0]) < TOLERANCE["float32"]


def test_the_fold_adds_in_ascending_order() -> None:
    partial = (
        torch.randn(5, 3, 1500, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(5)[:, None, None]
    )
    bias = torch.randn(1500)
    wide = torch.full((3, 1600), float("nan"))
    bind_fold("float32", 1500, "float32", ARCHS["sm90"])(partial, bias, wide[:, :1500])
    total = partial[0]
    for chunk in partial[1:]:
        total = total + chunk
    assert same_bits(wide[:, :1500], total + bias)
    assert wide[:, 1500:].isnan().all()
    assert not same_bits(wide[:, :1500], partial.flip(0).cumsum(0)[-1] + bias)  # negative control: the other way round


def test_k_within_a_chunk_is_the_sequential_class() -> None:
    short, long = gemm("bfloat16", 8, 1024), gemm("bfloat16", 8, 1025)
    assert gemm_numerics(SplitParams(k_chunk=1024), short) == gemm_numerics(GemmParams(), short) == "k_sequential"
    assert gemm_numerics(SplitParams(k_chunk=1024), long) == gemm_numerics(GemmParams(k_chunk=1024), long)
    assert gemm_numerics(GemmParams(k_chunk=1024), long) == "k_chunks.1024"
    assert gemm_numerics(SplitParams(), gemm("float32", 8, 2048)) == "k_chunks.1024.ieee"
