"""The table for a model's `config.json`, without vLLM, a server, or the GPU: what its layers ask a plan for.

Shapes are those of `tune --model`. What a config does not show, such as layers of a family of its own, is not in it:
the table that a server logs is of the layers that were built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bidispatch import ops
from bidispatch.errors import SelectionError, UsageError
from bidispatch.integrations.vllm.problems import attention_problem, latent_problem
from bidispatch.integrations.vllm.reasons import ENCODER, SAMPLER, SEES_LATER, SPARSE, STATE
from bidispatch.integrations.vllm.table import Row
from bidispatch.ops.schema import DimValue, parse_dtype
from bidispatch.planning.plan import Plan
from bidispatch.tune.formats import Format, format_of
from bidispatch.tune.models import EXPERT_COUNTS, expert_shapes, model_shapes, of_text, read_config, router_shape

__all__ = ["rows_of"]

_PAGE = 16
_NOT_COVERED = {
    "linear_num_value_heads": ("linear attention (GDN)", STATE),
    "linear_attn_config": ("linear attention", STATE),
    "layers_block_type": ("layers of several kinds (Mamba)", STATE),
    "mamba_d_state": ("Mamba", STATE),
    "mamba_num_heads": ("Mamba", STATE),
    "ssm_state_size": ("Mamba", STATE),
    "state_size": ("Mamba", STATE),
    "conv_L_cache": ("short convolutions", STATE),
    "index_topk": ("sparse attention", SPARSE),
}
_ENCODERS = ("vision_config", "audio_config")
_SEE_LATER = frozenset({"bagel", "gemma3", "molmo2", "moondream3", "paligemma", "umm"})
"""Models whose config need not say so (vLLM 0.25.1, transformers_utils/model_arch_config_convertor.py)."""
_LAYER_NORMS = ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")
_TWO_WINDOWS = ("gemma2", "gemma3", "cohere2")
"""Families whose layers see a window or everything by turns; older configs of theirs have no `layer_types`."""
_TIED = ("gemma", "cohere")
_BEFORE = "vLLM up to 0.30"
_GATES = ("deepseek", "gemma4", "hy_v3", "minimax_m2", "nemotron_h")
"""Families whose gate is vLLM's `GateLinear` in every version; others' is up to 0.30 a linear layer like another."""
_PLAIN_GATES = ("afmoe", "bailing_moe", "glm4_moe", "mimo_v2", "param2moe", "sarvam")
"""Families whose gate is torch's own `Linear` up to then."""
_NORMED_HEADS = ("qwen3", "gemma3")
_Asked = tuple[str, str, str, str, Mapping[str, DimValue]]
"""A layer, its kind, and what it asks a plan for: an op, a dtype, dims."""


