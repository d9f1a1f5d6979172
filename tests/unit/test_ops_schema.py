"""Problems: what an op accepts as dims and dtype, and that nothing about a batch gets in."""

from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidispatch import ops
from bidispatch.errors import UsageError
from bidispatch.ops.schema import DTYPES, Dim, Op, parse_dtype
from bidispatch.planning.plan import Plan
from bidispatch.planning.select import select
from bidispatch.registry import Implementation
from bidispatch.runtime.arguments import tensor_specs

AVAILABLE = [op for op in ops.CATALOGUE.values() if op.available]
GEMM = ops.get("gemm")


@pytest.mark.parametrize("op", ops.CATALOGUE.values(), ids=lambda op: op.name)
def test_every_op_has_a_typical_problem_in_each_of_its_dtypes(op):
    for dtype in op.dtypes:
        problem = op.typical(dtype)
        assert problem.dtype == dtype
        assert set(problem.dims) == set(op.dim_names)


@pytest.mark.parametrize("op", AVAILABLE, ids=lambda op: op.name)
def test_every_axis_of_an_op_is_a_dim_or_a_run_time_size_that_leads(op):
    problem = op.typical(op.dtypes[0])
    for spec in tensor_specs((*op.arguments, *op.outputs), problem):
        assert len(spec.sizes) + len(spec.known) == spec.ndim
        assert not {size for _, size, _ in spec.sizes} & set(op.dim_names)


@pytest.mark.parametrize("op", AVAILABLE, ids=lambda op: op.name)
def test_the_sizes_of_the_outputs_come_from_the_arguments(op):
    problem = op.typical(op.dtypes[0])
    given_sizes = {size for spec in tensor_specs(op.arguments, problem) for _, size, _ in spec.sizes}
    assert {size for spec in tensor_specs(op.outputs, problem) for _, size, _ in spec.sizes} <= given_sizes


@pytest.mark.parametrize("op", ops.CATALOGUE.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("word", ["m", "M", "batch", "batch_size", "num_tokens", "seq_len", "rows"])
def test_a_batch_size_is_refused_with_the_reason(op, word):
    with pytest.raises(UsageError, match="selection does not see the batch"):
        op.problem(op.dtypes[0], {word: 1})


def test_no_op_has_a_dim_that_counts_rows():
    words = {"m", "batch", "tokens", "rows", "seqs", "num_tokens", "num_seqs", "batch_size", "seq_len", "max_tokens"}
    for op in ops.CATALOGUE.values():
        assert not words & {name.lower() for name in op.dim_names}, op.name


def test_nothing_on_the_way_to_a_selection_takes_a_batch():
    words = {"m", "batch", "batch_size", "tokens", "max_tokens", "num_tokens", "rows", "limits", "seqs"}
    for function in (Plan.select_problem, select, Implementation.unmet, Op.problem):
        assert not words & set(inspect.signature(function).parameters), function


def test_text_from_the_command_line_becomes_the_dims_type():
    problem = GEMM.problem("bf16", {"n": "64", "k": "128", "bias": "True", "out_dtype": "fp32"})
    assert problem.dims == {"n": 64, "k": 128, "bias": True, "out_dtype": "float32", "role": "linear"}


def test_text_and_values_give_one_problem():
    text = GEMM.problem("torch.bfloat16", {"n": "64", "k": "128", "bias": "false", "out_dtype": "bf16"})
    values = GEMM.problem("bfloat16", {"k": 128, "n": 64})
    assert text == values
    assert hash(text) == hash(values)
    assert text.key == values.key


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"n": 64}, "gemm needs k; for example --dim k=4096"),
        ({}, "gemm needs n, k"),
        ({"n": 64, "k": 64, "kk": 1}, r"no dim 'kk'; it has n, k.*did you mean 'k'"),
        ({"n": 0, "k": 64}, "an int of at least 1, not 0"),
        ({"n": -5, "k": 64}, "at least 1"),
        ({"n": 6.5, "k": 64}, r"an int, not 6.5 \(float\)"),
        ({"n": "6.5", "k": 64}, "an int, not '6.5'"),
        ({"n": True, "k": 64}, "an int, not True"),
        ({"n": None, "k": 64}, "an int, not None"),
        ({"n": [1], "k": 64}, "an int, not"),
        ({"n": 64, "k": 64, "bias": "yes"}, "true or false"),
        ({"n": 64, "k": 64, "bias": 1}, "a bool, not 1"),
        ({"n": 64, "k": 64, "out_dtype": "float33"}, "unknown dtype 'float33'.*did you mean"),
        ({"n": 64, "k": 64, "out_dtype": "fp8"}, "one of dtype, float32, float16, bfloat16, not 'float8_e4m3fn'"),
        ({"n": 64, "k": 64, "out_dtype": 3}, "a str, not 3"),
    ],
)
def test_a_bad_dim_is_refused_with_what_is_wanted(dims, message):
    with pytest.raises(UsageError, match=message):
        GEMM.problem("bfloat16", dims)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"num_heads": 7, "num_kv_heads": 2}, "num_heads=7 is not a multiple of num_kv_heads=2"),
        ({"num_heads": 8, "num_kv_heads": 2, "window": 4, "causal": False}, "sliding window needs causal=true"),
        ({"num_heads": 8, "num_kv_heads": 2, "softcap": float("nan")}, "finite"),
        ({"num_heads": 8, "num_kv_heads": 2, "softcap": "inf"}, "finite"),
        ({"num_heads": 8, "num_kv_heads": 2, "softcap": -1}, "at least 0"),
        ({"num_heads": 8, "num_kv_heads": 2, "kv_dtype": "float16"}, "own dtype, bfloat16, or float8_e4m3fn"),
    ],
)
def test_dims_that_disagree_are_refused(dims, message):
    with pytest.raises(UsageError, match=message):
        ops.get("attention").problem("bfloat16", {"head_dim": 64, **dims})


