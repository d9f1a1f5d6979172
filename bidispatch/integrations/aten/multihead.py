"""`F.multi_head_attention_forward`, which `nn.MultiheadAttention` and torch's Transformer layers call.

torch's own is Python that calls other functions, which the overrides, once inside it, would not see.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from bidispatch.integrations.aten import functions
from bidispatch.integrations.aten.attention import scaled_dot_product_attention
from bidispatch.integrations.aten.functions import served

__all__ = ["multi_head_attention_forward"]


def multi_head_attention_forward(
    handle: int,
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """query [m, batch, width], key and value [n, batch, ...], or all without batch: the result and the weights.

    Biases of keys and values, an added zero and static keys or values are not served.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        return NotImplemented
    if not all(served(x) for x in (query, key, value)) or query.dim() not in (2, 3):
        return NotImplemented
    if query.shape[-1] != embed_dim_to_check or embed_dim_to_check % num_heads:
        return NotImplemented
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    (m, batch, width), n = query.shape, key.shape[0]
    mask = _mask(attn_mask, key_padding_mask, batch, num_heads, m, n)
    if mask is NotImplemented:
        return NotImplemented
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    heads = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        projected = functions.linear(handle, x, weight, bias)
        if projected is NotImplemented:
            return NotImplemented
        heads.append(projected.reshape(x.shape[0], batch, num_heads, width // num_heads).permute(1, 2, 0, 3))
    q, k, v = heads
    dropout = dropout_p if training else 0.0
    weights_of_heads = None
    if need_weights:
        scores = functions.matmul(handle, q, k.mT, out_dtype=torch.float32) / math.sqrt(width // num_heads)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.float()
        weights_of_heads = functions.softmax(handle, scores, -1).to(q.dtype)
        if dropout:
            weights_of_heads = F.dropout(weights_of_heads, dropout)
        result = functions.matmul(handle, weights_of_heads, v)
    else:
        result = scaled_dot_product_attention(handle, q, k, v, mask, dropout)
    if result is NotImplemented:
        return NotImplemented
    result = functions.linear(
        handle, result.permute(2, 0, 1, 3).reshape(m, batch, width), out_proj_weight, out_proj_bias
    )
    if result is NotImplemented:
        return NotImplemented
    if weights_of_heads is not None and average_attn_weights:
        weights_of_heads = functions.mean(handle, weights_of_heads, 1)
    if not batched:
        result = result.squeeze(1)
        weights_of_heads = None if weights_of_heads is None else weights_of_heads.squeeze(0)
    return result, weights_of_heads


def _mask(attn_mask: Any, key_padding_mask: Any, batch: int, heads: int, m: int, n: int) -> Any:
    """One mask over [batch, heads, m, n], as attention takes it: where it may look, or what to add to its scores.

    Both of torch's masks say what to leave out where they are bools.
    """
    masks = []
    if attn_mask is not None:
        if attn_mask.dim() == 3 and attn_mask.shape == (batch * heads, m, n):
            masks.append(attn_mask.view(batch, heads, m, n))
        elif attn_mask.shape == (m, n):
            masks.append(attn_mask)
        else:
            return NotImplemented
    if key_padding_mask is not None:
        if key_padding_mask.shape not in ((batch, n), (n,)):
            return NotImplemented
        masks.append(key_padding_mask.reshape(batch, 1, 1, n))
    if not masks:
        return None
    if all(mask.dtype is torch.bool for mask in masks):
        left_out = masks[0]
        for mask in masks[1:]:
            left_out = left_out | mask
        return ~left_out
    added = [
        torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)
        if mask.dtype is torch.bool
        else mask.float()
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
