"""`attention` and `attention.mla` by FlashAttention's kernels: one split for every row, or lone queries in splits.

A call launches the same kernels whatever its lengths are: `admit` and FA3's varlen call, or `lengths`, FA2's and
`spoil`; for lone queries in splits `prepare`, the library's decode call and `merge`. Their arguments follow the call's
shapes and the limits a kernel was bound for; of these only the bound of FA2's grid follows the number of tokens (see
`params`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bidispatch.errors import ArgumentError, BackendError, UsageError
from bidispatch.runtime.context import BindContext, Kernel, need_max_seq_len, need_positive_scale
from bidispatch_backends.aligned import ALIGNMENT
from bidispatch_backends.flash_attn.discovery import FA2, FA2_PACKAGE, FA2_VLLM, Libraries
from bidispatch_backends.flash_attn.heads import heads_of
from bidispatch_backends.flash_attn.kernels import Launches, launches, schedule_size
from bidispatch_backends.flash_attn.library import Fa2, Fa3, fa2_of, fa3
from bidispatch_backends.triton.attention import bind_lone_queries
from bidispatch_backends.triton.launch import ceil_div

__all__ = [
    "bind_fa2",
    "bind_fa2_capacity_splits",
    "bind_fa2_kv_split",
    "bind_fa2_splits",
    "bind_fa3",
    "bind_fa3_kv_split",
    "bind_fa3_mla",
    "bind_fa3_mla_splits",
    "bind_fa3_triton_splits",
]

_ONE_WARP_GROUP = 64
"""FA3 has another tile for calls of up to so many rows of a KV head: hopper/heuristics.h, `use_one_mma_wg`."""

_LARGEST_GRID = 65535
"""Of CUDA's axes y and z, which hold FlashAttention's entries and heads."""


@dataclass(frozen=True)
class _Split:
    """How a lone query is shown to the library: as `entries` of `extent` KV positions, each in `num_splits` splits."""

    entries: int
    extent: int
    num_splits: int
    own_table: bool = True
    """Whether its block table is made for it; else the caller's is shown, whose width then changes no bit."""


def bind_fa2(context: BindContext) -> Kernel:
    """Return the kernel of the op `attention`. Raises `UsageError` for limits without max_seq_len, `BackendError` for
    a library that does not load. A sequence longer than max_seq_len or than its block table holds, or with more
    rows than max_query_len, gives NaN.
    """
    split = _Split(1, _whole_pages(context), 1, own_table=False) if context.tile.pack_lone_queries else None
    return _Attention(context, _fa2(context, FA2), split)


def bind_fa2_splits(context: BindContext) -> Kernel:
    """The same with a fixed number of splits of a lone query's own KV, as vLLM's FA2 divides it."""
    split = _Split(1, _whole_pages(context), context.params.num_splits, own_table=False)
    return _Attention(context, _fa2(context, FA2_VLLM), split)


def bind_fa2_capacity_splits(context: BindContext) -> Kernel:
    """The same with splits of kv_capacity / num_splits positions, as flash-attn divides the width of a block table.

    Raises `UsageError` for a max_seq_len above kv_capacity.
    """
    params, longest = context.params, context.limits.max_seq_len
    if longest > params.kv_capacity:
        raise UsageError(
            f"{context.problem} is bound with max_seq_len={longest}, above kv_capacity={params.kv_capacity}; "
            "name a larger kv_capacity in the profile: it is part of the numerics class"
        )
    return _Attention(context, _fa2(context, FA2_PACKAGE), _Split(1, params.kv_capacity, params.num_splits))


def bind_fa2_kv_split(context: BindContext) -> Kernel:
    """The same with a lone query's KV in splits of one size, each a sequence of FA2's, merged in ascending order."""
    return _Attention(context, _fa2(context, FA2), _sized(context))


def bind_fa3(context: BindContext) -> Kernel:
    """The same by FA3, one split for every row."""
    return _Attention(context, fa3(), None)


def bind_fa3_kv_split(context: BindContext) -> Kernel:
    """The same by FA3, a lone query's KV in splits of one size."""
    return _Attention(context, fa3(), _sized(context))


