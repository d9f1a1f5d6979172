"""deep_gemm.moe on a GPU: bits of rows at every number of rows and in both layouts, graphs, and how near it is."""

from __future__ import annotations

import pytest
import torch
from bound_kernels import same_bits

from bidispatch import ops
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.verify.accuracy import allowed
from bidispatch.verify.compare import bits

FP8 = "float8_e4m3fn"
LIMIT, MOST_MASKED = 1100, 200
ROWS = (1, 2, 3, 7, 8, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 257, 513, 1025, 1100)
SHAPES = (
    {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 1792},
    {"experts": 32, "top_k": 8, "hidden": 7168, "intermediate": 2048, "expert_map": True, "global_experts": 256},
    {"experts": 6, "top_k": 3, "hidden": 256, "intermediate": 128, "shared": True, "activation": "swiglu_clamped"},
)
KINDS = ("bfloat16", FP8)
IDS = 4


def problem_of(weights, **dims):
    return ops.get("moe.experts").problem("bfloat16", {**dims, "weight_dtype": weights})


def inputs(problem, rows, distribution="normal"):
    return load_attribute(ops.get(problem.op).inputs)(problem, rows, device="cuda", distribution=distribution)


def rows_of(problem, arguments, rows):
    declared = ops.get(problem.op).arguments
    return [a if a is None or "m" not in e.shape else a[rows] for a, e in zip(arguments, declared, strict=True)]


def kernel_of(plan, problem, layout="", most=LIMIT, backend="deep_gemm"):
    """An implementation with its own ladder, or with one layout; skipped with its reasons where it cannot serve."""
    implementation = default_registry().get(f"{backend}.{'moe_fp8_block' if problem['weight_dtype'] == FP8 else 'moe'}")
    if reasons := implementation.unmet(plan.device, problem):
        pytest.skip(f"{implementation.name}: {'; '.join(reasons)}")
    params = implementation.params()
    shapes = implementation.tiles(plan.device, problem, params)
    if layout:
        shapes = ((None, implementation.tile(layout=layout)),)
    rungs = tuple(Rung(implementation, params, shape, top) for top, shape in shapes)
    return bind(problem, plan.device, rungs, Limits(most))


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_rows_have_their_bits_at_every_number_and_in_both_layouts(plan, dims, weights, record_property):
    """This is what one class for both rungs stands on."""
    problem = problem_of(weights, **dims)
    kernels = {"contiguous": kernel_of(plan, problem, "contiguous")}
    kernels["masked"] = kernel_of(plan, problem, "masked", MOST_MASKED)
    kernels["masked for few"] = kernel_of(plan, problem, "masked", 16)
    differing = {}
    for distribution in ("normal", "positive"):
        arguments = inputs(problem, LIMIT, distribution)
        wanted = kernels["contiguous"](*arguments)
        for name, kernel in kernels.items():
            most = {"contiguous": LIMIT, "masked": MOST_MASKED, "masked for few": 16}[name]
            for rows in (rows for rows in ROWS if rows <= most):
                for first in (0, LIMIT - rows):
                    part = slice(first, first + rows)
                    count = int((bits(kernel(*rows_of(problem, arguments, part))) != bits(wanted[part])).sum())
                    if count:
                        differing[f"{distribution} {name} {first}+{rows}"] = count
    record_property("differing", differing)
    assert differing == {}


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("layout", ["masked", "contiguous"])
@pytest.mark.parametrize("spread", ["all to one", "none", "twice the same", "beside nan"])
def test_any_spread_leaves_a_row_its_bits(plan, spread, layout, weights):
    problem = problem_of(weights, **SHAPES[0])
    kernel = kernel_of(plan, problem, layout, 150)
    arguments = inputs(problem, 150)
    wanted = kernel(*arguments)
    kept = torch.arange(0, 150, 3, device="cuda")
    others = torch.ones(150, dtype=torch.bool, device="cuda")
    others[kept] = False
    if spread == "all to one":
        arguments[IDS][others] = 5
    elif spread == "none":
        arguments[IDS][others] = -1
    elif spread == "twice the same":
        arguments[IDS][others, 1] = arguments[IDS][others, 0]
    else:
        arguments[0][others] = float("nan")
    out = kernel(*arguments)
    assert same_bits(out[kept], wanted[kept])
    if spread == "none":
        assert (out[others] == 0).all()


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("rows", [8, 300])
def test_a_captured_graph_serves_other_routing(plan, rows, weights):
    problem = problem_of(weights, **SHAPES[0])
    kernel = kernel_of(plan, problem)
    arguments, others = inputs(problem, rows), inputs(problem, rows)
    others[IDS] = torch.full_like(others[IDS], 7)
    wanted = [kernel(*arguments), kernel(*arguments[:IDS], others[IDS], *arguments[IDS + 1 :])]
    out = torch.empty_like(wanted[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*arguments, out=out)
    graph.replay()
    assert same_bits(out, wanted[0])
    arguments[IDS].copy_(others[IDS])
    graph.replay()
    assert same_bits(out, wanted[1])


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_it_is_as_near_as_triton_with_two_roundings_more(plan, dims, weights, record_property):
    problem = problem_of(weights, **dims)
    name = "deep_gemm.moe_fp8_block" if weights == FP8 else "deep_gemm.moe"
    most = allowed(problem, torch.bfloat16, default_registry().get(name).own_rounding(problem))
    for rows in (16, 300):
        arguments = inputs(problem, rows)
        (exact,) = load_attribute(ops.get(problem.op).reference)(problem, *arguments)
        errors = {
            backend: float(
                (kernel_of(plan, problem, backend=backend)(*arguments).double() - exact).norm() / exact.norm()
            )
            for backend in ("deep_gemm", "triton")
        }
        record_property(f"errors {rows}", errors)
        assert errors["deep_gemm"] < most, errors
        assert errors["triton"] < allowed(problem, torch.bfloat16), errors


def test_two_classes_differ(plan):
    """Negative control: the comparison above sees another place of rounding."""
    problem = problem_of(FP8, **SHAPES[0])
    arguments = inputs(problem, 64, "positive")
    outs = [kernel_of(plan, problem, backend=backend)(*arguments) for backend in ("deep_gemm", "triton")]
    assert not same_bits(*outs)
