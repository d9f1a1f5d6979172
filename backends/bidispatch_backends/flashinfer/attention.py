"""`attention` by FlashInfer's fa2 kernels over a paged cache. Imports the library when a kernel is bound.

Every request goes through `BatchPrefillWithPagedKVCacheWrapper`, a decode too, as FlashInfer's tensor-core decode does:
the CUDA-core decode cuts KV by the batch and has no switch for it. Requests are parted by `parts`, planned with splits
of a fixed size, and run part by part.

FlashInfer's `plan` reads lengths on the host, so a call waits for the GPU once, to learn them; it cannot be captured in
a CUDA graph. What a plan's kernels read is copied from one pinned buffer, so the next plan waits for that copy, and so
does the end of a kernel: torch, which does not see the copy, would give the buffer to the next who asks.

FlashInfer compiles its kernels (nvcc and ninja, minutes) unless it finds them built; binding does that, not a call.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from bidispatch.errors import ArgumentError, BackendError, UsageError
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import BindContext, Kernel, Limits, need_max_seq_len
from bidispatch_backends.flashinfer.parts import INDEX_BYTES, Layout, Part, Request, groups, most_bytes, worst_bytes

__all__ = ["bind_attention"]

_MB = 1 << 20


def bind_attention(context: BindContext) -> Kernel:
    """Return the kernel of the op `attention`; it holds a workspace of at most `workspace_mb`.

    Raises `UsageError` for limits without `max_seq_len`, and where the partial results of one sequence at the limits
    would exceed the workspace; `BackendError` where FlashInfer cannot build its kernels. A call raises `ArgumentError`
    for lengths that make no batch, that exceed the limits or the block table, and for caches of different strides;
    `UsageError` while a CUDA graph is captured.
    """
    need_max_seq_len(context)
    return _PagedAttention(context, importlib.import_module("flashinfer"))


def _layout(context: BindContext) -> Layout:
    problem = context.problem
    heads = problem.size("num_heads")
    return Layout(
        heads=heads,
        group=heads // problem.size("num_kv_heads"),
        head_dim=problem.size("head_dim"),
        decode_split=context.params.decode_split,
        prefill_split=context.params.prefill_split,
    )


def _longest_query(limits: Limits) -> int:
    return min(limits.max_query_len or limits.max_tokens, limits.max_tokens)


def _workspace_bytes(context: BindContext, layout: Layout) -> int:
    """What to allocate: no more than calls within the limits can use, nor than the tile allows."""
    limits = context.limits
    allowed: int = context.tile.workspace_mb * _MB
    longest = _longest_query(limits)
    for part, query, floats, indices in worst_bytes(layout, longest, limits.max_seq_len):
        if floats > allowed:
            name = "decode_split" if layout.decodes(query) else "prefill_split"
            raise UsageError(
                f"{context.problem}: flashinfer.paged with {name}={part.split} needs {-(-floats // _MB)} MiB for one "
                f"sequence of {query} query tokens over {limits.max_seq_len} positions, workspace_mb is "
                f"{context.tile.workspace_mb}; set {name} to a larger power of two or to 0, raise workspace_mb "
                "(16384 at most), or bind with a smaller max_query_len"
            )
        if indices > INDEX_BYTES:
            raise UsageError(
                f"{context.problem}: {query} query tokens over {limits.max_seq_len} positions exceed FlashInfer's "
                f"tables of {INDEX_BYTES // _MB} MiB; bind with a smaller max_query_len"
            )
    most = most_bytes(layout, longest, limits.max_seq_len, limits.max_tokens, limits.max_seqs)
    return max(_MB, min(most, allowed))


class _PagedAttention:
    def __init__(self, context: BindContext, library: Any) -> None:
        self._problem: Problem = context.problem
        self._limits = context.limits
        self._device = torch.device(context.device.torch_device)
        self._layout = _layout(context)
        self._page_size = self._problem.size("page_size")
        self._workspace = _workspace_bytes(context, self._layout)
        self._wrapper: Any = library.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(self._workspace, dtype=torch.uint8, device=self._device),
            kv_layout="NHD",
            backend="fa2",  # `auto` takes fa3 on Hopper, which has no splits
        )
        self._copied: Any = None
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            _wait_at_end(self, self._copied)
        self._build()

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        *rest: Any,
    ) -> None:
        # Between them are the op's optional tensors: none is ever there, by the requirements.
        scale, out = rest[-2:]
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UsageError(
                "flashinfer.paged reads lengths on the host and cannot be captured in a CUDA graph; call it outside, "
                "or choose an implementation that can: BIDISPATCH_IMPL=attention=triton.paged_attention"
            )
        if k_cache.stride() != v_cache.stride():
            raise ArgumentError(
                f"{self._problem}: k_cache and v_cache must have the same strides for FlashInfer, not "
                f"{k_cache.stride()} and {v_cache.stride()}"
            )
        requests = self._requests(q, block_table, seq_lens, query_start_loc)
        for part, group in groups(self._layout, requests, self._workspace):
            self._plan(part, group, block_table, scale)
            self._run(group, q, (k_cache, v_cache), out)

    def _requests(
        self, q: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor
    ) -> list[Request]:
        """The lengths, in one copy to the host. Raises `ArgumentError` for those that make no batch."""
        numbers: list[int] = torch.cat((seq_lens, query_start_loc)).tolist()
        lengths, starts = numbers[: len(seq_lens)], numbers[len(seq_lens) :]
        most = min(self._limits.max_seq_len, block_table.shape[1] * self._page_size)
        if starts[0] != 0 or starts[-1] > q.shape[0]:
            raise ArgumentError(
                f"{self._problem}: query_start_loc goes from {starts[0]} to {starts[-1]}, q has rows 0 to {q.shape[0]}"
            )
        requests = []
        for index, kv in enumerate(lengths):
            query = starts[index + 1] - starts[index]
            if not 0 <= query <= kv:
                raise ArgumentError(f"{self._problem}: sequence {index} has {query} query rows and {kv} positions")
            if kv > most:
                raise ArgumentError(
                    f"{self._problem}: sequence {index} has {kv} positions; its block table and max_seq_len allow "
                    f"{most}"
                )
            longest = _longest_query(self._limits)
            if query > longest:
                raise ArgumentError(
                    f"{self._problem}: sequence {index} has {query} query rows, max_query_len is {longest}"
                )
            requests.append(Request(index, starts[index], query, kv))
        return requests

    def _plan(self, part: Part, group: Sequence[Request], block_table: torch.Tensor, scale: float) -> None:
        size = self._page_size
        query_starts = _starts([request.query for request in group])
        page_counts = [-(-request.kv // size) for request in group]
        page_starts = _starts(page_counts)
        last = [request.kv - (pages - 1) * size for request, pages in zip(group, page_counts, strict=True)]
        self._make_plan(
            part,
            query_starts,
            page_starts,
            self._pages(group, page_counts, page_starts, block_table),
            torch.tensor(last, dtype=torch.int32),
            scale,
        )

    def _pages(
        self, group: Sequence[Request], counts: Sequence[int], starts: torch.Tensor, block_table: torch.Tensor
    ) -> torch.Tensor:
        """The pages of the group's sequences after one another [sum of counts], by device indexing alone."""
        total = int(starts[-1])
        places = torch.tensor([[request.index for request in group], list(counts), starts[:-1].tolist()])
        rows, lengths, begins = places.to(block_table.device)
        owner = torch.repeat_interleave(torch.arange(len(group), device=block_table.device), lengths, output_size=total)
        columns = torch.arange(total, device=block_table.device) - begins[owner]
        return block_table[rows[owner], columns]

    def _make_plan(
        self,
        part: Part,
        query_starts: torch.Tensor,
        page_starts: torch.Tensor,
        pages: torch.Tensor,
        last: torch.Tensor,
        scale: float,
    ) -> None:
        problem = self._problem
        dtype = getattr(torch, problem.dtype)
        if self._copied is not None:
            self._copied.synchronize()  # the pinned buffer of the plan before is still being read until then
        self._wrapper.plan(
            query_starts,
            page_starts,
            pages,
            last,
            problem.size("num_heads"),
            problem.size("num_kv_heads"),
            problem.size("head_dim"),
            self._page_size,
            causal=problem.flag("causal"),
            sm_scale=scale,
            logits_soft_cap=float(problem["softcap"]) or None,
            q_data_type=dtype,
            kv_data_type=dtype,
            o_data_type=dtype,
            # In pages. Requests without splits could be planned with a size too: it would only be more to decide.
            fixed_split_size=part.split // self._page_size if part.split else None,
            disable_split_kv=not part.split,
        )
        if self._copied is not None:
            self._copied.record()

    def _run(
        self, group: Sequence[Request], q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
    ) -> None:
        rows = _rows(group, q.device)
        if isinstance(rows, slice) and out[rows].is_contiguous():
            self._wrapper.run(q[rows], cache, out=out[rows])
        else:
            out[rows] = self._wrapper.run(q[rows], cache)

    def _build(self) -> None:
        """Plan one request, so that FlashInfer builds or loads its kernels now."""
        one = torch.tensor([0, 1], dtype=torch.int32)
        page = torch.zeros(1, dtype=torch.int32, device=self._device)
        try:
            self._make_plan(Part(0, 0), one, one, page, torch.ones(1, dtype=torch.int32), 1.0)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise BackendError(
                f"FlashInfer has no kernels for {self._problem} and could not build them: {type(error).__name__}: "
                f"{error}; it needs nvcc and ninja, or its prebuilt modules"
            ) from error


def _wait_at_end(kernel: object, copied: Any) -> None:
    """Have the last copy done before what `kernel` holds is freed. Not at exit, when CUDA may be gone."""
    weakref.finalize(kernel, copied.synchronize).atexit = False


def _starts(counts: Sequence[int]) -> torch.Tensor:
    """Where each begins and the last ends, int32 on the host."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def _rows(group: Sequence[Request], device: torch.device) -> slice | torch.Tensor:
    """The rows of q that a group has: a slice where they lie together."""
    stop = group[0].row
    for request in group:
        if request.row != stop:
            break
        stop += request.query
    else:
        return slice(group[0].row, stop)
    pieces = [torch.arange(request.row, request.row + request.query) for request in group]
    return torch.cat(pieces).to(device)
