"""The mixture of experts: right for every spread of tokens over experts, and no row touched by another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import (
    SM90,
    TOLERANCE,
    bind,
    draw_inputs,
    implementation,
    poisoned_outputs,
    reference,
    relative_error,
    run,
    same_bits,
    tiles,
)

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import Kernel, Limits
from bidispatch.runtime.scratch import Scratch
from bidispatch_backends.triton import moe
from bidispatch_backends.triton.moe_params import ExpertsTile

SMALL = {"experts": 5, "top_k": 3, "hidden": 48, "intermediate": 40}
FEATURES = (
    {},
    {"bias": True, "shared": True, "activation": "gelu"},
    {"activation": "swiglu_clamped", "bias": True, "expert_map": True, "global_experts": 12},
    {"top_k": 1, "hidden": 33, "intermediate": 7, "out_dtype": "float32"},
)
ROUTERS = (
    {},
    {"scoring": "sigmoid", "renormalize": False, "routed_scaling_factor": 2.5},
    {"scoring": "sigmoid", "correction_bias": True, "n_group": 4, "topk_group": 2},
    {"n_group": 5, "topk_group": 1, "top_k": 4},
    {"correction_bias": True, "top_k": 20},
)
# Beside the few tiles of the ladder: neither product swapped, both, one of each, and outputs that end inside a tile.
FURTHER = tuple(
    ExpertsTile(
        block_m=16, counted=counted, up_block_n=32, up_block_k=32, up_swap=up, up_warps=4, up_stages=2,
        down_block_n=64, down_block_k=16, down_swap=down, down_warps=4, down_stages=2,
    )
    for counted, up, down in ((64, False, False), (0, True, False), (64, False, True))
)  # fmt: skip
X, WEIGHTS, IDS, MAP = 0, 3, 4, 9
BF16 = "triton.moe"


def experts(dtype: str = "float16", **dims: Any) -> Problem:
    return ops.get("moe.experts").problem(dtype, {**SMALL, **dims})


FP8 = {"hidden": 256, "intermediate": 128, "weight_dtype": "float8_e4m3fn"}


def router(dtype: str = "float32", **dims: Any) -> Problem:
    return ops.get("moe.router").problem(dtype, {"experts": 20, "top_k": 3, **dims})


def every_kernel(problem: Problem, rows: int, kernel: str = "triton.moe") -> list[Any]:
    """Each tile bound for many rows, and for so many that programs count for themselves where the tile allows it."""
    found = [*tiles(problem, name=kernel), *(FURTHER if kernel == BF16 else ())]
    few = [bind(problem, tile=tile, limits=Limits(rows), name=kernel) for tile in found if tile.counted]
    return [*(bind(problem, tile=tile, name=kernel) for tile in found), *few]


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_clamped"])
@pytest.mark.parametrize("place", [X, 1], ids=["x", "w13"])
def test_nan_reaches_the_rows_that_read_it_through_every_activation(activation: str, place: int) -> None:
    """Of a row itself, or of an expert's weights. The clamps drop it where they are written as minimum and maximum."""
    problem = experts(activation=activation)
    arguments = draw_inputs(problem, 6)
    arguments[place] = arguments[place].clone()
    arguments[place][1] = float("nan")
    exact = reference(problem, arguments)[0].isnan()
    assert exact.any()
    for kernel in every_kernel(problem, 6):
        assert torch.equal(run(problem, arguments, kernel)[0].isnan(), exact)


