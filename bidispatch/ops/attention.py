"""Attention over a paged KV cache.

One call holds any mix of prefill, chunked prefill and decode. Sequence b owns the query rows
`query_start_loc[b]` to `query_start_loc[b + 1]`; they are the last of its `seq_lens[b]` KV positions, whose
keys and values are already in the cache, position p in page `block_table[b, p // page_size]`. Block table
entries past a sequence's last page are never read. A sequence of length 0 has no rows. Rows of q that no
sequence owns, as the padding of a CUDA graph, are left as they were in `out`.

Scores are q kᵀ · scale, then the soft cap, then ALiBi's bias -slope · |position of q - position of k| (Press et al.,
arXiv 2108.12409), then the mask. The order is that of flash-attn 2.8.3 (csrc/flash_attn/src/flash_fwd_kernel.h:
softcap before mask.apply_mask, which adds the bias).

A cache in float8_e4m3fn holds k / k_scale and v / v_scale, as vLLM's `reshape_and_cache_flash` writes it and FA3 reads
it (`k_descale`, `v_descale`): one fp32 scale above 0 a KV head; `scale.expand(num_kv_heads)` gives one for all.
"""

from __future__ import annotations

from collections.abc import Mapping

from bidispatch.ops.heads import heads_conflict
from bidispatch.ops.schema import SAME_DTYPE, Argument, Dim, DimValue, Op, Scalar

__all__ = ["ATTENTION", "FP8", "OPS"]

FP8 = "float8_e4m3fn"
_FP8_CACHE = f"kv_dtype={FP8}"


def _conflict(dims: Mapping[str, DimValue]) -> str | None:
    if why := heads_conflict(dims):
        return why
    if dims["window"] and not dims["causal"]:
        return "a sliding window needs causal=true: it counts positions back from the query's own"
    if dims["kv_dtype"] not in (dims[SAME_DTYPE], FP8):
        return f"the cache holds the op's own dtype, {dims[SAME_DTYPE]}, or {FP8}, not kv_dtype={dims['kv_dtype']}"
    return None


ATTENTION = Op(
    name="attention",
    summary="softmax(q kᵀ · scale) v over a paged cache; grouped queries, prefill and decode in one batch",
    dims=(
        Dim("head_dim", int, "width of a head", minimum=1, typical=128),
        Dim("num_heads", int, "query heads", minimum=1, typical=32),
        Dim("num_kv_heads", int, "key and value heads; divides num_heads", minimum=1, typical=8),
        Dim("page_size", int, "KV positions a page holds", minimum=1, default=16),
        Dim("causal", bool, "a query sees its own position and those before it", default=True),
        Dim("window", int, "positions a query sees, its own included; 0 sees all", default=0, minimum=0),
        Dim("softcap", float, "scores become softcap · tanh(score / softcap); 0 leaves them", default=0.0, minimum=0),
        Dim("sinks", bool, "each head has a sink logit that joins the softmax's sum and no value", default=False),
        Dim("alibi", bool, "scores have -slope · distance added, a slope a head (ALiBi)", default=False),
        Dim("kv_dtype", str, f"what the cache holds: the op's dtype, or {FP8} with scales", default=SAME_DTYPE),
    ),
    arguments=(
        Argument("q", ("tokens", "num_heads", "head_dim")),
        Argument("k_cache", ("pages", "page_size", "num_kv_heads", "head_dim"), dtype="kv_dtype"),
        Argument("v_cache", ("pages", "page_size", "num_kv_heads", "head_dim"), dtype="kv_dtype"),
        Argument("block_table", ("seqs", "max_pages"), dtype="int32"),
        Argument("seq_lens", ("seqs",), dtype="int32"),
        Argument("query_start_loc", ("seqs+1",), dtype="int32"),
        Argument("sinks", ("num_heads",), dtype="float32", when="sinks"),
        Argument("alibi_slopes", ("num_heads",), dtype="float32", when="alibi"),
        Argument("k_scale", ("num_kv_heads",), dtype="float32", when=_FP8_CACHE, any_strides=True),
        Argument("v_scale", ("num_kv_heads",), dtype="float32", when=_FP8_CACHE, any_strides=True),
    ),
    scalars=(Scalar("scale", lambda problem: problem.size("head_dim") ** -0.5, "default 1 / sqrt(head_dim)"),),
    outputs=(Argument("out", ("tokens", "num_heads", "head_dim")),),
    reference="bidispatch.ops.reference.attention:attention",
    inputs="bidispatch.ops.reference.attention:attention_inputs",
    stock="bidispatch.ops.stock:attention",
    sequences="bidispatch.ops.reference.attention:paged_batch",
    conflict=_conflict,
)

OPS = (ATTENTION,)
