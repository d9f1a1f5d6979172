"""A built model's layers, each given what serves it: once a worker, with weights there and nothing captured yet.

Layers are the modules that hold weights, attention, and routers. What a model's own code computes between them is not
seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from typing import Any

from bidispatch.errors import SelectionError, UsageError
from bidispatch.integrations.vllm import linear, mla_products, moe, norms, ops
from bidispatch.integrations.vllm.host import Host, Unserved
from bidispatch.integrations.vllm.table import Row

__all__ = ["adopt", "around", "mark_compiled_graphs", "require_one_batch_at_a_time"]

_LOOKS_UP = frozenset({"VocabParallelEmbedding", "Embedding", "Conv1dEmbedding"})
"""Layers with weights in which no row is summed: each row is looked up."""

_ATTENDS = frozenset({"MMEncoderAttention"})
"""Attention that holds neither weights nor a cache."""
_OF_ENCODERS = "attention of an encoder is vLLM's choice (--mm-encoder-attn-backend), and was not looked at"


def adopt(host: Host, model: Any, vllm_config: Any) -> None:
    """Give every layer of a model its kernels, and add its rows to the host's."""
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    sinks = {id(getattr(m.impl, "sinks", None)) for m in model.modules() if _is_attention(m)}
    for name, module in model.named_modules():
        if _is_attention(module):
            host.rows.append(_attention(name, module))
            if hasattr(module, "kv_lora_rank"):
                products = f"{name} (W_UK, W_UV)"
                _try(host, products, "attention", "bmm", lambda n=name, m=module: mla_products.serve(host, n, m))
            continue
        if any(kind.__name__ in _ATTENDS for kind in type(module).__mro__):
            host.rows.append(Row.uncovered(name, "attention", _OF_ENCODERS, op="attention"))
            continue
        if getattr(module, "fuse_qkv_rmsnorm", False):  # vLLM 0.33, layers/mla.py: then its norms are not called
            why = (
                "the norms of q and of the compressed KV are fused by vLLM (fuse_qkv_rmsnorm), which was not looked at"
            )
            host.rows.append(Row.uncovered(f"{name} (norms of q and KV)", "norm", why, op="rms_norm"))
        router = vars(module).get("router")
        if router is not None and hasattr(router, "_compute_routing"):
            _try(host, name, "router", "moe.router", lambda n=name, r=router: moe.serve_router(host, n, r, dtype))
        if hasattr(module, "w13_weight") or type(module).__name__ == "RoutedExperts":
            _try(host, name, "experts", "moe.experts", lambda n=name, m=module: moe.serve_experts(host, n, m))
            continue
        around = model.get_submodule(name.rpartition(".")[0])
        _layer(host, name, module, around, tuple(aliases[id(module)]), sinks)


def _layer(host: Host, name: str, module: Any, around: Any, aliases: tuple[str, ...], sinks: Collection[int]) -> None:
    """around: what holds the module. sinks: the tensors that attention layers take, which that may hold."""
    known = _try(host, name, "linear", "gemm", lambda: linear.serve(host, name, module, aliases))
    known = known or _try(host, name, "norm", "rms_norm", lambda: norms.serve(host, name, module, around))
    if known or type(module).__name__ in _LOOKS_UP or not _holds_weights(module, sinks):
        return
    method = getattr(module, "quant_method", None)
    what = f"weights of {type(method).__name__}" if method is not None else f"{type(module).__name__} with weights"
    host.rows.append(Row.uncovered(name, "layer", f"{what}: nothing here serves that; use a model or format that is"))


def _try(host: Host, name: str, kind: str, op: str, serve: Any) -> bool:
    """Whether a module is of a kind. What is refused becomes a row, and takes none of its own with it."""
    before = len(host.rows)
    try:
        return bool(serve())
    except (Unserved, SelectionError, UsageError) as error:
        del host.rows[before:]
        host.rows.append(Row.uncovered(name, kind, "; ".join(str(error).splitlines()), op=op))
        return True


