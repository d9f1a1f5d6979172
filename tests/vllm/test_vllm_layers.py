"""vLLM's own layers with their methods replaced: what they give, that bits of a row stand alone, what is refused."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEQuantConfig,
    biased_moe_quant_config,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle import fp8 as fp8_oracle
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticTensorSym,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.scalar_type import scalar_types
from vllm.v1.worker.gpu_worker import Worker

from bidispatch.errors import BackendError, DeviceError, SelectionError
from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import compat, fp8_linear, host, int4_kernel, plugin, table
from bidispatch.integrations.vllm.kernels import serving_plan
from bidispatch.integrations.vllm.mode import Mode

BF16 = torch.bfloat16


class Block(torch.nn.Module):
    """The layers of a small model, named as vLLM's models name theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = RMSNorm(64, dtype=BF16)
        self.gemma = GemmaRMSNorm(64).to(BF16)
        self.proj = ReplicatedLinear(64, 96, bias=True, params_dtype=BF16, disable_tp=True)
        self.gate = GateLinear(64, 8, bias=False, out_dtype=torch.float32, params_dtype=BF16)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter.data)
            parameter.requires_grad_(False)


def config_of():
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=BF16),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
        lora_config=None,
        speculative_config=None,
        additional_config={},
    )


def classes():
    return {
        seam.name: compat.resolve(seam)[0] if "." in seam.path else getattr(*compat.resolve(seam))
        for seam in compat.SEAMS
    }


@pytest.fixture
def served(patched):
    model = Block()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    return SimpleNamespace(model=model, host=made)


def rows_alone(function, *batches):
    """Results of each row by itself, put together."""
    parts = [function(*(x[row : row + 1] for x in batches)) for row in range(len(batches[0]))]
    parts = [part if isinstance(part, tuple) else (part,) for part in parts]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def test_every_layer_is_served_and_named(served) -> None:
    rows = table.merged(served.host.rows)
    assert [row.reason for row in rows] == [""] * len(rows)
    assert {(row.kind, row.op) for row in rows} == {
        ("norm", "rms_norm"),
        ("norm", "fused_add_rms_norm"),
        ("linear", "gemm"),
        ("router", "gemm"),
    }
    assert {row.level for row in rows} == {"sequence"}
    assert all(row.source and row.evidence == "claimed" for row in rows)


def test_linear_gives_the_product_and_rows_stand_alone(served) -> None:
    layer, x = served.model.proj, torch.randn(33, 64).to(BF16)
    out, _ = layer(x)
    wanted = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(out.float(), wanted, atol=0.2, rtol=0.02)
    (alone,) = rows_alone(lambda row: layer(row)[0], x)
    assert torch.equal(out, alone)


def test_gate_gives_its_own_dtype(served) -> None:
    x = torch.randn(20, 64).to(BF16)
    out, bias = served.model.gate(x)
    assert (out.dtype, bias) == (torch.float32, None)
    (alone,) = rows_alone(lambda row: served.model.gate(row)[0], x)
    assert torch.equal(out, alone)


@pytest.mark.parametrize("name", ["norm", "gemma"])
@pytest.mark.parametrize("path", ["forward_native", "forward_cuda"])
def test_norms_on_both_of_vllms_paths(served, name: str, path: str) -> None:
    layer = getattr(served.model, name)
    forward = getattr(layer, path)
    x, residual = torch.randn(2, 19, 64).to(BF16)
    out, total = forward(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, forward(total))
    scale = layer.weight.float() + (1.0 if name == "gemma" else 0.0)
    wanted = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + layer.variance_epsilon) * scale
    torch.testing.assert_close(out.float(), wanted, atol=0.05, rtol=0.02)
    assert all(map(torch.equal, (out, total), rows_alone(forward, x, residual)))


def test_heads_are_rows(served) -> None:
    x = torch.randn(5, 4, 64).to(BF16)
    assert torch.equal(served.model.norm(x), served.model.norm(x.reshape(20, 64)).view(5, 4, 64))


