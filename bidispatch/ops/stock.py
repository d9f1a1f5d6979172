"""What plain torch does for each op: the yardstick for speed, and the control that is seen to follow the batch.

Every function is `f(problem, *arguments, *scalars) -> tuple of tensors`, in the op's output dtype, on the device of its
arguments. Imports torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bidispatch import ops
from bidispatch.int4 import dequantize
from bidispatch.ops.quantize import unfused
from bidispatch.ops.reference.linear import widened_blocks
from bidispatch.ops.reference.moe import gated, local_experts, quantized
from bidispatch.ops.reference.moe import router as exact_router
from bidispatch.ops.reference.quantize import LARGEST, group_scales, spread, token_scales
from bidispatch.ops.schema import Problem
from bidispatch.runtime.bind import load_attribute

__all__ = [
    "attention",
    "attention_mla",
    "bmm",
    "fp8_group",
    "fp8_tensor",
    "fp8_token",
    "fused_add_rms_norm",
    "fused_fp8_group",
    "gelu_tanh_and_mul",
    "gemm",
    "gemm_fp8",
    "gemm_fp8_block",
    "gemm_int4",
    "log_softmax",
    "mean",
    "moe_experts",
    "moe_router",
    "qk_norm",
    "rms_norm",
    "silu_and_mul",
    "softmax",
    "sum",
    "token_logprob",
]


def _dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
    """The dtype to compute in and that of the result: torch's own where it is wide enough for the result."""
    out: torch.dtype = getattr(torch, str(problem["out_dtype"]))
    return torch.promote_types(getattr(torch, problem.dtype), out), out