def _holds_weights(module: Any, but: Collection[int]) -> bool:
    return any(parameter is not None and id(parameter) not in but for parameter in module._parameters.values())


def _is_attention(module: Any) -> bool:
    """Whether a module is one of vLLM's attention layers: it has a backend and an implementation of it."""
    return hasattr(module, "impl") and callable(getattr(module, "get_attn_backend", None))


def _attention(name: str, module: Any) -> Row:
    selection = getattr(getattr(module.impl, "kernels", None), "selection", None)
    if type(module.impl).__module__.startswith("bidispatch.") and selection is not None:
        return Row.of(name, "attention", selection)
    backend = module.get_attn_backend().get_name()
    reason = f"backend {backend} is not the registry's; --attention-backend CUSTOM is"
    return Row.uncovered(name, "attention", reason, op="attention", by=backend)


def around(vllm_config: Any) -> Iterator[Row]:
    """What a configuration adds that no layer shows."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1:
        yield Row.uncovered(
            "all_reduce",
            "collective",
            "vLLM's pinned collectives stay; their kind follows the size of a tensor where custom all-reduce cannot "
            "take it (facts in docs/vllm.md), so tensor parallelism is not promised here",
        )
    if getattr(parallel, "pipeline_parallel_size", 1) > 1 or getattr(parallel, "data_parallel_size", 1) > 1:
        yield Row.uncovered("parallel", "engine", "pipeline and data parallelism were not looked at")
    if vllm_config.lora_config is not None:
        yield Row.uncovered("lora", "adapter", "adapters (LoRA) are vLLM's kernels; run without --enable-lora")
    if getattr(getattr(vllm_config, "model_config", None), "enable_sleep_mode", False):
        yield Row.uncovered(
            "sleep",
            "engine",
            "kernels keep constants among the weights, and a sleep of level 2 discards those; run without "
            "--enable-sleep-mode",
        )
    if vllm_config.speculative_config is not None:
        yield Row.uncovered("draft model", "engine", "the layers of a draft model are vLLM's; run without one")
    compiled = getattr(vllm_config, "compilation_config", None)
    if len(getattr(compiled, "compile_ranges_endpoints", None) or ()) > 1 or getattr(compiled, "compile_sizes", None):
        yield Row.uncovered(
            "compiled graphs",
            "engine",
            "what lies between layers is compiled once for each of several ranges of tokens, and may be fused and "
            "rounded in another way in each; leave out compile_sizes, compile_ranges_endpoints and fuse_allreduce_rms",
        )
    yield Row.uncovered(
        "sampler",
        "sampling",
        "sampling, logprobs and prompt_logprobs are vLLM's, in its own batch-invariant mode; greedy tokens follow the "
        "logits alone",
        refused=False,
    )


def require_one_batch_at_a_time(vllm_config: Any) -> None:
    """Raise `SelectionError` where two threads would run a model's layers at once: layers share workspaces."""
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        raise SelectionError(
            "two micro-batches at a time would share workspaces of bidispatch's kernels; leave --enable-dbo and "
            "--ubatch-size off, or set BIDISPATCH_VLLM=off"
        )


def mark_compiled_graphs(vllm_config: Any, model: Any) -> None:
    """Make what is served here a part of what vLLM's compile cache goes by.

    A graph of another coverage would hold vLLM's kernels where the table shows others. A language model inside another
    model is compiled by a copy of the configuration (`VllmConfig.with_hf_config`), which the module holds. Raises
    `UsageError` where a configuration has no room for it.
    """
    digest = hashlib.sha256(json.dumps(ops.bound_names()).encode()).hexdigest()[:16]
    held = [vars(module).get("vllm_config") for module in model.modules()]
    for config in {id(each): each for each in (vllm_config, *held) if hasattr(each, "additional_config")}.values():
        given = config.additional_config
        if not isinstance(given, dict):
            raise UsageError(
                f"additional_config is a {type(given).__name__}, which bidispatch cannot add to; give a mapping or none"
            )
        config.additional_config = {**given, "bidispatch": digest}