def test_a_compiled_graph_holds_the_op_and_not_a_rung(served) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = served.model.proj
    compiled = torch.compile(lambda x: layer(x)[0], backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 50):
        x = torch.randn(rows, 64).to(BF16)
        assert torch.equal(compiled(x), layer(x)[0])
    assert len(graphs) == 1
    assert any("vllm_linear" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


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


def experts_layer(quant_config=None, dtype=BF16, shape=(4, 48, 32), **changes):
    """Routed experts as vLLM builds them, but for the construction, which needs a GPU."""
    count, hidden, intermediate = shape
    experts = object.__new__(TritonExperts)
    experts.quant_config = quant_config or FusedMoEQuantConfig.make()
    experts._lora_context = None
    layer = torch.nn.Module()
    w13 = torch.randn(count, 2 * intermediate, hidden) / hidden**0.5
    w2 = torch.randn(count, hidden, intermediate) / intermediate**0.5
    layer.w13_weight = torch.nn.Parameter(w13.to(dtype), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(w2.to(dtype), requires_grad=False)
    layer.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(impl=SimpleNamespace(fused_experts=experts)))
    layer.moe_config = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(enable_eplb=False, use_all2all_kernels=False),
        is_lora_enabled=False,
        in_dtype=BF16,
    )
    layer.apply_router_weight_on_input, layer.activation = False, MoEActivation.SILU
    layer.top_k, layer.expert_map, layer.global_num_experts = 2, None, count
    for name, value in changes.items():
        setattr(layer, name, value)
    model = torch.nn.Module()
    model.experts = layer
    return model, layer, experts


def fp8_experts():
    """The same with fp8 weights in blocks of 128x128."""
    w1_scale, w2_scale = torch.rand(4, 4, 2) / 4, torch.rand(4, 2, 2) / 4
    config = fp8_w8a8_moe_quant_config(w1_scale=w1_scale, w2_scale=w2_scale, block_shape=[128, 128])
    return experts_layer(config, torch.float8_e4m3fn, (4, 256, 256))


def gpt_oss_experts():
    """The same with biases and gpt-oss's activation."""
    config = biased_moe_quant_config(torch.randn(4, 64).to(BF16), torch.randn(4, 48).to(BF16))
    return experts_layer(config, activation=MoEActivation.SWIGLUOAI)


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


def run_experts(layer, experts, x, weights, ids, a1q_scale=None):
    """As vLLM's modular kernel calls them."""
    out = torch.empty_like(x)
    experts.apply(
        output=out,
        hidden_states=x,
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        topk_weights=weights,
        topk_ids=ids,
        activation=layer.activation,
        global_num_experts=4,
        expert_map=None,
        a1q_scale=a1q_scale,
        a2_scale=None,
        workspace13=None,
        workspace2=None,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return out


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


def test_weights_that_nothing_knows_are_named(patched) -> None:
    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = torch.nn.Parameter(torch.ones(4))

    model = torch.nn.Module()
    model.mixer = Mixer()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert "Mixer with weights" in made.rows[0].reason


def test_strict_runs_no_layer_that_was_given_nothing(patched) -> None:
    layer = ReplicatedLinear(8, 8, params_dtype=BF16, disable_tp=True)
    host.refuse_unserved(True)
    try:
        with pytest.raises(SelectionError, match="BIDISPATCH_VLLM=strict"):
            layer(torch.ones(1, 8, dtype=BF16))
    finally:
        host.refuse_unserved(False)


def test_a_layer_with_a_forward_of_its_own_is_not_promised(patched) -> None:
    class Fused(ReplicatedLinear):
        def forward(self, x):
            return x @ self.weight.T if len(x) < 16 else super().forward(x)

    model = torch.nn.Module()
    model.fused = Fused(8, 8, params_dtype=BF16, disable_tp=True)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert "Fused has a forward of its own" in made.rows[0].reason
    assert not hasattr(model.fused, host.SERVED)


def test_deepseeks_fused_projection_is_served_with_its_switch_off(patched) -> None:
    from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear

    layer = object.__new__(DeepSeekV2FusedQkvAProjLinear)
    torch.nn.Module.__init__(layer)
    layer.quant_method, layer._use_min_latency_gemm = UnquantizedLinearMethod(), True
    layer.skip_bias_add, layer.return_bias, layer.gather_output, layer.tp_size = False, True, False, 1
    layer.weight = torch.nn.Parameter(torch.randn(48, 64).to(BF16), requires_grad=False)
    layer.bias = None
    model = torch.nn.Module()
    model.fused_qkv_a_proj = layer
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("gemm", "")]
    assert layer._use_min_latency_gemm is False
    x = torch.randn(20, 64).to(BF16)
    out, _ = layer(x)
    torch.testing.assert_close(out.float(), x.float() @ layer.weight.float().T, atol=0.2, rtol=0.02)
    assert torch.equal(out, rows_alone(lambda row: layer(row)[0], x)[0])
    assert [seam.where for seam in compat.UNIMPORTED] == [
        f"{DeepSeekV2FusedQkvAProjLinear.__module__}.{DeepSeekV2FusedQkvAProjLinear.__qualname__}.forward"
    ]


