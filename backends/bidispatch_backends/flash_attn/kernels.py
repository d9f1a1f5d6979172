"""Small kernels around FlashAttention's: what it is shown, lone queries made ready, partial results merged.

All shapes follow the call's shapes alone; lengths are read on the device. A lone query is the only row of its sequence
in the call. Its *entries* are what the library is shown in its place: sequences of up to `EXTENT` positions, entry j
with the positions from j · EXTENT on.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.schema import Problem
from bidispatch_backends.flash_attn.heads import heads_of
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, ceil_div, options, pointer, power_of_two

__all__ = [
    "Launches",
    "admit_kernel",
    "launches",
    "lengths_kernel",
    "merge_kernel",
    "prepare_kernel",
    "schedule_kernel",
    "schedule_size",
    "spoil_kernel",
]

_SEQS = 128
_PAGES = 1024
_ELEMENTS = 1024
_ONE_WARP = 256  # elements of a result that one warp merges; of wider ones, splits in flight would spill
_UNROLL = tl.constexpr(8)  # splits whose loads are in flight together
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(do_not_specialize=["seqs", "max_kv"])
def lengths_kernel(kv_lens_ptr, query_start_ptr, used_ptr, seqs, max_kv, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    """used = the KV length that the one-split call is shown: at most max_kv, so that no table is read past its end.

    At least one for each row, since FA2 must be given no row without a key: what it makes of more than there are
    `spoil_kernel` replaces. ALONE: 1 for lone queries, whose result is replaced too.
    """
    seq = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = seq < seqs
    kv_len = tl.load(kv_lens_ptr + seq, mask=inside, other=0)
    rows = tl.load(query_start_ptr + seq + 1, mask=inside, other=0)
    rows -= tl.load(query_start_ptr + seq, mask=inside, other=0)
    used = tl.minimum(tl.maximum(kv_len, rows), max_kv)
    if ALONE:
        used = tl.where(rows == 1, 1, used)
    tl.store(used_ptr + seq, used, mask=inside)


@triton.jit(do_not_specialize=["max_kv", "max_query"])
def admit_kernel(
    kv_lens_ptr,
    query_start_ptr,
    used_ptr,
    rows_ptr,
    out_ptr,
    max_kv,
    max_query,
    stride_out_token,
    stride_out_head,
    ALONE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What FA3 is shown of a sequence, for which it takes a number of rows: `lengths_kernel` and `spoil_kernel` in one.

    rows = those of its queries; 0 where it is longer than max_kv or has more than max_query, whose rows of the result
    are NaN, and, with ALONE, for lone queries, which another kernel serves. FA3 writes to no other rows.
    """
    seq = tl.program_id(0)
    first = tl.load(query_start_ptr + seq)
    rows = tl.load(query_start_ptr + seq + 1) - first
    kv_len = tl.load(kv_lens_ptr + seq)
    served = (kv_len <= max_kv) & (rows <= max_query)
    shown = served
    if ALONE:  # but for one of no positions, whose result is FA3's 0
        shown = served & ((rows != 1) | (kv_len <= 0))
    tl.store(used_ptr + seq, tl.where(shown, kv_len, 0))
    tl.store(rows_ptr + seq, tl.where(shown, rows, 0))
    if not served:
        _spoil_rows(
            out_ptr, first, rows, stride_out_token, stride_out_head, HEADS=HEADS, HEAD_DIM=HEAD_DIM, BLOCK=BLOCK
        )


