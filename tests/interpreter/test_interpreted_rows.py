"""Norms, activations and reductions: right, in place, beside anything, and summed in the order they state.

Many rows a program, chunks in one kernel or two: the class of bits is the same, which the last part here is about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interpreted import (
    DTYPES,
    TOLERANCE,
    bind,
    draw_inputs,
    has_rows,
    implementation,
    reference,
    relative_error,
    rows_that_differ,
    run,
    same_bits,
    scalars,
    tiles,
)

from bidispatch import ops
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton import softmax
from bidispatch_backends.triton.params import RowParams, SoftmaxParams, SoftmaxTile

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rms_norm", {}),
    ("rms_norm", {"gemma": True}),
    ("fused_add_rms_norm", {}),
    ("fused_add_rms_norm", {"gemma": True}),
    ("qk_norm", {"num_heads": 4, "num_kv_heads": 2}),
    ("qk_norm", {"num_heads": 3, "num_kv_heads": 1, "gemma": True}),
    ("silu_and_mul", {}),
    ("gelu_tanh_and_mul", {}),
    ("softmax", {}),
    ("softmax", {"out_dtype": "float32"}),
    ("log_softmax", {}),
    ("log_softmax", {"out_dtype": "float32"}),
    ("token_logprob", {}),
    ("mean", {}),
    ("mean", {"out_dtype": "float32"}),
    ("sum", {}),
    ("sum", {"out_dtype": "float32"}),
]
CASE_IDS = ["-".join([op, *dims]) for op, dims in CASES]
# Wide enough for what a test does with it: several blocks, several chunks.
NARROW = {RowParams: RowParams(block=1024), SoftmaxParams: SoftmaxParams(chunk=1024)}
WIDTHS = (1, 7, 100, 1024, 5000)
IN_PLACE = ("rms_norm", "softmax", "log_softmax")


def problem_of(name: str, dtype: str, n: int, dims: dict[str, Any]) -> Problem:
    """A problem whose summed axis has n elements."""
    return ops.get(name).problem(dtype, {"head_dim" if name == "qk_norm" else "n": n, **dims})


def narrow(problem: Problem) -> Any:
    """Params under which 1500 elements are more than one block or chunk."""
    return NARROW.get(implementation(problem).params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dims"), CASES, ids=CASE_IDS)
def test_result_is_near_the_fp64_reference(name: str, dims: dict[str, Any], dtype: str) -> None:
    for n in WIDTHS:
        problem = problem_of(name, dtype, n, dims)
        for distribution in ("normal", "positive", "scaled") if n == 100 else ("normal",):
            arguments = draw_inputs(problem, 3, distribution=distribution)
            for out, exact in zip(run(problem, arguments), reference(problem, arguments), strict=True):
                # A softmax of 1 has the logarithm 0, and 0 no relative error.
                error = relative_error(out, exact) if exact.any() else float(out.double().abs().max())
                assert error < TOLERANCE[str(out.dtype).removeprefix("torch.")], (n, distribution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "dims"), CASES, ids=CASE_IDS)
def test_a_row_has_the_same_bits_alone_and_beside_anything(name: str, dims: dict[str, Any], dtype: str) -> None:
    problem = problem_of(name, dtype, 1500, dims)
    kernel = bind(problem, params=narrow(problem))
    assert rows_that_differ(problem, lambda arguments: run(problem, arguments, kernel)) == 0


def test_a_kernel_whose_sum_follows_the_batch_is_caught() -> None:
    """Negative control: the comparison above sees a width of the sum that follows the number of rows."""
    problem = ops.get("mean").problem("float32", {"n": 1500, "out_dtype": "float32"})
    kernels = {alone: bind(problem, params=RowParams(block=1024 if alone else 2048)) for alone in (True, False)}
    assert rows_that_differ(problem, lambda args: run(problem, args, kernels[len(args[0]) == 1])) > 0


@pytest.mark.parametrize(("name", "dims"), CASES, ids=CASE_IDS)
def test_rows_and_warps_of_a_program_do_not_enter_the_bits(name: str, dims: dict[str, Any]) -> None:
    """Seven rows: no number of rows a program divides them, so the last program has rows that do not exist."""
    for n, params in ((100, None), (1500, None), (1500, True)):
        problem = problem_of(name, "float32", n, dims)
        found = implementation(problem)
        chosen = narrow(problem) if params else found.params()
        if "rows" not in (found.tile.model_fields if found.tile else {}):
            pytest.skip("one row a program")
        arguments = draw_inputs(problem, 7, distribution="scaled")
        shapes = [found.tile(rows=rows, num_warps=warps) for rows, warps in ((1, 1), (2, 4), (8, 1), (4, 16))]
        results = [run(problem, arguments, bind(problem, params=chosen, tile=tile)) for tile in shapes]
        for other in results[1:]:
            assert all(same_bits(one, two) for one, two in zip(results[0], other, strict=True)), n


def tree_sum(lanes: torch.Tensor) -> torch.Tensor:
    """The order of `rows.tree_sum` in plain torch: halves until 2048 lanes are left, then adjacent pairs."""
    while lanes.shape[1] > 2048:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0]


@pytest.mark.parametrize("block", [1024, 4096, 16384])
@pytest.mark.parametrize("n", [1, 3, 1000, 1024, 3000, 9000, 20000])
def test_sum_has_the_stated_order(n: int, block: int) -> None:
    """Lanes take every `block`-th element in turn, then the tree."""
    problem = ops.get("mean").problem("float32", {"n": n})
    (x,) = draw_inputs(problem, 2, distribution="scaled")
    lanes = torch.zeros(2, block)
    for start in range(0, n, block):
        width = min(block, n - start)
        lanes[:, :width] += x[:, start : start + width]
    (out,) = run(problem, [x], bind(problem, params=RowParams(block=block)))
    assert same_bits(out, tree_sum(lanes) / n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_output_may_be_the_input(name: str, dtype: str) -> None:
    problem = ops.get(name).problem(dtype, {"n": 3000})
    x, *rest = draw_inputs(problem, 3)
    for params in (None, narrow(problem)):
        (apart,) = run(problem, [x, *rest], bind(problem, params=params))
        in_place = x.clone()
        bind(problem, params=params)(in_place, *rest, *scalars(problem), in_place)
        assert same_bits(apart, in_place)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_outputs_may_be_either_input(dtype: str, swap: bool) -> None:
    problem = ops.get("fused_add_rms_norm").problem(dtype, {"n": 5000})
    drawn_x, drawn_residual, weight = draw_inputs(problem, 3)
    for params in (None, narrow(problem)):
        kernel = bind(problem, params=params)
        out, residual_out = run(problem, [drawn_x, drawn_residual, weight], kernel)
        x, residual = drawn_x.clone(), drawn_residual.clone()
        outputs = (residual, x) if swap else (x, residual)
        kernel(x, residual, weight, *scalars(problem), *outputs)
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
    problem = problem_of(name, dtype, 130, dims)
    arguments = draw_inputs(problem, 3)
    strided = []
    for argument, per_row in zip(arguments, has_rows(problem), strict=True):
        if per_row and argument.ndim > 1:
            wide = torch.full((*argument.shape[:-1], argument.shape[-1] + 13), float("nan"), dtype=argument.dtype)
            wide[..., 5:-8] = argument
            argument = wide[..., 5:-8]
        strided.append(argument)
    for plain, other in zip(run(problem, arguments), run(problem, strided), strict=True):
        assert same_bits(plain, other)


def test_softmax_follows_torch_where_rows_are_not_finite() -> None:
    infinity = float("inf")
    x = torch.tensor([[1.0, -infinity, 2.0], [-infinity] * 3, [infinity, 0.0, 1.0], [float("nan"), 0.0, 1.0]])
    # Three chunks, of which the second or all are nothing but -inf, as a mask over a vocabulary leaves them.
    wide = torch.randn(4, 3000)
    wide[0, 1024:2048], wide[1], wide[2, 2999], wide[3, 5] = -infinity, -infinity, infinity, float("nan")
    for name, stock in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        for rows in (x, wide):
            problem = ops.get(name).problem("float32", {"n": rows.shape[1]})
            (out,) = run(problem, [rows], bind(problem, params=narrow(problem)))
            torch.testing.assert_close(out, stock(rows, dim=-1), equal_nan=True)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_activations_hold_at_the_ends_of_the_range(name: str) -> None:
    gate = torch.tensor([[-1e30, -1e4, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e4, 1e30]])
    problem = ops.get(name).problem("float32", {"n": gate.shape[1]})
    (out,) = run(problem, [torch.cat([gate, torch.ones_like(gate)], dim=1)])
    expected = torch.where(gate > 1, gate, torch.where(gate.abs() < 1, gate / 2, torch.zeros(())))
    torch.testing.assert_close(out, expected)


# -- one class: the same bits by another way -----------------------------------------------------------------------


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normed_as_rows_are(dtype: str, gemma: bool) -> None:
    """`qk_norm` of slices of a packed row, of the same class as `rms_norm`, gives its bits for each head."""
    for head_dim in (64, 80, 128, 1500):
        heads = {"num_heads": 4, "num_kv_heads": 2}
        problem = ops.get("qk_norm").problem(dtype, {"head_dim": head_dim, "gemma": gemma, **heads})
        one = ops.get("rms_norm").problem(dtype, {"n": head_dim, "gemma": gemma})
        assert label(problem) == label(one)
        q, k, q_weight, k_weight = draw_inputs(problem, 5)
        assert not q.is_contiguous()
        for tile in tiles(problem):
            outputs = run(problem, [q, k, q_weight, k_weight], bind(problem, tile=tile))
            for x, weight, out in zip((q, k), (q_weight, k_weight), outputs, strict=True):
                (expected,) = run(one, [x.reshape(-1, head_dim), weight])
                assert same_bits(out.view(-1, head_dim), expected)


def label(problem: Problem) -> str:
    found = implementation(problem)
    return found.numerics(found.params(), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 100, 1024, 1025, 5000])
def test_a_tokens_logprob_is_that_of_log_softmax(n: int, dtype: str) -> None:
    """Of the same class, the same bits, whether one program has the row or the last of several."""
    whole = ops.get("log_softmax").problem(dtype, {"n": n, "out_dtype": "float32"})
    one = ops.get("token_logprob").problem(dtype, {"n": n})
    assert label(whole) == label(one)
    x, token_ids = draw_inputs(one, 9, distribution="scaled")
    for params in (SoftmaxParams(chunk=1024), SoftmaxParams()):
        (rows,) = run(whole, [x], bind(whole, params=params))
        kernel = bind(one, params=params)
        for _ in range(2):  # the second finds the workspace as the first has left it
            (out,) = run(one, [x, token_ids], kernel)
            assert same_bits(out, rows.gather(1, token_ids[:, None])[:, 0])


@pytest.mark.parametrize("chunk", [1024, 4096])
def test_a_token_outside_of_the_vocabulary_gives_nan_and_leaves_the_others(chunk: int) -> None:
    problem = ops.get("token_logprob").problem("float32", {"n": 3000})
    kernel = bind(problem, params=SoftmaxParams(chunk=chunk))
    x, token_ids = draw_inputs(problem, 6)
    (expected,) = run(problem, [x, token_ids], kernel)
    token_ids[1], token_ids[3], token_ids[4] = -1, 3000, 2**40
    (out,) = run(problem, [x, token_ids], kernel)
    assert out.isnan().tolist() == [False, True, False, True, True, False]
    assert same_bits(out[::2][:2], expected[::2][:2])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("n", [1025, 3000, 9001])
def test_a_row_has_the_stated_sum_of_its_chunks(n: int, name: str) -> None:
    """Each chunk from its own maximum, then scaled to the row's: as a program that walks the chunks would do it."""
    chunk = 1024
    problem = ops.get(name).problem("float32", {"n": n})
    (x,) = draw_inputs(problem, 3, distribution="scaled")
    places = 1 << (-(-n // chunk) - 1).bit_length()
    padded = torch.full((3, places * chunk), -float("inf"))
    padded[:, :n] = x
    maxima = padded.view(3, places, chunk).amax(-1)
    log2_e = torch.tensor(1.4426950408889634)
    totals = torch.zeros(3, places)
    for index in range(-(-n // chunk)):
        part = padded[:, index * chunk : (index + 1) * chunk]
        totals[:, index] = tree_sum(exp2((part - maxima[:, index, None]) * log2_e))
    maximum = maxima.amax(-1, keepdim=True)
    total = tree_sum(totals * exp2((maxima - maximum) * log2_e))[:, None]
    if name == "softmax":
        expected = exp2((x - maximum) * log2_e) * (1.0 / total)
    else:
        expected = x - maximum - torch.from_numpy(np.log(total.numpy()))
    (out,) = run(problem, [x], bind(problem, params=SoftmaxParams(chunk=chunk)))
    assert same_bits(out, expected)


def exp2(x: torch.Tensor) -> torch.Tensor:
    """As the interpreter computes it."""
    return torch.from_numpy(np.exp2(x.numpy()))


def test_chunks_that_follow_the_batch_are_caught() -> None:
    """Negative control: a width of the chunks that follows the number of rows."""
    problem = ops.get("softmax").problem("float32", {"n": 3000})
    kernels = {alone: bind(problem, params=SoftmaxParams(chunk=1024 if alone else 4096)) for alone in (True, False)}
    assert rows_that_differ(problem, lambda args: run(problem, args, kernels[len(args[0]) == 1])) > 0


@pytest.mark.parametrize("name", ["softmax", "token_logprob"])
def test_a_call_with_more_rows_than_the_workspace_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ops.get(name).problem("float32", {"n": 1500})
    arguments = draw_inputs(problem, 7)
    params = SoftmaxParams(chunk=1024)
    (whole,) = run(problem, arguments, bind(problem, params=params))
    monkeypatch.setattr(softmax, "_WORKSPACE_ROWS", 3)
    (cut,) = run(problem, arguments, bind(problem, params=params))
    assert same_bits(whole, cut)


def test_chunks_do_not_wait_where_programs_run_one_after_the_other() -> None:
    """A tile that asks for the joint kernel takes the two others on a device that does not hold all chunks at once."""
    problem = ops.get("softmax").problem("float32", {"n": 1500})
    arguments = draw_inputs(problem, 3)
    both = [
        run(problem, arguments, bind(problem, params=SoftmaxParams(chunk=1024), tile=tile))[0]
        for tile in (SoftmaxTile(num_warps=4, joint=True), SoftmaxTile(num_warps=4))
    ]
    assert same_bits(*both)
