"""The fp64 references against formulas written another way, stock torch against the references, and the generators."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bidispatch import ops
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.draw import DISTRIBUTIONS, draw
from bidispatch.ops.schema import Problem

FLOAT_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# ‖stock − reference‖ / ‖reference‖ that rounding can explain: a few units in the last place of the dtype.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}

ATTENTION = {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "page_size": 16}
CASES: Sequence[tuple[str, dict[str, Any]]] = (
    ("gemm", {"n": 48, "k": 80}),
    ("gemm", {"n": 48, "k": 80, "bias": True}),
    ("gemm", {"n": 48, "k": 80, "bias": True, "out_dtype": "float32"}),
    ("bmm", {"n": 24, "k": 40}),
    ("rms_norm", {"n": 96}),
    ("rms_norm", {"n": 96, "gemma": True}),
    ("fused_add_rms_norm", {"n": 96}),
    ("fused_add_rms_norm", {"n": 96, "gemma": True}),
    ("qk_norm", {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2}),
    ("qk_norm", {"head_dim": 16, "num_heads": 3, "num_kv_heads": 1, "gemma": True}),
    ("silu_and_mul", {"n": 96}),
    ("gelu_tanh_and_mul", {"n": 96}),
    ("softmax", {"n": 96}),
    ("log_softmax", {"n": 96, "out_dtype": "float32"}),
    ("token_logprob", {"n": 96}),
    ("mean", {"n": 96}),
    ("attention", ATTENTION),
    ("attention", {**ATTENTION, "head_dim": 80, "page_size": 5}),
    ("attention", {**ATTENTION, "num_heads": 2}),
    ("attention", {**ATTENTION, "causal": False}),
    ("attention", {**ATTENTION, "window": 20}),
    ("attention", {**ATTENTION, "softcap": 5.0}),
    ("attention", {**ATTENTION, "sinks": True}),
    ("attention", {**ATTENTION, "sinks": True, "softcap": 5.0, "window": 20}),
    ("attention", {**ATTENTION, "alibi": True}),
    ("attention", {**ATTENTION, "alibi": True, "causal": False, "softcap": 5.0}),
    ("attention", {**ATTENTION, "kv_dtype": "float8_e4m3fn"}),
    ("attention", {**ATTENTION, "alibi": True, "sinks": True, "window": 20, "kv_dtype": "fp8"}),
)


def problem_of(name: str, dims: dict[str, Any], dtype: str = "float32") -> Problem:
    return ops.get(name).problem(dtype, dims)


def load(path: str) -> Callable[..., Any]:
    module, attribute = path.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def arguments_of(problem: Problem, rows: int, **options: Any) -> list[Any]:
    op = ops.get(problem.op)
    arguments = load(op.inputs)(problem, rows, **options)
    return [*arguments, *(scalar.default_for(problem) for scalar in op.scalars)]


def batch_of(*arguments: Any, **options: Any) -> list[Any]:
    return paged_batch(*arguments, **options)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(FLOAT_BITS[a.dtype]), b.contiguous().view(FLOAT_BITS[b.dtype]))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def in_words(problem: Problem, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Every op again, one number at a time, with Python floats; attention a query and a head at a time."""
    if problem.op == "attention":
        return (attention_in_words(problem, *arguments),)
    if problem.op == "gemm":
        x, weight, bias = arguments
        rows = [
            [math.fsum(p * q for p, q in zip(r, w, strict=True)) for w in weight.tolist()] for r in x.double().tolist()
        ]
        out = torch.tensor(rows, dtype=torch.float64)
        return (out if bias is None else out + bias.double().expand_as(out),)
    if problem.op == "bmm":
        a, b = arguments
        gemm = problem_of("gemm", {"n": 1, "k": 1})
        return (torch.stack([in_words(gemm, x, y.T, None)[0] for x, y in zip(a, b, strict=True)]),)
    outs = [row_in_words(problem, *row) for row in rows_of(problem, arguments)]
    return tuple(torch.tensor(out, dtype=torch.float64) for out in zip(*outs, strict=True))


def rows_of(problem: Problem, arguments: Sequence[Any]) -> list[list[Any]]:
    """The arguments of each row on its own, as lists of floats; what is no [m, ...] tensor goes to every row."""
    schema = [*ops.get(problem.op).arguments, *ops.get(problem.op).scalars]
    count = len(arguments[0])
    columns = []
    for entry, value in zip(schema, arguments, strict=True):
        per_row = getattr(entry, "shape", ("",))[0] == "m"
        as_list = value.tolist() if isinstance(value, torch.Tensor) else value
        columns.append(as_list if per_row else [as_list] * count)
    return [list(row) for row in zip(*columns, strict=True)]