def bind_fa3_triton_splits(context: BindContext) -> Kernel:
    """The same by FA3, lone queries by the parallel splits of `triton.paged_attention`.

    Raises `UsageError` too where those of `max_seqs` lone queries exceed `workspace_mb`.
    """
    return bind_lone_queries(context, _Attention(context, fa3(), None, replaced=True))


def bind_fa3_mla(context: BindContext) -> Kernel:
    """Return the kernel of the op `attention.mla`, by FA3 with q_v, one split for every row.

    Raises `UsageError` for limits without max_seq_len, `BackendError` for a library that does not load. A sequence
    longer than max_seq_len or than its block table holds, or with more rows than max_query_len, gives NaN. The kernel
    raises `ArgumentError` for a cache whose rows do not begin on 16 bytes, and for a scale that is not above 0.
    """
    return _LatentAttention(context, fa3(context.problem.size("kv_lora_rank")), None)


def bind_fa3_mla_splits(context: BindContext) -> Kernel:
    """The same with splits of a lone query's own KV, as FA3 cuts it by a schedule made here."""
    return _LatentSplits(context, fa3(context.problem.size("kv_lora_rank")))


def _sized(context: BindContext) -> _Split:
    size = context.params.split_size
    return _Split(max(1, ceil_div(context.limits.max_seq_len, size)), size, 1)


def _whole_pages(context: BindContext) -> int:
    """KV positions of the longest sequence, to the end of its last page."""
    page_size = context.problem.size("page_size")
    return ceil_div(max(1, context.limits.max_seq_len), page_size) * page_size


def _fa2(context: BindContext, libraries: Libraries) -> Fa2:
    source = libraries.choose(context.device, context.problem)
    if source is None:
        raise BackendError(str(libraries.unmet(context.device, context.problem)))
    return fa2_of(source)


