"""Every private seam of vLLM that is used here, by version, and the check that they are there.

Signatures are read in vLLM's source files, so that a check imports nothing of it: it runs in the front process, where
CUDA must stay untouched, before any model is built, and on a wheel that is only unpacked. Read in the sources of every
minor version from 0.25 to 0.33.
"""

from __future__ import annotations

import ast
import enum
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from bidispatch.errors import BackendError

__all__ = ["ENGINE", "LIFTED", "READ", "SEAMS", "SUPPORTED", "UNIMPORTED", "Kind", "Seam", "check", "faults", "resolve"]

SUPPORTED = ("0.25", "0.34")
"""The first version, and the first one after the last."""

_LAYERS = "vllm.model_executor.layers"
_COMPRESSED = f"{_LAYERS}.quantization.compressed_tensors"
_ROUTING = "self hidden_states router_logits indices_type input_ids"


class Kind(enum.Enum):
    """How a seam is there."""

    DEFINED = "defined"
    """A class, or a function or method with these parameters."""
    BOUND = "bound"
    """A name bound in a module or in a class: imported, assigned or defined there."""
    SET = "set"
    """An attribute that a class's methods set."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A function of vLLM, a method of one of its classes and the parameters it has, or a name."""

    name: str
    module: str
    path: str
    """`Class.method`, `Class` or `function`."""
    parameters: str = ""
    """By name, in order, keyword-only ones last; a class has none."""
    later: str = ""
    """Parameters that later versions have behind those; what is patched passes them on, or refuses a value."""
    kind: Kind = Kind.DEFINED
    since: str = ""
    """The first version that has it; every supported one where not given."""

    def is_in(self, version: str) -> bool:
        """Whether a version is to have it."""
        return not self.since or Version(version) >= Version(self.since)

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
    Seam(
        "mixed_kernel",
        "vllm.model_executor.kernels.linear",
        "choose_mp_linear_kernel",
        "config compute_capability",
    ),
    Seam("mixed_base", "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel", "MPLinearKernel"),
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
    # Modules bind these two by name, so that is where they are replaced.
    *(
        Seam(f"fp8_kernel_{scheme}", module, "init_fp8_linear_kernel", kind=Kind.BOUND)
        for scheme, module in (
            ("linear", f"{_LAYERS}.quantization.fp8"),
            ("compressed", f"{_COMPRESSED}.schemes.compressed_tensors_w8a8_fp8"),
            ("online", f"{_LAYERS}.quantization.online.fp8"),
        )
    ),
    *(
        Seam(f"mixed_kernel_{scheme}", module, "choose_mp_linear_kernel", kind=Kind.BOUND)
        for scheme, module in (
            ("gptq", f"{_LAYERS}.quantization.auto_gptq"),
            ("compressed", f"{_COMPRESSED}.schemes.compressed_tensors_wNa16"),
        )
    ),
)
"""What a worker imports and replaces, and the classes that it looks at."""

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

_ATTENTION = "vllm.v1.attention"
_BACKENDS = f"{_ATTENTION}.backends.registry"
_LOADERS = "vllm.model_executor.model_loader"

