"""fp8 scales of zero, infinity and NaN: what they touch is what the reference says, all else keeps its bits.

Operands are positive and none is 0, so that an infinity is one whether a scale multiplies an element or a sum.
"""

from __future__ import annotations

import pytest
import torch
from bound_kernels import bound, same_bits

from bidispatch import ops
from bidispatch.registry import default_registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits
from bidispatch.verify.accuracy import allowed

BAD = {"zero": 0.0, "inf": float("inf"), "nan": float("nan")}
PRODUCTS = ("triton.fp8_block", "deep_gemm.fp8")
EXPERTS = ("triton.moe_fp8_block", "deep_gemm.moe_fp8_block")
ROWS = (1, 9, 300)
"""Of a call: rungs of few rows and of many, and both layouts of grouped products."""
ROW, GROUP, BLOCK = 0, 1, 128
DTYPE = "bfloat16"


def without_zeros(tensor):
    values = tensor.float()
    return torch.where(values == 0, 1.0, values).to(tensor.dtype)


def drawn(plan, problem, rows):
    """The arguments by name, in the op's order."""
    op = ops.get(problem.op)
    arguments = load_attribute(op.inputs)(problem, rows, device=plan.device.torch_device, distribution="positive")
    named = dict(zip((argument.name for argument in op.arguments), arguments, strict=True))
    return named | {name: without_zeros(named[name]) for name in ("x", "weight", "w13", "w2") if name in named}


def with_scale(arguments, name, place, value):
    """The same with one scale changed."""
    scales = arguments[name].clone()
    scales[place] = value
    return arguments | {name: scales}


def assert_is_the_references(problem, name, arguments, out, touched):
    """Where `touched` holds: NaN where the reference is NaN, infinite where it is, and near it elsewhere."""
    (exact,) = load_attribute(ops.get(problem.op).reference)(problem, *arguments.values())
    exact, out = exact[touched], out[touched].double()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(out[exact.isinf()], exact[exact.isinf()])
    finite = exact.isfinite()
    most = allowed(problem, torch.bfloat16, default_registry().get(name).own_rounding(problem))
    assert (out - exact)[finite].norm() <= most * exact[finite].norm()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["x_scales", "weight_scales"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_scale_of_a_product_reaches_its_row_or_columns_alone(plan, name, which, bad, rows):
    problem = ops.get("gemm.fp8_block").problem("float8_e4m3fn", {"n": 3 * BLOCK, "k": 4 * BLOCK})
    kernel = bound(plan, name, problem, Limits(rows))
    arguments = drawn(plan, problem, rows)
    dirty = with_scale(arguments, which, (ROW, GROUP), BAD[bad])
    clean, out = kernel(*arguments.values()), kernel(*dirty.values())
    touched = torch.zeros(out.shape, dtype=torch.bool, device=out.device)
    if which == "x_scales":
        touched[ROW] = True
    else:
        touched[:, ROW * BLOCK : (ROW + 1) * BLOCK] = True
    assert same_bits(out[~touched], clean[~touched])
    assert not same_bits(out[touched], clean[touched])
    assert_is_the_references(problem, name, dirty, out, touched)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("which", "block"), [("w13_scales", 0), ("w13_scales", -1), ("w2_scales", 0)])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_scale_of_an_expert_reaches_its_tokens_alone(plan, name, which, block, bad, rows):
    """Block 0 of w13 is of gates, the last of ups."""
    dims = {"experts": 6, "top_k": 2, "hidden": 2 * BLOCK, "intermediate": 2 * BLOCK}
    problem = ops.get("moe.experts").problem(DTYPE, {**dims, "weight_dtype": "float8_e4m3fn"})
    kernel = bound(plan, name, problem, Limits(rows))
    arguments = drawn(plan, problem, rows)
    expert = int(arguments["topk_ids"][ROW, 0])
    dirty = with_scale(arguments, which, (expert, block, GROUP), BAD[bad])
    clean, out = kernel(*arguments.values()), kernel(*dirty.values())
    touched = (arguments["topk_ids"] == expert).any(dim=1)
    assert touched.any()
    assert rows == 1 or not touched.all()
    assert same_bits(out[~touched], clean[~touched])
    assert not same_bits(out[touched], clean[touched])
    assert_is_the_references(problem, name, dirty, out, touched)