def test_a_dtype_the_op_does_not_take_is_refused():
    with pytest.raises(UsageError, match="gemm takes bfloat16, float16, float32, not float8_e4m3fn"):
        GEMM.problem("fp8", {"n": 1, "k": 1})


def test_an_unknown_op_is_refused_with_a_suggestion():
    with pytest.raises(UsageError, match=r"unknown op 'rmsnorm'.*did you mean 'rms_norm'"):
        ops.get("rmsnorm")


@pytest.mark.parametrize("full", DTYPES)
def test_every_spelling_of_a_dtype_is_torchs_name(full):
    assert parse_dtype(full) == parse_dtype(DTYPES[full]) == parse_dtype(f"torch.{full}") == full


def values_of(dim: Dim) -> st.SearchStrategy:
    if dim.choices:
        return st.sampled_from(dim.choices)
    if dim.holds_dtype:
        return st.sampled_from(["dtype", *DTYPES])
    if dim.type is int:
        return st.integers(int(dim.minimum or 0), 1 << 20)
    if dim.type is float:
        return st.floats(dim.minimum or 0, 1e6, allow_nan=False)
    return st.booleans()


@given(data=st.data())
def test_a_problem_survives_its_own_text(data):
    op = data.draw(st.sampled_from(AVAILABLE))
    dims = {dim.name: data.draw(values_of(dim), dim.name) for dim in op.dims}
    dtype = data.draw(st.sampled_from(op.dtypes))
    known = {name: dtype if value == "dtype" else value for name, value in dims.items()}
    if op.conflict and op.conflict({**known, "dtype": dtype}):
        with pytest.raises(UsageError):
            op.problem(dtype, dims)
        return
    problem = op.problem(dtype, dims)
    text = op.problem(dtype, {name: str(value) for name, value in problem.dims.items()})
    assert text == problem
    assert json.loads(problem.key) == {"op": op.name, "dtype": dtype, "dims": dict(problem.dims)}
    assert "dtype" not in problem.dims.values()


@given(
    name=st.text(max_size=12), value=st.one_of(st.none(), st.text(max_size=5), st.integers(), st.floats(), st.binary())
)
def test_no_dim_whatever_it_is_makes_anything_but_a_problem_or_a_usage_error(name, value):
    try:
        problem = GEMM.problem("float32", {"n": 8, "k": 8, name: value})
    except UsageError:
        return
    assert name in GEMM.dim_names
    assert type(problem[name]) is {dim.name: dim.type for dim in GEMM.dims}[name]