READ: tuple[Seam, ...] = (
    # Attention (`backends`, `attention`, `mla`, `metadata`, `cache`).
    Seam(
        "attention_choice",
        "vllm.platforms.cuda",
        "CudaPlatformBase.get_attn_backend_cls",
        "cls selected_backend attn_selector_config num_heads",
    ),
    Seam("attention_chosen", f"{_ATTENTION}.selector", "_cached_get_attn_backend", kind=Kind.BOUND),
    Seam("attention_custom", _BACKENDS, "AttentionBackendEnum.CUSTOM", kind=Kind.BOUND),
    Seam("attention_overridden", _BACKENDS, "AttentionBackendEnum.is_overridden", "self"),
    Seam("attention_clear", _BACKENDS, "AttentionBackendEnum.clear_override", "self"),
    Seam("attention_register", _BACKENDS, "register_backend", "backend class_path is_mamba"),
    Seam("attention_load", "vllm.utils.import_utils", "resolve_obj_by_qualname", kind=Kind.BOUND),
    Seam("attention_backend", f"{_ATTENTION}.backend", "AttentionBackend.validate_configuration", kind=Kind.BOUND),
    Seam("attention_pages", f"{_ATTENTION}.backend", "MultipleOf"),
    Seam(
        "attention_layer",
        f"{_ATTENTION}.backend",
        "AttentionImpl.__init__",
        "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap "
        "attn_type kv_sharing_target_layer_name",
    ),
    Seam(
        "attention_forward",
        f"{_ATTENTION}.backend",
        "AttentionImpl.forward",
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
    ),
    Seam(
        "mla_forward",
        f"{_ATTENTION}.backend",
        "MLAAttentionImpl.forward_mqa",
        "self q kv_c_and_k_pe_cache attn_metadata layer",
    ),
    Seam(
        "attention_builder",
        f"{_ATTENTION}.backend",
        "AttentionMetadataBuilder.__init__",
        "self kv_cache_spec layer_names vllm_config device",
    ),
    Seam(
        "attention_build",
        f"{_ATTENTION}.backend",
        "AttentionMetadataBuilder.build",
        "self common_prefix_len common_attn_metadata fast_build",
    ),
    Seam(
        "attention_capture",
        f"{_ATTENTION}.backend",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        "self common_attn_metadata",
    ),
    Seam(
        "cache_write",
        "vllm._custom_ops",
        "reshape_and_cache_flash",
        "key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale",
    ),
    # The random weights' load format (`loader`).
    Seam("load_formats", _LOADERS, "_LOAD_FORMAT_TO_MODEL_LOADER", kind=Kind.BOUND),
    Seam("loader_register", _LOADERS, "register_model_loader", "load_format"),
    Seam("loader", _LOADERS, "BaseModelLoader", kind=Kind.BOUND),
    Seam("loader_init", f"{_LOADERS}.base_loader", "BaseModelLoader.__init__", "self load_config"),
    Seam("loader_download", f"{_LOADERS}.base_loader", "BaseModelLoader.download_model", "self model_config"),
    Seam("loader_weights", f"{_LOADERS}.base_loader", "BaseModelLoader.load_weights", "self model model_config"),
    # What stays allocated is added to it (`plugin`): of both model runners.
    *(
        Seam(f"memory_{runner}", module, "GPUModelRunner.model_memory_usage", kind=Kind.SET)
        for runner, module in ((1, "vllm.v1.worker.gpu_model_runner"), (2, "vllm.v1.worker.gpu.model_runner"))
    ),
)
"""What is called, read or derived from elsewhere in this package."""

_LLM_ENGINE = "vllm.v1.engine.llm_engine"
_SCHEDULER = "vllm.v1.core.sched"
_POOL = "vllm.v1.core.block_pool"

ENGINE: tuple[Seam, ...] = (
    Seam("arguments", "vllm.engine.arg_utils", "EngineArgs"),
    Seam(
        "engine",
        _LLM_ENGINE,
        "LLMEngine.from_engine_args",
        "cls engine_args usage_context stat_loggers enable_multiprocessing",
    ),
    Seam("engine_add", _LLM_ENGINE, "LLMEngine.add_request", kind=Kind.BOUND),
    Seam("engine_step", _LLM_ENGINE, "LLMEngine.step", "self"),
    Seam("engine_left", _LLM_ENGINE, "LLMEngine.has_unfinished_requests", "self"),
    Seam("engine_forget", _LLM_ENGINE, "LLMEngine.reset_prefix_cache", "self reset_running_requests reset_connector"),
    Seam("engine_core", "vllm.v1.engine.core_client", "InprocClient.engine_core", kind=Kind.SET),
    Seam("scheduler", "vllm.v1.engine.core", "EngineCore.scheduler", kind=Kind.SET),
    Seam("schedule", f"{_SCHEDULER}.scheduler", "Scheduler.schedule", "self throttle_prefills"),
    *(
        Seam(f"scheduler_{name}", f"{_SCHEDULER}.scheduler", f"Scheduler.{name}", kind=Kind.SET)
        for name in ("max_num_scheduled_tokens", "kv_cache_manager", "waiting", "running")
    ),
    Seam("pool", "vllm.v1.core.kv_cache_manager", "KVCacheManager.block_pool", kind=Kind.SET),
    Seam("pool_free", _POOL, "BlockPool.get_num_free_blocks", "self"),
    Seam("pool_take", _POOL, "BlockPool.get_new_blocks", "self num_blocks"),
    Seam("pool_give", _POOL, "BlockPool.free_blocks", "self ordered_blocks"),
    *(
        Seam(f"step_{name}", f"{_SCHEDULER}.output", f"SchedulerOutput.{name}", kind=Kind.BOUND)
        for name in ("num_scheduled_tokens", "scheduled_new_reqs", "scheduled_cached_reqs")
    ),
    *(
        Seam(f"cached_{name}", f"{_SCHEDULER}.output", f"CachedRequestData.{name}", kind=Kind.BOUND)
        for name in ("req_ids", "resumed_req_ids", "num_computed_tokens")
    ),
    *(
        Seam(f"new_{name}", f"{_SCHEDULER}.output", f"NewRequestData.{name}", kind=Kind.BOUND)
        for name in ("req_id", "num_computed_tokens")
    ),
)
"""What `bidispatch vllm check` watches in an engine, and nothing else needs."""