def rows_of(plan: Plan, model: Path, *, tensor_parallel: int = 1, dtype: str | None = None) -> list[Row]:
    """A row for each kind of layer of a model, on one rank.

    dtype: of the activations; else the config's. Raises `UsageError` for a config that cannot be read.
    """
    outer = read_config(model)
    config = of_text(outer)
    wanted = parse_dtype(dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    rows = []
    if plan.device.arch.vendor != "nvidia":
        why = (
            f"the plugin refuses vLLM workers that are not CUDA's; on {plan.device.arch.name} the rest is only planned"
        )
        rows.append(Row.uncovered("worker", "engine", why))
    uncovered = [
        Row.uncovered(name, "layer", f"{key} is in its config: {reason}")
        for key, (name, reason) in _NOT_COVERED.items()
        if config.get(key)
    ]
    rows += [*uncovered, *_encoders(outer)]
    if uncovered and "num_attention_heads" not in config:
        return rows
    found = format_of(config)
    sees_later = _sees_later(outer, config)
    layer_norm = next((key for key in _LAYER_NORMS if key in config and "rms_norm_eps" not in config), "")
    for layer, kind, op, of, dims in _layers(config, model, tensor_parallel, wanted, found):
        if found.reason and kind == "linear":
            rows.append(Row.uncovered(layer, kind, found.reason, op="gemm"))
        elif _BEFORE in layer and str(config.get("model_type", "")).startswith(_PLAIN_GATES):
            why = "its gate is torch's own Linear, which nothing here serves; use vLLM 0.31 or later"
            rows.append(Row.uncovered(layer, kind, why, op=op))
        elif sees_later and op == "attention":
            rows.append(Row.uncovered(layer, kind, SEES_LATER, op=op))
        elif layer_norm and layer == "norms":
            why = f"{layer_norm} is in its config, and no rms_norm_eps: LayerNorm, which nothing here serves"
            rows.append(Row.uncovered(layer, kind, why))
        else:
            rows.append(_row(plan, layer, kind, op, of, dims))
    rows += _experts(config, plan, model, tensor_parallel, wanted, found)
    if tensor_parallel > 1:
        why = "vLLM's pinned collectives stay, and are not promised here"
        rows.append(Row.uncovered("all_reduce", "collective", why))
    return [*dict.fromkeys(rows), Row.uncovered("sampler", "sampling", SAMPLER, refused=False)]


def _encoders(config: Mapping[str, Any]) -> Iterator[Row]:
    """What stands in a server's table for an encoder of images or sounds."""
    for key in _ENCODERS:
        if isinstance(config.get(key), dict):
            name = f"{key.removesuffix('_config')} encoder"
            yield Row.uncovered(name, "attention", ENCODER, op="attention")
            why = "convolutions and LayerNorms of an encoder, where it has them: nothing here serves those"
            yield Row.uncovered(name, "layer", why)


def _sees_later(outer: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether tokens of images see later ones: `is_mm_prefix_lm` of vLLM's ModelConfig."""
    if "is_mm_prefix_lm" in outer:
        return bool(outer["is_mm_prefix_lm"])
    if str(outer.get("model_type", "")).startswith("gemma4"):
        return config.get("use_bidirectional_attention") == "vision"
    return outer.get("model_type") in _SEE_LATER


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    """The products with a bias, as vLLM's models have them (0.25.1 to 0.33.0), which no config says for all."""
    family = str(config.get("model_type", ""))
    names: set[str] = set()
    if family.startswith("qwen2"):
        names |= {"qkv"}
    if config.get("attention_bias"):
        names |= {"qkv"} if family.startswith(("qwen3", "glm4")) else {"qkv", "o"}
    if family == "gpt_oss":
        names |= {"qkv", "o", "router"}
    if config.get("mlp_bias"):
        names |= {"gate_up", "down"}
    if config.get("use_bias"):
        names |= {"qkv", "o", "gate_up", "down"}
    return frozenset(names)


def _layers(config: Mapping[str, Any], model: Path, ranks: int, dtype: str, found: Format) -> Iterator[_Asked]:
    biased = _biased(config)
    for shape in model_shapes(model, ranks):
        names = [name.split(" ", 1)[-1] for name in shape.names]
        for has_bias in (False, True):
            if layer := ", ".join(name for name in names if (name in biased) is has_bias):
                for asked in _products(config, layer, shape.dims, dtype, found):
                    yield asked
                    if has_bias and not asked[2].startswith("quantize."):
                        # A layer may leave its bias to another rank: a server binds both.
                        yield (*asked[:4], {**asked[4], "bias": True})
    gemma = str(config.get("model_type", "")).startswith("gemma")
    for op in ("rms_norm", "fused_add_rms_norm"):
        yield "norms", "norm", op, dtype, {"n": int(config["hidden_size"]), "gemma": gemma}
    yield from _attention(config, ranks, dtype, gemma)


def _products(
    config: Mapping[str, Any], layer: str, dims: Mapping[str, DimValue], dtype: str, found: Format
) -> Iterator[_Asked]:
    family = str(config.get("model_type", ""))
    n, k = int(dims["n"]), int(dims["k"])
    if dims.get("role") == "router":
        always = family.startswith(_GATES)
        yield layer if always else f"{layer} (vLLM 0.31 and later)", "router", "gemm", dtype, dims
        if not always:
            yield f"{layer} ({_BEFORE})", "linear", "gemm", dtype, {"n": n, "k": k}
    elif layer == "lm_head":
        tied = config.get("tie_word_embeddings", family.startswith(_TIED))
        yield "lm_head (the embedding)" if tied else layer, "lm_head", "gemm", dtype, dims
    else:
        for asked in found.asked(n, k, dtype):
            yield layer, "linear", *asked


def _attention(config: Mapping[str, Any], ranks: int, dtype: str, gemma: bool) -> Iterator[_Asked]:
    heads = int(config["num_attention_heads"])
    mine = max(1, heads // ranks)
    if "kv_lora_rank" in config:
        rank, rope = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
        problem = latent_problem(dtype, num_heads=mine, kv_lora_rank=rank, rope_dim=rope, page_size=_PAGE)
        yield "attention", "attention", problem.op, dtype, problem.dims
        nope, value = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
        yield "W_UK", "attention", "bmm", dtype, {"n": rank, "k": nope}
        yield "W_UV", "attention", "bmm", dtype, {"n": value, "k": rank}
        return
    width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    if str(config.get("model_type", "")).startswith(_NORMED_HEADS):
        kv_heads = max(1, int(config.get("num_key_value_heads") or heads) // ranks)
        for layer, count in (("q_norm", mine), ("k_norm", kv_heads)):
            by_head = {"head_dim": width, "num_heads": count - 1, "num_kv_heads": 1, "gemma": gemma}
            if count > 1:
                yield layer, "norm", "qk_norm", dtype, by_head
            else:
                yield layer, "norm", "rms_norm", dtype, {"n": width, "gemma": gemma}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = set(config.get("layer_types") or ())
    if not kinds and window and str(config.get("model_type", "")).startswith(_TWO_WINDOWS):
        kinds = {"full_attention", "sliding_attention"}
    kinds = kinds or {"sliding_attention" if window else "full_attention"}
    for kind in sorted(kinds & {"full_attention", "sliding_attention"}):
        problem = attention_problem(
            dtype,
            num_heads=mine,
            num_kv_heads=max(1, int(config.get("num_key_value_heads") or heads) // ranks),
            head_dim=width,
            page_size=_PAGE,
            window=window if kind == "sliding_attention" else None,
            softcap=config.get("attn_logit_softcapping"),
            sinks=config.get("model_type") == "gpt_oss",
        )
        yield f"{kind} layers", "attention", problem.op, dtype, problem.dims


def _experts(
    config: Mapping[str, Any], plan: Plan, model: Path, ranks: int, dtype: str, found: Format
) -> Iterator[Row]:
    if not any(config.get(key) for key in EXPERT_COUNTS):
        return
    if found.experts:
        yield Row.uncovered("experts", "experts", found.experts, op="moe.experts")
    else:
        (shape,) = expert_shapes(model, ranks)
        yield _row(plan, "experts", "experts", "moe.experts", dtype, shape.dims)
    routing = router_shape(model).dims
    for logits in ("float32", dtype):  # the gate's, which follows vLLM's version
        yield _row(plan, f"router of {logits} logits", "router", "moe.router", logits, routing)


def _row(plan: Plan, layer: str, kind: str, op: str, dtype: str, dims: Mapping[str, DimValue]) -> Row:
    try:
        return Row.of(layer, kind, plan.select_problem(ops.get(op).problem(dtype, dims)))
    except (SelectionError, UsageError) as error:
        return Row.uncovered(layer, kind, "; ".join(str(error).splitlines()), op=op)
