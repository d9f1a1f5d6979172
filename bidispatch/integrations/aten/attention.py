"""`scaled_dot_product_attention` taken apart: a product, a softmax, a product. Plain: all scores are in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from bidispatch.integrations.aten import torch_ops
from bidispatch.integrations.aten.autocast import lowered
from bidispatch.integrations.aten.compute import padded_length
from bidispatch.integrations.aten.functions import served

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    handle: int,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """query [..., heads, m, d], key [..., kv_heads, n, d], value [..., kv_heads, n, dv]: [..., heads, m, dv].

    Scores are fp32 and scaled and masked there. Keys are padded to a length that many contexts share, since a kernel
    is bound for each. Masked positions weigh exactly 0; a row with nothing to see is 0, as torch has it.
    """
    query, key, value = lowered("scaled_dot_product_attention", query, key, value)
    if not (served(query) and query.dtype is key.dtype is value.dtype) or query.dim() < 2:
        return NotImplemented
    if is_causal and attn_mask is not None:
        return NotImplemented
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])  # type: ignore[no-untyped-call]
    heads = query.shape[-3] if query.dim() > 2 else 1
    kv_heads = heads
    if query.dim() > 2:
        kv_heads = key.shape[-3] if enable_gqa else max(key.shape[-3], value.shape[-3])
        if not enable_gqa:
            heads = max(heads, kv_heads)
            kv_heads = heads
    (m, d), n, dv = query.shape[-2:], key.shape[-2], value.shape[-1]
    if not (m and n and d and dv and heads and batch.numel()) or heads % kv_heads:
        return NotImplemented
    padded = padded_length(n)
    q = query.expand(*batch, heads, m, d).reshape(batch.numel() * kv_heads, heads // kv_heads * m, d)
    k = _padded(key, batch, kv_heads, padded)
    v = _padded(value, batch, kv_heads, padded)
    scores = torch_ops.bmm(handle, q, k.mT, out_dtype=torch.float32).view(*batch, heads, m, padded)
    scores = scores * (1 / math.sqrt(d) if scale is None else scale)
    mask = torch.ones(m, n, dtype=torch.bool, device=query.device).tril() if is_causal else attn_mask
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~_widened(mask, n, padded, False), -math.inf)
    elif mask is not None:
        scores = scores + _widened(mask.float(), n, padded, -math.inf)
    elif padded > n:
        seen = torch.arange(padded, device=query.device) < n
        scores = scores.masked_fill(~seen, -math.inf)
    blind = None
    if mask is not None:
        # Softmax of nothing but -inf is NaN, and so would be its gradient.
        blind = (scores == -math.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
    weights = torch_ops.softmax(handle, scores, -1, torch.float32, False)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    weights = weights.to(query.dtype)
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, True)
    out = torch_ops.bmm(handle, weights.view(q.shape[0], q.shape[1], padded), v)
    shape = (*batch, heads, m, dv) if query.dim() > 2 else (m, dv)
    return out.view(shape)


def _padded(x: torch.Tensor, batch: torch.Size, heads: int, length: int) -> torch.Tensor:
    """Keys or values as [matrices, length, d], zeros where there are none."""
    x = x.expand(*batch, heads, *x.shape[-2:])
    if length > x.shape[-2]:
        x = F.pad(x, (0, 0, 0, length - x.shape[-2]))
    return x.reshape(batch.numel() * heads, length, x.shape[-1])


def _widened(mask: torch.Tensor, n: int, length: int, value: float) -> torch.Tensor:
    """A mask of n keys, or of one for all, over `length` keys."""
    return F.pad(mask.expand(*mask.shape[:-1], n), (0, length - n), value=value)
