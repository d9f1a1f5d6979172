"""What a model's layers get on GPUs that are made up, by the names that they report: an H200, a B300, an MI300."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_configs import QWEN3_8B

import bidispatch
from bidispatch.device import ARCHS, Device
from bidispatch.integrations.vllm.from_config import rows_of
from bidispatch.integrations.vllm.kernels import select
from bidispatch.integrations.vllm.problems import attention_problem
from bidispatch.integrations.vllm.table import Row, refusals

H200 = Device(ARCHS["sm90"], "NVIDIA H200")
B300 = Device(ARCHS["sm103"], "NVIDIA B300")
MI300 = Device(ARCHS["gfx942"], "AMD Instinct MI300X")
GPUS = [H200, B300, MI300]

DENSE = QWEN3_8B | {"torch_dtype": "bfloat16"}
EXPERTS = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
LATENT = EXPERTS | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
TOKENS = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
INT4 = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}

GEMM = {"triton.gemm", "triton.gemm_split_k", "cublaslt.pinned"}
SERVED = {
    "gemm": GEMM,
    "gemm.int4": {"triton.int4", "triton.int4_split_k"},
    "gemm.fp8": {"triton.fp8"},
    "gemm.fp8_block": {"triton.fp8_block"},
    "quantize.fp8_group": {"triton.quantize_fp8_group"},
    "quantize.fp8_token": {"triton.quantize_fp8_token"},
    "rms_norm": {"triton.rms_norm"},
    "fused_add_rms_norm": {"triton.fused_add_rms_norm"},
    "qk_norm": {"triton.qk_norm"},
    "attention": {"triton.paged_attention"},
    "attention.mla": {"triton.mla"},
    "bmm": {"triton.bmm"},
    "moe.router": {"triton.moe_router"},
    "moe.experts": {"triton.moe", "triton.moe_fp8_block"},
}
"""What may serve an op where no other package is installed."""
NVIDIA_ONLY = {"gemm.fp8", "gemm.fp8_block", "quantize.fp8_group", "quantize.fp8_token"}
"""In float8_e4m3fn, which an MI300 does not have."""


def rows_on(device: Device, config: dict, folder: Path) -> list[Row]:
    (folder / "config.json").write_text(json.dumps(config))
    return rows_of(bidispatch.plan(device, require="sequence", cuda_graph=True), folder)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("config", "ops"),
    [
        (DENSE, {"gemm", "attention", "qk_norm"}),
        (DENSE | BLOCKS, {"gemm", "attention", "gemm.fp8_block", "quantize.fp8_group"}),
        (DENSE | TOKENS, {"gemm", "attention", "gemm.fp8", "quantize.fp8_token"}),
        (DENSE | INT4, {"gemm", "attention", "gemm.int4"}),
        (EXPERTS, {"gemm", "attention", "moe.experts", "moe.router"}),
        (EXPERTS | BLOCKS, {"gemm", "attention", "moe.experts", "moe.router"}),
        (LATENT, {"gemm", "attention.mla", "bmm", "moe.experts", "moe.router"}),
    ],
    ids=["dense", "fp8 blocks", "fp8 tokens", "int4", "experts", "fp8 experts", "latent"],
)
def test_layers(tmp_path: Path, device: Device, config: dict, ops: set[str]) -> None:
    rows = {row for row in rows_on(device, config, tmp_path) if row.kind not in ("sampling", "engine")}
    assert {row.op for row in rows} >= ops | {"rms_norm", "fused_add_rms_norm"}
    amd = device.arch.vendor == "amd"
    for row in rows:
        fp8 = row.op in NVIDIA_ONLY or (row.op == "moe.experts" and BLOCKS.items() <= config.items())
        assert row.promised is not (amd and fp8), row
        if row.promised:
            assert set(row.implementation.split(", ")) <= SERVED[row.op]
            assert (row.level, row.evidence) == ("sequence", "claimed")
            assert row.source.startswith("hw_profiles/")
        else:
            assert device.name in row.reason


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_workers_that_are_not_cudas_are_refused(tmp_path: Path, device: Device) -> None:
    refused = refusals(rows_on(device, DENSE, tmp_path))
    if device is MI300:
        assert len(refused) == 1
        assert "refuses vLLM workers that are not CUDA's; on gfx942" in refused[0]
    else:
        assert refused == []


@pytest.mark.parametrize(
    ("device", "name", "file"),
    [(H200, "h200", "h200"), (B300, "sm103", "sm100"), (MI300, "gfx942", "_base")],
    ids=["H200", "B300", "MI300"],
)
def test_the_profile_is_that_of_the_gpu(tmp_path: Path, device: Device, name: str, file: str) -> None:
    assert bidispatch.plan(device, require="sequence").profile.name == name
    (attention,) = [row for row in rows_on(device, DENSE, tmp_path) if row.kind == "attention"]
    assert attention.source.startswith(f"hw_profiles/{file}.yaml:")


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 1024}, {"sinks": True}, {"softcap": 50.0}, {"kv_cache_dtype": "fp8"}, {"alibi": True}],
    ids=str,
)
def test_attention_of_every_kind(device: Device, changes: dict) -> None:
    """An fp8 cache on an MI300 is planned, and refused by the layer: vLLM's has other bits there."""
    plan = bidispatch.plan(device, require="sequence", cuda_graph=True)
    problem = attention_problem("bfloat16", num_heads=32, num_kv_heads=8, head_dim=128, page_size=16, **changes)
    assert select(plan, problem).implementations == ("triton.paged_attention",)