HEADS, NOPE, ROPE, RANK, VALUE = 4, 32, 16, 64, 48


def mla_layer(**changes):
    """vLLM's MLA layer with weights as it makes them, around an attention that takes each row alone."""
    from bidispatch.integrations.vllm.mla import BidispatchMLAImpl

    layer = object.__new__(MLAAttention)
    torch.nn.Module.__init__(layer)
    impl = object.__new__(BidispatchMLAImpl)
    dims = {"num_heads": HEADS, "kv_lora_rank": RANK, "rope_dim": ROPE, "page_size": 16}
    selection = serving_plan("cpu").select("attention.mla", dtype="bfloat16", **dims)
    impl.num_heads, impl.kernels = HEADS, SimpleNamespace(selection=selection)
    impl.forward_mqa = lambda q, cache, step, layer: (q[..., :RANK] + q[..., RANK:].sum(-1, keepdim=True), None)
    both = torch.randn(HEADS * (NOPE + VALUE), RANK).to(BF16).T.view(RANK, HEADS, NOPE + VALUE)
    w_uk, w_uv = both.split([NOPE, VALUE], dim=-1)
    layer.W_UK_T, layer.W_UV = w_uk.permute(1, 2, 0), w_uv.transpose(0, 1)
    layer.num_heads, layer.kv_lora_rank, layer.qk_nope_head_dim = HEADS, RANK, NOPE
    layer.qk_rope_head_dim, layer.v_head_dim, layer.impl = ROPE, VALUE, impl
    layer.get_attn_backend = lambda: SimpleNamespace(get_name=lambda: "CUSTOM")
    for name, value in changes.items():
        setattr(layer, name, value)
    model = torch.nn.Module()
    model.attn = layer
    return model, layer


def run_mla(layer, q, padding=0, **named):
    output = torch.zeros(len(q) + padding, HEADS * VALUE, dtype=BF16)
    q = torch.cat([q, torch.full_like(q[:1], float("nan")).expand(padding, -1, -1)])
    step = SimpleNamespace(num_actual_tokens=len(q) - padding)
    assert layer.forward_impl(q, None, None, None, step, output=output, **named) is output
    return output


