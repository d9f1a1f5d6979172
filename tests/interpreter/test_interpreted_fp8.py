"""Quantisation and fp8 products: right at every size and stride, no row touched by another, fused as apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreted import (
    DTYPES,
    bind,
    draw_inputs,
    poisoned_outputs,
    reference,
    relative_error,
    rows_that_differ,
    run,
    same_bits,
    tiles,
)

from bidispatch import ops
from bidispatch.ops.quantize import unfused
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute
from bidispatch_backends.triton.fp8_params import Fp8BlockParams, Fp8Params
from bidispatch_backends.triton.gemm_params import ProductTile
from bidispatch_backends.triton.params import ElementTile, RowTile

FP8 = torch.float8_e4m3fn
FORMATS = ("float", "ue8m0")
FUSED = ("silu_and_mul.fp8_group", "rms_norm.fp8_group", "fused_add_rms_norm.fp8_group")
WIDTHS = (1, 40, 128, 300, 1003, 4096)
# Beside the ladder's: more columns than a block of scales, and rows on the long side.
WIDE = ProductTile(block_m=64, block_n=256, num_warps=8, num_stages=2)
WIDE_SWAPPED = ProductTile(block_m=16, block_n=256, swap=True, num_warps=8, num_stages=2)
SIZES = [(1, 1), (7, 300), (130, 127), (300, 128), (5, 1000)]


def quantization(dtype: str, k: int, scale_format: str = "float") -> Problem:
    return ops.get("quantize.fp8_group").problem(dtype, {"k": k, "scale_format": scale_format})


def fused(op: str, dtype: str, n: int, **dims: Any) -> Problem:
    return ops.get(op).problem(dtype, {"n": n, **dims})


def product(op: str, n: int, k: int, **dims: Any) -> Problem:
    return ops.get(op).problem("float8_e4m3fn", {"n": n, "k": k, "out_dtype": "float32", **dims})


def every_tile(problem: Problem) -> list[ProductTile]:
    return [*dict.fromkeys(tiles(problem)), WIDE, WIDE_SWAPPED]


# -- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", WIDTHS)
def test_quantisation_has_the_bits_of_its_definition(k: int, dtype: str, scale_format: str) -> None:
    problem = quantization(dtype, k, scale_format)
    for distribution in ("normal", "positive", "scaled"):
        (x,) = draw_inputs(problem, 3, distribution=distribution)
        x[1] = 0
        wanted = load_attribute(ops.get(problem.op).stock)(problem, x)
        for one, other in zip(run(problem, [x]), wanted, strict=True):
            assert same_bits(one, other), distribution


def test_scales_are_those_of_the_stock_kernels() -> None:
    """amax / 448 rounded, at least 1e-10 / 448; as a power of two the next one up, at least that above 1e-10."""
    x = torch.zeros(4, 128)
    x[0, 5], x[1, 7], x[2, 0] = -448.0, 3.0, 1e-20
    scales = {name: run(quantization("float32", 128, name), [x])[1][:, 0].tolist() for name in FORMATS}
    least = float(torch.tensor(1e-10) / 448)
    assert scales["float"] == [1.0, float(torch.tensor(3.0) / 448), least, least]
    assert scales["ue8m0"] == [1.0, 2.0**-7, 2.0**-33, 2.0**-33]
    x[1, 7] = 449.0
    assert run(quantization("float32", 128, "ue8m0"), [x])[1][1, 0].item() == 2.0


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FUSED)
def test_a_fused_op_gives_the_bits_of_the_two(op: str, dtype: str, scale_format: str) -> None:
    for n in WIDTHS:
        for gemma in (False, True) if "norm" in op else (None,):
            dims = {"scale_format": scale_format} | ({} if gemma is None else {"gemma": gemma})
            problem = fused(op, dtype, n, **dims)
            before, after = unfused(problem)
            arguments = draw_inputs(problem, 5, distribution="scaled")
            first, *others = run(before, arguments)
            for tile in tiles(problem):
                found = run(problem, arguments, bind(problem, tile=tile))
                for one, other in zip(found, [*run(after, [first]), *others], strict=True):
                    assert same_bits(one, other), (n, gemma, tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["quantize.fp8_group", *FUSED])
def test_a_row_has_the_same_bits_alone_and_beside_anything(op: str, dtype: str) -> None:
    problem = quantization(dtype, 700) if op.startswith("quantize") else fused(op, dtype, 700)
    kernel = bind(problem)
    assert rows_that_differ(problem, lambda arguments: run(problem, arguments, kernel)) == 0


def test_a_scale_that_follows_the_batch_is_caught() -> None:
    """Negative control: the comparison above sees one scale of all rows, as per-tensor scaling has it."""
    problem = quantization("float32", 256)

    def run_rows(arguments: list[Any]) -> list[torch.Tensor]:
        x = arguments[0].nan_to_num(0, 0, 0)
        scale = x.abs().amax() / 448
        return [(x / scale).to(FP8), scale.expand(len(x), 2).clone()]

    assert rows_that_differ(problem, run_rows) > 0


@pytest.mark.parametrize("op", FUSED[1:])
def test_rows_and_warps_of_a_program_do_not_enter_the_bits(op: str) -> None:
    """Seven rows: no number of rows a program divides them, so the last program has rows that do not exist."""
    for n in (40, 300):
        problem = fused(op, "float32", n)
        arguments = draw_inputs(problem, 7, distribution="scaled")
        shapes = [RowTile(rows=rows, num_warps=warps) for rows, warps in ((1, 1), (2, 4), (8, 1))]
        first, *rest = (run(problem, arguments, bind(problem, tile=tile)) for tile in shapes)
        for other in rest:
            assert all(same_bits(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("op", ["quantize.fp8_group", *FUSED])
def test_strided_rows_and_scales_side_by_side_give_the_same_bits(op: str) -> None:
    """Scales whose groups lie side by side, as DeepGEMM reads them; nothing around an output is written."""
    problem = quantization("float32", 300) if op.startswith("quantize") else fused(op, "float32", 300)
    arguments = draw_inputs(problem, 5)
    wide = torch.full((5, arguments[0].shape[1] + 9), math.nan)
    wide[:, 4:-5] = arguments[0]
    plain = run(problem, arguments)
    outputs = poisoned_outputs(problem, arguments)
    outputs[1] = torch.full((3, 8), -1.0).T[:5]
    room = torch.zeros(5, 320, dtype=FP8)
    outputs[0] = room[:, 7:307]
    scalars = [scalar.default_for(problem) for scalar in ops.get(op).scalars]
    bind(problem)(wide[:, 4:-5], *arguments[1:], *scalars, *outputs)
    assert all(same_bits(one, other) for one, other in zip(plain, outputs, strict=True))
    assert (room[:, :7].float() == 0).all()
    assert (room[:, 307:].float() == 0).all()


def test_rows_that_are_not_finite() -> None:
    x = torch.ones(4, 256)
    x[0, 3], x[1, 3], x[2, :128] = math.nan, math.inf, math.nan
    q, scales = run(quantization("float32", 256), [x])
    values = q.float()
    assert values.isnan().sum(1).tolist() == [1, 1, 128, 0]
    assert scales[0].tolist() == scales[3].tolist()
    assert scales[1].isinf().tolist() == [True, False]
    assert (values[1, :3] == 0).all()
    assert (values[1, 128:] == 448).all()


def test_a_launch_that_would_cut_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="block=64 is not a multiple of 128"):
        bind(quantization("float32", 256), tile=ElementTile(block=64))
    with pytest.raises(ValueError, match="a row must fit into block=16384"):
        bind(fused("rms_norm.fp8_group", "float32", 20000))


# -- products ------------------------------------------------------------------------------------------------------


def whole_arguments(problem: Problem, m: int) -> list[Any]:
    """Small integers, and scales that are powers of two: sums are exact in any order, so that a wrong index, mask or
    scale cannot hide in rounding.
    """
    generator = torch.Generator().manual_seed(m)
    arguments = []
    for argument in draw_inputs(problem, m):
        if argument is None:
            arguments.append(None)
        elif argument.dtype is FP8:
            arguments.append(torch.randint(-3, 4, argument.shape, generator=generator).to(FP8))
        else:
            powers = torch.randint(-2, 3, argument.shape, generator=generator)
            arguments.append(torch.exp2(powers.float()).to(argument.dtype))
    return arguments


@pytest.mark.parametrize("products", ["fp8", "fp16"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_block_scaled_products_are_exact_in_every_tile(n: int, k: int, products: str) -> None:
    problem = product("gemm.fp8_block", n, k)
    for tile in every_tile(problem):
        kernel = bind(problem, params=Fp8BlockParams(products=products), tile=tile)
        for m in (1, tile.block_m, tile.block_m + 1):
            arguments = whole_arguments(problem, m)
            (out,) = run(problem, arguments, kernel)
            assert torch.equal(out.double(), reference(problem, arguments)[0]), (tile, m)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_scaling", ["tensor", "channel"])
@pytest.mark.parametrize("x_scaling", ["tensor", "token"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_scaled_products_are_exact_in_every_tile(
    n: int, k: int, x_scaling: str, weight_scaling: str, bias: bool
) -> None:
    problem = product("gemm.fp8", n, k, x_scaling=x_scaling, weight_scaling=weight_scaling, bias=bias)
    for tile in every_tile(problem):
        arguments = whole_arguments(problem, tile.block_m + 1)
        (out,) = run(problem, arguments, bind(problem, tile=tile))
        assert torch.equal(out.double(), reference(problem, arguments)[0]), tile


@pytest.mark.parametrize("products", ["fp8", "fp16"])
def test_longer_steps_are_exact_and_of_another_class(products: str) -> None:
    problem = product("gemm.fp8", 70, 700)
    arguments = whole_arguments(problem, 20)
    long_steps, short_steps = (Fp8Params(products=products, max_num_imprecise_acc=size) for size in (256, 128))
    (out,) = run(problem, arguments, bind(problem, params=long_steps))
    assert torch.equal(out.double(), reference(problem, arguments)[0])
    arguments = draw_inputs(problem, 20, distribution="positive")
    outs = [run(problem, arguments, bind(problem, params=params))[0] for params in (long_steps, short_steps)]
    assert not same_bits(*outs)


@pytest.mark.parametrize("distribution", ["normal", "positive", "scaled"])
@pytest.mark.parametrize("op", ["gemm.fp8_block", "gemm.fp8"])
def test_products_are_near_the_fp64_reference(op: str, distribution: str) -> None:
    problem = product(op, 70, 500)
    arguments = draw_inputs(problem, 19, distribution=distribution)
    (out,) = run(problem, arguments)
    assert relative_error(out, reference(problem, arguments)[0]) < 2e-6


@pytest.mark.parametrize("op", ["gemm.fp8_block", "gemm.fp8"])
def test_every_tile_gives_a_row_alone_the_bits_it_has_among_others(op: str) -> None:
    """One class: over tiles, M, and neighbours of NaN and infinity."""
    problem = product(op, 200, 300)
    arguments = draw_inputs(problem, 70, distribution="positive")
    (wanted,) = run(problem, arguments)
    for tile in every_tile(problem):
        kernel = bind(problem, tile=tile)
        assert same_bits(run(problem, arguments, kernel)[0], wanted), tile
        assert rows_that_differ(problem, lambda some, kernel=kernel: run(problem, some, kernel)) == 0


def test_strided_operands_give_the_same_bits() -> None:
    problem = product("gemm.fp8_block", 200, 300)
    x, x_scales, weight, weight_scales = draw_inputs(problem, 5)
    (plain,) = run(problem, [x, x_scales, weight, weight_scales])
    wide_x, wide_weight = torch.zeros(5, 320).to(FP8), torch.zeros(200, 333).to(FP8)
    wide_x[:, 3:303], wide_weight[:, 5:305] = x, weight
    side_by_side = torch.full((3, 8), math.nan).T[:5]
    side_by_side.copy_(x_scales)
    wide_scales = torch.full((2, 7), math.nan)
    wide_scales[:, 2:5] = weight_scales
    arguments = [wide_x[:, 3:303], side_by_side, wide_weight[:, 5:305], wide_scales[:, 2:5]]
    assert same_bits(run(problem, arguments)[0], plain)


def test_scales_that_are_not_finite_reach_their_rows_alone() -> None:
    problem = product("gemm.fp8_block", 130, 300)
    x, x_scales, weight, weight_scales = draw_inputs(problem, 9)
    (clean,) = run(problem, [x, x_scales, weight, weight_scales])
    dirty = x_scales.clone()
    dirty[0, 1], dirty[1, 0], dirty[2] = math.nan, math.inf, 0
    (out,) = run(problem, [x, dirty, weight, weight_scales])
    assert same_bits(out[3:], clean[3:])
    assert out[0].isnan().all()
    assert not out[1].isfinite().any()
    assert (out[2] == 0).all()


def test_merged_weights_give_the_bits_of_separate_ones() -> None:
    problem = product("gemm.fp8_block", 300, 256)
    x, x_scales, weight, weight_scales = draw_inputs(problem, 20)
    (merged,) = run(problem, [x, x_scales, weight, weight_scales])
    for rows, blocks in ((slice(0, 128), slice(0, 1)), (slice(128, 300), slice(1, 3))):
        part = product("gemm.fp8_block", rows.stop - rows.start, 256)
        (separate,) = run(part, [x, x_scales, weight[rows], weight_scales[blocks]])
        assert same_bits(separate, merged[:, rows])


def test_a_scale_of_another_block_is_caught() -> None:
    """Negative control: the exact comparison sees the scales of two blocks exchanged."""
    problem = product("gemm.fp8_block", 130, 300)
    arguments = whole_arguments(problem, 3)
    arguments[1][:] = torch.tensor([1.0, 2.0, 4.0])
    exact = reference(problem, arguments)[0]
    assert torch.equal(run(problem, arguments)[0].double(), exact)
    arguments[1] = arguments[1].flip(1)
    assert not torch.equal(run(problem, arguments)[0].double(), exact)
