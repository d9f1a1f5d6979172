"""Norms, activations and reductions: right, in place, beside anything, and summed in the order they state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import (
    DTYPES,
    TOLERANCE,
    bind,
    draw_inputs,
    implementation,
    reference,
    relative_error,
    run,
    same_bits,
    scalars,
)

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton.params import RowParams, RowTile

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rms_norm", {}),
    ("rms_norm", {"gemma": True}),
    ("fused_add_rms_norm", {}),
    ("fused_add_rms_norm", {"gemma": True}),
    ("silu_and_mul", {}),
    ("gelu_tanh_and_mul", {}),
    ("softmax", {}),
    ("softmax", {"out_dtype": "float32"}),
    ("log_softmax", {}),
    ("log_softmax", {"out_dtype": "float32"}),
    ("mean", {}),
    ("mean", {"out_dtype": "float32"}),
    ("sum", {}),
    ("sum", {"out_dtype": "float32"}),
]
CASE_IDS = ["-".join([op, *dims]) for op, dims in CASES]
WIDTHS = (1, 7, 100, 1024, 5000)
IN_PLACE = ("rms_norm", "softmax", "log_softmax")


def rows_of(arguments: list[Any], rows: Any) -> list[Any]:
    """The same arguments with some of the rows: weights have one axis and stay."""
    return [argument[rows] if argument.ndim == 2 else argument for argument in arguments]


def rows_that_differ(problem: Problem, run_rows: Callable[[list[Any]], list[torch.Tensor]], rows: int = 5) -> int:
    """How many rows have other bits alone than among NaN, infinity and the other rows."""
    arguments = draw_inputs(problem, rows)
    together = run_rows(arguments)
    dirty = [argument.clone() for argument in arguments]
    for argument in dirty:
        if argument.ndim == 2:
            argument[0], argument[2] = float("nan"), float("inf")
    beside = run_rows(dirty)
    differ = 0
    for row in range(rows):
        alone = run_rows(rows_of(arguments, slice(row, row + 1)))
        same = all(same_bits(a[0], t[row]) for a, t in zip(alone, together, strict=True))
        if row not in (0, 2):
            same = same and all(same_bits(a[0], b[row]) for a, b in zip(alone, beside, strict=True))
        differ += not same
    return differ


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dims"), CASES, ids=CASE_IDS)
def test_result_is_near_the_fp64_reference(name: str, dims: dict[str, Any], dtype: str) -> None:
    for n in WIDTHS:
        problem = ops.get(name).problem(dtype, {"n": n, **dims})
        for distribution in ("normal", "positive", "scaled") if n == 100 else ("normal",):
            arguments = draw_inputs(problem, 3, distribution=distribution)
            for out, exact in zip(run(problem, arguments), reference(problem, arguments), strict=True):
                # A softmax of 1 has the logarithm 0, and 0 no relative error.
                error = relative_error(out, exact) if exact.any() else float(out.double().abs().max())
                assert error < TOLERANCE[dtype], (n, distribution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dims"), CASES, ids=CASE_IDS)
def test_a_row_has_the_same_bits_alone_and_beside_anything(name: str, dims: dict[str, Any], dtype: str) -> None:
    problem = ops.get(name).problem(dtype, {"n": 1500, **dims})
    params = RowParams(block=1024) if implementation(problem).params is RowParams else None
    kernel = bind(problem, params=params)
    assert rows_that_differ(problem, lambda arguments: run(problem, arguments, kernel)) == 0


def test_a_kernel_whose_sum_follows_the_batch_is_caught() -> None:
    """Negative control: the comparison above sees a width of the sum that follows the number of rows."""
    problem = ops.get("mean").problem("float32", {"n": 1500, "out_dtype": "float32"})
    kernels = {alone: bind(problem, params=RowParams(block=1024 if alone else 2048)) for alone in (True, False)}
    assert rows_that_differ(problem, lambda args: run(problem, args, kernels[len(args[0]) == 1])) > 0


def test_warps_do_not_enter_the_order_of_a_sum() -> None:
    problem = ops.get("mean").problem("float32", {"n": 777})
    arguments = draw_inputs(problem, 4, distribution="scaled")
    results = [run(problem, arguments, bind(problem, tile=RowTile(num_warps=warps)))[0] for warps in (1, 4, 16)]
    assert all(same_bits(results[0], other) for other in results)


@pytest.mark.parametrize("n", [1, 3, 1000, 1024, 3000])
def test_sum_has_the_stated_order(n: int) -> None:
    """Lanes take every 1024th element in turn, then adjacent pairs are added."""
    problem = ops.get("mean").problem("float32", {"n": n})
    (x,) = draw_inputs(problem, 2, distribution="scaled")
    lanes = torch.zeros(2, 1024)
    for start in range(0, n, 1024):
        width = min(1024, n - start)
        lanes[:, :width] += x[:, start : start + width]
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    (out,) = run(problem, [x], bind(problem, params=RowParams(block=1024)))
    assert same_bits(out, lanes[:, 0] / n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_output_may_be_the_input(name: str, dtype: str) -> None:
    problem = ops.get(name).problem(dtype, {"n": 3000})
    x, *rest = draw_inputs(problem, 3)
    (apart,) = run(problem, [x, *rest])
    in_place = x.clone()
    bind(problem)(in_place, *rest, *scalars(problem), in_place)
    assert same_bits(apart, in_place)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_outputs_may_be_either_input(dtype: str, swap: bool) -> None:
    problem = ops.get("fused_add_rms_norm").problem(dtype, {"n": 5000})
    x, residual, weight = draw_inputs(problem, 3)
    out, residual_out = run(problem, [x, residual, weight])
    x, residual = x.clone(), residual.clone()
    outputs = (residual, x) if swap else (x, residual)
    bind(problem)(x, residual, weight, *scalars(problem), *outputs)
    assert same_bits(out, outputs[0])
    assert same_bits(residual_out, outputs[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_norm_reads_the_rounded_residual(dtype: str) -> None:
    fused = ops.get("fused_add_rms_norm").problem(dtype, {"n": 300})
    x, residual, weight = draw_inputs(fused, 4)
    out, residual_out = run(fused, [x, residual, weight])
    assert same_bits(residual_out, x + residual)
    assert same_bits(out, run(ops.get("rms_norm").problem(dtype, {"n": 300}), [x + residual, weight])[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dims"), CASES, ids=CASE_IDS)
def test_strided_rows_give_the_same_bits(name: str, dims: dict[str, Any], dtype: str) -> None:
    problem = ops.get(name).problem(dtype, {"n": 130, **dims})
    arguments = draw_inputs(problem, 3)
    strided = []
    for argument in arguments:
        if argument.ndim == 2:
            wide = torch.full((3, argument.shape[1] + 13), float("nan"), dtype=argument.dtype)
            wide[:, 5:-8] = argument
            argument = wide[:, 5:-8]
        strided.append(argument)
    for plain, other in zip(run(problem, arguments), run(problem, strided), strict=True):
        assert same_bits(plain, other)


def test_softmax_follows_torch_where_rows_are_not_finite() -> None:
    infinity = float("inf")
    x = torch.tensor([[1.0, -infinity, 2.0], [-infinity] * 3, [infinity, 0.0, 1.0], [float("nan"), 0.0, 1.0]])
    for name, stock in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        (out,) = run(ops.get(name).problem("float32", {"n": 3}), [x])
        torch.testing.assert_close(out, stock(x, dim=-1), equal_nan=True)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_activations_hold_at_the_ends_of_the_range(name: str) -> None:
    gate = torch.tensor([[-1e30, -1e4, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e4, 1e30]])
    problem = ops.get(name).problem("float32", {"n": gate.shape[1]})
    (out,) = run(problem, [torch.cat([gate, torch.ones_like(gate)], dim=1)])
    expected = torch.where(gate > 1, gate, torch.where(gate.abs() < 1, gate / 2, torch.zeros(())))
    torch.testing.assert_close(out, expected)