def test_the_products_of_mla(patched) -> None:
    torch.manual_seed(0)
    model, layer = mla_layer()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("attention.mla", ""), ("bmm", ""), ("bmm", "")]
    q = torch.randn(19, HEADS, NOPE + ROPE).to(BF16)
    out = run_mla(layer, q)
    up = torch.einsum("bnp,npl->bnl", q[..., :NOPE].float(), layer.W_UK_T.float()).to(BF16)
    latent, _ = layer.impl.forward_mqa(torch.cat([up, q[..., NOPE:]], -1), None, None, layer)
    wanted = torch.einsum("bnl,nlv->bnv", latent.float(), layer.W_UV.float()).reshape(19, -1)
    assert (out.float() - wanted).norm() / wanted.norm() < 0.01
    assert torch.equal(out, rows_alone(lambda row: run_mla(layer, row), q)[0])
    padded = run_mla(layer, q, padding=5)
    assert torch.equal(padded[:19], out)
    assert not padded[19:].any()
    for scale in ("output_scale", "q_dcp_replicated"):
        with pytest.raises(SelectionError, match="quantised after attention"):
            run_mla(layer, q, **{scale: torch.ones(1)})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"W_UK_T": None}, "its W_UK_T is NoneType"),
        ({"W_UV": torch.zeros(HEADS, RANK, 1)}, "its W_UV is [4, 64, 1]"),
        ({"impl": SimpleNamespace()}, "its attention is not the registry's"),
        ({"num_heads": 8}, "its attention has 4 heads and its products 8"),
    ],
)
def test_products_of_mla_that_are_not_served(patched, changes, reason: str) -> None:
    model, layer = mla_layer(**changes)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert reason in made.rows[-1].reason
    assert made.rows[-1].op == "bmm"
    assert not hasattr(layer, host.SERVED)


def test_the_head_is_served_under_either_name_and_an_embedding_is_left(patched) -> None:
    model = torch.nn.Module()
    model.embed_tokens = VocabParallelEmbedding(128, 16, params_dtype=BF16)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert made.rows == []
    model.lm_head = model.embed_tokens  # tied
    torch.nn.init.normal_(model.lm_head.weight.data)
    adopting.adopt(made, model, config_of())
    assert [(row.kind, row.op, row.reason) for row in made.rows] == [("lm_head", "gemm", "")]
    x = torch.randn(18, 16).to(BF16)
    apply = model.lm_head.quant_method.apply
    out = apply(model.lm_head, x)
    torch.testing.assert_close(out.float(), x.float() @ model.lm_head.weight.float().T, atol=0.1, rtol=0.02)
    assert torch.equal(out, rows_alone(lambda row: apply(model.lm_head, row), x)[0])


def fp8_layer():
    method = object.__new__(Fp8LinearMethod)
    method.weight_block_size, method.out_dtype = [128, 128], BF16
    method.fp8_linear = object.__new__(TritonFp8BlockScaledMMKernel)
    layer = object.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    layer.quant_method = method
    layer.weight = torch.nn.Parameter(torch.randn(192, 256).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(torch.rand(2, 2), requires_grad=False)
    model = torch.nn.Module()
    model.proj = layer
    return model, layer


def test_fp8_blocks(patched) -> None:
    torch.manual_seed(0)
    model, layer = fp8_layer()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("quantize.fp8_group", ""), ("gemm.fp8_block", "")]
    x, bias = torch.randn(21, 256).to(BF16), torch.randn(192).to(BF16)
    out = layer.quant_method.apply(layer, x, bias)
    scales = layer.weight_scale_inv.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    wanted = x.float() @ (layer.weight.float() * scales).T + bias.float()
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05
    assert torch.equal(out, rows_alone(lambda row: layer.quant_method.apply(layer, row, bias), x)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, layer: setattr(m, "weight_block_size", [64, 64]), "its blocks are"),
        (lambda m, layer: setattr(m, "fp8_linear", object()), "may hold the weight in another order"),
        (lambda m, layer: setattr(layer, "weight_scale_inv", torch.rand(2, 3)), "its scales are"),
    ],
)
def test_fp8_that_is_not_served(patched, change, reason: str) -> None:
    model, layer = fp8_layer()
    del layer.weight_scale_inv
    layer.weight_scale_inv = torch.rand(2, 2)
    change(layer.quant_method, layer)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert reason in made.rows[0].reason
    assert len(made.rows) == 1