@pytest.mark.parametrize("dims", FEATURES, ids=str)
def test_every_tile_is_near_the_reference_and_all_give_the_same_bits(dims: dict[str, Any]) -> None:
    problem = experts(**dims)
    arguments = draw_inputs(problem, 19)
    exact = reference(problem, arguments)[0]
    results = [run(problem, arguments, kernel)[0] for kernel in every_kernel(problem, 19)]
    assert relative_error(results[0], exact) < TOLERANCE["float16"]
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "dims",
    [
        {},
        {"activation": "swiglu_clamped", "bias": True, "expert_map": True, "global_experts": 12},
        {"scale_format": "ue8m0", "shared": True, "out_dtype": "float32"},
    ],
    ids=str,
)
def test_fp8_weights_are_near_the_reference_and_every_tile_gives_the_same_bits(dims: dict[str, Any]) -> None:
    problem = experts(**FP8, **dims)
    arguments = draw_inputs(problem, 6)
    exact = reference(problem, arguments)[0]
    results = [run(problem, arguments, kernel)[0] for kernel in every_kernel(problem, 6, "triton.moe_fp8_block")]
    assert relative_error(results[0], exact) < 2 * TOLERANCE["float16"]
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("counted", [True, False])
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(counted: bool) -> None:
    problem = experts(bias=True)
    arguments = draw_inputs(problem, 23)
    tile = tiles(problem, name=BF16)[0].model_copy(update={"counted": 128 if counted else 0})
    kernel = bind(problem, tile=tile, limits=Limits(23), name=BF16)
    (whole,) = run(problem, arguments, kernel)
    for row in (0, 2, 11, 22):
        alone = list(arguments)
        for place in (X, WEIGHTS, IDS):
            alone[place] = arguments[place][row : row + 1]
        (out,) = run(problem, alone, kernel)
        assert same_bits(out, whole[row : row + 1])


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("spread", ["all to one", "none", "out of range", "one row", "twice the same"])
def test_any_spread_of_tokens_over_experts_is_right(spread: str, counted: bool) -> None:
    problem = experts()
    arguments = draw_inputs(problem, 37)
    ids = arguments[IDS]
    if spread == "all to one":
        ids[:] = 3
    elif spread == "none":
        ids[:] = -1
    elif spread == "out of range":
        ids[::2] = torch.tensor([5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    elif spread == "one row":
        ids[1:] = -1
    else:
        ids[:, 1] = ids[:, 0]
    tile = tiles(problem, name=BF16)[0].model_copy(update={"counted": 128 if counted else 0})
    (out,) = run(problem, arguments, bind(problem, tile=tile, limits=Limits(37), name=BF16))
    exact = reference(problem, arguments)[0]
    if spread == "none":
        assert (out == 0).all()
    else:
        assert relative_error(out, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("counted", [True, False])
def test_rows_beside_nan_and_other_experts_keep_their_bits(counted: bool) -> None:
    problem = experts()
    arguments = draw_inputs(problem, 21)
    tile = tiles(problem, name=BF16)[0].model_copy(update={"counted": 64 if counted else 0})
    kernel = bind(problem, tile=tile, limits=Limits(21), name=BF16)
    (clean,) = run(problem, arguments, kernel)
    dirty = [None if tensor is None else tensor.clone() for tensor in arguments]
    dirty[X][0::3], dirty[X][1::3] = float("nan"), float("inf")
    dirty[WEIGHTS][0::3] = float("nan")
    dirty[IDS][0::3], dirty[IDS][1::3] = dirty[IDS][2], -1
    (beside,) = run(problem, dirty, kernel)
    assert same_bits(clean[2::3], beside[2::3])


def test_strided_tensors_and_a_map_with_what_is_not_there() -> None:
    problem = experts(expert_map=True, global_experts=9, shared=True)
    arguments = draw_inputs(problem, 6)
    arguments[MAP] = torch.tensor([4, -1, 2, 7, 0, -1, 1, 3, -5], dtype=torch.int32)  # 7 and -5 are no experts
    (plain,) = run(problem, arguments)
    assert relative_error(plain, reference(problem, arguments)[0]) < TOLERANCE["float16"]
    strided = list(arguments)
    for place, tensor in enumerate(arguments):
        if tensor is not None and tensor.dim() > 1:
            wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=tensor.dtype)
            wide[..., 2:-3] = tensor
            strided[place] = wide[..., 2:-3]
    assert same_bits(plain, run(problem, strided)[0])


def test_pairs_beyond_what_programs_count_are_sorted() -> None:
    """A tile for few pairs, bound for more: nothing may be left out."""
    problem = experts()
    arguments = draw_inputs(problem, 40)
    tile = tiles(problem, name=BF16)[0].model_copy(update={"counted": 16})
    (out,) = run(problem, arguments, bind(problem, tile=tile, name=BF16))
    assert relative_error(out, reference(problem, arguments)[0]) < TOLERANCE["float16"]


def test_a_kernel_that_counts_too_few_pairs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with room for half the pairs, the other half's parts are never written."""
    problem = experts()
    arguments = draw_inputs(problem, 20)
    monkeypatch.setattr(moe, "is_sorted", lambda *_: False)
    tile = tiles(problem, name=BF16)[0].model_copy(update={"counted": 32})
    (out,) = run(problem, arguments, bind(problem, tile=tile, name=BF16))
    error = relative_error(out.nan_to_num(), reference(problem, arguments)[0])
    assert error > 100 * TOLERANCE["float16"]


PIECES = (
    (BF16, {"bias": True, "shared": True, "expert_map": True, "global_experts": 12, "out_dtype": "float32"}),
    ("triton.moe_fp8_block", {**FP8, "out_dtype": "float32"}),
)


def in_pieces(problem: Problem, kernel: str, most: int, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Bound for 41 rows with room for so many at a time, over memory that another kernel filled with NaN."""
    monkeypatch.setattr(moe, "most_tokens", lambda *_: most)
    scratch = Scratch()
    scratch.take(((1 << 22, torch.uint8),), "cpu")[0].fill_(0xFF)
    tile = tiles(problem, name=kernel)[-1]
    return bind(problem, tile=tile, limits=Limits(41), name=kernel, scratch=scratch)


@pytest.mark.parametrize(("kernel", "dims"), PIECES, ids=lambda value: str(value)[:20])
def test_a_call_in_pieces_gives_the_bits_of_the_whole(
    kernel: str, dims: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = experts(**dims)
    arguments = draw_inputs(problem, 41)
    whole, *cut = (run(problem, arguments, in_pieces(problem, kernel, most, monkeypatch))[0] for most in (41, 16, 7))
    assert relative_error(whole, reference(problem, arguments)[0]) < 2 * TOLERANCE["float16"]
    assert all(same_bits(result, whole) for result in cut)


def test_an_order_that_follows_the_rows_of_a_piece_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: slots of pieces added in another order than those of a whole call."""
    problem = experts(out_dtype="float32")
    arguments = draw_inputs(problem, 41)
    whole, cut = (in_pieces(problem, BF16, most, monkeypatch) for most in (41, 16))

    def turned(*given: Any) -> None:
        everything = list(given)
        for place in (WEIGHTS, IDS):
            everything[place] = everything[place].flip(1).contiguous()
        cut(*everything)

    assert not same_bits(run(problem, arguments, turned)[0], run(problem, arguments, whole)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dims", ROUTERS, ids=str)
def test_the_router_chooses_as_the_reference(dims: dict[str, Any], dtype: str) -> None:
    problem = router(dtype, **dims)
    arguments = draw_inputs(problem, 33)
    weights, ids = run(problem, arguments)
    exact, exact_ids = reference(problem, arguments)
    assert torch.equal(ids, exact_ids)
    assert relative_error(weights, exact) < 1e-6
    for row in (0, 8, 32):
        alone = [arguments[0][row : row + 1], arguments[1]]
        assert all(same_bits(a, b[row : row + 1]) for a, b in zip(run(problem, alone), (weights, ids), strict=True))


def test_ties_go_to_the_lower_expert_and_nan_is_below_all() -> None:
    problem = router(top_k=4, renormalize=False)
    logits = torch.full((4, 20), -3.0)
    logits[0, [19, 7, 12]] = 1.0
    logits[1] = 0.0
    logits[1, 5] = -0.0
    logits[2, [3, 2]] = torch.tensor([float("inf"), float("-inf")])
    logits[3, [0, 1]] = float("nan")
    ids = run(problem, [logits, None])[1].tolist()
    assert ids[0] == [7, 12, 19, 0]
    assert ids[1] == [0, 1, 2, 3]
    assert ids[2][:2] == [3, 0]
    assert ids[3] == [2, 3, 4, 5]


def test_several_rows_of_a_router_in_one_program_give_the_same_bits() -> None:
    problem = router()
    arguments = draw_inputs(problem, 13)
    one = run(problem, arguments)
    tile = tiles(problem)[0].model_copy(update={"rows": 4, "num_warps": 4})
    assert all(same_bits(a, b) for a, b in zip(one, run(problem, arguments, bind(problem, tile=tile)), strict=True))


def test_each_kernel_takes_its_own_weights() -> None:
    assert implementation(experts(), BF16).unmet(SM90, experts()) == ()
    assert implementation(experts(), BF16).unmet(SM90, experts(**FP8)) != ()
    assert implementation(experts(), "triton.moe_fp8_block").unmet(SM90, experts()) != ()
    assert implementation(router()).name == "triton.moe_router"
    assert len(poisoned_outputs(router(), draw_inputs(router(), 2))) == 2
