"""vLLM's KV cache as the ops take it, without a copy, and the writing of new keys and values."""

from __future__ import annotations

import torch

from bidispatch.errors import ArgumentError

__all__ = ["heads_of", "write_heads", "write_latent"]

_FP8_MAX = 448.0  # of float8_e4m3fn


def heads_of(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as views [pages, page_size, kv_heads, head_size], of any strides but the last.

    vLLM 0.33.0 (v1/kv_cache_layout.py) has [pages, kv_heads, page_size, 2 · head_size]; 0.25.1
    (get_kv_cache_shape) has [pages, 2, page_size, kv_heads, head_size]. Raises `ArgumentError` for another shape.
    """
    if kv_cache.dim() == 4 and kv_cache.shape[3] == 2 * head_size:
        both = kv_cache.transpose(1, 2)
        return both[..., :head_size], both[..., head_size:]
    if kv_cache.dim() == 5 and kv_cache.shape[1] == 2 and kv_cache.shape[4] == head_size:
        return kv_cache[:, 0], kv_cache[:, 1]
    raise ArgumentError(
        f"a KV cache of shape {list(kv_cache.shape)} is neither [pages, kv_heads, page_size, {2 * head_size}] "
        f"nor [pages, 2, page_size, kv_heads, {head_size}]"
    )


def write_heads(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Put keys and values [tokens, kv_heads, head_size] at their slots; slot -1 is padding. Each alone, so invariant.

    The ops of vLLM take as many rows as there are slots.
    """
    k_cache, v_cache = heads_of(kv_cache, key.shape[-1])
    if kv_cache.is_cuda:
        from vllm import _custom_ops

        _custom_ops.reshape_and_cache_flash(key, value, k_cache, v_cache, slots, kv_cache_dtype, k_scale, v_scale)
        return
    _scatter(key, k_cache, slots, kv_cache_dtype, k_scale)
    _scatter(value, v_cache, slots, kv_cache_dtype, v_scale)


def write_latent(kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """On the processor: put kv_c [tokens, kv_lora_rank] and k_pe [tokens, rope_dim] side by side at their slots."""
    _scatter(torch.cat((kv_c, k_pe), dim=-1), kv_cache, slots, "auto", None)


def _scatter(
    rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, kv_cache_dtype: str, scale: torch.Tensor | None
) -> None:
    """What vLLM's CUDA op does, in torch: cache is [pages, page_size, ...]."""
    kept = slots >= 0
    places = slots[kept]
    rows = rows[: len(slots)][kept]
    if kv_cache_dtype.startswith("fp8") and scale is not None:
        wide = rows.float() / scale.reshape(1, -1, 1)
        rows = wide.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        cache = cache.view(torch.uint8)
    page_size = cache.shape[1]
    cache[places // page_size, places % page_size] = rows
