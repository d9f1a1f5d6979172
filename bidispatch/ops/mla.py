"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the absorbed form.

The cache holds one vector a position: the compressed KV of width `kv_lora_rank`, then the rotary key of width
`rope_dim`. Queries have been multiplied by the up-projection of the keys, so that every head asks that one vector; the
value is its first `kv_lora_rank` elements, and the up-projection of the values follows the op. So it is grouped
attention with a single KV head. The batch is that of the op `attention`, causal: any mix of prefill, chunks, decodes.

Only this form can give a prefill the bits of a decode. A prefill pays for it: for each pair of a query and a key it
multiplies (576 + 512) elements a head, where keys of 192 and values of 128, projected up again, take (192 + 128): 3.4
times the work. Up-projected keys are rounded before the product and absorbed queries after theirs, so the two forms
differ in their bits whatever the order of sums is: an engine whose prefill is the other form is free of chunking and of
the prefix cache at most, which is below level `sequence`.
"""

from __future__ import annotations

from bidispatch.ops.attention import ATTENTION
from bidispatch.ops.schema import Argument, Dim, Op, Problem, Scalar

__all__ = ["OPS", "as_attention"]

_NOPE_HEAD_DIM = 128

ATTENTION_MLA = Op(
    name="attention.mla",
    summary="multi-head latent attention, absorbed: every head asks one compressed KV head in a paged cache",
    dims=(
        Dim("num_heads", int, "query heads", minimum=1, typical=128),
        Dim("kv_lora_rank", int, "width of the compressed KV", minimum=1, default=512),
        Dim("rope_dim", int, "width of the rotary part", minimum=1, default=64),
        Dim("page_size", int, "KV positions a page holds", minimum=1, default=64),
    ),
    arguments=(
        Argument("q", ("tokens", "num_heads", "kv_lora_rank+rope_dim")),
        Argument("kv_cache", ("pages", "page_size", "kv_lora_rank+rope_dim")),
        Argument("block_table", ("seqs", "max_pages"), dtype="int32"),
        Argument("seq_lens", ("seqs",), dtype="int32"),
        Argument("query_start_loc", ("seqs+1",), dtype="int32"),
    ),
    scalars=(
        Scalar(
            "scale",
            lambda problem: (_NOPE_HEAD_DIM + problem.size("rope_dim")) ** -0.5,
            "default 1 / sqrt(128 + rope_dim), as DeepSeek's heads are before the absorption; YaRN has a factor more",
        ),
    ),
    outputs=(Argument("out", ("tokens", "num_heads", "kv_lora_rank")),),
    dtypes=("bfloat16", "float16"),
    reference="bidispatch.ops.reference.mla:attention_mla",
    inputs="bidispatch.ops.reference.mla:attention_mla_inputs",
    stock="bidispatch.ops.stock:attention_mla",
    sequences="bidispatch.ops.reference.mla:latent_batch",
)

OPS = (ATTENTION_MLA,)


def as_attention(problem: Problem) -> Problem:
    """The problem of `attention` with the same scores: one KV head of kv_lora_rank + rope_dim.

    Its values are as wide as its keys; the first kv_lora_rank columns of its result are this op's.
    """
    dims = {
        "head_dim": problem.size("kv_lora_rank") + problem.size("rope_dim"),
        "num_heads": problem.size("num_heads"),
        "num_kv_heads": 1,
        "page_size": problem.size("page_size"),
    }
    return ATTENTION.problem(problem.dtype, dims)
