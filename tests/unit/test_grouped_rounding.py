"""What deep_gemm's grouped classes round of their own, alone in fp64, against what verify allows."""

from __future__ import annotations

import pytest
import torch

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.ops.reference.draw import DISTRIBUTIONS
from bidispatch.ops.reference.linear import widened_blocks
from bidispatch.ops.reference.moe import experts, experts_inputs, gated, local_experts, quantized
from bidispatch.registry import default_registry
from bidispatch.verify.accuracy import allowed
from bidispatch.verify.cases import problems_for

SERVED = [
    problem
    for problem in problems_for(Device.parse("cpu"), ["moe.experts"], ["bfloat16"])
    if not problem.flag("bias") and problem["out_dtype"] == "bfloat16" and problem.size("hidden") < 1024
]
ROWS = 67
BF16_BITS = 8
FP8 = "float8_e4m3fn"


def problem_of(**dims):
    sizes = {"experts": 4, "top_k": 2, "hidden": 128, "intermediate": 384, "weight_dtype": FP8}
    return ops.get("moe.experts").problem("bfloat16", {**sizes, **dims})


def rounded(values, bits=BF16_BITS):
    """To so many significant bits, the nearest, of two the even one."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def widened(weight, scales, expert):
    return weight[expert].double() if scales is None else widened_blocks(weight[expert], scales[expert])


def rounded_experts(problem, arguments, bits=BF16_BITS):
    """The reference with gate and up rounded to so many bits, then everything where `grouped_numerics` says."""
    x, w13, w2, weights, ids, _, _, w13_scales, w2_scales, expert_map, add = arguments
    local = local_experts(problem, ids, expert_map)
    rows = quantized(problem, x)
    out = torch.zeros(x.shape, dtype=torch.float64) if add is None else add.double()
    for expert in sorted(set(local.flatten().tolist()) - {-1}):
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        both = rounded(rows[tokens] @ widened(w13, w13_scales, expert).T, bits)
        act = quantized(problem, rounded(gated(problem, both)))
        part = rounded(act @ widened(w2, w2_scales, expert).T)
        out = out.index_add(0, tokens, part * weights[tokens, slots, None].double())
    return rounded(out)


def error_of(problem, distribution, **options):
    arguments = experts_inputs(problem, ROWS, distribution=distribution, seed=3)
    (exact,) = experts(problem, *arguments)
    return float((rounded_experts(problem, arguments, **options) - exact).norm() / exact.norm())


def limit_of(problem):
    name = "deep_gemm.moe_fp8_block" if problem["weight_dtype"] == FP8 else "deep_gemm.moe"
    return allowed(problem, torch.bfloat16, default_registry().get(name).own_rounding(problem))


@pytest.mark.parametrize("problem", [*SERVED, *(problem_of(activation=a) for a in ("gelu", "swiglu_clamped"))], ids=str)
def test_the_roundings_of_the_class_pass_what_it_is_allowed(problem):
    assert max(error_of(problem, distribution) for distribution in DISTRIBUTIONS) < limit_of(problem)


def test_the_limit_of_kernels_that_keep_gate_and_up_would_refuse_them():
    problem = problem_of()
    assert default_registry().get("triton.moe_fp8_block").own_rounding(problem) == 0
    plain = allowed(problem, torch.bfloat16)
    assert plain < error_of(problem, "normal") < limit_of(problem)


@pytest.mark.parametrize("weights", [FP8, "bfloat16"])
def test_three_bits_fewer_are_refused(weights):
    """Negative control: the limit knows these roundings from coarser ones."""
    problem = problem_of(weight_dtype=weights)
    assert error_of(problem, "normal", bits=BF16_BITS - 3) > limit_of(problem)