def row_in_words(problem: Problem, x: list[float], *rest: Any) -> tuple[Any, ...]:
    def norm(row: list[float], weight: list[float], eps: float) -> list[float]:
        root = math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
        return [v / root * (w + 1 if problem["gemma"] else w) for v, w in zip(row, weight, strict=True)]

    if problem.op == "qk_norm":
        k, q_weight, k_weight, eps = rest
        heads: list[Any] = x
        return [norm(head, q_weight, eps) for head in heads], [norm(head, k_weight, eps) for head in k]
    half = len(x) // 2
    gated = list(zip(x[:half], x[half:], strict=False))
    if problem.op == "rms_norm":
        return (norm(x, *rest),)
    if problem.op == "fused_add_rms_norm":
        residual, weight, eps = rest
        total = torch.tensor([a + b for a, b in zip(x, residual, strict=True)], dtype=torch.float64)
        rounded = total.to(getattr(torch, problem.dtype)).tolist()
        return norm(rounded, weight, eps), rounded
    if problem.op == "silu_and_mul":
        return ([a * b * (0.5 + 0.5 * math.tanh(a / 2)) for a, b in gated],)
    if problem.op == "gelu_tanh_and_mul":
        return ([b * a / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a))) for a, b in gated],)
    total_exp = math.fsum(math.exp(v) for v in x)
    if problem.op == "softmax":
        return ([math.exp(v) / total_exp for v in x],)
    if problem.op == "log_softmax":
        return ([v - math.log(total_exp) for v in x],)
    if problem.op == "token_logprob":
        return (x[rest[0]] - math.log(total_exp),)
    assert problem.op == "mean"
    return (math.fsum(x) / len(x),)


