"""What a vLLM attention layer asks the plan for. Imports no vLLM: selection is the same on a laptop."""

from __future__ import annotations

from bidispatch import ops
from bidispatch.errors import SelectionError
from bidispatch.ops.attention import FP8
from bidispatch.ops.schema import Problem

__all__ = ["attention_problem", "latent_problem"]

_FP8_CACHES = ("fp8", "fp8_e4m3")


def attention_problem(
    dtype: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    alibi: bool = False,
    kv_cache_dtype: str = "auto",
) -> Problem:
    """The problem of `attention` that a decoder's layer is. Raises `SelectionError` for a cache it cannot read.

    window: vLLM's `sliding_window`, positions seen with the query's own (vLLM's backends pass window - 1 to the left).
    """
    return ops.get("attention").problem(
        dtype,
        {
            "head_dim": head_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "page_size": page_size,
            "causal": True,
            "window": window or 0,
            "softcap": float(softcap or 0.0),
            "sinks": sinks,
            "alibi": alibi,
            "kv_dtype": _held("attention", dtype, kv_cache_dtype, fp8=True),
        },
    )


def latent_problem(
    dtype: str, *, num_heads: int, kv_lora_rank: int, rope_dim: int, page_size: int, kv_cache_dtype: str = "auto"
) -> Problem:
    """The problem of `attention.mla` that an MLA layer is. Raises `SelectionError` for a cache it cannot read."""
    _held("attention.mla", dtype, kv_cache_dtype, fp8=False)
    dims: dict[str, int | float | str | bool] = {
        "num_heads": num_heads,
        "kv_lora_rank": kv_lora_rank,
        "rope_dim": rope_dim,
        "page_size": page_size,
    }
    return ops.get("attention.mla").problem(dtype, dims)


def _held(op: str, dtype: str, kv_cache_dtype: str, *, fp8: bool) -> str:
    """The dtype that `--kv-cache-dtype` puts in the cache."""
    if kv_cache_dtype in ("auto", dtype):
        return dtype
    if fp8 and kv_cache_dtype in _FP8_CACHES:
        return FP8
    known = ["auto", dtype, *(_FP8_CACHES if fp8 else ())]
    raise SelectionError(
        f"{op} of a {dtype} model reads no cache of --kv-cache-dtype {kv_cache_dtype}; it reads {', '.join(known)}"
    )
