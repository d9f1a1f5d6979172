"""`attention.mla` by FlashMLA's dense decode, with a schedule of ours. Imports the library when a kernel is bound.

The library's own schedule shares all blocks of the batch out to the multiprocessors and splits a request wherever a
share ends (FlashMLA 9241ae3, csrc/smxx/decode/get_decoding_sched_meta): bits follow the lengths of the neighbours. Here
each request is one part, so that it is walked from its first block to its last by one thread block.

Every query token is shown as a request of its own, with the positions up to its own: so whatever the batch holds, the
library sees single queries. A chunk reads its context once for each of its tokens: this is a kernel for decode.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from bidispatch.errors import BackendError
from bidispatch.runtime.context import BindContext, Kernel, need_max_seq_len, need_positive_scale

__all__ = ["bind_decode", "schedule"]

_BLOCK = 64
"""KV positions of a block of the schedule, and rows of q of a thread block."""
_FIELDS = 8
_END_REQUEST, _END_BLOCK = 1, 3
# q, kcache, head_size_v, seqlens_k, block_table, scale, is_causal, tile_scheduler_metadata, num_splits, out. The types
# are all there is to tell versions apart by: vllm 0.25.1 registers the function without the arguments' names.
_TYPES = ("Tensor", "Tensor", "int", "Tensor", "Tensor", "float", "bool", *("Optional[Tensor]",) * 3)


def schedule(lengths: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole requests dealt to parts: metadata [parts, 8] and the first split of each request [requests + 1], int32.

    lengths: KV positions of each request, int32 [requests], at least one request. A row of the metadata is its first
    and last request, its first block and the one behind its last, the first request's split, whether its first and
    last request are split, and padding (FlashMLA 9241ae3, csrc/params.h:10-15). Parts without a request begin behind
    the last one. Which part a request is in follows from the number of requests; its own walk does not.
    """
    requests = len(lengths)
    each = -(-requests // parts)
    first = torch.arange(parts, device=lengths.device, dtype=torch.int32) * each
    last = (first + (each - 1)).clamp(max=requests - 1)
    metadata = lengths.new_zeros(parts, _FIELDS)
    metadata[:, 0] = first.clamp(max=requests)
    metadata[:, _END_REQUEST] = last
    metadata[:, _END_BLOCK] = (lengths[last.long()] + (_BLOCK - 1)) // _BLOCK
    return metadata, torch.arange(requests + 1, device=lengths.device, dtype=torch.int32)


def bind_decode(context: BindContext) -> Kernel:
    """Return the kernel of the op `attention.mla`; lengths are read on the GPU alone, so it can be captured.

    A sequence longer than `max_seq_len`, or than its block table holds, gives NaN. Raises `UsageError` when the limits
    name no `max_seq_len`, `BackendError` for a library whose operator has other arguments; the kernel raises
    `ArgumentError` for a scale that is not above 0.
    """
    problem, limits = context.problem, context.limits
    need_max_seq_len(context)
    forward = _forward()
    heads, rank = problem.size("num_heads"), problem.size("kv_lora_rank")
    parts = max(1, _multiprocessors(context) // -(-heads // _BLOCK))

    def decode(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        need_positive_scale(problem, scale)
        if not (len(q) and len(seq_lens)):
            return
        rows = torch.arange(len(q), device=q.device, dtype=torch.int32)
        owned = rows < query_start_loc[-1]
        seqs = torch.searchsorted(query_start_loc[1:], rows, right=True).clamp(max=len(seq_lens) - 1)
        known = seq_lens <= min(limits.max_seq_len, block_table.shape[1] * _BLOCK)
        served = owned & known[seqs]
        lengths = torch.where(served, seq_lens[seqs] - query_start_loc[seqs + 1] + rows + 1, 1)
        # Rows that are not served ask for one position of page 0, which exists; what they give is dropped.
        tables = torch.where(served[:, None], block_table[seqs], 0)
        metadata, splits = schedule(lengths, parts)
        result = forward(
            q.contiguous()[:, None],
            kv_cache[:, :, None],
            rank,
            lengths,
            tables,
            scale,
            False,
            metadata,
            splits,
            None,
        )[0].view(len(q), heads, rank)
        result = torch.where(served[:, None, None], result, float("nan"))
        out.copy_(torch.where(owned[:, None, None], result, out))

    return decode


def _multiprocessors(context: BindContext) -> int:
    if context.device.compute_units is not None:
        return context.device.compute_units
    return int(torch.cuda.get_device_properties(context.device.torch_device).multi_processor_count)


def _forward() -> Callable[..., Any]:
    importlib.import_module("vllm._flashmla_C")  # registers its operators
    operator = torch.ops._flashmla_C.dense_decode_fwd.default
    types = tuple(str(argument.type) for argument in operator._schema.arguments)
    if types != _TYPES:
        raise BackendError(
            f"_flashmla_C::dense_decode_fwd takes {', '.join(types)}, not {', '.join(_TYPES)}, as vllm 0.25.1's does. "
            "Choose another implementation: BIDISPATCH_IMPL=attention.mla=triton.mla"
        )
    found: Callable[..., Any] = operator
    return found