def attention_in_words(
    problem: Problem,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    seq_lens: Any,
    starts: Any,
    sinks: Any,
    alibi_slopes: Any,
    k_scale: Any,
    v_scale: Any,
    scale: float,
) -> torch.Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    size, group = problem.size("page_size"), problem.size("num_heads") // problem.size("num_kv_heads")
    softcap, window = float(problem["softcap"]), problem.size("window")
    for b, kv_len in enumerate(seq_lens.tolist()):
        where = [(int(table[b, p // size]), p % size) for p in range(kv_len)]
        for row in range(int(starts[b]), int(starts[b + 1])):
            position = kv_len - int(starts[b + 1]) + row
            last = position if problem["causal"] else kv_len - 1
            seen = range(max(0, position - window + 1) if window else 0, last + 1)
            for head in range(q.shape[1]):
                keys = torch.stack([k_cache[(*where[p], head // group)] for p in seen]).double()
                values = torch.stack([v_cache[(*where[p], head // group)] for p in seen]).double()
                if k_scale is not None:
                    keys, values = keys * float(k_scale[head // group]), values * float(v_scale[head // group])
                scores = (keys * q[row, head].double()).sum(-1) * scale
                if softcap:
                    scores = (scores / softcap).tanh() * softcap
                if alibi_slopes is not None:
                    scores -= float(alibi_slopes[head]) * torch.tensor(
                        [float(abs(position - p)) for p in seen], dtype=torch.float64
                    )
                weights = scores.exp()
                total = weights.sum() + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
                out[row, head] = (weights[:, None] * values).sum(0) / total
    return out


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    name, dims = case
    extra = {k: v for k, v in dims.items() if ATTENTION.get(k) != v and k not in ("n", "k")}
    return "-".join([name, *(f"{k}={v}" for k, v in extra.items())])


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_formula(case: tuple[str, dict[str, Any]], dtype: str) -> None:
    problem = problem_of(*case, dtype)
    arguments = arguments_of(problem, 7 if problem.op != "attention" else 24)
    got = load(ops.get(problem.op).reference)(problem, *arguments)
    wanted = in_words(problem, *arguments)
    assert len(got) == len(wanted) == len(ops.get(problem.op).outputs)
    for value, reference in zip(got, wanted, strict=True):
        assert value.dtype is torch.float64
        assert value.shape == reference.shape
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("case", "distribution"),
    # Of scores of size 2^20 a rounded one decides which value wins the softmax: nothing to be near to.
    [(c, d) for c, d in itertools.product(CASES, DISTRIBUTIONS) if (c[0], d) != ("attention", "scaled")],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_stock_torch_is_near_the_reference(case: tuple[str, dict[str, Any]], distribution: str, dtype: str) -> None:
    problem = problem_of(*case, dtype)
    op = ops.get(problem.op)
    arguments = arguments_of(problem, 40, distribution=distribution)
    got = load(op.stock)(problem, *arguments)
    wanted = load(op.reference)(problem, *arguments)
    for output, value, reference in zip(op.outputs, got, wanted, strict=True):
        name = dtype if output.dtype == "dtype" else str(problem.dims.get(output.dtype, output.dtype))
        assert value.dtype is getattr(torch, name)
        assert value.shape == reference.shape
        assert relative_error(value, reference) < TOLERANCE[dtype]


def test_a_wrong_stock_result_would_be_seen() -> None:
    problem = problem_of("rms_norm", {"n": 96})
    x, weight, eps = arguments_of(problem, 40)
    (reference,) = load(ops.get("rms_norm").reference)(problem, x, weight, eps)
    (value,) = load(ops.get("rms_norm").stock)(problem, x, weight * (1 + 1e-4), eps)
    assert relative_error(value, reference) > TOLERANCE["float32"]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 9, 40, 200])
def test_attention_inputs_have_the_rows_asked_for(rows: int) -> None:
    problem = problem_of("attention", ATTENTION)
    q, k_cache, v_cache, table, seq_lens, starts, sinks, *others = load(ops.get("attention").inputs)(problem, rows)
    assert q.shape == (rows, 4, 16)
    assert starts[-1] == rows
    assert bool((starts[1:] - starts[:-1] <= seq_lens).all())
    assert sinks is None
    assert others == [None, None, None]
    assert k_cache.shape == v_cache.shape
    assert (table.dtype, seq_lens.dtype, starts.dtype) == (torch.int32,) * 3
    if rows >= 40:
        lengths = set(zip((starts[1:] - starts[:-1]).tolist(), seq_lens.tolist(), strict=True))
        assert any(query == 1 < kv for query, kv in lengths), "a decode"
        assert any(1 < query < kv for query, kv in lengths), "a chunk behind a cached prefix"
        assert any(1 < query == kv for query, kv in lengths), "a whole prompt"


def test_inputs_follow_the_seed_and_nothing_else() -> None:
    for case in CASES:
        problem = problem_of(*case)
        again = zip(arguments_of(problem, 20, seed=3), arguments_of(problem, 20, seed=3), strict=True)
        for a, b in again:
            assert not isinstance(a, torch.Tensor) or torch.equal(a.double().nan_to_num(7), b.double().nan_to_num(7))
        assert not torch.equal(arguments_of(problem, 20, seed=3)[0], arguments_of(problem, 20, seed=4)[0])


def test_a_sequence_has_the_same_data_in_any_batch_chunk_and_page() -> None:
    problem = problem_of("attention", {**ATTENTION, "sinks": True})
    whole = batch_of(problem, [300], [300], sequence_seeds=[11])
    others = batch_of(problem, [40, 1, 290], [40, 270, 300], sequence_seeds=[5, 11, 9], page_seed=8, extra_pages=5)
    assert same_bits(whole[0][269], others[0][40])
    assert not same_bits(whole[0][268], others[0][40])
    for cache in (1, 2):
        mine, theirs = (gather(batch, cache, index, 270) for batch, index in ((whole, 0), (others, 1)))
        assert same_bits(mine, theirs)
        assert not same_bits(mine, gather(others, cache, 2, 270))
    assert same_bits(whole[6], others[6])
    narrow = batch_of(problem_of("attention", {**ATTENTION, "page_size": 3}), [1], [270], sequence_seeds=[11])
    assert same_bits(gather(narrow, 1, 0, 270), gather(whole, 1, 0, 270))


def gather(batch: Sequence[Any], cache: int, index: int, length: int) -> torch.Tensor:
    pages = batch[3][index, : -(-length // batch[cache].shape[1])].long()
    rows: torch.Tensor = batch[cache][pages].flatten(0, 1)[:length]
    return rows


def test_cache_slots_no_sequence_uses_hold_nan() -> None:
    problem = problem_of("attention", ATTENTION)
    q, k_cache, v_cache, table, *_ = batch_of(problem, [4, 0, 1], [37, 0, 5], max_pages=6, padding_rows=2)
    for cache in (k_cache, v_cache):
        slots = cache.flatten(2).isnan()
        assert int(slots.all(-1).sum()) == slots.shape[0] * slots.shape[1] - 37 - 5
        assert not bool((slots.any(-1) ^ slots.all(-1)).any())
        assert bool(cache[table[0, 3:].long()].isnan().all())
        assert bool(cache[table[1].long()].isnan().all())
    assert bool(q[5:].isnan().all())
    assert not bool(q[:5].isnan().any())


def test_ascending_pages_ascend() -> None:
    problem = problem_of("attention", ATTENTION)
    table = batch_of(problem, [1, 1], [40, 20], page_order="ascending")[3]
    assert table[0].tolist() == [0, 1, 2]
    assert table[1, :2].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "options", "message"),
    [
        ([1], [1, 2], {}, "1 query lengths for 2"),
        ([3], [2], {}, "sequence 0 asks about 3 of its 2"),
        ([1], [2], {"page_order": "random"}, "unknown page order 'random'"),
        ([1], [2], {"extra_pages": 0}, "at least 1"),
        ([1], [40], {"max_pages": 2}, "needs 3"),
        ([1], [40], {"sequence_seeds": [1, 2]}, "2 sequence seeds"),
    ],
)
def test_lengths_that_make_no_batch_are_refused(query_lens: Any, kv_lens: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of(problem_of("attention", ATTENTION), query_lens, kv_lens, **options)


def test_scaled_values_are_finite_in_every_dtype_and_span_powers_of_two() -> None:
    for dtype, decades in (("float32", 2**20), ("bfloat16", 2**20), ("float16", 2**6)):
        values = draw((4096,), "x", dtype=dtype, distribution="scaled").double().abs()
        assert bool(values.isfinite().all())
        assert float(values.max() / values.quantile(0.02)) > decades
    assert bool((draw((4096,), "x", dtype="float32", distribution="positive") >= 0).all())
    with pytest.raises(ValueError, match="unknown distribution 'uniform'"):
        draw((1,), "x", dtype="float32", distribution="uniform")
