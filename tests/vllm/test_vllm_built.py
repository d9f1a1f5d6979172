"""Quantised layers and experts that vLLM itself builds and finishes after loading, on a platform that looks like an
H100: which kernels it is made to choose, and that parameters lie as they are read here.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import vllm._custom_ops as custom_ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import mla_attention
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.online import fp8 as online
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym
from vllm.platforms.interface import DeviceCapability
from vllm.v1.worker import workspace
from vllm_layers import BF16, classes, config_of, rows_alone

from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import host, int4_kernel
from bidispatch.integrations.vllm.kernels import serving_plan

N, K = 192, 256


def scaled_fp8_quant(x, scale=None, *_, use_per_token_if_dynamic=False, **__):
    """What vLLM's does on a GPU: merged weights get one scale, and models are quantised while they are loaded."""
    if scale is None:
        rows = x.float().abs().amax(1, keepdim=True) / 448
        scale = rows if use_per_token_if_dynamic else rows.max().view(1)
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.fixture
def h100(patched, cuda_platform, monkeypatch):
    """vLLM as it sees an H100, but for what its compiled code would compute."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and name != "vllm.platforms" and "current_platform" in vars(module):
            monkeypatch.setattr(module, "current_platform", cuda_platform)
    cuda_platform.supports_fp8 = lambda: True
    cuda_platform.get_device_capability = lambda *_: DeviceCapability(9, 0)
    for name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8"):
        monkeypatch.setattr(custom_ops, name, lambda *_: True)
    monkeypatch.setattr(custom_ops, "scaled_fp8_quant", scaled_fp8_quant)
    for name in ("verify_marlin_supported", "check_marlin_supported"):
        monkeypatch.setattr(auto_gptq, name, lambda *_, **__: True, raising=False)
    monkeypatch.setattr(int4_kernel, "plan_of", lambda _: serving_plan("cpu"))
    model_config = SimpleNamespace(dtype=BF16, is_moe=True, max_model_len=64, hf_text_config=SimpleNamespace())
    monkeypatch.setattr(get_current_vllm_config(), "model_config", model_config)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.init_workspace_manager(torch.device("cpu"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    with torch.no_grad():
        yield
    torch.set_default_dtype(before)
    workspace.reset_workspace_manager()


def fill(layer) -> None:
    """Any weights, as if they were loaded."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        data = parameter.data
        if data.dtype is torch.int32:
            data.copy_(torch.randint(-(2**31), 2**31, data.shape))
        elif data.dtype.itemsize == 4 and data.numel() > 0:
            data.copy_(torch.rand(data.shape) / 64 + 0.001)
        elif data.is_floating_point():
            data.copy_(torch.randn(data.shape, dtype=torch.float32) / (1 if data.dtype.itemsize == 1 else 16))


def adopted(layer):
    fill(layer)
    layer.quant_method.process_weights_after_loading(layer)
    model = torch.nn.Module()
    model.layer = layer
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert not [row.reason for row in made.rows if row.reason]
    return [row.op for row in made.rows]


def stands_alone(run, *batches) -> None:
    out = run(*batches)
    assert out.isfinite().all()
    assert out.float().std() > 0
    assert torch.equal(out, rows_alone(run, *batches)[0])


def compressed(weights, inputs=None, layout="float-quantized"):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    group["input_activations"] = inputs and {"num_bits": 8, "type": "float", "symmetric": True, **inputs}
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": []}
    return CompressedTensorsConfig.from_config(config)


FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
TOKENS = {"strategy": "token", "dynamic": True}
GROUPS = {"strategy": "group", "group_size": 128, "dynamic": True}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False, "dynamic": {}}
GPTQ |= {"modules_in_block_to_quantize": ["proj"]}  # read from the checkpoint, where it is not said
LINEAR = {
    "fp8 blocks": (
        lambda: Fp8Config(True, "dynamic", weight_block_size=[128, 128]),
        ["quantize.fp8_group", "gemm.fp8_block"],
    ),
    "fp8 dynamic": (lambda: Fp8Config(True, "dynamic"), ["quantize.fp8_token", "gemm.fp8"]),
    "fp8 static": (lambda: Fp8Config(True, "static"), ["quantize.fp8_tensor", "gemm.fp8"]),
    "compressed fp8 channel": (
        lambda: compressed(FP8 | {"strategy": "channel"}, TOKENS),
        ["quantize.fp8_token", "gemm.fp8"],
    ),
    "compressed fp8 tensor": (
        lambda: compressed(FP8 | {"strategy": "tensor"}, TOKENS),
        ["quantize.fp8_token", "gemm.fp8"],
    ),
    "compressed fp8 static": (
        lambda: compressed(FP8 | {"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        ["quantize.fp8_tensor", "gemm.fp8"],
    ),
    "compressed fp8 blocks": (
        lambda: compressed(FP8 | {"strategy": "block", "block_structure": [128, 128]}, GROUPS),
        ["quantize.fp8_group", "gemm.fp8_block"],
    ),
    "compressed int4": (lambda: compressed(INT4, layout="pack-quantized"), ["gemm.int4"]),
    "compressed int4 zeros": (lambda: compressed(INT4 | {"symmetric": False}, layout="pack-quantized"), ["gemm.int4"]),
    "gptq": (lambda: auto_gptq.AutoGPTQConfig.from_config({"quant_method": "gptq", **GPTQ}), ["gemm.int4"]),
    "awq": (
        lambda: AutoAWQConfig.from_config({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}),
        ["gemm.int4"],
    ),
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(h100, kind: str, bias: bool) -> None:
    make, ops = LINEAR[kind]
    layer = ReplicatedLinear(K, N, bias=bias, params_dtype=BF16, quant_config=make(), prefix="proj", disable_tp=True)
    assert adopted(layer) == ops
    stands_alone(lambda x: layer(x)[0], torch.randn(23, K).to(BF16))


@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        (online.Fp8PerTensorOnlineLinearMethod, ["quantize.fp8_token", "gemm.fp8"]),
        (online.Fp8PtpcOnlineLinearMethod, ["quantize.fp8_token", "gemm.fp8"]),
        (online.Fp8PerBlockOnlineLinearMethod, ["quantize.fp8_group", "gemm.fp8_block"]),
    ],
)
def test_layers_that_are_quantised_while_they_are_loaded(h100, monkeypatch, kind: type, ops: list[str]) -> None:
    monkeypatch.setattr(online, "initialize_online_processing", lambda _: None)
    layer = ReplicatedLinear(K, N, bias=True, params_dtype=BF16, prefix="proj", disable_tp=True)
    layer.quant_method = kind()
    if kind is not online.Fp8PerBlockOnlineLinearMethod:
        layer.quant_method.activation_quant_key = kFp8DynamicTokenSym  # 0.33 asks the platform when it is imported
    delattr(layer, "weight")
    layer.quant_method.create_weights(layer, K, [N], K, N, BF16, weight_loader=None)
    layer.weight = torch.nn.Parameter(torch.empty(N, K))  # was on no device
    assert adopted(layer) == ops
    stands_alone(lambda x: layer(x)[0], torch.randn(23, K).to(BF16))


@pytest.mark.parametrize("kind", ["fp8 blocks", "fp8 dynamic", "fp8 static", "compressed fp8 channel", "gptq", "awq"])
def test_compiled_graphs_hold_opaque_ops(h100, kind: str) -> None:
    layer = ReplicatedLinear(
        K, N, bias=True, params_dtype=BF16, quant_config=LINEAR[kind][0](), prefix="proj", disable_tp=True
    )
    adopted(layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: layer(x)[0], backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 50):
        x = torch.randn(rows, K).to(BF16)
        assert torch.equal(compiled(x), layer(x)[0])
    calls = [
        str(node.target) for graph in graphs for node in graph.graph.nodes if "bidispatch.vllm_" in str(node.target)
    ]
    assert len(graphs) == len(calls) == 1
    torch._dynamo.reset()


EXPERTS = {
    "bf16": (None, {}),
    "bf16 biased": (None, {"has_bias": True, "activation": MoEActivation.SWIGLUOAI}),
    "fp8 blocks": (lambda: Fp8Config(True, "dynamic", weight_block_size=[128, 128]), {}),
    "compressed fp8 blocks": (
        lambda: compressed(FP8 | {"strategy": "block", "block_structure": [128, 128]}, GROUPS),
        {},
    ),
}


def experts_of(quant_config, activation=MoEActivation.SILU, **changes):
    config = FusedMoEConfig(
        num_experts=4,
        experts_per_token=2,
        hidden_dim=256,
        intermediate_size=128,
        num_local_experts=4,
        num_logical_experts=4,
        activation=activation,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=BF16,
        **changes,
    )
    placement = SimpleNamespace(
        expert_map=None, expert_mask=None, local_num_experts=4, placement_strategy="linear", routing_tables=None
    )
    return RoutedExperts("experts", BF16, config, quant_config, placement)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(h100, kind: str) -> None:
    make, changes = EXPERTS[kind]
    layer = experts_of(make and make(), **changes)
    assert adopted(layer) == ["moe.experts"]
    kernel = layer.quant_method.moe_kernel
    assert type(kernel.impl.fused_experts) is TritonExperts

    def run(x, weights, ids):
        return layer.quant_method.apply(layer, x, weights, ids, None, None)

    x = torch.randn(9, 256).to(BF16)
    stands_alone(run, x, torch.rand(9, 2, dtype=torch.float32), torch.randint(4, (9, 2), dtype=torch.int32))


HEADS, NOPE, ROPE, RANK, VALUE, PAGE = 4, 32, 16, 128, 48, 16


@pytest.mark.parametrize("kind", [None, "fp8 dynamic", "gptq"])
def test_mla(h100, monkeypatch, kind: str | None) -> None:
    """A layer with bidispatch's backend: its weights are made of `kv_b_proj`, before that is served."""
    from bidispatch.integrations.vllm import mla as ours

    monkeypatch.setattr(ours, "plan_of", lambda _: serving_plan("cpu"))
    # Of vLLM's way for prompts, which nothing here takes; its libraries want a GPU.
    unused = type("Unused", (), {"__init__": lambda *_, **__: None, "requires_r1_mla_dimensions": False})
    monkeypatch.setattr(mla_attention, "get_mla_prefill_backend", lambda *_, **__: unused)
    dims = (HEADS, 0.1, NOPE, ROPE, VALUE, None, RANK)
    n = HEADS * (NOPE + VALUE)
    quant = LINEAR[kind][0]() if kind else None
    kv_b = ReplicatedLinear(RANK, n, bias=False, params_dtype=BF16, quant_config=quant, prefix="proj", disable_tp=True)
    kv_b.input_size_per_partition = RANK
    backend = ours.BidispatchMLABackend
    layer = mla_attention.MLAAttention(*dims, kv_b_proj=kv_b, prefix="model.layers.0.attn", attn_backend=backend)
    fill(kv_b)
    kv_b.quant_method.process_weights_after_loading(kv_b)
    layer.process_weights_after_loading(BF16)
    model = torch.nn.Module()
    model.attn = layer
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert not [row.reason for row in made.rows if row.reason]
    assert [row.op for row in made.rows if row.kind == "attention"] == ["attention.mla", "bmm", "bmm"]

    def run(q, latent):
        """Each row is a sequence of its own, one position long."""
        rows = len(q)
        cache = torch.zeros(rows, PAGE, RANK + ROPE, dtype=BF16)
        cache[:, 0] = latent
        ones = torch.ones(rows, dtype=torch.int32)
        step = ours.LatentMetadata(
            num_actual_tokens=rows,
            max_query_len=1,
            decode_step=False,
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
            seq_lens=ones,
            block_table=torch.arange(rows, dtype=torch.int32)[:, None],
            slot_mapping=torch.arange(rows) * PAGE,
            num_reqs=rows,
            max_seq_len=1,
        )
        output = torch.empty(rows, HEADS * VALUE, dtype=BF16)
        return layer.forward_impl(q, latent[:, :RANK], latent[:, None, RANK:], cache, step, output=output)

    q, latent = torch.randn(5, HEADS, NOPE + ROPE).to(BF16), torch.randn(5, RANK + ROPE).to(BF16)
    stands_alone(run, q, latent)
    # One position has all the weight: what comes out is its latent part, projected up by vLLM's own weights.
    wanted = torch.einsum("bl,nlv->bnv", latent[:, :RANK].float(), layer.W_UV.float()).reshape(5, -1)
    assert (run(q, latent).float() - wanted).norm() / wanted.norm() < 0.01
