"""Paged attention on the processor: the same bits for a position in a prefill, a chunk or a decode.

A sequence's keys and values are walked in tiles at absolute positions: tile t holds positions t · kv_tile and on,
whatever the query, the chunk or the page size. The softmax is carried from tile to tile in fp32 (a running maximum, sum
and weighted values; arXiv 1805.02867), so a query's result is a fixed chain of steps over the tiles up to its own. A
tile that a row does not see at all changes nothing: its scores are -inf, so the sum is multiplied by exp(0) and grows
by 0.

Every step has one shape. The rows of a KV head (query positions times the query heads that share it) are cut into
blocks of `rows`, padded with zeros; the products are `torch.bmm` over KV heads, [rows, head_dim] x [head_dim, kv_tile]
and [rows, kv_tile] x [kv_tile, head_dim], the latter padded (see `PRODUCT_COLUMNS`). As many heads are taken at a time
as keep a step within 16384 elements, which torch's element loops do not share among threads (exp and tanh do from 2048
on, but have no scalar tail to move).

Measured with torch 2.13 (MKL) on an AVX-512 processor: the bits follow neither the place in a block nor 1 to 4 threads.

Not promised: a value is multiplied by an exact 0 for queries before it, so that a NaN or an infinity in it reaches
earlier queries of its own sequence and tile, if it is in the cache already. A bound kernel keeps its buffers, so it
must not run in two threads at once.
"""

from __future__ import annotations

import torch

from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.torch_cpu.workspace import PRODUCT_COLUMNS, pad_to, row_blocks, workspace

__all__ = ["bind_paged_attention"]

_MOST_ELEMENTS = 16384
_VECTOR = 64
_LOWEST = torch.finfo(torch.float32).min  # a maximum before any score: finite, so that a difference is never NaN


def bind_paged_attention(context: BindContext) -> Kernel:
    """Return the kernel of the op `attention`; it takes the op's arguments, then `scale`, then `out`."""
    return _PagedAttention(context)