def whole_fp8_layer(compressed, channel, static, **changes):
    """An fp8 layer without blocks, its parameters as vLLM has them once they are loaded."""
    n, k = 192, 256
    layer = object.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    scheme = object.__new__(CompressedTensorsW8A8Fp8 if compressed else Fp8LinearMethod)
    scheme.weight_block_size, scheme.out_dtype = None, BF16
    scheme.activation_quant_key = kFp8StaticTensorSym if static else kFp8DynamicTokenSym
    scheme.fp8_linear = object.__new__(CutlassFP8ScaledMMLinearKernel)
    scheme.fp8_linear.logical_output_size = n
    layer.quant_method = scheme
    if compressed:
        layer.scheme, layer.quant_method = scheme, object.__new__(CompressedTensorsLinearMethod)
    weight = torch.randn(n, k).to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(weight.t(), requires_grad=False)
    layer.weight_scale = torch.rand(n, 1) / 8 if channel else torch.rand(())
    layer.input_scale = torch.tensor(0.01) if static else None
    layer.bias = torch.randn(n).to(BF16)
    layer.input_size, layer.input_quant_key = k, "hoisted"
    for name, value in changes.items():
        setattr(scheme if hasattr(scheme, name) else layer, name, value)
    model = torch.nn.Module()
    model.proj = layer
    return model, layer


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_fp8_without_blocks(patched, compressed: bool, channel: bool, static: bool) -> None:
    torch.manual_seed(0)
    model, layer = whole_fp8_layer(compressed, channel, static)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    quantize = "quantize.fp8_tensor" if static else "quantize.fp8_token"
    assert [(row.op, row.reason) for row in made.rows] == [(quantize, ""), ("gemm.fp8", "")]
    assert not hasattr(layer, "input_quant_key")
    x = torch.randn(21, 256).to(BF16)
    for bias in (None, layer.bias):
        out = layer.quant_method.apply(layer, x, bias)
        wanted = x.float() @ (layer.weight.float().t() * layer.weight_scale).T + (0 if bias is None else bias.float())
        assert out.dtype is BF16
        assert (out.float() - wanted).norm() / wanted.norm() < 0.05
        assert torch.equal(out, rows_alone(lambda row, b=bias: layer.quant_method.apply(layer, row, b), x)[0])
    with pytest.raises(SelectionError, match="vLLM's fused quantisation"):
        layer.quant_method.apply(layer, SimpleNamespace(quant_key="fp8"))


