"""The `torch_cpu` kernels: a row's bits alone, in any batch, at any place, beside anything; and near the reference."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.invariance import Invariance
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.draw import DISTRIBUTIONS
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Registry
from bidispatch.runtime.context import BindContext, Kernel, Limits
from bidispatch_backends.torch_cpu import register

FLOAT_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}
DTYPES = tuple(TOLERANCE)
ROWS = 75  # more than two blocks of every op's
SIZES = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65)  # the edges of blocks, and what torch treats apart
PLACES = (0, 1, 5, 10)
OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemm": ("gemm", {"n": 48, "k": 200}),
    "gemm-bias": ("gemm", {"n": 33, "k": 77, "bias": True}),
    "gemm-fp32-out": ("gemm", {"n": 48, "k": 200, "bias": True, "out_dtype": "float32"}),
    "gemm-deep": ("gemm", {"n": 256, "k": 1024}),
    "gemm-narrow": ("gemm", {"n": 11, "k": 219}),
    "gemm-one-column": ("gemm", {"n": 1, "k": 64}),
    "bmm": ("bmm", {"n": 40, "k": 72}),
    "bmm-narrow": ("bmm", {"n": 11, "k": 202}),
    "rms_norm": ("rms_norm", {"n": 256}),
    "rms_norm-gemma": ("rms_norm", {"n": 100, "gemma": True}),
    "rms_norm-long": ("rms_norm", {"n": 9000}),
    "fused_add_rms_norm": ("fused_add_rms_norm", {"n": 257}),
    "qk_norm": ("qk_norm", {"head_dim": 80, "num_heads": 4, "num_kv_heads": 2}),
    "qk_norm-gemma": ("qk_norm", {"head_dim": 33, "num_heads": 3, "num_kv_heads": 1, "gemma": True}),
    "silu_and_mul": ("silu_and_mul", {"n": 300}),
    "silu_and_mul-long": ("silu_and_mul", {"n": 9000}),
    "gelu_tanh_and_mul": ("gelu_tanh_and_mul", {"n": 33}),
    "gelu_tanh_and_mul-long": ("gelu_tanh_and_mul", {"n": 9000}),
    "softmax": ("softmax", {"n": 1000}),
    "softmax-one": ("softmax", {"n": 1}),
    "log_softmax": ("log_softmax", {"n": 1000, "out_dtype": "float32"}),
    "log_softmax-long": ("log_softmax", {"n": 40001}),
    "token_logprob": ("token_logprob", {"n": 1000}),
    "token_logprob-long": ("token_logprob", {"n": 40001}),
    "mean": ("mean", {"n": 1000}),
    "mean-long": ("mean", {"n": 40001}),
    "sum": ("sum", {"n": 1000}),
    "sum-long": ("sum", {"n": 40001}),
}

HEADS = {"head_dim": 32, "num_heads": 8, "num_kv_heads": 2}
ATTENTION: dict[str, dict[str, Any]] = {
    "grouped": HEADS,
    "head_dim-80": {**HEADS, "head_dim": 80, "num_heads": 6, "page_size": 5},
    "one-head-each": {**HEADS, "num_kv_heads": 8, "page_size": 1},
    "one-kv-head": {**HEADS, "num_heads": 24, "num_kv_heads": 1, "page_size": 256},
    "many-kv-heads": {"head_dim": 11, "num_heads": 20, "num_kv_heads": 10},
    "window": {**HEADS, "window": 70},
    "narrow-window": {**HEADS, "window": 1},
    "softcap": {**HEADS, "softcap": 3.0},
    "sinks": {**HEADS, "sinks": True},
    "alibi": {**HEADS, "alibi": True},
    "fp8": {**HEADS, "kv_dtype": "float8_e4m3fn"},
    "alibi, fp8, sinks": {**HEADS, "window": 90, "alibi": True, "sinks": True, "kv_dtype": "float8_e4m3fn"},
    "everything": {**HEADS, "window": 200, "softcap": 3.0, "sinks": True, "page_size": 7},
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry()
    register(registry)
    return registry


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small calls spend their time waiting for threads, the more so beside other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[2, 3, 8])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    """Thread counts that share a loop's elements evenly and unevenly."""
    torch.set_num_threads(request.param)
    return int(request.param)