class _PagedAttention:
    def __init__(self, context: BindContext) -> None:
        problem = context.problem
        self._kv_heads = problem.size("num_kv_heads")
        self._group = problem.size("num_heads") // self._kv_heads
        self._head_dim = problem.size("head_dim")
        self._page_size = problem.size("page_size")
        self._causal = problem.flag("causal")
        self._window = problem.size("window")
        self._softcap = float(problem["softcap"])
        self._tile: int = context.params.kv_tile
        self._rows: int = context.params.rows
        self._head_slices = list(row_blocks(self._kv_heads, max(1, _MOST_ELEMENTS // (self._rows * self._tile))))
        most_heads = self._head_slices[0].stop
        self._keys = workspace(self._kv_heads, self._tile, self._head_dim)
        self._values = workspace(self._kv_heads, self._tile, pad_to(PRODUCT_COLUMNS, self._head_dim))
        self._decay = workspace(pad_to(_VECTOR, most_heads * self._rows))
        self._columns = torch.arange(self._tile, device="cpu")
        self._max_seq_len = context.limits.max_seq_len

    def __call__(
        self,
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
        out: torch.Tensor,
    ) -> None:
        per_head = (sinks, alibi_slopes, k_scale, v_scale)
        starts = query_start_loc.tolist()
        in_table = block_table.shape[1] * self._page_size
        longest = min(self._max_seq_len or in_table, in_table)
        for index, kv_len in enumerate(seq_lens.tolist()):
            rows = slice(starts[index], starts[index + 1])
            if kv_len > longest:  # as on a GPU, where a kernel cannot raise
                out[rows] = float("nan")
            elif rows.start < rows.stop:
                out[rows] = self._sequence(q[rows], k_cache, v_cache, block_table[index], kv_len, per_head, scale)

    def _sequence(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_row: torch.Tensor,
        kv_len: int,
        per_head: tuple[torch.Tensor | None, ...],
        scale: float,
    ) -> torch.Tensor:
        """q [queries, num_heads, head_dim], the last positions of one sequence of kv_len.

        per_head: sinks, alibi_slopes, k_scale and v_scale.
        """
        sinks, alibi_slopes, k_scale, v_scale = per_head
        queries = len(q)
        first_query = kv_len - queries
        blocks = self._to_blocks(q.float().view(queries, self._kv_heads, self._group, self._head_dim))
        # Of each block: the positions of its first and last row, and of every row.
        row_positions = (
            torch.arange(len(blocks) * self._rows, device="cpu").view(-1, self._rows) // self._group + first_query
        )
        spans = [(int(p[0]), min(int(p[-1]), kv_len - 1)) for p in row_positions]
        maxima, sums = self._start(queries, sinks)
        slopes = self._slopes(queries, alibi_slopes)
        weighted = blocks.new_zeros(*blocks.shape[:-1], self._values.shape[-1])

        first_kv = max(0, first_query - self._window + 1) if self._window else 0
        first_kv -= first_kv % self._tile
        positions = torch.arange(first_kv, kv_len, device="cpu")
        pages, slots = page_row[positions // self._page_size].long(), positions % self._page_size
        for tile in row_blocks(len(positions), self._tile):
            self._load(self._keys, k_cache[pages[tile], slots[tile]], k_scale)
            self._load(self._values, v_cache[pages[tile], slots[tile]], v_scale)
            start = first_kv + tile.start
            for block, span in enumerate(spans):
                if self._sees(span, start):
                    hidden = self._hidden(row_positions[block], span, start, kv_len)
                    distance = (row_positions[block][:, None] - (self._columns + start)).abs().float()
                    for heads in self._head_slices:
                        bias = None if slopes is None else slopes[block, heads, :, None] * distance
                        state = maxima[block, heads], sums[block, heads], weighted[block, heads]
                        self._step(blocks[block, heads], heads, hidden, bias, scale, *state)
        return self._from_blocks(weighted / sums[..., None], queries)

    def _to_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[queries, kv_heads, group, width] to [blocks, kv_heads, rows, width], the end of the last block zero."""
        queries, _, _, width = values.shape
        used = queries * self._group
        padded = values.new_zeros(self._kv_heads, pad_to(self._rows, used), width)
        padded[:, :used] = values.transpose(0, 1).reshape(self._kv_heads, used, width)
        return padded.view(self._kv_heads, -1, self._rows, width).transpose(0, 1).contiguous()

    def _from_blocks(self, blocks: torch.Tensor, queries: int) -> torch.Tensor:
        """The inverse: [blocks, kv_heads, rows, width] to [queries, num_heads, head_dim], the padded width cut off."""
        heads = blocks[..., : self._head_dim].transpose(0, 1)
        flat = heads.reshape(self._kv_heads, -1, self._head_dim)[:, : queries * self._group]
        by_query = flat.view(self._kv_heads, queries, self._group, self._head_dim).transpose(0, 1)
        return by_query.reshape(queries, -1, self._head_dim)

    def _start(self, queries: int, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Running maxima and sums before the first tile, [blocks, kv_heads, rows]: none yet, or the sink's term."""
        shape = (1, self._kv_heads, self._group, 1)
        logits = self._keys.new_full(shape, _LOWEST) if sinks is None else sinks.clamp(min=_LOWEST).view(shape)
        by_query = logits.expand(queries, -1, -1, -1)
        maxima = self._to_blocks(by_query)[..., 0].contiguous()
        return maxima, torch.full_like(maxima, 0.0 if sinks is None else 1.0)

    def _slopes(self, queries: int, alibi_slopes: torch.Tensor | None) -> torch.Tensor | None:
        """The negative slope of each row, [blocks, kv_heads, rows]."""
        if alibi_slopes is None:
            return None
        by_query = -alibi_slopes.view(1, self._kv_heads, self._group, 1).expand(queries, -1, -1, -1)
        return self._to_blocks(by_query)[..., 0]

    def _load(self, buffer: torch.Tensor, gathered: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Put a tile's gathered keys or values [used, kv_heads, head_dim] into a buffer; the rest of it is zero.

        Those of an fp8 cache are multiplied by the scale of their head: one rounded product an element.
        """
        buffer.zero_()
        used = buffer[:, : len(gathered), : self._head_dim]
        used.copy_(gathered.transpose(0, 1))
        if scale is not None:
            used.mul_(scale[:, None, None])

    def _sees(self, span: tuple[int, int], start: int) -> bool:
        """Whether any query of a block sees any key of the tile at `start`."""
        if not self._causal:
            return True
        in_window = not self._window or start + self._tile > span[0] - self._window + 1
        return start <= span[1] and in_window

    def _hidden(
        self, row_positions: torch.Tensor, span: tuple[int, int], start: int, kv_len: int
    ) -> torch.Tensor | None:
        """True where a row must not see a key of the tile at `start`: [rows, kv_tile] or [kv_tile]; None: sees all."""
        if not self._causal:
            return self._columns >= kv_len - start if start + self._tile > kv_len else None
        inside = start + self._tile - 1 <= span[0]
        in_window = not self._window or start > span[1] - self._window
        if inside and in_window:
            return None
        ago = row_positions[:, None] - (self._columns + start)
        return (ago < 0) | (ago >= self._window) if self._window else ago < 0

    def _step(
        self,
        q: torch.Tensor,
        heads: slice,
        hidden: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: float,
        maxima: torch.Tensor,
        sums: torch.Tensor,
        weighted: torch.Tensor,
    ) -> None:
        """Carry the softmax of one block and some heads over the tile in the buffers; the state is updated in place."""
        scores = torch.bmm(q, self._keys[heads].transpose(1, 2)).mul_(scale)
        if self._softcap:
            scores = scores.div_(self._softcap).tanh_().mul_(self._softcap)
        if bias is not None:
            scores.add_(bias)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        highest = torch.maximum(maxima, scores.amax(-1))
        weights = scores.sub_(highest[..., None]).exp_()
        decay = self._exp_padded(maxima - highest)
        maxima.copy_(highest)
        sums.mul_(decay).add_(weights.sum(-1))
        weighted.mul_(decay[..., None]).add_(torch.bmm(weights, self._values[heads]))

    def _exp_padded(self, values: torch.Tensor) -> torch.Tensor:
        """exp of every element, all through vector code; the result is good until the next call."""
        self._decay.zero_()
        flat = self._decay[: values.numel()]
        flat.copy_(values.view(-1))
        self._decay.exp_()
        return flat.view(values.shape)
