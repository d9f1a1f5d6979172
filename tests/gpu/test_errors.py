"""Errors against fp64 beside those of the kernels that servers run, on the same operands.

FA3 of vLLM for attention, DeepGEMM for fp8 products, vLLM's fused experts for those. A test skips, by name, where a
library is not installed. Latent attention is in test_flash_mla.py, beside FlashMLA.
"""

from __future__ import annotations

import functools

import pytest
import torch
from benchmark_peers import peer, present
from bound_kernels import bound

from bidispatch import ops
from bidispatch.ops.moe import known_experts
from bidispatch.ops.reference.attention import attention, paged_batch
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits

# What a library's import warns of is not ours to fail for.
pytestmark = pytest.mark.filterwarnings("default")

FP8 = "float8_e4m3fn"
OURS = 1.05
ROUNDS_PARTIALS = 1.5
"""Of libraries' kernels, which round partial results to bf16 where they split."""

HEADS = (
    {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64},
    {"num_heads": 16, "num_kv_heads": 16, "head_dim": 128},
)
DECODED = (300, 777, 1000, 1024, 2049, 5000, 8000, 12000)
PHASES = {
    "decode": ((1,) * len(DECODED), DECODED),
    "drafts": ((4,) * len(DECODED), DECODED),
    "prefill": ((1500, 700, 257), (1500, 700, 257)),
    "chunk": ((512, 300), (4096, 1000)),
}
"""Query rows and positions of each sequence."""
LIBRARIES = (
    *(f"flash_attn.fa2{kind}" for kind in ("", "_splits", "_capacity_splits", "_kv_split")),
    *(f"flash_attn.fa3{kind}" for kind in ("_kv_split", "_triton_splits")),
    "flashinfer.paged",
)
KERNELS = (("triton.paged_attention", OURS), *((name, ROUNDS_PARTIALS) for name in LIBRARIES))


def error_of(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def attention_error(plan):
    """Of one kernel, bound as a server binds it for such calls. The data of a sequence is the same in any pages.

    FA3's errors and the exact results are the same for every kernel beside them: computed once.
    """

    def batch(problem, phase):
        return paged_batch(problem, *PHASES[phase], device=plan.device.torch_device)

    @functools.cache
    def exact(problem, phase):
        return attention(problem, *batch(problem, phase), problem.size("head_dim") ** -0.5)[0]

    @functools.cache
    def measured(name, problem, phase):
        queries, lengths = PHASES[phase]
        kernel = bound(plan, name, problem, Limits(sum(queries), len(queries), max(lengths), max(queries)))
        return error_of(kernel(*batch(problem, phase)), exact(problem, phase))

    def error(name, dims, phase, page_size=16):
        return measured(name, ops.get("attention").problem("bfloat16", {**dims, "page_size": page_size}), phase)

    return error


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dims", HEADS, ids=str)
@pytest.mark.parametrize(("name", "most"), KERNELS, ids=[name for name, _ in KERNELS])
def test_attention_is_as_near_as_fa3(attention_error, name, most, dims, phase, record_property):
    mine = attention_error(name, dims, phase, page_size=256 if "capacity" in name else 16)
    theirs = attention_error("flash_attn.fa3", dims, phase)
    record_property("error", mine)
    record_property("of FA3's", mine / theirs)
    assert mine <= most * theirs, f"{mine:.3e}, FA3 {theirs:.3e}"


def test_the_measure_sees_a_rounding_more(plan):
    """Negative control: a result rounded once more to bf16, as a split that is rounded, is further off than allowed."""
    exact = torch.randn(300, 4096, device=plan.device.torch_device, dtype=torch.float64)
    once = exact.bfloat16()
    twice = (exact * 3).bfloat16().double() / 3
    assert error_of(twice.bfloat16(), exact) > OURS * error_of(once, exact)


def drawn(plan, problem, rows, distribution="normal"):
    make = load_attribute(ops.get(problem.op).inputs)
    return make(problem, rows, device=plan.device.torch_device, distribution=distribution)


def reference(problem, arguments):
    return load_attribute(ops.get(problem.op).reference)(problem, *arguments)[0]


@pytest.mark.parametrize("distribution", ["normal", "positive"])
@pytest.mark.parametrize("rows", [16, 128, 1000])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (2112, 7168), (4096, 12288)])
@pytest.mark.parametrize("name", ["triton.fp8_block", "deep_gemm.fp8"])
def test_fp8_products_are_as_near_as_deep_gemm(plan, name, n, k, rows, distribution, record_property):
    if plan.device.arch.family != "sm90":
        pytest.skip(f"DeepGEMM takes fp32 scales as they are on sm90 alone, not on {plan.device.arch.name}")
    problem = ops.get("gemm.fp8_block").problem(FP8, {"n": n, "k": k})
    x, x_scales, weight, weight_scales = arguments = drawn(plan, problem, rows, distribution)
    kernel = bound(plan, name, problem, Limits(rows))
    product = present(peer("deep_gemm").product)
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)
    its_scales = peer("deep_gemm").side_by_side(rows, x_scales.shape[1], x.device).copy_(x_scales)
    product(x, its_scales, weight, weight_scales, out)
    exact = reference(problem, arguments)
    mine, theirs = error_of(kernel(*arguments), exact), error_of(out, exact)
    record_property("error", mine)
    record_property("of DeepGEMM's", mine / theirs)
    assert mine <= OURS * theirs, f"{mine:.3e}, DeepGEMM {theirs:.3e}"


IDS = [argument.name for argument in ops.get("moe.experts").arguments].index("topk_ids")
EXPERTS = (
    {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 1792},
    {"experts": 16, "top_k": 4, "hidden": 512, "intermediate": 256},
)


@pytest.mark.parametrize("rows", [16, 300])
@pytest.mark.parametrize("dims", EXPERTS, ids=str)
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("triton.moe_fp8_block", FP8),
        ("deep_gemm.moe_fp8_block", FP8),
        ("triton.moe", "bfloat16"),
        ("deep_gemm.moe", "bfloat16"),
    ],
)
def test_experts_are_as_near_as_vllms(plan, name, weights, dims, rows, record_property):
    """Against fp64 of the dequantised operands, whose activations are quantised as the op says."""
    problem = ops.get("moe.experts").problem("bfloat16", {**dims, "weight_dtype": weights})
    arguments = drawn(plan, problem, rows)
    # Those that are drawn have some that no expert has, which vLLM would take for addresses.
    scores = torch.rand(rows, dims["experts"], device=plan.device.torch_device)
    arguments[IDS] = scores.topk(dims["top_k"], dim=-1).indices.int()
    kernel = bound(plan, name, problem, Limits(rows))
    stock = present(peer("vllm_moe").experts, [arguments], known_experts(problem.dims))
    exact = reference(problem, arguments)
    mine, theirs = error_of(kernel(*arguments), exact), error_of(stock(0), exact)
    record_property("error", mine)
    record_property("of vLLM's", mine / theirs)
    assert mine <= OURS * theirs, f"{mine:.3e}, vLLM {theirs:.3e}"
