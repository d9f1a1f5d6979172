"""vLLM's routers and experts with their methods replaced."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEQuantConfig,
    biased_moe_quant_config,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.oracle import fp8 as fp8_oracle
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm_layers import BF16, classes, config_of, experts_layer, fp8_experts, gpt_oss_experts, rows_alone, run_experts

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import host, table
from bidispatch.integrations.vllm.kernels import serving_plan


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedTopKRouter(2, 8, renormalize=True),
        lambda: FusedTopKRouter(2, 8, scoring_func="sigmoid", renormalize=False),
        lambda: GroupedTopKRouter(2, 8, 4, 2, True, "sigmoid", 2.5, torch.randn(8)),
        lambda: FusedTopKBiasRouter(2, 8, torch.randn(8), True, 1.5),
    ],
)
def test_routers(patched, make) -> None:
    router = make()
    model = torch.nn.Module()
    model.runner = torch.nn.Module()
    model.runner.router = router
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [row.reason for row in made.rows] == ["", ""]
    logits = torch.randn(17, 8)
    weights, ids = router._compute_routing(logits, logits, torch.int64)
    assert (weights.dtype, ids.dtype, ids.shape) == (torch.float32, torch.int64, (17, 2))
    scores = logits.softmax(-1) if getattr(router, "scoring_func", "softmax") == "softmax" else logits.sigmoid()
    chosen = scores.gather(-1, ids)
    if router.renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, chosen * getattr(router, "routed_scaling_factor", 1.0))
    with pytest.raises(SelectionError, match=r"logits in torch\.float64"):
        router._compute_routing(logits.double(), logits.double(), None)


def test_a_router_with_shared_experts_inside_is_not_promised(patched) -> None:
    model = torch.nn.Module()
    model.router = FusedTopKBiasRouter(2, 8, torch.randn(8), num_fused_shared_experts=1)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    (row,) = made.rows
    assert "shared experts are among the routed ones" in row.reason
    assert table.refusals(made.rows) == [f"router  (moe.router): {row.reason}"]


def widened(weight, scales):
    if scales is None:
        return weight.float()
    return weight.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)


def experts_by_hand(layer, experts, x, weights, ids):
    """What experts give, in fp32, a slot at a time."""
    w13 = widened(layer.w13_weight, experts.w1_scale)
    w2 = widened(layer.w2_weight, experts.w2_scale)
    wanted = torch.zeros_like(x, dtype=torch.float32)
    for token, slot in itertools.product(range(len(x)), range(2)):
        expert = ids[token, slot]
        both = w13[expert] @ x[token].float()
        if experts.w1_bias is not None:
            both += experts.w1_bias[expert].float()
        if layer.activation is MoEActivation.SWIGLUOAI:
            hidden = SwigluOAIAndMul.forward_native(SimpleNamespace(alpha=1.702, limit=7.0), both)
        else:
            gate, up = both.chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
        down = w2[expert] @ hidden
        if experts.w2_bias is not None:
            down += experts.w2_bias[expert].float()
        wanted[token] += weights[token, slot] * down
    return wanted


@pytest.mark.parametrize("make", [experts_layer, fp8_experts, gpt_oss_experts])
def test_experts(patched, make) -> None:
    torch.manual_seed(0)
    model, layer, experts = make()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("moe.experts", "")]
    assert experts.expects_unquantized_inputs
    x = torch.randn(9, layer.w2_weight.shape[1]).to(BF16)
    weights, ids = torch.rand(9, 2), torch.randint(4, (9, 2))
    out = run_experts(layer, experts, x, weights, ids)
    wanted = experts_by_hand(layer, experts, x, weights, ids)
    assert (out.float() - wanted).norm() / wanted.norm() < (0.08 if experts.w1_scale is not None else 0.01)
    assert torch.equal(out, rows_alone(lambda *row: run_experts(layer, experts, *row), x, weights, ids)[0])


def test_rows_that_vllm_quantised_are_refused(patched) -> None:
    model, layer, experts = fp8_experts()
    assert not experts.expects_unquantized_inputs  # nothing is served yet
    adopting.adopt(host.Host(serving_plan("cpu"), 64, classes()), model, config_of())
    x, weights, ids = torch.randn(2, 256).to(BF16), torch.rand(2, 2), torch.randint(4, (2, 2))
    with pytest.raises(SelectionError, match="expects_unquantized_inputs"):
        run_experts(layer, experts, x, weights, ids, torch.ones(2, 2))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("capability", [90, 100])
def test_fp8_experts_go_to_the_backend_that_leaves_the_weights(
    patched, cuda_platform, monkeypatch, capability: int, ranks: int
) -> None:
    for name in ("is_device_capability", "is_device_capability_family"):
        monkeypatch.setattr(cuda_platform, name, lambda wanted: wanted == capability, raising=False)
    monkeypatch.setattr(fp8_oracle, "current_platform", cuda_platform)
    parallel = SimpleNamespace(ep_size=ranks, use_deepep_v2_kernels=False)
    config = SimpleNamespace(moe_parallel_config=parallel)
    backends = fp8_oracle._get_priority_backends(config, kFp8Static128BlockSym, kFp8Dynamic128Sym)
    assert backends[0] is fp8_oracle.Fp8MoeBackend.TRITON
    assert len(set(backends)) == len(backends) > 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE}, "activation swigluoai_uninterleave"),
        ({"quant_config": FusedMoEQuantConfig.make(gemm1_clamp_limit=7.0)}, "its silu is clamped at 7.0"),
        (
            {"quant_config": FusedMoEQuantConfig.make(gemm1_clamp_limit=6.0), "activation": MoEActivation.SWIGLUOAI},
            "its swigluoai is given {'limit': 6.0}",
        ),
        ({"quant_config": biased_moe_quant_config(torch.zeros(4, 64), None)}, "one of its products has a bias"),
        ({"quant_config": biased_moe_quant_config(torch.zeros(4, 64), torch.zeros(4, 48))}, "its biases are"),
        ({"quant_config": FusedMoEQuantConfig.make(torch.int8)}, "experts in torch.int8"),
        (
            {"quant_config": FusedMoEQuantConfig.make(torch.float8_e4m3fn), "dtype": torch.float8_e4m3fn},
            "with scales without blocks",
        ),
        (
            {
                "quant_config": fp8_w8a8_moe_quant_config(
                    torch.ones(4, 1, 1, dtype=BF16), torch.ones(4, 1, 1), block_shape=[128, 128]
                ),
                "dtype": torch.float8_e4m3fn,
            },
            "its scales of w13 are [4, 1, 1] in torch.bfloat16",
        ),
        (
            {
                "quant_config": fp8_w8a8_moe_quant_config(
                    torch.ones(4, 1, 1), torch.ones(4, 1, 1), block_shape=[128, 128]
                ),
                "dtype": torch.float8_e4m3fn,
            },
            "needs hidden a multiple of 128",
        ),
        ({"dtype": torch.float16}, "what goes into them is torch.bfloat16"),
        ({"apply_router_weight_on_input": True}, "weights are applied to what goes in"),
        ({"expert_map": torch.zeros(4, dtype=torch.int64)}, "expert map is torch.int64"),
    ],
)
def test_experts_that_are_not_served(patched, changes, reason: str) -> None:
    model, _, experts = experts_layer(**changes)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert reason in made.rows[0].reason
    assert not hasattr(experts, host.SERVED)


def test_served_experts_ask_vllm_for_no_workspace_but_the_result(patched) -> None:
    model, layer, experts = experts_layer()
    shapes = (7, 64, 48, 2, 4, 4, None, layer.activation)
    first, second, out = experts.workspace_shapes(*shapes)
    assert min(map(len, (first, second))) > 1
    adopting.adopt(host.Host(serving_plan("cpu"), 64, classes()), model, config_of())
    assert experts.workspace_shapes(*shapes) == ((1,), (1,), out)
    assert out == (7, 48)