class _Attention:
    """A bound kernel and its workspaces."""

    _most_entries = _LARGEST_GRID

    def __init__(
        self, context: BindContext, library: Fa2 | Fa3, split: _Split | None, *, replaced: bool = False
    ) -> None:
        """replaced: whether someone else writes the rows of lone queries afterwards."""
        problem, limits = context.problem, context.limits
        need_max_seq_len(context)
        self._problem, self._library, self._split = problem, library, split
        self._page_size, self._heads = problem.size("page_size"), heads_of(problem)
        self._max_kv = limits.max_seq_len
        self._longest_query = limits.max_query_len or limits.max_tokens
        self._tile_bound = self._pinned(library)
        # With one row a sequence and splits, nothing is left for the one-split call.
        self._walks = split is None or self._longest_query > 1
        self._launches = self._launched(context, split, replaced=replaced)
        # What is made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._used = self._integers(context, limits.max_seqs)
            self._rows_shown = self._integers(context, limits.max_seqs)
            entries = self._allocate(context, split) if split else 0
            self._no_starts = self._integers(context, max(limits.max_seqs, entries) + 1)

    def _launched(self, context: BindContext, split: _Split | None, *, replaced: bool) -> Launches:
        problem, arch = context.problem, context.device.arch
        if split is None:
            return launches(problem, arch, replaced=replaced)
        return launches(problem, arch, split.entries, split.extent, copies_pages=split.own_table)

    def _pinned(self, library: Fa2 | Fa3) -> int:
        """FA3's max_seqlen_q: one number, above what moves its tile. 0 for FA2, where it is a bound of the grid."""
        if isinstance(library, Fa2):
            return 0
        group = self._heads.queries // self._heads.keys
        return max(self._longest_query, _ONE_WARP_GROUP // group + 1, 2)

    @staticmethod
    def _integers(context: BindContext, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=context.device.torch_device)

    def _allocate(self, context: BindContext, split: _Split) -> int:
        """Room for as many lone queries at a time as the tile allows, at least one. Returns how many entries it has."""
        device, dtype = context.device.torch_device, getattr(torch, context.problem.dtype)
        heads, query_dim, value_dim = self._heads.queries, self._heads.query_dim, self._heads.value_dim
        pages = split.extent // self._page_size if split.own_table else 0
        # q and out of each entry, its pages, and, inside the library, fp32 partial results of more than one split.
        inside = 4 * (value_dim + 1) * split.num_splits if split.num_splits > 1 else 0
        a_query = split.entries * (heads * ((query_dim + value_dim) * dtype.itemsize + inside) + 4 * pages)
        most = min(
            context.limits.max_seqs,
            (context.tile.workspace_mb << 20) // a_query,
            _LARGEST_GRID // (split.entries * (heads if split.num_splits > 1 else 1)),
            self._most_entries // split.entries,
        )
        self._queries = max(1, most)
        entries: int = self._queries * split.entries
        self._rows = torch.zeros(entries, 1, heads, query_dim, dtype=dtype, device=device)
        self._partial = torch.zeros(entries, 1, heads, value_dim, dtype=dtype, device=device)
        # One row more: FA2 may look at the entry behind a sequence's last page, though at no page it names.
        self._pages = self._integers(context, (entries + 1) * pages).view(entries + 1, pages)
        self._entry_lens = self._integers(context, entries)
        return entries

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
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        self._aligned(q, caches, block_table, seq_lens, query_start_loc, *rest[-2:])

    def _aligned(
        self,
        q: torch.Tensor,
        caches: dict[str, torch.Tensor],
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attend with q and out on 16 bytes, copied where they are not. caches: by name, keys first, values last."""
        need_positive_scale(self._problem, scale)
        for name, cache in caches.items():
            if not _on_vectors(cache):
                raise ArgumentError(
                    f"{self._problem}: {name} begins at {cache.data_ptr():#x} with strides {cache.stride()}; "
                    f"FlashAttention loads {ALIGNMENT} bytes, so both must be multiples of that"
                )
        q = q if _on_vectors(q) else q.clone(memory_format=torch.contiguous_format)
        target = out if _on_vectors(out) else out.clone(memory_format=torch.contiguous_format)
        ends = seq_lens.contiguous(), query_start_loc.contiguous()
        parts = tuple(caches.values())
        self._attend(q, parts[0], parts[-1], block_table, *ends, scale, target)
        if target is not out:
            out.copy_(target)

    def _attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        max_kv = min(self._max_kv, block_table.shape[1] * self._page_size)
        ends = seq_lens, query_start_loc
        limits = max_kv, self._longest_query, *out.stride()[:2]
        spoils = True
        if self._walks:
            used = self._used[:seqs]
            operands = q, k_cache, v_cache, block_table, used, query_start_loc, self._no_starts[: seqs + 1], out
            causal, softcap = self._heads.causal, self._heads.softcap
            if isinstance(self._library, Fa3):
                rows, spoils = self._rows_shown[:seqs], False
                self._launches.admit((seqs,), *ends, used, rows, out, *limits)
                self._library.varlen(
                    *operands,
                    max_query_len=self._tile_bound,
                    max_kv_len=self._max_kv,
                    scale=scale,
                    causal=causal,
                    softcap=softcap,
                    rows=rows,
                )
            else:
                programs = ceil_div(seqs, self._launches.seqs_a_program)
                self._launches.lengths((programs,), *ends, used, seqs, max_kv)
                self._library.varlen(
                    *operands,
                    max_query_len=max(2, min(tokens, self._longest_query)),
                    max_kv_len=self._max_kv,
                    scale=scale,
                    causal=causal,
                    softcap=softcap,
                )
        if self._split:
            for first in range(0, seqs, self._queries):
                count = min(self._queries, seqs - first)
                inputs = (q, k_cache, v_cache, block_table, seq_lens, query_start_loc)
                self._lone_queries(self._split, first, count, max_kv, inputs, scale, out)
        if spoils:
            self._launches.spoil((tokens,), *ends, out, seqs, *limits)

    def _decode(self, operands: tuple[torch.Tensor, ...], split: _Split, scale: float) -> torch.Tensor:
        """The library's call of entries, and its LSE."""
        softcap = self._heads.softcap
        return self._library.decode(*operands, num_splits=split.num_splits, scale=scale, softcap=softcap)

    def _lone_queries(
        self,
        split: _Split,
        first: int,
        count: int,
        max_kv: int,
        inputs: tuple[torch.Tensor, ...],
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """The sequences first .. first + count that have one row: their rows of `out` are written over."""
        prepare, merge = self._launches.prepare, self._launches.merge
        if prepare is None or merge is None:
            return
        q, k_cache, v_cache, block_table, *ends = inputs
        entries = count * split.entries
        rows, partial, lens = self._rows[:entries], self._partial[:entries], self._entry_lens[:entries]
        strides = (block_table.stride(0), *q.stride()[:2])
        grid = (count, split.entries, self._launches.page_chunks)
        prepare(grid, q, block_table, *ends, rows, self._pages, lens, first, max_kv, *strides)
        table = self._pages[:entries] if split.own_table else block_table[first : first + count]
        operands = rows, k_cache, v_cache, table, lens, self._no_starts[: entries + 1], partial
        lse = self._decode(operands, split, scale)
        merge((count, self._heads.queries), partial, lse.contiguous(), *ends, out, first, max_kv, *out.stride()[:2])


class _LatentAttention(_Attention):
    """The same for `attention.mla`: the one cache holds keys and values, which `Fa3` tells apart by its rank."""

    def __call__(self, q: torch.Tensor, kv_cache: torch.Tensor, *rest: Any) -> None:
        self._aligned(q, {"kv_cache": kv_cache}, *rest)


class _LatentSplits(_LatentAttention):
    """The same with splits that FA3 cuts. Where every query is a lone one, it is shown the caller's rows, uncopied."""

    _most_entries = 992
    """Sequences whose splits FA3 lets a schedule count."""

    def __init__(self, context: BindContext, library: Fa3) -> None:
        self._fa3 = library
        self._most_splits = context.params.num_splits
        super().__init__(context, library, _Split(1, _whole_pages(context), self._most_splits, own_table=False))
        with torch.inference_mode(False):
            self._schedules = self._integers(context, schedule_size(self._queries))
            self._entry_starts = torch.arange(self._queries + 1, dtype=torch.int32, device=context.device.torch_device)

    def _launched(self, context: BindContext, split: _Split | None, *, replaced: bool) -> Launches:
        params = context.params
        cut = params.split_size, params.smallest_split, params.least_splits, params.num_splits
        problem, arch = context.problem, context.device.arch
        return launches(problem, arch, 1, _whole_pages(context), copies_pages=False, scheduled=cut)

    def _attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        tokens, seqs = q.shape[0], seq_lens.shape[0]
        if self._walks or max(tokens, seqs) > self._queries:
            super()._attend(q, k_cache, v_cache, block_table, seq_lens, query_start_loc, scale, out)
            return
        max_kv = min(self._max_kv, block_table.shape[1] * self._page_size)
        used = self._used[:seqs]
        self._in_splits(q, k_cache, v_cache, block_table, seq_lens, query_start_loc, used, out, max_kv, scale)

    def _decode(self, operands: tuple[torch.Tensor, ...], split: _Split, scale: float) -> torch.Tensor:
        rows, k_cache, v_cache, table, lens, _, partial = operands
        starts = self._entry_starts[: len(lens) + 1]
        q, out = rows[:, 0], partial[:, 0]
        lse = self._in_splits(q, k_cache, v_cache, table, lens, starts, lens, out, self._max_kv, scale)
        return lse.T

    def _in_splits(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        lens: torch.Tensor,
        starts: torch.Tensor,
        used: torch.Tensor,
        out: torch.Tensor,
        max_kv: int,
        scale: float,
    ) -> torch.Tensor:
        """Sequences of one row at most. used: where what they are shown of their KV goes. Returns the LSE."""
        seqs = len(lens)
        schedule = self._schedules[: schedule_size(seqs)]
        if self._launches.schedule:
            self._launches.schedule((seqs,), lens, starts, used, schedule, out, seqs, max_kv, 1, *out.stride()[:2])
        return self._fa3.varlen(
            *(q, k_cache, v_cache, block_table, used, starts, self._no_starts[: seqs + 1], out),
            max_query_len=1,
            max_kv_len=self._max_kv,
            scale=scale,
            causal=False,
            softcap=self._heads.softcap,
            num_splits=self._most_splits,
            schedule=schedule,
        )


def _on_vectors(tensor: torch.Tensor) -> bool:
    """Whether a tensor and each of its rows begin on 16 bytes."""
    size = tensor.element_size()
    return not tensor.data_ptr() % ALIGNMENT and not any(
        stride * size % ALIGNMENT
        for stride, length in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        if length > 1
    )
