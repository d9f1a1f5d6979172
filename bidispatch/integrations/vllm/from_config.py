"""The table for a model's `config.json`, without vLLM, a server, or the GPU: what its layers ask a plan for.

Shapes are those of `tune --model`. What a config does not show, such as layers of a family of its own, is not in it:
the table that a server logs is of the layers that were built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bidispatch import ops
from bidispatch.errors import SelectionError, UsageError
from bidispatch.integrations.vllm.problems import attention_problem, latent_problem
from bidispatch.integrations.vllm.table import Row
from bidispatch.ops.schema import DimValue, parse_dtype
from bidispatch.planning.plan import Plan
from bidispatch.tune.formats import Format, format_of
from bidispatch.tune.models import EXPERT_COUNTS, expert_shapes, model_shapes, router_shape

__all__ = ["rows_of"]

_PAGE = 16
_NOT_COVERED = {
    "linear_num_value_heads": "linear attention (GDN)",
    "layers_block_type": "layers of several kinds (Mamba)",
    "mamba_d_state": "Mamba",
    "ssm_state_size": "Mamba",
    "state_size": "Mamba",
    "index_topk": "sparse attention",
}
_NORMED_HEADS = ("qwen3", "gemma3")
_Asked = tuple[str, str, str, str, Mapping[str, DimValue]]
"""A layer, its kind, and what it asks a plan for: an op, a dtype, dims."""


def rows_of(plan: Plan, model: Path, *, tensor_parallel: int = 1, dtype: str | None = None) -> list[Row]:
    """A row for each kind of layer of a model, on one rank.

    dtype: of the activations; else the config's. Raises `UsageError` for a config that cannot be read.
    """
    config = _config(model)
    wanted = parse_dtype(dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    rows = []
    if plan.device.arch.vendor != "nvidia":
        why = (
            f"the plugin refuses vLLM workers that are not CUDA's; on {plan.device.arch.name} the rest is only planned"
        )
        rows.append(Row.uncovered("worker", "engine", why))
    uncovered = [
        Row.uncovered(name, "layer", f"{key} is in its config: {name} is not served here")
        for key, name in _NOT_COVERED.items()
        if config.get(key)
    ]
    rows += uncovered
    if uncovered and "num_attention_heads" not in config:
        return rows
    found = format_of(config)
    for layer, kind, op, of, dims in _layers(config, model, tensor_parallel, wanted, found):
        if found.reason and kind == "linear":
            rows.append(Row.uncovered(layer, kind, found.reason, op="gemm"))
        else:
            rows.append(_row(plan, layer, kind, op, of, dims))
    rows += _experts(config, plan, model, tensor_parallel, wanted, found)
    if tensor_parallel > 1:
        why = "vLLM's pinned collectives stay, and are not promised here"
        rows.append(Row.uncovered("all_reduce", "collective", why))
    why = "sampling, logprobs and prompt_logprobs are vLLM's, in its own batch-invariant mode"
    return [*rows, Row.uncovered("sampler", "sampling", why, refused=False)]


def _config(model: Path) -> Mapping[str, Any]:
    file = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not a readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} is not a mapping; --model wants a model's config.json, or its folder")
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _layers(config: Mapping[str, Any], model: Path, ranks: int, dtype: str, found: Format) -> Iterator[_Asked]:
    for shape in model_shapes(model, ranks):
        layer = ", ".join(name.split(" ", 1)[-1] for name in shape.names)
        if shape.dims.get("role") == "router":
            yield layer, "router", "gemm", dtype, shape.dims
        elif layer == "lm_head":
            yield layer, "lm_head", "gemm", dtype, shape.dims
        else:
            for asked in found.asked(int(shape.dims["n"]), int(shape.dims["k"]), dtype):
                yield layer, "linear", *asked
    gemma = str(config.get("model_type", "")).startswith("gemma")
    for op in ("rms_norm", "fused_add_rms_norm"):
        yield "norms", "norm", op, dtype, {"n": int(config["hidden_size"]), "gemma": gemma}
    yield from _attention(config, ranks, dtype, gemma)


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
    kinds = set(config.get("layer_types") or ()) or {"sliding_attention" if window else "full_attention"}
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
    yield _row(plan, "router", "router", "moe.router", "float32", router_shape(model).dims)


def _row(plan: Plan, layer: str, kind: str, op: str, dtype: str, dims: Mapping[str, DimValue]) -> Row:
    try:
        return Row.of(layer, kind, plan.select_problem(ops.get(op).problem(dtype, dims)))
    except (SelectionError, UsageError) as error:
        return Row.uncovered(layer, kind, "; ".join(str(error).splitlines()), op=op)