LIFTED: tuple[Seam, ...] = (
    # It asks for graphs without torch.compile, which would freeze the tile that vLLM's own products choose by the
    # number of tokens. Products here are ops, which choose when they run; of layers that are not served a frozen tile
    # is one for all batches, and changes no bit.
    Seam(
        "breakable_graphs",
        "vllm.config.vllm",
        "VllmConfig._uses_breakable_cudagraph_for_batch_invariance",
        "self",
        since="0.31.0",
    ),
)
"""Restrictions of vLLM's own mode that are lifted, each a method that says whether it is wanted, and then says no
(docs/vllm-restrictions.md). They are asked where a configuration is made, in the front process."""


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
    wrong = faults(root, version)
    if wrong:
        raise BackendError(
            f"vLLM {version} at {root} is not as it was read, and nothing of it was patched: {'; '.join(wrong)}; "
            "set BIDISPATCH_VLLM=off to run it as it is"
        )


def faults(root: Path, version: str, seams: Iterable[Seam] = (*SEAMS, *UNIMPORTED, *READ, *LIFTED)) -> list[str]:
    """What is not as it should be in the sources of a version under `root`, one text a seam."""
    trees: dict[str, ast.Module | None] = {}
    found = []
    for seam in seams:
        if not seam.is_in(version):
            continue
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
    *owners, name = seam.path.split(".")
    for owner in owners:
        node = _definition(body, owner)
        body = node.body if isinstance(node, ast.ClassDef) else ()
    if seam.kind is not Kind.DEFINED:
        there = _bound(body) if seam.kind is Kind.BOUND else _set_on_self(body)
        return "" if name in there else f"{seam.where} is not there"
    node = _definition(body, name)
    if node is None:
        return f"{seam.where} is not there"
    if isinstance(node, ast.FunctionDef):
        taken = node.args
        has = " ".join(each.arg for each in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs))
        known = {seam.parameters, f"{seam.parameters} {seam.later}".strip()}
        if has not in known or taken.vararg or taken.kwarg:
            return f"{seam.where} takes ({has}), known is ({seam.parameters})"
    elif seam.parameters:
        return f"{seam.where} is no function"
    return ""


def _definition(body: Iterable[ast.stmt], name: str) -> ast.ClassDef | ast.FunctionDef | None:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next((each for each in body if isinstance(each, kinds) and each.name == name), None)


def _targets(node: ast.AST) -> Sequence[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return (node.target,) if isinstance(node, ast.AnnAssign) else ()


def _bound(body: Iterable[ast.stmt]) -> set[str]:
    """Names that statements bind, those of an `if` or `try` left out."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        found |= {each.id for each in _targets(node) if isinstance(each, ast.Name)}
    return found


def _set_on_self(body: Iterable[ast.stmt]) -> set[str]:
    """Attributes that a class's methods assign to `self`."""
    return {
        each.attr
        for statement in body
        for node in ast.walk(statement)
        for each in _targets(node)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
    }
