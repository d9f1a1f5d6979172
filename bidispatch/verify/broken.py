"""Kernels for the controls: sound ones in plain torch, and the faults that can be planted in them. Imports torch.

A sound kernel here holds its bits on any device because it is made of elementwise multiplications and additions of
fp32, which IEEE 754 rounds in one way, walked in a fixed order.
"""

from __future__ import annotations

import math

import torch

from bidispatch import ops
from bidispatch.registry import Params
from bidispatch.runtime.context import BindContext, Kernel

__all__ = ["ControlParams", "bind_attention", "bind_attention_mla", "bind_moe_experts", "bind_product"]

_HIDDEN_M, _EDGE = 37, 600
_CAPACITY = 2
_MOST_DRAFTED = 16
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23  # of an fp32 number


class ControlParams(Params):
    """Which fault a control kernel has; none when empty."""

    fault: str = ""
    splits: int = 1


def bind_product(context: BindContext) -> Kernel:
    """`gemm` without bias. `params.fault` is one of the branches below.

    It names an edge, as a kernel does that chooses inside.
    """
    fault, splits = context.params.fault, context.params.splits
    calls = 0

    def launch(x: torch.Tensor, weight: torch.Tensor, bias: None, out: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        m = len(x)
        if fault == "strides ignored":
            x = x.as_strided(x.shape, (x.shape[1], 1))
        if fault == "last k dropped":
            x, weight = x[:, :-1], weight[:, :-1]
        parts = splits
        if fault == "splits follow M":
            parts = 1 if m == 1 else 2 if m < 16 else 4
        elif fault == "splits follow N":
            parts = 1 + weight.shape[0] % 2
        elif fault == "splits follow the limits":
            parts = 1 if context.limits.max_tokens < 8 else 4
        elif fault == "another split at one M":
            parts = 2 if m == _HIDDEN_M else 1
        elif fault == "another split above an edge":
            parts = 2 if m > _EDGE else 1
        elif fault == "splits change by the call":
            parts = 1 + calls % 2
        elif fault == "splits follow the capture":
            parts = 2 if torch.cuda.is_current_stream_capturing() else 1
        result = _product(x, weight, parts)
        if fault == "neighbours leak":
            result = result + 0 * x.sum()
        if fault == "a row is skipped" and m > 4:
            out[:-1] = result[:-1]
            return
        if fault == "a row too many":
            _write_behind(out)
        out.copy_(result)

    launch.edges = (_EDGE,)  # type: ignore[attr-defined]
    return launch


def _product(x: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """x [m, k] · weight [n, k], K cut into equal parts whose sums are added in order."""
    k = x.shape[1]
    x, weight = x.float(), weight.float()
    total = torch.zeros(len(x), len(weight), device=x.device)
    for part in range(parts):
        partial = torch.zeros_like(total)
        for j in range(part * k // parts, (part + 1) * k // parts):
            partial = partial + x[:, j, None] * weight[None, :, j]
        total = total + partial
    return total


def _write_behind(out: torch.Tensor) -> None:
    """Zero the row after the last one, where the allocation has one."""
    behind = out.storage_offset() + len(out) * out.stride(0)
    if (behind + out.shape[1]) * out.element_size() <= out.untyped_storage().nbytes():
        out.as_strided((1, out.shape[1]), out.stride(), behind).zero_()


def bind_moe_experts(context: BindContext) -> Kernel:
    """`moe.experts` with silu and no other feature. `params.fault` is one of the branches below."""
    fault, experts = context.params.fault, context.problem.size("experts")

    def launch(
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_bias: None,
        w2_bias: None,
        w13_scales: None,
        w2_scales: None,
        expert_map: None,
        add: None,
        out: torch.Tensor,
    ) -> None:
        m, top_k = topk_ids.shape
        ids = topk_ids.long()
        valid = (ids >= 0) & (ids < experts)
        if fault == "padding counts":
            valid |= ids == -1
        ids = torch.where(valid, ids % experts, 0)
        if fault == "experts have room for few":
            named = torch.nn.functional.one_hot(ids, experts) * valid[..., None]
            before = named.flatten(0, 1).cumsum(0).view_as(named).gather(-1, ids[..., None])[..., 0]
            valid &= before <= _CAPACITY
        total = torch.zeros(out.shape, device=x.device)
        in_turn = range(top_k)
        if fault == "slots in an order that follows M" and m > 1:
            in_turn = range(top_k - 1, -1, -1)
        for slot in in_turn:
            both = _products(x, w13[ids[:, slot]])
            gate, up = both.chunk(2, dim=-1)
            falling = _exp(-gate.abs())  # which knows no large arguments
            silu = gate * torch.where(gate < 0, falling, 1.0) / (1 + falling)
            part = _products(silu * up, w2[ids[:, slot]]) * topk_weights[:, slot, None]
            total = total + torch.where(valid[:, slot, None], part, 0.0)
        out.copy_(total)

    return launch


def _products(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [m, k] · weights [m, n, k], a weight for each row, K in order."""
    total = torch.zeros(weights.shape[:2], device=x.device)
    for j in range(x.shape[1]):
        total = total + x[:, j, None] * weights[:, :, j]
    return total


def bind_attention(context: BindContext) -> Kernel:
    """`attention`, causal, with no other feature. `params.fault` is one of the branches below."""
    fault, problem = context.params.fault, context.problem

    def launch(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: None,
        alibi_slopes: None,
        k_scale: None,
        v_scale: None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        query_lens = query_start_loc.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(seq_lens), device=q.device), query_lens)
        owned, longest = len(owner), int(seq_lens.max())
        kv_len, ends = seq_lens[owner].long(), query_start_loc[1:][owner].long()
        positions = kv_len - (ends - torch.arange(owned, device=q.device))
        steps = torch.arange(longest, device=q.device)
        pages = block_table[owner][:, steps // problem.size("page_size")].long()
        slots = pages * problem.size("page_size") + steps % problem.size("page_size")
        seen = steps[None, :] <= positions[:, None]
        keys, values = (
            torch.where(seen[..., None, None], cache.flatten(0, 1)[slots], 0.0) for cache in (k_cache, v_cache)
        )
        width = torch.full_like(positions, longest + 1)
        if fault == "splits follow the longest":
            width[:] = max(1, longest // 3)
        elif fault == "splits follow the chunk":
            width[query_lens[owner] == 1] = 3
        elif fault == "splits follow the page":
            width = 1 + pages[:, 0] % 4
        elif fault == "splits follow the limits":
            width[:] = max(1, context.limits.max_seq_len // 16)
        elif fault == "splits of a decode binding" and context.limits.max_query_len == 1:
            width[:] = 3
        elif fault == "splits of a binding for drafts" and 1 < context.limits.max_query_len <= _MOST_DRAFTED:
            width[query_lens[owner] > 1] = 3
        factor = 0.9 * scale if fault == "wrong scale" else scale
        result = _attend(q[:owned] * factor, keys, values, seen, width)
        if fault == "neighbours leak":
            result = result + 0 * q[:owned].sum()
        elif fault == "unused slots leak":
            last = pages[:, -1] * problem.size("page_size") + problem.size("page_size") - 1
            result = result + 0 * v_cache.flatten(0, 1)[last].sum()
        if fault == "padding is written":
            out.zero_()
        out[:owned] = result

    return launch


def bind_attention_mla(context: BindContext) -> Kernel:
    """`attention.mla` through the kernel above: its cache holds the keys, and in its first columns the values."""
    attention = bind_attention(context)
    rank = context.problem.size("kv_lora_rank")
    absent = [None for argument in ops.get("attention").arguments if argument.when]

    def launch(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        keys = kv_cache[:, :, None]
        attention(q, keys, keys[..., :rank], block_table, seq_lens, query_start_loc, *absent, scale, out)

    return launch


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    width: torch.Tensor,
) -> torch.Tensor:
    """q [t, heads, d] over keys and values [t, p, kv_heads, d or less], its sums cut every `width` [t] positions."""
    group = q.shape[1] // keys.shape[2]
    keys, values = keys.repeat_interleave(group, dim=2), values.repeat_interleave(group, dim=2)
    scores = torch.zeros(keys.shape[:3], device=q.device)
    for d in range(q.shape[2]):
        scores = scores + q[:, None, :, d] * keys[..., d]
    scores = scores.masked_fill(~seen[..., None], -math.inf)
    weights = _exp(scores - scores.amax(dim=1, keepdim=True))
    total = torch.zeros(*q.shape[:2], values.shape[3] + 1, device=q.device)
    partial = torch.zeros_like(total)
    for p in range(keys.shape[1]):
        with_sum = torch.cat([values[:, p], torch.ones_like(values[:, p, :, :1])], dim=-1)
        partial = partial + weights[:, p, :, None] * with_sum
        ends = ((p + 1) % width == 0)[:, None, None]
        total = torch.where(ends, total + partial, total)
        partial = torch.where(ends, 0.0, partial)
    total = total + partial
    return total[..., :-1] / total[..., -1:]


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp of fp32 in multiplications and additions, since torch's own may differ between vector and scalar code."""
    scaled = (x * math.log2(math.e)).clamp(min=-120.0)
    whole = scaled.round()
    fraction = (scaled - whole) * math.log(2)
    series = torch.ones_like(x)
    for n in range(8, 0, -1):
        series = 1 + series * fraction * (1 / n)
    power = ((whole.to(torch.int32) + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float32)
    return torch.where(x == -math.inf, 0.0, series * power)
