"""`gemm.int4`: the bits of `gemm` with the dequantised weight, at every size, group and stride."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import (
    TOLERANCE,
    bind,
    draw_inputs,
    poisoned_outputs,
    reference,
    relative_error,
    run,
    same_bits,
    tiles,
)

from bidispatch import ops
from bidispatch.errors import ArgumentError
from bidispatch.int4 import dequantize, pack
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton import int4 as module
from bidispatch_backends.triton.gemm_params import GemmParams, GemmTile, SplitParams
from bidispatch_backends.triton.int4_params import Int4Params, Int4Tile, SplitInt4Params

WALKED, SPLIT = "triton.int4", "triton.int4_split_k"
CHUNK = 256
SMALL = Int4Tile(block_m=16, block_n=32, block_k=128, num_warps=2, num_stages=2)
"""Of few elements, so that edges come soon."""
WIDE = Int4Tile(block_m=16, block_n=128, block_k=256, num_warps=4, num_stages=2)


def int4(n: int, k: int, dtype: str = "float16", **dims: Any) -> Problem:
    return ops.get("gemm.int4").problem(dtype, {"n": n, "k": k, **dims})


def dense(problem: Problem, arguments: list[Any], **options: Any) -> torch.Tensor:
    """What `gemm` gives for the dequantised weight."""
    x, weight, scales, zeros, bias = arguments
    dims = {name: problem[name] for name in ("n", "k", "bias", "out_dtype")}
    (out,) = run(ops.get("gemm").problem(problem.dtype, dims), [x, dequantize(weight, scales, zeros), bias], **options)
    return out


def gemm_kernel(problem: Problem, **options: Any) -> Any:
    dims = {name: problem[name] for name in ("n", "k", "bias", "out_dtype")}
    return bind(ops.get("gemm").problem(problem.dtype, dims), **options)


@pytest.mark.parametrize("distribution", ["normal", "positive", "scaled"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 768])
@pytest.mark.parametrize("zero_points", [False, True])
def test_the_bits_are_those_of_gemm_with_the_dequantised_weight(
    zero_points: bool, group_size: int, distribution: str
) -> None:
    problem = int4(80, 768, zero_points=zero_points, group_size=group_size, bias=True, out_dtype="float32")
    for m in (1, 19):
        arguments = draw_inputs(problem, m, distribution=distribution)
        wanted = dense(problem, arguments)
        for tile in (SMALL, WIDE, *tiles(problem, name=WALKED)[:2]):
            (out,) = run(problem, arguments, bind(problem, name=WALKED, tile=tile))
            assert same_bits(out, wanted), tile
        assert relative_error(wanted, reference(problem, arguments)[0]) < TOLERANCE["float32"]


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("k", [128, 256, 384, 1024])
def test_chunks_walked_and_in_parallel_are_those_of_gemm(k: int, zero_points: bool) -> None:
    problem = int4(48, k, zero_points=zero_points, bias=True, out_dtype="float32")
    gemm_tile = GemmTile(block_m=16, block_n=32, block_k=64, num_warps=2, num_stages=2)
    walked = bind(problem, name=WALKED, params=Int4Params(k_chunk=CHUNK), tile=SMALL)
    split = bind(problem, name=SPLIT, params=SplitInt4Params(k_chunk=CHUNK), tile=SMALL)
    for m in (1, 16, 33):
        arguments = draw_inputs(problem, m)
        kernel = gemm_kernel(problem, params=GemmParams(k_chunk=CHUNK), tile=gemm_tile)
        wanted = dense(problem, arguments, kernel=kernel)
        assert same_bits(run(problem, arguments, walked)[0], wanted)
        assert same_bits(run(problem, arguments, split)[0], wanted)
        assert same_bits(run(problem, arguments, split)[0], wanted)  # the counters are back at zero
        other = gemm_kernel(problem, params=SplitParams(k_chunk=CHUNK), tile=gemm_tile, name="triton.gemm_split_k")
        assert same_bits(dense(problem, arguments, kernel=other), wanted)


@pytest.mark.parametrize("name", [WALKED, SPLIT])
def test_a_row_alone_has_the_bits_it_has_in_a_batch_of_any_tile(name: str) -> None:
    problem = int4(96, 512, zero_points=True)
    params = (Int4Params if name == WALKED else SplitInt4Params)(k_chunk=CHUNK)
    arguments = draw_inputs(problem, 70)
    ladder = tiles(problem, params, name)
    alone = bind(problem, name=name, params=params, tile=ladder[0])
    rows = torch.cat([run(problem, [arguments[0][i : i + 1], *arguments[1:]], alone)[0] for i in range(0, 70, 7)])
    for tile in ladder:
        (batch,) = run(problem, arguments, bind(problem, name=name, params=params, tile=tile))
        assert same_bits(batch[::7], rows), tile


def test_every_integer_and_zero_point_is_exact() -> None:
    """x is the identity: each output is a weight, and every pair of an integer and a zero point occurs."""
    problem = int4(16, 128, zero_points=True, group_size=32)
    q = torch.arange(128).repeat(16, 1) % 16
    zeros = torch.arange(64).reshape(4, 16).remainder(16).to(torch.int8)
    scales = torch.full((4, 16), 0.37, dtype=torch.float16) * torch.arange(1, 65).reshape(4, 16)
    arguments = [torch.eye(128, dtype=torch.float16), pack(q), scales, zeros, None]
    (out,) = run(problem, arguments, bind(problem, name=WALKED))
    exact = (q.T.float() - zeros.repeat_interleave(32, 0).float()) * scales.repeat_interleave(32, 0).float()
    assert torch.equal(out, exact.to(torch.float16))


def test_strided_rows_and_a_slice_of_a_merged_weight_give_the_same_bits() -> None:
    problem = int4(64, 256, zero_points=True, bias=True)
    x, weight, scales, zeros, bias = draw_inputs(problem, 5)
    (plain,) = run(problem, [x, weight, scales, zeros, bias], bind(problem, name=WALKED))
    wide = torch.full((5, 300), float("nan"), dtype=x.dtype)
    wide[:, 3:259] = x
    merged = torch.full((64, 64), -1, dtype=torch.int32)
    merged[:, 16:48] = weight
    out = torch.full((5, 80), -1.0, dtype=x.dtype)
    bind(problem, name=WALKED)(wide[:, 3:259], merged[:, 16:48], scales, zeros, bias, out[:, 8:72])
    assert same_bits(plain, out[:, 8:72])
    assert (out[:, :8] == -1).all()
    assert (out[:, 72:] == -1).all()


@pytest.mark.parametrize("name", [WALKED, SPLIT])
def test_scales_that_no_word_holds_are_refused(name: str) -> None:
    problem = int4(32, 256)
    x, weight, scales, *_ = draw_inputs(problem, 2)
    wide = torch.zeros(2, 33, dtype=scales.dtype)
    (out,) = poisoned_outputs(problem, [x, weight, scales, None, None])
    with pytest.raises(ArgumentError, match="scales must be contiguous and begin on 4 bytes"):
        bind(problem, name=name)(x, weight, wide[:, :32], None, None, out)


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_scales_of_zero_infinity_and_nan_are_numbers_like_others(bad: float) -> None:
    problem = int4(32, 256)
    x, weight, scales, *_ = draw_inputs(problem, 3)
    scales[1, 5] = bad
    (out,) = run(problem, [x, weight, scales, None, None], bind(problem, name=WALKED))
    (clean,) = run(problem, draw_inputs(problem, 3), bind(problem, name=WALKED))
    others = torch.arange(32) != 5
    assert same_bits(out[:, others], clean[:, others])
    assert torch.isfinite(out[:, 5]).all() == (bad == 0.0)


def test_rows_beside_nan_and_infinity_keep_their_bits() -> None:
    problem = int4(40 + 8, 256)
    x, *rest = draw_inputs(problem, 40)
    for tile in (SMALL, WIDE):
        kernel = bind(problem, name=WALKED, tile=tile)
        (clean,) = run(problem, [x, *rest], kernel)
        dirty = x.clone()
        dirty[0::3], dirty[1::3] = float("nan"), float("inf")
        (beside,) = run(problem, [dirty, *rest], kernel)
        assert same_bits(clean[2::3], beside[2::3])


def test_tiles_that_do_not_divide_k_are_refused() -> None:
    with pytest.raises(ValueError, match="block_k=256 does not divide k=384"):
        bind(int4(32, 384), name=WALKED, tile=WIDE)


def test_a_kernel_that_takes_the_wrong_groups_scale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    problem = int4(48, 256, group_size=32)
    arguments = draw_inputs(problem, 3)
    wanted = dense(problem, arguments)
    assert same_bits(run(problem, arguments, bind(problem, name=WALKED))[0], wanted)
    original = module.launches

    def coarse(*values: Any) -> tuple[Any, ...]:
        (launch,) = original(*values)
        launch.constants["GROUP_SIZE"] = 64
        return (launch,)

    monkeypatch.setattr(module, "launches", coarse)
    assert not same_bits(run(problem, arguments, bind(problem, name=WALKED))[0], wanted)


def test_a_kernel_whose_split_of_k_follows_m_is_caught() -> None:
    """Negative control: chunks of 256 for one row and of 512 for more are two orders of additions."""
    problem = int4(96, 1024, out_dtype="float32")
    arguments = draw_inputs(problem, 33)
    one = bind(problem, name=SPLIT, params=SplitInt4Params(k_chunk=256), tile=SMALL)
    many = bind(problem, name=SPLIT, params=SplitInt4Params(k_chunk=512), tile=SMALL)
    (alone,) = run(problem, [arguments[0][:1], *arguments[1:]], one)
    assert same_bits(alone, run(problem, arguments, one)[0][:1])
    assert not same_bits(alone, run(problem, arguments, many)[0][:1])
