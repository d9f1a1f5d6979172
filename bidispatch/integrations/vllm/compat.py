"""Every private seam of vLLM that is patched here, by version, and the check that they are there.

Signatures are read in vLLM's source files, so that a check imports nothing of it: it runs in the front process, where
CUDA must stay untouched, before any model is built, and on a wheel that is only unpacked. Read in 0.25.1, 0.29.0 and
0.33.0. (Attention's seams are in `backends`.)
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from bidispatch.errors import BackendError

__all__ = ["SEAMS", "SUPPORTED", "UNIMPORTED", "Seam", "check", "faults", "resolve"]

SUPPORTED = ("0.25", "0.34")
"""The first version, and the first one after the last."""

_LAYERS = "vllm.model_executor.layers"
_COMPRESSED = f"{_LAYERS}.quantization.compressed_tensors"
_ROUTING = "self hidden_states router_logits indices_type input_ids"


@dataclass(frozen=True, slots=True)
class Seam:
    """A function of vLLM, or a method of one of its classes, and the parameters it has."""

    name: str
    module: str
    path: str
    """`Class.method`, `Class` or `function`."""
    parameters: str = ""
    """By name, in order, keyword-only ones last; a class has none."""
    later: str = ""
    """Parameters that later versions have behind those; what is patched passes them on, or refuses a value."""

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.module}.{self.path}"


SEAMS: tuple[Seam, ...] = (
    Seam("init_device", "vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", "self"),
    Seam("load_model", "vllm.v1.worker.gpu_worker", "Worker.load_model", "self load_dummy_weights"),
    Seam("linear", f"{_LAYERS}.linear", "UnquantizedLinearMethod.apply", "self layer x bias"),
    Seam("head", f"{_LAYERS}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply", "self layer x bias"),
    Seam("embedding", f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding"),
    Seam("parallel_head", f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead"),
    Seam("logits", f"{_LAYERS}.logits_processor", "LogitsProcessor"),
    # Before 0.33 it takes kernels by the number of tokens in vLLM's mode too (v0.25.1 and 0.29.0, its `forward`).
    Seam("gate", f"{_LAYERS}.fused_moe.router.gate_linear", "GateLinear.forward", "self x"),
    Seam("rms_norm", f"{_LAYERS}.layernorm", "RMSNorm.forward_cuda", "self x residual"),
    Seam("rms_norm_native", f"{_LAYERS}.layernorm", "RMSNorm.forward_native", "self x residual"),
    Seam("gemma_norm", f"{_LAYERS}.layernorm", "GemmaRMSNorm.forward_cuda", "self x residual"),
    Seam("gemma_norm_native", f"{_LAYERS}.layernorm", "GemmaRMSNorm.forward_native", "self x residual"),
    Seam("fp8_linear", f"{_LAYERS}.quantization.fp8", "Fp8LinearMethod.apply", "self layer x bias"),
    *(
        Seam(f"online_{scales}", f"{_LAYERS}.quantization.online.fp8", f"{kind}.apply", "self layer x bias")
        for scales, kind in (
            ("tensor", "Fp8PerTensorOnlineLinearMethod"),
            ("block", "Fp8PerBlockOnlineLinearMethod"),
            ("channel", "Fp8PtpcOnlineLinearMethod"),
        )
    ),
    Seam("compressed", f"{_COMPRESSED}.compressed_tensors", "CompressedTensorsLinearMethod.apply", "self layer x bias"),
    Seam(
        "compressed_fp8",
        f"{_COMPRESSED}.schemes.compressed_tensors_w8a8_fp8",
        "CompressedTensorsW8A8Fp8.apply_weights",
        "self layer x bias",
    ),
    Seam("awq", f"{_LAYERS}.quantization.auto_awq", "AutoAWQLinearMethod.apply", "self layer x bias"),
    Seam("gptq", f"{_LAYERS}.quantization.auto_gptq", "AutoGPTQLinearMethod.apply", "self layer x bias"),
    Seam(
        "compressed_int4",
        f"{_COMPRESSED}.schemes.compressed_tensors_wNa16",
        "CompressedTensorsWNA16.apply_weights",
        "self layer x bias",
    ),
    # Modules bind it by name: what is patched is the name in those of `gptq` and `compressed_int4`.
    Seam(
        "mixed_kernel",
        "vllm.model_executor.kernels.linear",
        "choose_mp_linear_kernel",
        "config compute_capability",
    ),
    Seam("mixed_base", "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel", "MPLinearKernel"),
    # Modules bind it by name: what is patched is the name in those of the fp8 methods.
    Seam(
        "fp8_kernel",
        "vllm.model_executor.kernels.linear",
        "init_fp8_linear_kernel",
        "activation_quant_key weight_quant_key input_dtype out_dtype weight_shape force_kernel module_name",
    ),
    Seam("fp8_plain_kernel", "vllm.model_executor.kernels.linear.scaled_mm.triton", "TritonFp8BlockScaledMMKernel"),
    Seam("fp8_whole_kernel", "vllm.model_executor.kernels.linear.scaled_mm.cutlass", "CutlassFP8ScaledMMLinearKernel"),
    Seam("router", f"{_LAYERS}.fused_moe.router.fused_topk_router", "FusedTopKRouter._compute_routing", _ROUTING),
    Seam(
        "grouped_router",
        f"{_LAYERS}.fused_moe.router.grouped_topk_router",
        "GroupedTopKRouter._compute_routing",
        _ROUTING,
    ),
    Seam(
        "bias_router",
        f"{_LAYERS}.fused_moe.router.fused_topk_bias_router",
        "FusedTopKBiasRouter._compute_routing",
        _ROUTING,
    ),
    Seam(
        "experts",
        f"{_LAYERS}.fused_moe.experts.triton_moe",
        "TritonExperts.apply",
        "self output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map a1q_scale "
        "a2_scale workspace13 workspace2 expert_tokens_meta apply_router_weight_on_input",
    ),
    Seam(
        "experts_inputs",
        f"{_LAYERS}.fused_moe.experts.triton_moe",
        "TritonExperts.expects_unquantized_inputs",
        "self",
    ),
    Seam(
        "experts_workspaces",
        f"{_LAYERS}.fused_moe.experts.triton_moe",
        "TritonExperts.workspace_shapes",
        "self M N K topk global_num_experts local_num_experts expert_tokens_meta activation",
    ),
    Seam(
        "fp8_experts_backends",
        f"{_LAYERS}.fused_moe.oracle.fp8",
        "_get_priority_backends",
        "moe_config weight_key activation_key",
    ),
    Seam("attention", f"{_LAYERS}.attention.attention", "Attention"),
    Seam(
        "mla",
        f"{_LAYERS}.attention.mla_attention",
        "MLAAttention.forward_impl",
        "self q k_c_normed k_pe kv_cache attn_metadata output output_scale output_block_scale quant_group_size "
        "quant_scale_ue8m0 quant_col_major quant_tma_aligned",
        later="q_dcp_replicated",  # 0.29.0
    ),
)

UNIMPORTED: tuple[Seam, ...] = (
    Seam(
        "deepseek_qkv_a",
        "vllm.model_executor.models.deepseek_v2",
        "DeepSeekV2FusedQkvAProjLinear.forward",
        "self input_",
    ),
)
"""Layers of a model's own, which only its models import: known by their names, and read in the sources like the rest.
The one here takes a kernel for few tokens where its `_use_min_latency_gemm` is set, else what it inherits."""


def check(version: str, root: Path) -> None:
    """Raise `BackendError` that names everything missing in the vLLM at `root` (the folder `vllm`), or its version."""
    try:
        known = Version(SUPPORTED[0]) <= Version(version) < Version(SUPPORTED[1])
    except InvalidVersion:
        known = False
    if not known:
        raise BackendError(
            f"vLLM {version} is not one whose layers are known here: {SUPPORTED[0]} to below {SUPPORTED[1]} are; "
            "install one of those, or set BIDISPATCH_VLLM=off"
        )
    wrong = faults(root)
    if wrong:
        raise BackendError(
            f"vLLM {version} at {root} is not as it was read, and nothing of it was patched: {'; '.join(wrong)}; "
            "set BIDISPATCH_VLLM=off to run it as it is"
        )


def faults(root: Path, seams: Iterable[Seam] = (*SEAMS, *UNIMPORTED)) -> list[str]:
    """What is not as it should be in the sources under `root`, one text a seam."""
    trees: dict[str, ast.Module | None] = {}
    found = []
    for seam in seams:
        if seam.module not in trees:
            trees[seam.module] = _parse(root, seam.module)
        tree = trees[seam.module]
        fault = f"{seam.module} is not there" if tree is None else _fault(seam, tree)
        if fault:
            found.append(fault)
    return found


def resolve(seam: Seam) -> tuple[Any, str]:
    """Import a seam's module: the object that holds what is patched, and its name there."""
    holder: Any = importlib.import_module(seam.module)
    *owners, name = seam.path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    return holder, name


def _parse(root: Path, module: str) -> ast.Module | None:
    base = root.joinpath(*module.split(".")[1:])
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None


def _fault(seam: Seam, tree: ast.Module) -> str:
    body: Sequence[ast.stmt] = tree.body
    node: ast.stmt | None = None
    for name in seam.path.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        node = next((each for each in body if isinstance(each, kinds) and each.name == name), None)
        if node is None:
            return f"{seam.where} is not there"
        body = node.body if isinstance(node, ast.ClassDef) else ()
    if isinstance(node, ast.FunctionDef):
        taken = node.args
        has = " ".join(each.arg for each in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs))
        known = {seam.parameters, f"{seam.parameters} {seam.later}".strip()}
        if has not in known or taken.vararg or taken.kwarg:
            return f"{seam.where} takes ({has}), known is ({seam.parameters})"
    elif seam.parameters:
        return f"{seam.where} is no function"
    return ""
