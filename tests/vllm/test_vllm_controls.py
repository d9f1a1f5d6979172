"""Negative controls: every replaced method, put back and standing for one of vLLM's whose sums follow the number of
rows, is caught by the comparison that the tests beside this one rest on.
"""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from vllm.model_executor.layers.quantization.online.fp8 import (
    Fp8PerBlockOnlineLinearMethod,
    Fp8PerTensorOnlineLinearMethod,
    Fp8PtpcOnlineLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm_layers import (
    BF16,
    HEADS,
    NOPE,
    ROPE,
    Block,
    classes,
    config_of,
    experts_layer,
    fp8_layer,
    int4_layer,
    mla_layer,
    rows_alone,
    run_experts,
    run_mla,
    whole_fp8_layer,
)

from bidispatch.integrations.vllm import adopt as adopting
from bidispatch.integrations.vllm import compat, host, plugin
from bidispatch.integrations.vllm.kernels import serving_plan

ROWS = 23
"""Four parts of a sum, where a row alone has two."""
NO_ARITHMETIC = {
    *("init_device", "load_model", "experts_inputs", "experts_workspaces", "fp8_experts_backends"),
    *("embedding", "parallel_head", "logits", "attention"),
    *("compressed", "fp8_kernel", "fp8_plain_kernel", "fp8_whole_kernel", "mixed_kernel", "mixed_base"),
    *(seam.name for seam in compat.SEAMS if seam.kind is compat.Kind.BOUND),
}
"""Seams that compute nothing."""


def drifting(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Sums of rows [rows, columns] in parts of which there are 1 to 4, by the number of rows, as split-K has them."""
    parts = x.reshape(len(x), -1).float().chunk(1 + len(x) % 4, -1)
    total = torch.stack([part.sum(-1).to(BF16) for part in parts]).sum(0)
    return total[:, None].expand(-1, columns).clone()


def drifting_linear(self, layer, x, bias=None):
    return drifting(x, 8)


def drifting_gate(self, x):
    return drifting(x, 8), None


def drifting_norm(self, x, residual=None):
    return drifting(x, x.shape[-1])


def drifting_router(self, hidden_states, router_logits, indices_type, *, input_ids=None):
    return drifting(router_logits, 2), torch.zeros(len(router_logits), 2, dtype=torch.int32)


def drifting_experts(self, output, hidden_states, *arguments, **named):
    output.copy_(drifting(hidden_states, output.shape[-1]))


def drifting_mla(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, **named):
    output.copy_(drifting(q, output.shape[-1]))
    return output


def of_block(name, forward="forward"):
    model = Block()
    layer = getattr(model, name)

    def run(x):
        out = getattr(layer, forward)(x)
        return out[0] if isinstance(out, tuple) else out

    return model, run, torch.randn(ROWS, 64).to(BF16)


def of_method(made, k=256):
    model, layer = made[:2]
    return model, lambda x: layer.quant_method.apply(layer, x), torch.randn(ROWS, k).to(BF16)


def of_whole(kind):
    return of_method(whole_fp8_layer(kind, True, False))


def of_head():
    model = torch.nn.Module()
    model.lm_head = VocabParallelEmbedding(128, 16, params_dtype=BF16)
    torch.nn.init.normal_(model.lm_head.weight.data)
    return of_method((model, model.lm_head), 16)


def of_router(router):
    model = torch.nn.Module()
    model.runner = torch.nn.Module()
    model.runner.router = router
    return model, lambda x: router._compute_routing(x, x, None), torch.randn(ROWS, 8)


def of_experts():
    model, layer, experts = experts_layer()
    weights, ids = torch.rand(1, 2), torch.randint(4, (1, 2))

    def run(x):
        return run_experts(
            layer, experts, x, weights.expand(len(x), -1).contiguous(), ids.expand(len(x), -1).contiguous()
        )

    return model, run, torch.randn(ROWS, 48).to(BF16)


def of_mla():
    model, layer = mla_layer()
    return model, lambda q: run_mla(layer, q), torch.randn(ROWS, HEADS, NOPE + ROPE).to(BF16)


CASES = {
    "linear": (lambda: of_block("proj"), drifting_linear),
    "head": (of_head, drifting_linear),
    "gate": (lambda: of_block("gate"), drifting_gate),
    "rms_norm": (lambda: of_block("norm", "forward_cuda"), drifting_norm),
    "rms_norm_native": (lambda: of_block("norm", "forward_native"), drifting_norm),
    "gemma_norm": (lambda: of_block("gemma", "forward_cuda"), drifting_norm),
    "gemma_norm_native": (lambda: of_block("gemma", "forward_native"), drifting_norm),
    "fp8_linear": (lambda: of_method(fp8_layer()), drifting_linear),
    "online_tensor": (lambda: of_whole(Fp8PerTensorOnlineLinearMethod), drifting_linear),
    "online_channel": (lambda: of_whole(Fp8PtpcOnlineLinearMethod), drifting_linear),
    "online_block": (lambda: of_method(fp8_layer(Fp8PerBlockOnlineLinearMethod)), drifting_linear),
    "compressed_fp8": (lambda: of_whole(CompressedTensorsW8A8Fp8), drifting_linear),
    "awq": (lambda: of_method(int4_layer("awq")), drifting_linear),
    "gptq": (lambda: of_method(int4_layer("gptq")), drifting_linear),
    "compressed_int4": (lambda: of_method(int4_layer("compressed")), drifting_linear),
    "router": (lambda: of_router(FusedTopKRouter(2, 8)), drifting_router),
    "grouped_router": (lambda: of_router(GroupedTopKRouter(2, 8, 4, 2, True, "sigmoid")), drifting_router),
    "bias_router": (lambda: of_router(FusedTopKBiasRouter(2, 8, torch.randn(8))), drifting_router),
    "experts": (of_experts, drifting_experts),
    "mla": (of_mla, drifting_mla),
}


def stands_alone(run, x) -> bool:
    out = run(x)
    outs = out if isinstance(out, tuple) else (out,)
    return all(map(torch.equal, outs, rows_alone(run, x)))


def test_every_seam_that_computes_has_a_control() -> None:
    assert set(CASES) == {seam.name for seam in compat.SEAMS} - NO_ARITHMETIC


@pytest.mark.parametrize("name", CASES)
def test_a_method_of_vllms_that_follows_the_batch_is_caught(patched, monkeypatch, name: str) -> None:
    torch.manual_seed(0)
    make, stand_in = CASES[name]
    model, run, x = make()
    made = host.Host(serving_plan("cpu"), 64, classes())
    adopting.adopt(made, model, config_of())
    assert not [row.reason for row in made.rows if row.reason]
    assert stands_alone(run, x)
    plugin.undo()
    monkeypatch.setattr(*compat.resolve(next(seam for seam in compat.SEAMS if seam.name == name)), stand_in)
    assert not stands_alone(run, x)
