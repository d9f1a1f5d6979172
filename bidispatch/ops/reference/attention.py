"""Reference and inputs of paged attention, and the builder of paged batches that other checks use too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bidispatch.ops.reference.draw import draw
from bidispatch.ops.schema import Problem

__all__ = ["attention", "attention_inputs", "paged_batch"]

_QUERY_BLOCK = 256  # rows whose fp64 scores are in memory at once
_STREAM_BLOCK = 256  # positions drawn under one key

# Cached lengths of the decodes: the shortest, around a page, around the widths of tiles and splits, and long ones.
_DECODE_CACHED = (136, 0, 15, 16, 63, 300, 511, 776)
_CHUNK_CACHED = 77


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
    """Attention of every sequence over its own pages: [tokens, num_heads, head_dim] in float64.

    Shapes as in `bidispatch.ops.attention`. Rows of q that no sequence owns are zero here.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = query_start_loc.tolist()
    for index, kv_len in enumerate(seq_lens.tolist()):
        first, stop = starts[index], starts[index + 1]
        if first == stop:
            continue
        pages = block_table[index, : -(-kv_len // problem.size("page_size"))].long()
        keys = _widened(k_cache[pages], k_scale)[:kv_len]
        values = _widened(v_cache[pages], v_scale)[:kv_len]
        for row in range(first, stop, _QUERY_BLOCK):
            rows = slice(row, min(row + _QUERY_BLOCK, stop))
            positions = torch.arange(rows.start, rows.stop, device=q.device) + (kv_len - stop)
            out[rows] = _attend(problem, q[rows].double(), keys, values, positions, sinks, alibi_slopes, scale)
    return (out,)


def _widened(pages: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Pages [pages, page_size, kv_heads, d] as float64 [positions, kv_heads, d], times the scale of each head."""
    flat = pages.double().flatten(0, 1)
    return flat if scale is None else flat * scale.double()[:, None]


def _attend(
    problem: Problem,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One sequence: q [rows, heads, d] at `positions` [rows] over keys and values [kv_len, kv_heads, d]."""
    group = problem.size("num_heads") // problem.size("num_kv_heads")
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    softcap = float(problem["softcap"])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ago = positions[:, None] - torch.arange(len(keys), device=q.device)[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * ago.abs()
    if problem.flag("causal"):
        hidden = ago < 0
        if window := problem.size("window"):
            hidden = hidden | (ago >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        logits = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, logits], dim=-1)
    weights = torch.softmax(scores, dim=-1)[:, :, : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values)


def attention_inputs(
    problem: Problem,
    rows: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    distribution: str = "normal",
) -> list[torch.Tensor | None]:
    """A mixed batch of `rows` query rows: decodes, a chunk behind a cached prefix, and whole prompts.

    Up to eight decodes take at most an eighth of the rows (one at least), the chunk a third of what is left, two
    prompts the rest. Pages are shuffled, and every cache slot that no sequence uses holds NaN.
    """
    decodes = min(len(_DECODE_CACHED), max(1, rows // 8), rows)
    left = rows - decodes
    chunk = left // 3
    prompts = [(left - chunk) // 4, left - chunk - (left - chunk) // 4]
    lengths = [(1, cached + 1) for cached in _DECODE_CACHED[:decodes]]
    lengths[1:1] = [(prompts[0], prompts[0]), (chunk, chunk + _CHUNK_CACHED)]
    lengths.append((prompts[1], prompts[1]))
    lengths = [(query, kv) for query, kv in lengths if query]
    return paged_batch(
        problem,
        [query for query, _ in lengths],
        [kv for _, kv in lengths],
        device=device,
        seed=seed,
        distribution=distribution,
    )


def paged_batch(
    problem: Problem,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    sequence_seeds: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    distribution: str = "normal",
    page_order: str = "shuffled",
    page_seed: int | None = None,
    extra_pages: int = 3,
    max_pages: int | None = None,
    padding_rows: int = 0,
) -> list[torch.Tensor | None]:
    """Build the arguments of `attention` for given lengths: q, k_cache, v_cache, block_table, seq_lens,
    query_start_loc, sinks, alibi_slopes, k_scale and v_scale (None where the problem has none of them).

    Sequence b has kv_lens[b] positions, the last query_lens[b] of which are asked about. q, k and v at position p
    follow from its entry of `sequence_seeds` (default: seed · 2^20 + b) and p alone; an fp8 cache holds them divided by
    scales that follow from the distribution. So the same sequence can be put
    into other batches, other chunks and other pages with the same data: a decode at p and a prefill over p agree.

    seed: of the sinks and, unless `page_seed` is given, of the page order.
    page_order: "shuffled" over the whole cache, or "ascending".
    extra_pages: pages no sequence uses, at least 1. They hold NaN, as does every other unused slot, and the entries of
        the block table past a sequence's last page name them.
    max_pages: width of the block table; by default what the longest sequence needs, at least 1.
    padding_rows: rows of q after the last sequence's, owned by none; they hold NaN.
    Raises ValueError for lengths that make no batch.
    """
    seqs = len(kv_lens)
    if len(query_lens) != seqs:
        raise ValueError(f"{len(query_lens)} query lengths for {seqs} KV lengths; give one of each a sequence")
    for index, (query, kv) in enumerate(zip(query_lens, kv_lens, strict=True)):
        if not 0 <= query <= kv:
            raise ValueError(f"sequence {index} asks about {query} of its {kv} positions; need 0 <= query <= KV")
    if page_order not in ("shuffled", "ascending"):
        raise ValueError(f"unknown page order {page_order!r}; known: shuffled, ascending")
    if extra_pages < 1:
        raise ValueError("extra_pages must be at least 1: unused block table entries name such a page")
    seeds = list(sequence_seeds) if sequence_seeds is not None else [(seed << 20) + b for b in range(seqs)]
    if len(seeds) != seqs:
        raise ValueError(f"{len(seeds)} sequence seeds for {seqs} sequences; give one a sequence")

    page_size = problem.size("page_size")
    pages_of = [-(-kv // page_size) for kv in kv_lens]
    width = max([1, *pages_of]) if max_pages is None else max_pages
    if width < max([0, *pages_of]):
        raise ValueError(f"max_pages={max_pages}, but the longest sequence needs {max(pages_of)}")

    used = sum(pages_of)
    order = list(range(used + extra_pages))
    if page_order == "shuffled":
        shuffle = torch.Generator().manual_seed(seed if page_seed is None else page_seed)
        order = torch.randperm(used + extra_pages, generator=shuffle).tolist()
    poison = order[used]

    kv_shape = (problem.size("num_kv_heads"), problem.size("head_dim"))
    q_shape = (problem.size("num_heads"), problem.size("head_dim"))
    dtype, kv_dtype = (getattr(torch, name) for name in (problem.dtype, str(problem["kv_dtype"])))
    caches = {
        name: torch.full((len(order) * page_size, *kv_shape), float("nan"), dtype=kv_dtype, device=device)
        for name in ("k", "v")
    }
    scales = _cache_scales(problem, distribution, device)
    q = torch.full((sum(query_lens) + padding_rows, *q_shape), float("nan"), dtype=dtype, device=device)
    block_table = torch.full((seqs, width), poison, dtype=torch.int32)

    def stream(name: str, sequence: int, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Positions start to stop of one sequence's q, k or v, cut from blocks drawn under their own keys."""
        first = start // _STREAM_BLOCK
        blocks = [
            draw(
                (_STREAM_BLOCK, *shape),
                (sequence, name, block),
                dtype=problem.dtype,
                device=device,
                distribution=distribution,
            )
            for block in range(first, -(-stop // _STREAM_BLOCK))
        ]
        return torch.cat(blocks)[start - first * _STREAM_BLOCK : stop - first * _STREAM_BLOCK]

    next_page, row = 0, 0
    for index, (query, kv) in enumerate(zip(query_lens, kv_lens, strict=True)):
        pages = torch.tensor(order[next_page : next_page + pages_of[index]], dtype=torch.int32)
        next_page += pages_of[index]
        block_table[index, : len(pages)] = pages
        if kv:
            positions = torch.arange(kv)
            slots = (pages.long()[positions // page_size] * page_size + positions % page_size).to(device)
            for name, cache in caches.items():
                rows = stream(name, seeds[index], 0, kv, kv_shape)
                scale = scales[name]
                cache[slots] = rows if scale is None else (rows.float() / scale[:, None]).to(kv_dtype)
        if query:
            q[row : row + query] = stream("q", seeds[index], kv - query, kv, q_shape)
            row += query

    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    sinks = draw(q_shape[:1], (seed, "sinks"), dtype="float32", device=device) if problem.flag("sinks") else None
    slopes = 2.0 ** -torch.linspace(1, 8, q_shape[0], device=device) if problem.flag("alibi") else None
    return [
        q,
        caches["k"].view(len(order), page_size, *kv_shape),
        caches["v"].view(len(order), page_size, *kv_shape),
        block_table.to(device),
        torch.tensor(list(kv_lens), dtype=torch.int32, device=device),
        starts.to(device),
        sinks,
        slopes,
        scales["k"],
        scales["v"],
    ]


def _cache_scales(problem: Problem, distribution: str, device: str | torch.device) -> dict[str, torch.Tensor | None]:
    """Scales of an fp8 cache, one a KV head, that keep what `draw` gives below its largest value, 448."""
    if problem["kv_dtype"] == problem.dtype:
        return {"k": None, "v": None}
    heads = torch.arange(problem.size("num_kv_heads"), dtype=torch.float32, device=device)
    widest = 2.0**7 if distribution == "scaled" else 2.0**-5
    return {"k": widest * (1 + heads / 8), "v": widest * (2 - heads / (1 + heads))}
