"""Row ops on a GPU: every launch shape of a class gives the same bits, and so do ops that share a class."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from bound_kernels import same_bits

from bidispatch import ops
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rows.py"
DTYPES = ("bfloat16", "float16", "float32")
HEADS = {"num_heads": 32, "num_kv_heads": 8}
ROWS = 67
SUMMED = (
    ("rms_norm", {"n": 4096}),
    ("rms_norm", {"n": 5001, "gemma": True}),
    ("rms_norm", {"n": 128}),
    ("fused_add_rms_norm", {"n": 8192}),
    ("qk_norm", {"head_dim": 128, **HEADS}),
    ("mean", {"n": 4096, "out_dtype": "float32"}),
    ("mean", {"n": 1003, "out_dtype": "float32"}),
    ("silu_and_mul", {"n": 3000}),
    ("quantize.fp8_group", {"k": 7168}),
    ("quantize.fp8_group", {"k": 1003, "scale_format": "ue8m0"}),
    ("quantize.fp8_token", {"k": 7168}),
    ("quantize.fp8_tensor", {"k": 1003}),
    ("silu_and_mul.fp8_group", {"n": 3000}),
    ("rms_norm.fp8_group", {"n": 4096}),
    ("rms_norm.fp8_group", {"n": 40}),
    ("fused_add_rms_norm.fp8_group", {"n": 7168}),
    ("softmax", {"n": 4096, "out_dtype": "float32"}),
    ("softmax", {"n": 40, "out_dtype": "float32"}),
    ("softmax", {"n": 50257, "out_dtype": "float32"}),
    ("log_softmax", {"n": 151936, "out_dtype": "float32"}),
    ("token_logprob", {"n": 4096}),
    ("token_logprob", {"n": 151936}),
)


def benchmark():
    """The script whose `--try` times these launch shapes."""
    if "rows_benchmark" not in sys.modules:
        spec = importlib.util.spec_from_file_location("rows_benchmark", BENCHMARK)
        module = importlib.util.module_from_spec(spec)
        sys.modules["rows_benchmark"] = module
        spec.loader.exec_module(module)
    return sys.modules["rows_benchmark"]


def shapes_of(plan, problem):
    """Every tile of the ladder and every candidate: (class label, params, tile)."""
    found = benchmark().triton_kernel(problem)
    params = found.params()
    ladder = [(params, tile) for _, tile in found.tiles(plan.device, problem, params)]
    for chosen, tile in dict.fromkeys((*ladder, *benchmark().candidates(problem))):
        yield found.numerics(chosen, problem), chosen, tile


def call(plan, problem, params, tile, arguments, rows=ROWS):
    found = benchmark().triton_kernel(problem)
    kernel = bind(problem, plan.device, (Rung(found, params, tile),), Limits(rows))
    outputs = kernel(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def inputs(problem, rows=ROWS, **options):
    return load_attribute(ops.get(problem.op).inputs)(problem, rows, device="cuda", **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "dims"), SUMMED, ids=lambda value: value if isinstance(value, str) else str(value))
def test_every_launch_shape_of_a_class_gives_the_same_bits(plan, name, dims, dtype, record_property):
    problem = ops.get(name).problem(dtype, dims)
    aligned = inputs(problem)
    # Rows that begin at odd addresses: loads of one element, so another layout.
    odd = [argument if argument.ndim < 2 else _shifted(argument) for argument in aligned]
    seen = {}
    for label, params, tile in shapes_of(plan, problem):
        for arguments in (aligned, odd):
            outputs = call(plan, problem, params, tile, arguments)
            expected = seen.setdefault(label, outputs)
            assert all(same_bits(*pair) for pair in zip(outputs, expected, strict=True)), f"{label}: {params} {tile}"
    record_property("classes", sorted(seen))


def _shifted(tensor):
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype, device="cuda")
    view = wide[..., 1:-2]
    view.copy_(tensor)
    return view


def test_another_class_is_seen_to_differ(plan):
    """Negative control: other chunks, other bits."""
    problem = ops.get("softmax").problem("float32", {"n": 50257})
    arguments = inputs(problem)
    found = default_registry().get("triton.softmax")
    results = []
    for chunk in (4096, 8192):
        params = found.params(chunk=chunk)
        results += call(plan, problem, params, found.tiles(plan.device, problem, params)[-1][1], arguments)
    assert not same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normed_as_rows_are(plan, dtype):
    heads = plan.select("qk_norm", dtype=dtype, head_dim=128, **HEADS)
    rows = plan.select("rms_norm", dtype=dtype, n=128)
    assert heads.numerics == rows.numerics
    norm, row_norm = heads.bind(max_tokens=300), rows.bind(max_tokens=300 * 32)
    for tokens in (1, 5, 300):
        q, k, q_weight, k_weight = inputs(heads.problem, tokens)
        for x, weight, out in zip((q, k), (q_weight, k_weight), norm(q, k, q_weight, k_weight), strict=True):
            assert same_bits(out.view(-1, 128), row_norm(x.reshape(-1, 128), weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1000, 4096, 50257, 151936])
def test_a_tokens_logprob_is_that_of_log_softmax(plan, n, dtype):
    one = plan.select("token_logprob", dtype=dtype, n=n)
    every = plan.select("log_softmax", dtype=dtype, n=n, out_dtype="float32")
    assert one.numerics == every.numerics
    pick, log_softmax = one.bind(max_tokens=300), every.bind(max_tokens=300)
    for rows in (1, 7, 300):
        x, token_ids = inputs(one.problem, rows, seed=rows)
        assert same_bits(pick(x, token_ids), log_softmax(x).gather(1, token_ids[:, None])[:, 0])
    token_ids[::2] = n
    token_ids[1::4] = -1
    out = pick(x, token_ids)
    assert out[::2].isnan().all()
    assert out[1::4].isnan().all()
    assert not out[3::4].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax_over_a_vocabulary_is_near_fp64(plan, dtype, record_property):
    problem = ops.get("log_softmax").problem(dtype, {"n": 151936, "out_dtype": "float32"})
    log_softmax = plan.select_problem(problem).bind(max_tokens=32)
    for distribution in ("normal", "positive", "scaled"):
        (x,) = inputs(problem, 32, distribution=distribution)
        exact = torch.log_softmax(x.double(), dim=-1)
        error = float((log_softmax(x).double() - exact).abs().max() / exact.abs().max())
        record_property(distribution, error)
        assert error < 3e-7


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "token_logprob"])
def test_calls_of_every_size_leave_the_workspace_as_they_found_it(plan, name):
    """Chunks count who has arrived; a count that is not reset shows in the next call, or never ends."""
    problem = ops.get(name).problem("bfloat16", {"n": 151936})
    kernel = plan.select_problem(problem).bind(max_tokens=600)
    arguments = inputs(problem, 600)
    whole = kernel(*arguments)
    for rows in (1, 3, 600, 64, 1, 257) * 5:
        first = 600 - rows
        part = kernel(*(argument[first:] for argument in arguments))
        assert same_bits(part, whole[first:])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_long_rows_in_place_and_beside_other_work(plan, name):
    """Chunks that wait for each other, while another stream keeps the GPU busy."""
    problem = ops.get(name).problem("float32", {"n": 151936})
    kernel = plan.select_problem(problem).bind(max_tokens=400)
    (x,) = inputs(problem, 400)
    apart = kernel(x)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(other):
            for _ in range(3):
                square.mm(square)
        assert same_bits(kernel(x), apart)
    torch.cuda.current_stream().wait_stream(other)
    kernel(x, out=x)
    assert same_bits(x, apart)
    assert not apart.isnan().any()