@triton.jit
def _spoil_rows(
    out_ptr,
    first,
    rows,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NaN for so many rows of the result from one on."""
    row_ptr = out_ptr + first.to(tl.int64) * stride_token
    nan = tl.full((), float("nan"), tl.float32)
    for _ in range(rows):
        _fill(row_ptr, nan, stride_head, HEADS, HEAD_DIM, BLOCK)
        row_ptr += stride_token


@triton.jit
def _fill(row_ptr, value, stride_head, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One value for a row of the result."""
    for start in range(0, HEADS * HEAD_DIM, BLOCK):
        place = start + tl.arange(0, BLOCK)
        nothing = tl.full((BLOCK,), 0.0, dtype=tl.float32) + value
        nothing = nothing.to(row_ptr.dtype.element_ty)
        target = (place // HEAD_DIM) * stride_head + place % HEAD_DIM
        tl.store(row_ptr + target, nothing, mask=place < HEADS * HEAD_DIM)


@triton.jit(do_not_specialize=["seqs", "max_kv", "max_query"])
def schedule_kernel(
    kv_lens_ptr,
    query_start_ptr,
    used_ptr,
    schedule_ptr,
    out_ptr,
    seqs,
    max_kv,
    max_query,
    stride_out_token,
    stride_out_head,
    SPLIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """FA3's schedule, with a sequence's splits by its own length: one for each SPLIT positions, at most MOST, and at
    least LEAST, but no more than one for each SMALLEST; of each size, those that it has begun.

    schedule: as hopper/flash_prepare_scheduler.cu has it for calls that are not causal: rows of the packed heads
    [seqs, rounded up to 4], splits [as many], and a counter of tiles that starts at 0. used, and whose rows of the
    result are NaN: as in `admit_kernel`. Without rows FA3 computes nothing, and with one split it adds nothing up.
    """
    seq = tl.program_id(0)
    first = tl.load(query_start_ptr + seq)
    rows = tl.load(query_start_ptr + seq + 1) - first
    kv_len = tl.load(kv_lens_ptr + seq)
    served = (kv_len <= max_kv) & (rows <= max_query)
    used = tl.where(served, kv_len, 0)
    least = tl.minimum(tl.maximum(tl.cdiv(used, SMALLEST), 1), LEAST)
    splits = tl.maximum(tl.minimum(tl.cdiv(used, SPLIT), MOST), least)
    rounded = tl.cdiv(seqs, 4) * 4
    tl.store(used_ptr + seq, used)
    tl.store(schedule_ptr + seq, tl.where(served, rows, 0) * HEADS)
    tl.store(schedule_ptr + rounded + seq, splits)
    if seq == 0:
        tl.store(schedule_ptr + 2 * rounded, 0)
    if not served:
        _spoil_rows(
            out_ptr, first, rows, stride_out_token, stride_out_head, HEADS=HEADS, HEAD_DIM=HEAD_DIM, BLOCK=BLOCK
        )


def schedule_size(seqs: int) -> int:
    """Integers of the schedule of so many sequences."""
    return 2 * ceil_div(seqs, 4) * 4 + 1


@triton.jit
def _lone_token(query_start_ptr, seq):
    """The token of a sequence, and whether it is the only one."""
    token = tl.load(query_start_ptr + seq)
    return token, tl.load(query_start_ptr + seq + 1) - token == 1


@triton.jit(do_not_specialize=["first_seq", "max_kv", "stride_table"])
def prepare_kernel(
    q_ptr,
    table_ptr,
    kv_lens_ptr,
    query_start_ptr,
    rows_ptr,
    pages_ptr,
    used_ptr,
    first_seq,
    max_kv,
    stride_table,
    stride_q_token,
    stride_q_head,
    ENTRIES: tl.constexpr,
    EXTENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Fill one entry: its KV length, its row of q and its part of the block table; length 0 where none is.

    rows [entries, HEADS, HEAD_DIM], pages [entries, EXTENT / PAGE_SIZE], used [entries]: ENTRIES of each sequence from
    first_seq on, HEAD_DIM that of q. Axis 2 of the grid has PAGES of an entry each; 0 copies none. What is behind a
    sequence's last page stays as it was: nothing is loaded from there.
    """
    seq = first_seq + tl.program_id(0)
    entry = tl.program_id(1)
    slot = (tl.program_id(0) * ENTRIES + entry).to(tl.int64)
    token, alone = _lone_token(query_start_ptr, seq)
    kv_len = tl.minimum(tl.load(kv_lens_ptr + seq), max_kv)
    used = tl.minimum(tl.maximum(kv_len - entry * EXTENT, 0), EXTENT)
    used = tl.where(alone, used, 0)
    chunk = tl.program_id(2)
    if chunk == 0:
        tl.store(used_ptr + slot, used)
    if used == 0:
        return
    if chunk == 0:
        for start in range(0, HEADS * HEAD_DIM, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < HEADS * HEAD_DIM
            source = token.to(tl.int64) * stride_q_token + (place // HEAD_DIM) * stride_q_head + place % HEAD_DIM
            row = tl.load(q_ptr + source, mask=inside, other=0.0)
            tl.store(rows_ptr + slot * (HEADS * HEAD_DIM) + place, row, mask=inside)
    if PAGES:
        width: tl.constexpr = EXTENT // PAGE_SIZE
        page = chunk * PAGES + tl.arange(0, PAGES)
        inside = page < tl.cdiv(used, PAGE_SIZE)
        source = seq.to(tl.int64) * stride_table + entry * width + page
        tl.store(pages_ptr + slot * width + page, tl.load(table_ptr + source, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["first_seq", "max_kv"])
def merge_kernel(
    partial_ptr,
    lse_ptr,
    kv_lens_ptr,
    query_start_ptr,
    out_ptr,
    first_seq,
    max_kv,
    stride_out_token,
    stride_out_head,
    ENTRIES: tl.constexpr,
    EXTENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program merges the entries of one head of a lone query, in ascending order, in fp32; rounded once at the end.

    partial [entries, HEADS, HEAD_DIM] as the library rounded it, lse [entries, HEADS] fp32, natural. A left fold of
    (maximum, total, acc) in units of log2; one entry is copied as it is: its weight is 1 and so is its total.
    HEAD_DIM is that of the result. An LSE of NaN gives NaN, whatever the library made of that row. Nothing is written
    for a sequence of no positions, whose result is 0, and of more than max_kv, whose is NaN: by others.
    """
    seq = first_seq + tl.program_id(0)
    head = tl.program_id(1)
    token, alone = _lone_token(query_start_ptr, seq)
    kv_len = tl.load(kv_lens_ptr + seq)
    if (kv_len <= 0) | (kv_len > max_kv) | (alone == 0):
        return
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    slot = (tl.program_id(0) * ENTRIES).to(tl.int64) * HEADS + head
    maximum = tl.load(lse_ptr + slot) * _LOG2_E
    total = tl.full((), 1.0, tl.float32)
    acc = tl.load(partial_ptr + slot * HEAD_DIM + dims, mask=inside, other=0.0).to(tl.float32)
    entries = tl.cdiv(kv_len, EXTENT)
    for first in range(1, entries, _UNROLL):
        for ahead in tl.static_range(_UNROLL):
            # One that is not there has weight 0 and decays nothing: total * 1 + 0, to the bit.
            entry = first + ahead
            place = slot + entry * HEADS
            lse = tl.load(lse_ptr + place, mask=entry < entries, other=float("-inf")) * _LOG2_E
            there = tl.where(entry < entries, dims, HEAD_DIM) < HEAD_DIM
            partial = tl.load(partial_ptr + place * HEAD_DIM + dims, mask=there, other=0.0).to(tl.float32)
            new_maximum = tl.maximum(maximum, lse)
            decay = tl.exp2(maximum - new_maximum)
            weight = tl.exp2(lse - new_maximum)
            total = total * decay + weight
            acc = acc * decay + partial * weight
            maximum = new_maximum
    result = tl.where(maximum == maximum, acc / total, float("nan"))
    out_ptrs = out_ptr + token.to(tl.int64) * stride_out_token + head * stride_out_head + dims
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seqs", "max_kv", "max_query"])
def spoil_kernel(
    kv_lens_ptr,
    query_start_ptr,
    out_ptr,
    seqs,
    max_kv,
    max_query,
    stride_out_token,
    stride_out_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NaN for the rows of sequences longer than max_kv, of which the library was shown a part, and of those with more
    rows than max_query, of which it may have left some out, or than positions; 0 without any. One token a program.
    """
    token = tl.program_id(0)
    if token >= tl.load(query_start_ptr + seqs):
        return
    low = tl.full((), 0, tl.int32)
    high = low + seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_start_ptr + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    rows = tl.load(query_start_ptr + low + 1) - tl.load(query_start_ptr + low)
    kv_len = tl.load(kv_lens_ptr + low)
    if (kv_len <= max_kv) & (rows <= max_query) & (rows <= kv_len):
        return
    value = tl.where(kv_len > 0, float("nan"), 0.0)
    _fill(out_ptr + token.to(tl.int64) * stride_out_token, value, stride_out_head, HEADS, HEAD_DIM, BLOCK)


@dataclass(frozen=True)
class Launches:
    """The launches of a bound kernel; `prepare` and `merge` where lone queries are split."""

    lengths: Launch
    spoil: Launch
    admit: Launch
    """In the place of both, before FA3's call of one split."""
    prepare: Launch | None
    merge: Launch | None
    schedule: Launch | None
    """For splits that FA3 cuts."""

    page_chunks: int
    """Programs that copy an entry's pages: axis 2 of `prepare`."""

    @property
    def seqs_a_program(self) -> int:
        """Sequences of one program of `lengths`."""
        return _SEQS


def launches(
    problem: Problem,
    arch: Arch,
    entries: int = 0,
    extent: int = 0,
    *,
    copies_pages: bool = True,
    replaced: bool = False,
    scheduled: tuple[int, int, int, int] | None = None,
) -> Launches:
    """`entries` of `extent` KV positions for a lone query; 0 where it is served as every other.

    copies_pages: whether its part of the block table is copied; else the library is shown the caller's. replaced:
    whether someone else writes the rows of lone queries afterwards. scheduled: SPLIT, SMALLEST, LEAST and MOST of
    `schedule_kernel`, where FA3 cuts them.
    """
    data, index, state = pointer(problem.dtype), pointer("int32"), pointer("float32")
    heads = heads_of(problem)
    ends: dict[str, ArgumentType] = {"kv_lens_ptr": index, "query_start_ptr": index}
    sizes: dict[str, ArgumentType] = {"seqs": "i32", "max_kv": "i32"}
    place: dict[str, ArgumentType] = {"first_seq": "i32", "max_kv": "i32"}
    out_strides: dict[str, ArgumentType] = {
        "stride_out_token": heads.queries * heads.value_dim,
        "stride_out_head": heads.value_dim,
    }
    row = {"HEADS": heads.queries, "HEAD_DIM": heads.query_dim}
    result = {"HEADS": heads.queries, "HEAD_DIM": heads.value_dim}
    # Without the fusion: a product and a sum are rounded apart, whatever a compiler's version prefers.
    one_warp, four_warps = (options(arch, warps, 1, fp_fusion=False) for warps in (1, 4))
    lengths = Launch(
        lengths_kernel,
        {**ends, "used_ptr": index, **sizes},
        {"ALONE": entries > 0, "BLOCK": _SEQS},  # FA2's alone, whose lone queries nobody else writes
        four_warps,
    )
    nothing: dict[str, Constant] = {**result, "BLOCK": _ELEMENTS}
    limits: dict[str, ArgumentType] = {"max_kv": "i32", "max_query": "i32"}
    spoil = Launch(spoil_kernel, {**ends, "out_ptr": data, "seqs": "i32", **limits, **out_strides}, nothing, four_warps)
    admit = Launch(
        admit_kernel,
        {**ends, "used_ptr": index, "rows_ptr": index, "out_ptr": data, **limits, **out_strides},
        {"ALONE": entries > 0 or replaced, **nothing},
        four_warps,
    )
    if not entries:
        return Launches(lengths, spoil, admit, None, None, None, 0)
    cut = {"ENTRIES": entries, "EXTENT": extent}
    width = extent // problem.size("page_size")
    pages = min(_PAGES, power_of_two(width)) if copies_pages else 0
    prepare = Launch(
        prepare_kernel,
        {"q_ptr": data, "table_ptr": index, **ends, "rows_ptr": data, "pages_ptr": index, "used_ptr": index}
        | place
        | {"stride_table": "i32", "stride_q_token": heads.queries * heads.query_dim, "stride_q_head": heads.query_dim},
        cut | {"PAGE_SIZE": problem.size("page_size")} | row | {"BLOCK": _ELEMENTS, "PAGES": pages},
        four_warps,
    )
    merge = Launch(
        merge_kernel,
        {"partial_ptr": data, "lse_ptr": state, **ends, "out_ptr": data, **place, **out_strides},
        cut | result | {"BLOCK_D": power_of_two(heads.value_dim)},
        one_warp if heads.value_dim <= _ONE_WARP else four_warps,
    )
    schedule = None
    if scheduled:
        cuts = dict(zip(("SPLIT", "SMALLEST", "LEAST", "MOST"), scheduled, strict=True))
        schedule = Launch(
            schedule_kernel,
            {**ends, "used_ptr": index, "schedule_ptr": index, "out_ptr": data, "seqs": "i32", **limits, **out_strides},
            {**cuts, **nothing},
            four_warps,
        )
    return Launches(lengths, spoil, admit, prepare, merge, schedule, ceil_div(width, pages) if pages else 1)