def test_fp8_blocks_of_compressed_tensors(patched) -> None:
    model, layer = whole_fp8_layer(
        True,
        True,
        False,
        bias=False,
        weight_block_size=[128, 128],
        fp8_linear=object.__new__(TritonFp8BlockScaledMMKernel),
    )
    layer.weight = torch.nn.Parameter(layer.weight.t(), requires_grad=False)
    layer.weight_scale = torch.rand(2, 2)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("quantize.fp8_group", ""), ("gemm.fp8_block", "")]
    x = torch.randn(5, 256).to(BF16)
    out = layer.quant_method.apply(layer, x)
    scales = layer.weight_scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    wanted = x.float() @ (layer.weight.float() * scales).T
    assert (out.float() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fp8_linear": object()}, "may hold the weight in another order"),
        ({"input_size": 250}, "its weight was padded from [192, 250] to [192, 256]"),
        ({"weight_scale": torch.rand(3)}, "its weight scale is [3]"),
        ({"input_scale": torch.rand(2)}, "its input scale is [2]"),
        ({"input_scale": torch.rand(1)}, "that is missing"),
        ({"activation_quant_key": kFp8DynamicTensorSym}, "share a scale that follows the batch"),
        ({"bias": torch.zeros(192)}, "its bias is torch.float32"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_fp8_without_blocks_that_is_not_served(patched, compressed: bool, changes, reason: str) -> None:
    model, layer = whole_fp8_layer(compressed, True, False, **changes)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [reason in row.reason for row in made.rows] == [True]
    assert not hasattr(layer, host.SERVED)


def test_schemes_of_compressed_tensors_that_are_not_served_are_named(patched) -> None:
    model, layer = whole_fp8_layer(True, True, False)
    layer.scheme = object()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [row.reason for row in made.rows] == ["weights of object are not served"]


def test_fp8_block_kernels_are_the_ones_that_leave_the_weight(patched) -> None:
    seen = []
    kinds = (TritonFp8BlockScaledMMKernel, CutlassFP8ScaledMMLinearKernel)
    chosen = fp8_linear.kernel(lambda *a, **named: seen.append(named), *kinds)
    for grouped in (True, False):
        shape = SimpleNamespace(is_per_group=lambda grouped=grouped: grouped)
        chosen(SimpleNamespace(scale=SimpleNamespace(group_shape=shape)), None, module_name="x")
    assert seen == [{"module_name": "x", "force_kernel": kind} for kind in kinds]


def int4_layer(kind, n=32, k=256, group=128, zero_points=True, kept=True):
    """A 4-bit layer with the parameters of its checkpoint, and its weight [n, k] in fp32."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (n, k // group), generator=generator, dtype=torch.int8)
    zeros = zeros if zero_points else torch.zeros_like(zeros)
    scales = torch.rand(n, k // group, generator=generator).to(BF16) / 8
    wide = (q.float() - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    layer = object.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    layer.bias = None
    if kind == "awq":
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        columns = [pack_to_int32(t.T.reshape(-1, n // 8, 8)[..., order].reshape(-1, n), 4) for t in (q, zeros)]
        tensors = {"qweight": columns[0], "qzeros": columns[1], "scales": scales.T}
        layer.quant_method = object.__new__(AutoAWQLinearMethod)
        layer.quant_method.quant_config = SimpleNamespace(weight_bits=4, pack_factor=8)
    elif kind == "gptq":
        tensors = {"qweight": pack_to_int32(q, 4).T, "scales": scales.T, "g_idx": torch.zeros(k)}
        tensors["qzeros"] = torch.zeros(k // group, n // 8, dtype=torch.int32)  # not read
        layer.quant_method = object.__new__(AutoGPTQLinearMethod)
    else:
        tensors = {"weight_packed": pack_to_int32(q, 4), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
        tensors |= {"weight_zero_point": pack_to_int32(zeros, 4, packed_dim=0)} if zero_points else {}
        layer.quant_method = object.__new__(CompressedTensorsLinearMethod)
        layer.scheme = object.__new__(CompressedTensorsWNA16)
        layer.scheme.num_bits, layer.scheme.symmetric, layer.scheme.kernel = 4, not zero_points, None
    for name, tensor in tensors.items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    if kept and kind != "awq":
        kernel = object.__new__(int4_kernel.KeptWeights)
        kernel.config = SimpleNamespace(zero_points=zero_points)
        getattr(layer, "scheme", layer.quant_method).kernel = kernel
    model = torch.nn.Module()
    model.proj = layer
    return model, layer, wide


@pytest.mark.parametrize(
    ("kind", "zero_points"),
    [("awq", True), ("awq", False), ("gptq", False), ("compressed", True), ("compressed", False)],
)
def test_int4(patched, kind: str, zero_points: bool) -> None:
    model, layer, wide = int4_layer(kind, zero_points=zero_points)
    x = torch.randn(21, 256).to(BF16)
    if kind != "awq":  # before it is served, as MLA's kv_b_proj is asked
        early = layer.quant_method.apply(layer, x)
        torch.testing.assert_close(early.float(), x.float() @ wide.T, atol=0.1, rtol=0.02)
    layer.bias = torch.randn(32).to(BF16)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [(row.op, row.reason) for row in made.rows] == [("gemm.int4", "")]
    assert not layer._parameters
    for bias in (None, layer.bias):
        out = layer.quant_method.apply(layer, x, bias)
        wanted = x.float() @ wide.T + (0 if bias is None else bias.float())
        torch.testing.assert_close(out.float(), wanted, atol=0.1, rtol=0.02)
        assert torch.equal(out, rows_alone(lambda row, b=bias: layer.quant_method.apply(layer, row, b), x)[0])


def test_compressed_weights_that_vllm_left_alone_are_served_without_a_kernel(patched) -> None:
    """As 0.33 has it in its mode."""
    model, layer, wide = int4_layer("compressed", kept=False)
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    x = torch.randn(3, 256).to(BF16)
    torch.testing.assert_close(layer.quant_method.apply(layer, x).float(), x.float() @ wide.T, atol=0.1, rtol=0.02)


def spoil(kind, **attributes):
    model, layer, _ = int4_layer(kind)
    scheme = getattr(layer, "scheme", layer.quant_method)
    for name, value in attributes.items():
        setattr(scheme, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: spoil("awq", quant_config=SimpleNamespace(weight_bits=8)), "have 8 bits"),
        (lambda: spoil("gptq", kernel=object()), "object was chosen, and holds the weight in a layout of its own"),
        (lambda: spoil("compressed", kernel=object()), "object was chosen"),
        (lambda: spoil("compressed", num_bits=8), "have 8 bits"),
        (lambda: int4_layer("awq", k=64, group=64)[0], "k a multiple of 128"),
    ],
)
def test_int4_that_is_not_served(patched, make, reason: str) -> None:
    model = make()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert [reason in row.reason for row in made.rows] == [True]
    assert model.proj._parameters
    assert not hasattr(model.proj, host.SERVED)


def mixed_config(**changes):
    config = {
        "full_weight_shape": (256, 32),
        "partition_weight_shape": (256, 32),
        "weight_type": scalar_types.uint4b8,
        "act_type": BF16,
        "group_size": 128,
        "zero_points": False,
        "has_g_idx": False,
    }
    return MPLinearLayerConfig(**config | changes)


def test_4_bit_weights_are_kept_where_the_plan_serves_them(patched, monkeypatch) -> None:
    monkeypatch.setattr(int4_kernel, "plan_of", lambda config: serving_plan("cpu"))
    chosen = int4_kernel.kernel(lambda config: "vLLM's")
    assert chosen(mixed_config()) is int4_kernel.KeptWeights
    assert (
        chosen(mixed_config(group_size=-1, zero_points=True, weight_type=scalar_types.uint4)) is int4_kernel.KeptWeights
    )
    made = int4_kernel.KeptWeights(mixed_config(), "qweight", "scales", "qzeros", "g_idx")
    assert made.process_weights_after_loading(torch.nn.Module()) is None
    for changes in (
        {"weight_type": scalar_types.uint8b128},
        {"has_g_idx": True},
        {"partition_weight_shape": (250, 32)},
        {"act_type": torch.float8_e4m3fn},
    ):
        assert chosen(mixed_config(**changes)) == "vLLM's"


def worker_of(model):
    config = config_of()
    config.scheduler_config = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4)
    config.compilation_config = SimpleNamespace(max_cudagraph_capture_size=8)
    config.model_config = SimpleNamespace(dtype=BF16, max_model_len=64)
    worker = object.__new__(Worker)
    worker.vllm_config, worker.device, worker.rank = config, torch.device("cpu"), 0
    worker.model_runner = SimpleNamespace(get_model=lambda: model, load_model=lambda **_: None)
    return worker


def test_a_worker_takes_over_its_model_and_logs_one_table(patched, caplog) -> None:
    model = Block()
    worker = worker_of(model)
    with caplog.at_level("INFO", logger="vllm.bidispatch"):
        logging.getLogger("vllm").addHandler(caplog.handler)
        plugin._take_over(Mode.STRICT, worker, classes())
    tables = [record.getMessage() for record in caplog.records if "kernels of this model" in record.getMessage()]
    assert tables
    assert "torch_cpu.gemm" in tables[0]
    assert "fingerprint cpu-sequence-" in tables[0]
    assert "bidispatch" in worker.vllm_config.additional_config
    assert hasattr(model.proj, host.SERVED)


def test_a_worker_with_a_way_of_its_own_is_refused(patched) -> None:
    class Own(Worker):
        def load_model(self, *, load_dummy_weights: bool = False) -> None:
            pass

    plugin.require_patched_worker(object.__new__(Worker))
    with pytest.raises(DeviceError, match="--worker-cls"):
        plugin.require_patched_worker(object.__new__(Own))


def test_strict_names_layer_op_and_reason(patched) -> None:
    model, _, _ = experts_layer(activation=MoEActivation.RELU2)
    with pytest.raises(SelectionError, match=r"experts experts \(moe\.experts\): activation relu2") as error:
        plugin._take_over(Mode.STRICT, worker_of(model), classes())
    assert "BIDISPATCH_VLLM=on" in str(error.value)
    plugin._take_over(Mode.ON, worker_of(model), classes())


def originals():
    found = {}
    for seam in compat.SEAMS:
        holder, name = compat.resolve(seam)
        found[seam.name] = inspect.getattr_static(holder, name)
    return found


def test_patches_apply_once_and_undo(cuda_platform, monkeypatch) -> None:
    before = originals()
    plugin.patch_layers(Mode.ON)
    plugin.patch_layers(Mode.ON)
    changed = {name for name, value in originals().items() if value is not before[name]}
    # Names that other modules bound are patched there; some classes are only looked at.
    looked_at = {"fp8_kernel", "fp8_plain_kernel", "fp8_whole_kernel", "compressed", "mixed_kernel", "mixed_base"}
    assert changed == set(before) - looked_at - {"init_device"}
    plugin.undo()
    assert originals() == before


def test_nothing_stays_patched_where_one_seam_fails(cuda_platform, monkeypatch) -> None:
    from bidispatch.integrations.vllm import backends

    def broken(*_: object, **__: object) -> None:
        raise BackendError("no such thing")

    before = originals()
    monkeypatch.setattr(backends, "install", broken)
    with pytest.raises(BackendError):
        plugin.patch_layers(Mode.ON)
    assert originals() == before


def test_register_is_idempotent_and_only_the_worker_hook_is_touched(cuda_platform) -> None:
    before = originals()
    try:
        plugin.register()
        plugin.register()
        assert plugin.active()
        assert {n for n, value in originals().items() if value is not before[n]} == {"init_device"}
        assert not torch.cuda.is_initialized()
    finally:
        plugin.undo()
    assert originals() == before


def test_another_version_is_refused_by_name(cuda_platform, monkeypatch) -> None:
    monkeypatch.setattr(plugin, "installed", lambda _: "0.40.0")
    with pytest.raises(BackendError, match=r"vLLM 0\.40\.0"):
        plugin.register()
    assert not plugin.active()


def test_a_platform_that_is_not_cuda_is_refused() -> None:
    with pytest.raises(DeviceError, match="on CUDA"):
        plugin.register()


def test_vllm_calls_the_entry_point_and_what_it_raises_stops_the_process() -> None:
    """On the processor, which is not served: so an installed plugin is seen to be called, with CUDA untouched."""
    code = "from vllm.plugins import load_general_plugins; load_general_plugins()"
    environment = {**os.environ, "VLLM_BATCH_INVARIANT": "1"}
    environment.pop("VLLM_PLUGINS", None)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "bidispatch serves vLLM's layers on CUDA" in run.stderr
    assert run.returncode == 1
    off = subprocess.run(command, env=environment | {"BIDISPATCH_VLLM": "off"}, timeout=300, check=False)
    assert off.returncode == 0


def test_the_linear_method_is_the_one_of_vllm() -> None:
    assert UnquantizedLinearMethod.apply.__module__ == "vllm.model_executor.layers.linear"