class Comparisons:
    """Compares bits row by row and counts both the rows compared and those that differ."""

    def __init__(self) -> None:
        self.made = 0
        self.differ = 0

    def rows(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert got.shape == wanted.shape
        assert got.dtype is wanted.dtype
        bits = FLOAT_BITS[got.dtype]
        differ = got.contiguous().view(bits) != wanted.contiguous().view(bits)
        self.made += len(got)
        self.differ += int(differ.flatten(1).any(1).sum() if differ.ndim > 1 else differ.sum())

    def check(self, made: int) -> None:
        assert self.made == made > 0
        assert self.differ == 0, f"{self.differ} of {self.made} rows differ"


def load(path: str) -> Callable[..., Any]:
    module, attribute = path.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def bind(registry: Registry, problem: Problem, **params: Any) -> Kernel:
    """Bind a kernel with some of its params set, also to what the schema refuses: the controls break the promise."""
    (implementation,) = registry.find("cpu", problem.op, problem.dtype)
    limits = Limits(max_tokens=512, max_seqs=64, max_seq_len=1024)
    context = BindContext(Device.parse("cpu"), problem, implementation.params.model_construct(**params), None, limits)
    kernel: Kernel = load(implementation.load)(context)
    return kernel


def problem_of(case: str, dtype: str) -> Problem:
    op, dims = OPS[case]
    return ops.get(op).problem(dtype, dims)


def arguments_of(problem: Problem, rows: int = ROWS, **options: Any) -> list[Any]:
    arguments: list[Any] = load(ops.get(problem.op).inputs)(problem, rows, **options)
    return arguments


def batch_of(problem: Problem, *lengths: Any, **options: Any) -> list[Any]:
    return paged_batch(problem, *lengths, **options)


def row_axis(problem: Problem, shape: Sequence[str | int]) -> int | None:
    return shape.index("m") if "m" in shape else None


def take(problem: Problem, arguments: Sequence[Any], rows: Any) -> list[Any]:
    """The arguments of a call on some of the rows."""
    chosen = []
    for entry, value in zip(ops.get(problem.op).arguments, arguments, strict=True):
        axis = row_axis(problem, entry.shape)
        chosen.append(value if axis is None or value is None else value[(slice(None),) * axis + (rows,)])
    return chosen


def run(kernel: Kernel, problem: Problem, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Call a kernel with poisoned outputs; return them with the rows as their first axis."""
    op = ops.get(problem.op)
    sizes: dict[str, int] = {}
    for entry, value in zip(op.arguments, arguments, strict=True):
        if value is not None:
            sizes.update(zip(map(str, entry.shape), value.shape, strict=True))
    outputs = []
    for entry in op.outputs:
        shape = [problem.size(str(name)) if name in problem.dims else sizes[str(name)] for name in entry.shape]
        dtype = dtype_of(problem, entry.dtype)
        outputs.append(torch.full(shape, float("nan"), dtype=dtype))
    kernel(*arguments, *(scalar.default_for(problem) for scalar in op.scalars), *outputs)
    axes = [row_axis(problem, entry.shape) or 0 for entry in op.outputs]
    return [output.movedim(axis, 0) for output, axis in zip(outputs, axes, strict=True)]


def dtype_of(problem: Problem, declared: str) -> torch.dtype:
    """The dtype of an output that the catalogue declares so."""
    name = problem.dtype if declared == "dtype" else problem.dims.get(declared, declared)
    dtype: torch.dtype = getattr(torch, str(name))
    return dtype


def compare_places(kernel_for: Callable[[int], Kernel], problem: Problem, arguments: Sequence[Any]) -> Comparisons:
    """Rows of the whole batch against the same rows in calls of other sizes, from other rows on."""
    comparisons = Comparisons()
    wanted = run(kernel_for(ROWS), problem, arguments)
    for rows in SIZES:
        for first in PLACES:
            part = slice(first, first + rows)
            got = run(kernel_for(rows), problem, take(problem, arguments, part))
            for output, reference in zip(got, wanted, strict=True):
                comparisons.rows(output, reference[part])
    return comparisons


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


# -- products and row ops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    # Long rows are summed in fp32 whatever the dtype, and torch's fp16 products are slow.
    [(case, dtype) for case in OPS for dtype in DTYPES if dtype == "float32" or not case.endswith(("long", "deep"))],
)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place(registry: Registry, case: str, dtype: str) -> None:
    problem = problem_of(case, dtype)
    kernel = bind(registry, problem)
    outputs = len(ops.get(problem.op).outputs)
    comparisons = compare_places(lambda rows: kernel, problem, arguments_of(problem))
    comparisons.check(outputs * len(PLACES) * sum(SIZES))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS[1:])
@pytest.mark.parametrize("case", [case for case in OPS if not case.endswith("long")])
def test_other_distributions_keep_their_bits_too(registry: Registry, case: str, distribution: str) -> None:
    problem = problem_of(case, "float32")
    kernel = bind(registry, problem)
    arguments = arguments_of(problem, distribution=distribution)
    comparisons = Comparisons()
    wanted = run(kernel, problem, arguments)
    for row in (0, 1, 15, 16, 40, ROWS - 1):
        got = run(kernel, problem, take(problem, arguments, slice(row, row + 1)))
        for output, reference in zip(got, wanted, strict=True):
            comparisons.rows(output, reference[row : row + 1])
    comparisons.check(6 * len(wanted))


@pytest.mark.parametrize(
    "case", ["gemm", "gemm-bias", "bmm", "rms_norm-long", "silu_and_mul", "gelu_tanh_and_mul", "softmax", "mean-long"]
)
def test_no_thread_count_makes_the_place_matter(registry: Registry, case: str, threads: int) -> None:
    problem = problem_of(case, "float32")
    kernel = bind(registry, problem)
    arguments = arguments_of(problem)
    (wanted,) = run(kernel, problem, arguments)
    comparisons = Comparisons()
    for row in (0, 1, 31, ROWS - 1):
        comparisons.rows(run(kernel, problem, take(problem, arguments, slice(row, None)))[0], wanted[row:])
    comparisons.check(4 * ROWS - (0 + 1 + 31 + 74))


@pytest.mark.parametrize("case", OPS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_the_neighbours_hold_does_not_matter(registry: Registry, case: str, poison: float) -> None:
    problem = problem_of(case, "float32")
    kernel = bind(registry, problem)
    arguments = arguments_of(problem, 20)
    wanted = run(kernel, problem, arguments)
    comparisons = Comparisons()
    for row in (0, 7, 19):
        poisoned = []
        for entry, value in zip(ops.get(problem.op).arguments, arguments, strict=True):
            axis = row_axis(problem, entry.shape)
            if value is not None and axis is not None and value.is_floating_point():
                kept = value.movedim(axis, 0)[row].clone()
                value = torch.full_like(value, poison)
                value.movedim(axis, 0)[row] = kept
            poisoned.append(value)
        for output, reference in zip(run(kernel, problem, poisoned), wanted, strict=True):
            comparisons.rows(output[row : row + 1], reference[row : row + 1])
    for output, reference in zip(run(kernel, problem, arguments), wanted, strict=True):
        comparisons.rows(output, reference)  # nothing of it stays in the workspace
    comparisons.check(23 * len(wanted))


@pytest.mark.parametrize("case", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strides_and_alignment_do_not_matter(registry: Registry, case: str, dtype: str) -> None:
    problem = problem_of(case, dtype)
    kernel = bind(registry, problem)
    arguments = arguments_of(problem, 20)
    wanted = run(kernel, problem, arguments)
    moved: list[torch.Tensor | None] = []
    for value in arguments:
        if value is None or not value.is_floating_point():
            moved.append(value)
            continue
        wide = torch.full((*value.shape[:-1], value.shape[-1] + 3), float("nan"), dtype=value.dtype)
        view = wide[..., 1 : 1 + value.shape[-1]]
        view.copy_(value)
        moved.append(view)
    comparisons = Comparisons()
    for rows in (slice(0, 20), slice(3, 4), slice(2, 19)):
        for output, reference in zip(run(kernel, problem, take(problem, moved, rows)), wanted, strict=True):
            comparisons.rows(output, reference[rows])
    comparisons.check(38 * len(wanted))


@pytest.mark.parametrize("case", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_near_the_reference(registry: Registry, case: str, dtype: str) -> None:
    problem = problem_of(case, dtype)
    op = ops.get(problem.op)
    for distribution in DISTRIBUTIONS:
        arguments = arguments_of(problem, 21, distribution=distribution)
        got = run(bind(registry, problem), problem, arguments)
        scalars = (scalar.default_for(problem) for scalar in op.scalars)
        wanted = load(op.reference)(problem, *arguments, *scalars)
        for entry, value, reference in zip(op.outputs, got, wanted, strict=True):
            assert value.dtype is dtype_of(problem, entry.dtype)
            reference = reference.movedim(row_axis(problem, entry.shape) or 0, 0)
            tolerance = TOLERANCE[str(value.dtype).removeprefix("torch.")]
            assert relative_error(value, reference) < tolerance


def test_a_bias_is_added_before_the_result_is_rounded(registry: Registry) -> None:
    for dtype in ("bfloat16", "float16"):
        problem = ops.get("gemm").problem(dtype, {"n": 200, "k": 64, "bias": True})
        x, weight, bias = arguments_of(problem, 40)
        (got,) = run(bind(registry, problem), problem, [x, weight, bias])
        (exact,) = load(ops.get("gemm").reference)(problem, x, weight, bias)
        rounded_twice = (exact - bias.double()).to(got.dtype) + bias
        assert int((got != exact.to(got.dtype)).sum()) < 0.01 * got.numel()
        assert int((rounded_twice != exact.to(got.dtype)).sum()) > 0.05 * got.numel()


def test_outputs_may_be_strided_or_the_inputs_themselves(registry: Registry) -> None:
    problem = ops.get("fused_add_rms_norm").problem("bfloat16", {"n": 96})
    kernel = bind(registry, problem)
    x, residual, weight = arguments_of(problem)
    wanted = run(kernel, problem, [x, residual, weight])
    kernel(x, residual, weight, 1e-6, x, residual)
    gemm = ops.get("gemm").problem("float32", {"n": 48, "k": 96})
    arguments = arguments_of(gemm)
    wide = torch.full((ROWS, 60), float("nan"))
    bind(registry, gemm)(*arguments, wide[:, 5:53])
    comparisons = Comparisons()
    comparisons.rows(x, wanted[0])
    comparisons.rows(residual, wanted[1])
    comparisons.rows(wide[:, 5:53], run(bind(registry, gemm), gemm, arguments)[0])
    comparisons.check(3 * ROWS)
    assert bool(wide[:, :5].isnan().all())
    assert bool(wide[:, 53:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_weight_gives_the_bits_of_its_parts(registry: Registry, dtype: str) -> None:
    merged = ops.get("gemm").problem(dtype, {"n": 160, "k": 320})
    x, weight, _ = arguments_of(merged)
    (wanted,) = run(bind(registry, merged), merged, [x, weight, None])
    comparisons = Comparisons()
    for columns in (slice(0, 96), slice(96, 128), slice(128, 160)):
        part = ops.get("gemm").problem(dtype, {"n": columns.stop - columns.start, "k": 320})
        kernel = bind(registry, part)
        for values in (weight[columns], weight[columns].clone()):
            comparisons.rows(run(kernel, part, [x, values, None])[0], wanted[:, columns])
    comparisons.check(6 * ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_of_one_class_give_the_same_bits(registry: Registry, dtype: str) -> None:
    """Heads are normed as rows are, and a token's logprob is that of log_softmax."""
    comparisons = Comparisons()
    heads = ops.get("qk_norm").problem(dtype, {"head_dim": 80, "num_heads": 4, "num_kv_heads": 2})
    rows = ops.get("rms_norm").problem(dtype, {"n": 80})
    q, k, q_weight, k_weight = arguments_of(heads)
    got = run(bind(registry, heads), heads, [q, k, q_weight, k_weight])
    for x, weight, output in zip((q, k), (q_weight, k_weight), got, strict=True):
        (wanted,) = run(bind(registry, rows), rows, [x.reshape(-1, 80), weight])
        comparisons.rows(output.reshape(-1, 80), wanted)
    one = ops.get("token_logprob").problem(dtype, {"n": 1003})
    every = ops.get("log_softmax").problem(dtype, {"n": 1003, "out_dtype": "float32"})
    x, token_ids = arguments_of(one)
    (wanted,) = run(bind(registry, every), every, [x])
    (picked,) = run(bind(registry, one), one, [x, token_ids])
    comparisons.rows(picked, wanted.gather(1, token_ids[:, None])[:, 0])
    comparisons.check(ROWS * (4 + 2 + 1))
    for found, other in ((heads, rows), (one, every)):
        labels = set()
        for problem in (found, other):
            (implementation,) = registry.find("cpu", problem.op, problem.dtype)
            labels.add(implementation.numerics(implementation.params(), problem))
        assert len(labels) == 1


def test_a_token_outside_of_the_vocabulary_gives_nan_and_leaves_the_others(registry: Registry) -> None:
    problem = ops.get("token_logprob").problem("float32", {"n": 100})
    x, token_ids = arguments_of(problem, 5)
    (wanted,) = run(bind(registry, problem), problem, [x, token_ids])
    token_ids[1], token_ids[3] = -1, 100
    (got,) = run(bind(registry, problem), problem, [x, token_ids])
    assert got.isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(got[::2], wanted[::2])
    (exact,) = load(ops.get("token_logprob").reference)(problem, x, token_ids)
    assert torch.equal(exact.isnan(), got.isnan())


def test_a_kernel_bound_in_inference_mode_runs_outside_it(registry: Registry) -> None:
    for case in ("gemm", "mean"):
        problem = problem_of(case, "float32")
        with torch.inference_mode():
            kernel = bind(registry, problem)
        arguments = arguments_of(problem)
        with torch.inference_mode():
            inside = run(kernel, problem, arguments)[0].clone()
        comparisons = Comparisons()
        comparisons.rows(run(kernel, problem, arguments)[0], inside)
        comparisons.check(ROWS)


@pytest.mark.parametrize("case", ["gemm", "gemm-deep"])
def test_control_a_product_whose_block_follows_the_batch_is_caught(registry: Registry, case: str) -> None:
    problem = problem_of(case, "float32")
    comparisons = compare_places(lambda rows: bind(registry, problem, rows=rows), problem, arguments_of(problem))
    assert comparisons.differ > 0


@pytest.mark.parametrize("case", ["mean", "rms_norm"])
def test_control_a_sum_whose_pieces_follow_the_batch_are_caught(registry: Registry, case: str) -> None:
    problem = problem_of(case, "float32")
    comparisons = compare_places(
        lambda rows: bind(registry, problem, block=64 * (1 + rows % 3)), problem, arguments_of(problem)
    )
    assert comparisons.differ > 0


# -- attention ---------------------------------------------------------------------------------------------------


def attend(kernel: Kernel, problem: Problem, batch: Sequence[Any]) -> torch.Tensor:
    out = torch.full_like(batch[0], float("nan"))
    kernel(*batch, problem.size("head_dim") ** -0.5, out)
    return out


def attention_of(dims: dict[str, Any], dtype: str = "float32") -> Problem:
    return ops.get("attention").problem(dtype, dims)


def compare_chunks(kernel_for: Callable[[int], Kernel], problem: Problem) -> Comparisons:
    """Sequence 7, 300 positions in one prefill alone, against itself in chunks, decodes, other batches and pages."""
    whole = attend(kernel_for(300), problem, batch_of(problem, [300], [300], sequence_seeds=[7]))
    comparisons = Comparisons()
    for edges in ((0, 1, 2, 130, 300), (0, 64, 127, 128, 129, 257, 300), (0, 299, 300)):
        for first, stop in pairwise(edges):
            batch = batch_of(
                problem,
                [5, stop - first, 0, 1],
                [5, stop, 0, 90],
                sequence_seeds=[1, 7, 2, 3],
                page_seed=stop,
                max_pages=320,
            )
            comparisons.rows(attend(kernel_for(stop - first), problem, batch)[5:-1], whole[first:stop])
    positions = [*range(0, 300, 23), 63, 64, 126, 127, 128, 255, 256, 299]
    decodes = batch_of(problem, [1] * len(positions), [p + 1 for p in positions], sequence_seeds=[7] * len(positions))
    comparisons.rows(attend(kernel_for(1), problem, decodes), whole[positions])
    return comparisons


@pytest.mark.parametrize("case", ATTENTION)
def test_prefill_chunks_and_decodes_have_the_same_bits(registry: Registry, case: str) -> None:
    problem = attention_of(ATTENTION[case])
    kernel = bind(registry, problem)
    compare_chunks(lambda rows: kernel, problem).check(3 * 300 + 14 + 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefill_chunks_and_decodes_agree_in_half_precision(registry: Registry, dtype: str) -> None:
    problem = attention_of(ATTENTION["everything"], dtype)
    kernel = bind(registry, problem)
    compare_chunks(lambda rows: kernel, problem).check(3 * 300 + 14 + 8)


def test_no_thread_count_makes_prefill_and_decode_differ(registry: Registry, threads: int) -> None:
    problem = attention_of({**ATTENTION["many-kv-heads"], "softcap": 3.0})
    kernel = bind(registry, problem)
    compare_chunks(lambda rows: kernel, problem).check(3 * 300 + 14 + 8)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS[1:])
def test_attention_keeps_its_bits_with_other_distributions(registry: Registry, distribution: str) -> None:
    problem = attention_of(HEADS)
    kernel = bind(registry, problem)
    options = {"sequence_seeds": [7], "distribution": distribution}
    whole = attend(kernel, problem, batch_of(problem, [200], [200], **options))
    comparisons = Comparisons()
    for kv in (1, 128, 129, 200):
        comparisons.rows(attend(kernel, problem, batch_of(problem, [1], [kv], **options)), whole[kv - 1 : kv])
    comparisons.check(4)


def test_attention_over_all_positions_is_free_of_the_batch_and_the_chunk(registry: Registry) -> None:
    problem = attention_of({**HEADS, "causal": False})
    kernel = bind(registry, problem)
    whole = attend(kernel, problem, batch_of(problem, [200], [200], sequence_seeds=[7]))
    comparisons = Comparisons()
    for queries in (1, 5, 128, 199):
        batch = batch_of(problem, [3, queries, 1], [3, 200, 40], sequence_seeds=[1, 7, 2], page_seed=queries)
        comparisons.rows(attend(kernel, problem, batch)[3:-1], whole[-queries:])
    comparisons.check(1 + 5 + 128 + 199)


def test_page_size_and_page_order_do_not_matter(registry: Registry) -> None:
    comparisons = Comparisons()
    wanted = None
    for page_size in (1, 16, 33, 300):
        problem = attention_of({**HEADS, "page_size": page_size})
        kernel = bind(registry, problem)
        for order in ("ascending", "shuffled"):
            batch = batch_of(problem, [9, 20], [220, 20], page_order=order)
            got = attend(kernel, problem, batch)
            wanted = got if wanted is None else wanted
            comparisons.rows(got, wanted)
            split = torch.stack([batch[1], batch[2]], dim=1)  # keys and values of a page side by side, as vLLM has them
            comparisons.rows(attend(kernel, problem, [batch[0], split[:, 0], split[:, 1], *batch[3:]]), wanted)
    comparisons.check(16 * 29)


def test_strided_queries_and_outputs_do_not_matter(registry: Registry) -> None:
    problem = attention_of(HEADS)
    kernel = bind(registry, problem)
    q, *rest = batch_of(problem, [20, 1], [150, 60])
    wanted = attend(kernel, problem, [q, *rest])
    merged = torch.full((21, 14, 33), float("nan"))  # queries beside keys and values, and not aligned
    merged[:, :8, 1:] = q
    kernel(merged[:, :8, 1:], *rest, problem.size("head_dim") ** -0.5, out := torch.zeros(21, 9, 40)[:, 1:, 3:35])
    comparisons = Comparisons()
    comparisons.rows(out, wanted)
    comparisons.check(21)


def test_sequences_full_of_nan_do_not_reach_their_neighbours(registry: Registry) -> None:
    problem = attention_of(ATTENTION["everything"])
    kernel = bind(registry, problem)
    batch = batch_of(problem, [30, 4, 1], [130, 4, 50], padding_rows=3)
    wanted = attend(kernel, problem, batch)
    assert bool(wanted[:-3].isfinite().all())
    assert bool(wanted[-3:].isnan().all()), "rows that no sequence owns are left as they were"
    comparisons = Comparisons()
    for index, rows in enumerate((slice(0, 30), slice(30, 34), slice(34, 35))):
        q, k_cache, v_cache, *rest = batch
        mine = batch[3][index, : -(-int(batch[4][index]) // problem.size("page_size"))].long()
        poisoned = [torch.full_like(value, float("nan")) for value in (q, k_cache, v_cache)]
        poisoned[0][rows] = q[rows]
        for cache, value in zip(poisoned[1:], (k_cache, v_cache), strict=True):
            cache[mine] = value[mine]
        comparisons.rows(attend(kernel, problem, [*poisoned, *rest])[rows], wanted[rows])
    comparisons.rows(attend(kernel, problem, batch)[:-3], wanted[:-3])  # nothing of it stays in the workspace
    comparisons.check(70)


@pytest.mark.parametrize("past", ["table", "limits"])
def test_a_length_past_the_block_table_or_the_limits_is_nan_and_leaves_the_others(
    registry: Registry, past: str
) -> None:
    problem = attention_of(ATTENTION["everything"])
    kernel = bind(registry, problem)
    batch = batch_of(problem, [3, 4, 1], [130, 40, 50])
    wanted = attend(kernel, problem, batch)
    table = batch[3].shape[1] * problem.size("page_size")
    if past == "limits":
        batch[3] = batch[3].repeat(1, -(-1025 // table))
    batch[4][1] = 1025 if past == "limits" else table + 1
    got = attend(kernel, problem, batch)
    comparisons = Comparisons()
    assert bool(got[3:7].isnan().all())
    comparisons.rows(got[:3], wanted[:3])
    comparisons.rows(got[7:], wanted[7:])
    comparisons.check(4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*ATTENTION, "all-positions"])
def test_attention_is_near_the_reference(registry: Registry, case: str, dtype: str) -> None:
    problem = attention_of(ATTENTION.get(case, {**HEADS, "causal": False}), dtype)
    batch = arguments_of(problem, 150)
    got = attend(bind(registry, problem), problem, batch)
    (wanted,) = load(ops.get("attention").reference)(problem, *batch, problem.size("head_dim") ** -0.5)
    assert relative_error(got, wanted) < TOLERANCE[dtype]


def test_a_sink_of_minus_infinity_is_no_sink(registry: Registry) -> None:
    with_sinks, without = (attention_of({**HEADS, "window": 20, "sinks": sinks}) for sinks in (True, False))
    batch = batch_of(with_sinks, [40], [300])
    batch[6] = torch.full_like(batch[6], float("-inf"))
    comparisons = Comparisons()
    wanted = attend(bind(registry, without), without, [*batch[:6], *[None] * 4])
    comparisons.rows(attend(bind(registry, with_sinks), with_sinks, batch), wanted)
    comparisons.check(40)


def test_control_tiles_that_follow_the_batch_are_caught(registry: Registry) -> None:
    problem = attention_of(HEADS)
    comparisons = compare_chunks(lambda rows: bind(registry, problem, kv_tile=64 if rows == 1 else 128), problem)
    assert comparisons.differ > 0


# -- registration ------------------------------------------------------------------------------------------------


def test_every_op_of_the_catalogue_has_one_implementation(registry: Registry) -> None:
    available = {op.name for op in ops.CATALOGUE.values() if op.available}
    assert {implementation.op for implementation in registry} == available
    for implementation in registry:
        assert implementation.backend == "torch_cpu"
        assert implementation.claims is Invariance.SEQUENCE
        assert not implementation.cuda_graph
        assert implementation.libraries == ("torch",)
        problem = ops.get(implementation.op).typical(implementation.dtypes[0])
        assert implementation.unmet(Device.parse("cpu"), problem) == ()
        assert any("needs cpu" in why for why in implementation.unmet(Device.parse("sm90"), problem))
    assert "torch_cpu.paged_attention" in registry


def label(implementation: Implementation, problem: Problem, **params: Any) -> str:
    return implementation.numerics(implementation.params(**params), problem)


def test_the_class_label_names_the_scheme_and_its_params(registry: Registry) -> None:
    gemm, problem = registry.get("torch_cpu.gemm"), problem_of("gemm", "bfloat16")
    assert label(gemm, problem) == "torch_mm_blocks(rows=16)"
    assert label(gemm, problem, rows=32) == "torch_mm_blocks(rows=32)"
    widened = problem_of("gemm-fp32-out", "bfloat16")
    assert label(gemm, widened) == "torch_mm_blocks(rows=16, operands=float32)"
    assert label(registry.get("torch_cpu.mean"), problem_of("mean", "float32")) == "torch_row_blocks(block=8192)"
    attention = registry.get("torch_cpu.paged_attention")
    assert label(attention, attention_of(HEADS)) == "torch_kv_tiles(kv_tile=128, rows=16)"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gemm", {"rows": 0}),
        ("gemm", {"rows": 7}),
        ("mean", {"block": 16384}),
        ("mean", {"block": 100}),
        ("paged_attention", {"kv_tile": 100}),
        ("paged_attention", {"rows": 128}),
        ("paged_attention", {"tile": 64}),
    ],
)
def test_params_that_would_break_the_promise_are_refused(registry: Registry, name: str, params: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        registry.get(f"torch_cpu.{name}").params(**params)


def test_registering_imports_no_torch() -> None:
    code = (
        "import sys; from bidispatch.registry import Registry; from bidispatch_backends.torch_cpu import register; "
        "register(Registry()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