def gemm(
    problem: Problem, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """`F.linear`, then a cast where the result is wider, as models do with their logits: [m, n]."""
    return (F.linear(x, weight, bias).to(_dtypes(problem)[1]),)


def gemm_int4(
    problem: Problem,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The weight dequantised, then as `gemm`: [m, n]."""
    return gemm(problem, x, dequantize(weight, scales, zeros), bias)


def bmm(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`torch.bmm`, then a cast where the result is wider: [matrices, m, n]."""
    return (torch.bmm(a, b).to(_dtypes(problem)[1]),)


def fp8_group(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Maxima, a quotient and a cast: q [m, k] and scales [m, k/128]."""
    scales = group_scales(problem, x)
    q = x.float() / spread(scales, x.shape[1]).float()
    return q.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def fp8_token(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A maximum, a quotient and a cast: q [m, k] and scales [m]."""
    scales = token_scales(x)
    return (x.float() / scales[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def fp8_tensor(problem: Problem, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A quotient and a cast: q [m, k]."""
    return ((x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn),)


def fused_fp8_group(problem: Problem, *everything: Any) -> tuple[torch.Tensor, ...]:
    """What torch does for the op without quantisation, then `fp8_group`."""
    before, quantization = unfused(problem)
    out, *others = load_attribute(ops.get(before.op).stock)(before, *everything)
    return (*fp8_group(quantization, out), *others)


def gemm_fp8_block(
    problem: Problem, x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Both operands widened to bf16 (fp32 for a result in fp32), then `F.linear`: [m, n]."""
    out: torch.dtype = getattr(torch, str(problem["out_dtype"]))
    widened = (x.float() * spread(x_scales, x.shape[1]).float()).to(out)
    return (F.linear(widened, widened_blocks(weight, weight_scales).to(out)),)


def gemm_fp8(
    problem: Problem,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The same with scales for whole tensors or rows, and a bias."""
    out: torch.dtype = getattr(torch, str(problem["out_dtype"]))
    widened = x.float(), weight.float()
    for tensor, one, several in zip(widened, (x_scale, weight_scale), (x_scales, weight_scales), strict=True):
        if one is not None:
            tensor *= one
        if several is not None:
            tensor *= several[:, None]
    left, right = widened
    return (F.linear(left.to(out), right.to(out), bias),)


def rms_norm(problem: Problem, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """`F.rms_norm`: [m, n]. Gemma's 1 + weight is applied in fp32, as its models do, since bf16 cannot hold it."""
    if problem.flag("gemma"):
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps) * (1 + weight.float())
        return (normed.to(x.dtype),)
    return (F.rms_norm(x, x.shape[-1:], weight, eps),)


def fused_add_rms_norm(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    """x + residual, then `F.rms_norm`: [m, n] each."""
    total = x + residual
    return (*rms_norm(problem, total, weight, eps), total)


def qk_norm(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """`F.rms_norm` of q, then of k: [m, num_heads, head_dim] and [m, num_kv_heads, head_dim]."""
    return (*rms_norm(problem, q, q_weight, eps), *rms_norm(problem, k, k_weight, eps))


def silu_and_mul(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`F.silu` of the first half times the second: [m, n]."""
    a, b = x.chunk(2, dim=-1)
    return (F.silu(a) * b,)


def gelu_tanh_and_mul(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`F.gelu(approximate="tanh")` of the first half times the second: [m, n]."""
    a, b = x.chunk(2, dim=-1)
    return (F.gelu(a, approximate="tanh") * b,)


def softmax(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`F.softmax`: [m, n]."""
    compute, out = _dtypes(problem)
    return (F.softmax(x, dim=-1, dtype=compute).to(out),)


def log_softmax(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`F.log_softmax`: [m, n]."""
    compute, out = _dtypes(problem)
    return (F.log_softmax(x, dim=-1, dtype=compute).to(out),)


def token_logprob(problem: Problem, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`F.log_softmax` in fp32, then `gather`: [m]. A token outside of the vocabulary is an error."""
    return (F.log_softmax(x, dim=-1, dtype=torch.float32).gather(-1, token_ids[:, None])[:, 0],)


def mean(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`Tensor.mean`: [m]."""
    compute, out = _dtypes(problem)
    return (x.mean(-1, dtype=compute).to(out),)


def sum(problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: A001  the op's name
    """`Tensor.sum`: [m]."""
    compute, out = _dtypes(problem)
    return (x.sum(-1, dtype=compute).to(out),)


def attention(
    problem: Problem,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """`F.scaled_dot_product_attention` for each sequence over its gathered pages: [tokens, num_heads, head_dim].

    A soft cap and sinks have no form there, and go through a product, a softmax and a product, as ALiBi does here. An
    fp8 cache is widened to q's dtype first. Rows of q that no sequence owns are zero.
    """
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for index, kv_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        if rows.start == rows.stop:
            continue
        pages = block_table[index, : -(-kv_len // problem.size("page_size"))].long()
        keys, values = (
            _widened(cache[pages], scales, q.dtype).flatten(0, 1)[:kv_len].transpose(0, 1)[None]
            for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
        )
        queries = q[rows].transpose(0, 1)[None]
        if problem["softcap"] or sinks is not None or alibi_slopes is not None:
            result = _attend_in_steps(problem, queries, keys, values, sinks, alibi_slopes, scale)
        else:
            result = _attend_sdpa(problem, queries, keys, values, scale)
        out[rows] = result[0].transpose(0, 1)
    return (out,)


def _widened(pages: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Pages [pages, page_size, kv_heads, d] in `dtype`, times the scale of each head."""
    return pages if scales is None else (pages.float() * scales[:, None]).to(dtype)


def _attend_sdpa(
    problem: Problem,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """q [1, heads, rows, d], keys and values [1, kv_heads, kv_len, d]; a mask only where torch has no switch for it."""
    rows, kv_len = q.shape[2], keys.shape[2]
    whole_prompt = problem.flag("causal") and not problem.size("window") and rows == kv_len
    return F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=None if whole_prompt else _mask(problem, rows, kv_len, q.device),
        is_causal=whole_prompt,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )


def _attend_in_steps(
    problem: Problem,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The same with a soft cap, ALiBi and sinks, its softmax in fp32."""
    group = q.shape[1] // keys.shape[1]
    scores = (q @ keys.repeat_interleave(group, dim=1).transpose(-1, -2)).float() * scale
    softcap = float(problem["softcap"])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        positions = torch.arange(keys.shape[2], device=q.device)
        ago = positions[keys.shape[2] - q.shape[2] :, None] - positions[None, :]
        scores = scores - alibi_slopes[None, :, None, None] * ago.abs()
    mask = _mask(problem, q.shape[2], keys.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        logits = sinks.float()[None, :, None, None].expand(-1, -1, q.shape[2], 1)
        scores = torch.cat([scores, logits], dim=-1)
    weights = F.softmax(scores, dim=-1)[..., : keys.shape[2]]
    return weights.to(q.dtype) @ values.repeat_interleave(group, dim=1)


def _mask(problem: Problem, rows: int, kv_len: int, device: torch.device) -> torch.Tensor | None:
    """True where a query may look: [rows, kv_len], or None where every query may look everywhere."""
    window = problem.size("window")
    if not problem.flag("causal") or (rows == 1 and not 0 < window < kv_len):
        return None
    positions = torch.arange(kv_len, device=device)
    ago = positions[kv_len - rows :, None] - positions[None, :]
    return (ago >= 0) & (ago < window) if window else ago >= 0


def attention_mla(
    problem: Problem,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """`F.scaled_dot_product_attention` for each sequence over its gathered pages: [tokens, num_heads, kv_lora_rank].

    Rows of q that no sequence owns are zero.
    """
    rank = problem.size("kv_lora_rank")
    out = q.new_zeros(*q.shape[:2], rank)
    starts = query_start_loc.tolist()
    for index, kv_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        if rows.start == rows.stop:
            continue
        pages = block_table[index, : -(-kv_len // problem.size("page_size"))].long()
        latent = kv_cache[pages].flatten(0, 1)[:kv_len].expand(1, q.shape[1], -1, -1)
        positions = torch.arange(kv_len, device=q.device)
        seen = positions[None, :] <= positions[kv_len - (rows.stop - rows.start) :, None]
        attended = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], latent, latent[..., :rank], attn_mask=seen, scale=scale
        )
        out[rows] = attended[0].transpose(0, 1)
    return (out,)


def moe_router(problem: Problem, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Scores in fp32 and `torch.topk`, as models do: weights [m, top_k] and ids [m, top_k]. Ties as topk breaks them.

    A grouped choice, which torch has no op for, is the reference's.
    """
    top_k = problem.size("top_k")
    if problem.size("n_group") > 1:
        weights, ids = exact_router(problem, logits, bias)
        return weights.float(), ids
    scores = torch.sigmoid(logits.float()) if problem["scoring"] == "sigmoid" else F.softmax(logits.float(), dim=-1)
    ids = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if problem.flag("renormalize"):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * float(problem["routed_scaling_factor"]), ids.int()


def moe_experts(
    problem: Problem,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    add: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """One expert after another, `F.linear` on its tokens, summed by `index_add_`: [m, hidden]. fp8 is widened."""
    local = local_experts(problem, topk_ids, expert_map)
    rows = quantized(problem, x).to(x.dtype)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(local.flatten().tolist()) - {-1}):
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        first, second = w13[expert], w2[expert]
        if w13_scales is not None and w2_scales is not None:
            first = widened_blocks(first, w13_scales[expert]).to(x.dtype)
            second = widened_blocks(second, w2_scales[expert]).to(x.dtype)
        both = F.linear(rows[tokens], first, None if w13_bias is None else w13_bias[expert])
        act = quantized(problem, gated(problem, both)).to(x.dtype)
        part = F.linear(act, second, None if w2_bias is None else w2_bias[expert])
        total.index_add_(0, tokens, part * topk_weights[tokens, slots, None])
    if add is not None:
        total += add
    return (total.to(_dtypes(problem)[1]),)
