"""vLLM's layers on the processor, with parameters as vLLM has them once they are loaded, and how they are called."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEQuantConfig,
    biased_moe_quant_config,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticTensorSym,
)

from bidispatch.integrations.vllm import compat, int4_kernel
from bidispatch.integrations.vllm.kernels import serving_plan

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


def rows_alone(function, *batches):
    """Results of each row by itself, put together."""
    parts = [function(*(x[row : row + 1] for x in batches)) for row in range(len(batches[0]))]
    parts = [part if isinstance(part, tuple) else (part,) for part in parts]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


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


def fp8_layer(kind=Fp8LinearMethod):
    method = object.__new__(kind)
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


def whole_fp8_layer(kind, channel, static, **changes):
    """An fp8 layer without blocks, its parameters as vLLM has them once they are loaded."""
    n, k = 192, 256
    layer = object.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    scheme = object.__new__(kind)
    scheme.weight_block_size, scheme.out_dtype = None, BF16
    scheme.activation_quant_key = kFp8StaticTensorSym if static else kFp8DynamicTokenSym
    scheme.fp8_linear = object.__new__(CutlassFP8ScaledMMLinearKernel)
    scheme.fp8_linear.logical_output_size = n
    layer.quant_method = scheme
    if kind is CompressedTensorsW8A8Fp8:
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
        layer.scheme.use_batch_invariant = False  # 0.33 takes no kernel where it is on
    for name, tensor in tensors.items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    if kept and kind != "awq":
        kernel = object.__new__(int4_kernel.KeptWeights)
        kernel.config = SimpleNamespace(zero_points=zero_points)
        getattr(layer, "scheme", layer.quant_method).kernel = kernel
    model = torch.nn.Module()
    model.proj = layer
    return model, layer, wide
