"""Rows of tokens laid out by expert, as libraries' grouped products take them, and what stands between two products.

A layout is groups of `rows` rows. Contiguous: one group, in which the pairs (a token and a slot) of an expert lie
together, ascending, from a multiple of `block_rows` on, and a table says whose each row is, -1 for rows that pad.
Masked: a group an expert, in which a token's row is the token's number, and a table says how many rows of each are to
be multiplied. In both, `rows_of_pairs` says where each pair's row is, -1 for pairs without an expert of this rank.
Slots of one token that name the same expert share a row of the masked layout, which is written twice with the same
bits.

Scales of fp8 rows lie by group, groups of K apart: [groups, K/128, rows], what TMA reads.
"""

# Kernel arguments are Triton values, which no annotation describes; the host functions are annotated.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from bidispatch.device import Arch
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import Limits
from bidispatch_backends.triton.launch import ArgumentType, Constant, Launch, options, pointer, power_of_two
from bidispatch_backends.triton.moe import SORT_WARPS, id_arguments, id_constants, sort_lanes, sum_launch
from bidispatch_backends.triton.moe_kernels import counts_of, experts_of, gated_pair
from bidispatch_backends.triton.quantize import store_groups

__all__ = ["RowLaunches", "row_block", "row_launches"]

_GROUP = tl.constexpr(GROUP)
_ROW_BLOCK, _ROW_WARPS = 1024, 4


@triton.jit(do_not_specialize=["pairs", "all_rows"])
def contiguous_kernel(
    ids_ptr,
    expert_map_ptr,
    rows_of_pairs_ptr,
    experts_of_rows_ptr,
    pairs,
    all_rows,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Program e gives rows to the pairs of expert e, behind the blocks of the experts before it, as `sort_kernel` does.

    Blocks behind the last expert's pad, up to all_rows, a multiple of BLOCK_M; programs take them in turns.
    """
    expert = tl.program_id(0)
    left_over = tl.where(expert == 0, EXPERTS, -1)  # pairs without an expert are program 0's
    experts = tl.arange(0, BLOCK_E)
    counts = counts_of(ids_ptr, expert_map_ptr, pairs, stride_ids, TOP_K, EXPERTS, KNOWN, BLOCK_E, BLOCK_P)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_row = tl.sum(tl.where(experts < expert, blocks, 0), axis=0) * BLOCK_M
    count = tl.sum(tl.where(experts == expert, counts, 0), axis=0)

    place = first_row
    for first in range(0, tl.where(count + (left_over + 1) > 0, pairs, 0), BLOCK_P):
        mine = first + tl.arange(0, BLOCK_P)
        local = experts_of(ids_ptr, expert_map_ptr, mine, mine < pairs, stride_ids, TOP_K, EXPERTS, KNOWN)
        same = local == expert
        rank = tl.cumsum(same.to(tl.int32), axis=0)
        tl.store(rows_of_pairs_ptr + mine, place + rank - 1, mask=same)
        none = (local == left_over) & (mine < pairs)
        tl.store(rows_of_pairs_ptr + mine, tl.full((BLOCK_P,), -1, tl.int32), mask=none)
        place += tl.sum(same.to(tl.int32), axis=0)

    lanes = tl.arange(0, BLOCK_M)
    for first in range(0, count, BLOCK_M):
        row = first + lanes
        tl.store(experts_of_rows_ptr + first_row + row, tl.where(row < count, expert, -1))
    used = tl.sum(blocks, axis=0)
    for block in range(used + expert, all_rows // BLOCK_M, EXPERTS):
        tl.store(experts_of_rows_ptr + block * BLOCK_M + lanes, tl.full((BLOCK_M,), -1, tl.int32))


@triton.jit(do_not_specialize=["pairs", "rows"])
def masked_kernel(
    ids_ptr,
    expert_map_ptr,
    rows_of_pairs_ptr,
    counts_ptr,
    pairs,
    rows,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program e: where the pairs of expert e lie, and how many of its rows are multiplied: up to its last token's."""
    expert = tl.program_id(0)
    left_over = tl.where(expert == 0, EXPERTS, -1)  # pairs without an expert are program 0's
    most = expert * 0
    for first in range(0, pairs, BLOCK_P):
        mine = first + tl.arange(0, BLOCK_P)
        local = experts_of(ids_ptr, expert_map_ptr, mine, mine < pairs, stride_ids, TOP_K, EXPERTS, KNOWN)
        same = local == expert
        tokens = mine // TOP_K
        tl.store(rows_of_pairs_ptr + mine, expert * rows + tokens, mask=same)
        none = (local == left_over) & (mine < pairs)
        tl.store(rows_of_pairs_ptr + mine, tl.full((BLOCK_P,), -1, tl.int32), mask=none)
        most = tl.maximum(most, tl.max(tl.where(same, tokens + 1, 0), axis=0))
    tl.store(counts_ptr + expert, most)


@triton.jit
def _scales_of_group(scales_ptr, row, rows, GROUPS: tl.constexpr):
    """From where a row's scales are at `row`, and then every `rows`."""
    return scales_ptr + (row // rows).to(tl.int64) * rows * (GROUPS - 1)


@triton.jit(do_not_specialize=["rows"])
def scatter_kernel(
    x_ptr,
    rows_of_pairs_ptr,
    out_ptr,
    scales_ptr,
    rows,
    stride_x,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """A token's x in the row of each of its pairs, quantised where there are scales; `BLOCK` columns a program."""
    token = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * stride_x + columns, mask=columns < N, other=0.0)
    for slot in range(TOP_K):
        row = tl.load(rows_of_pairs_ptr + token * TOP_K + slot)
        if scales_ptr is None:
            tl.store(out_ptr + row.to(tl.int64) * N + columns, x, mask=tl.where(columns < N, row, -1) >= 0)
        else:
            store_groups(
                *(x.to(tl.float32), out_ptr, _scales_of_group(scales_ptr, row, rows, N // _GROUP)),
                *(row.to(tl.int64), start, tl.where(row >= 0, row + 1, row), N, 1, rows),
                *(N, 1, BLOCK, UE8M0),
            )


@triton.jit(do_not_specialize=["rows"])
def activation_kernel(
    both_ptr,
    rows_of_pairs_ptr,
    act_ptr,
    scales_ptr,
    rows,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """The activation of a pair's gate and up in fp32, rounded, and quantised where there are scales."""
    row = tl.load(rows_of_pairs_ptr + tl.program_id(0))
    if row < 0:
        return
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)[None, :]
    inside = columns < INNER
    both_ptr += row.to(tl.int64) * (2 * INNER)
    if ACTIVATION == "swiglu_clamped":
        gate = tl.load(both_ptr + 2 * columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(both_ptr + 2 * columns + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        gate = tl.load(both_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(both_ptr + INNER + columns, mask=inside, other=0.0).to(tl.float32)
    act = gated_pair(gate, up, ACTIVATION, ALPHA, LIMIT).to(both_ptr.dtype.element_ty)
    if scales_ptr is None:
        tl.store(act_ptr + row.to(tl.int64) * INNER + columns, act, mask=inside)
    else:
        store_groups(
            *(act.to(tl.float32), act_ptr, _scales_of_group(scales_ptr, row, rows, INNER // _GROUP)),
            *(row.to(tl.int64), start, row + 1, INNER, 1, rows, INNER, 1, BLOCK, UE8M0),
        )


class RowLaunches(NamedTuple):
    """The launches around two grouped products, in their order."""

    place: Launch
    scatter: Launch
    activate: Launch
    add: Launch


def row_launches(problem: Problem, arch: Arch, limits: Limits | None, *, masked: bool, block_rows: int) -> RowLaunches:
    """The launches for one layout."""
    hidden, inner, top_k = problem.size("hidden"), problem.size("intermediate"), problem.size("top_k")
    fp8 = problem["weight_dtype"] == FP8
    data, integers = pointer(problem.dtype), pointer("int32")
    operand, scales = pointer(FP8) if fp8 else data, pointer("float32") if fp8 else None
    sizes: dict[str, ArgumentType] = {"pairs": "i32", ("rows" if masked else "all_rows"): "i32"}
    lanes = sort_lanes(problem, limits)
    if masked:
        del lanes["BLOCK_E"]
    else:
        lanes["BLOCK_M"] = block_rows
    ue8m0: dict[str, Constant] = {"UE8M0": problem["scale_format"] == "ue8m0"}
    return RowLaunches(
        Launch(
            masked_kernel if masked else contiguous_kernel,
            {**id_arguments(problem), "rows_of_pairs_ptr": integers}
            | {("counts_ptr" if masked else "experts_of_rows_ptr"): integers, **sizes, "stride_ids": top_k},
            {**id_constants(problem), **lanes},
            options(arch, SORT_WARPS, 1, fp_fusion=False),
        ),
        Launch(
            scatter_kernel,
            {"x_ptr": data, "rows_of_pairs_ptr": integers, "out_ptr": operand, "scales_ptr": scales}
            | {"rows": "i32", "stride_x": hidden},
            {"TOP_K": top_k, "N": hidden, "BLOCK": row_block(hidden), **ue8m0},
            options(arch, _ROW_WARPS, 1, fp_fusion=False),
        ),
        Launch(
            activation_kernel,
            {"both_ptr": data, "rows_of_pairs_ptr": integers, "act_ptr": operand, "scales_ptr": scales, "rows": "i32"},
            {
                "INNER": inner,
                "ACTIVATION": str(problem["activation"]),
                "ALPHA": float(problem["swiglu_alpha"]),
                "LIMIT": float(problem["swiglu_limit"]),
                "BLOCK": row_block(inner),
                **ue8m0,
            },
            options(arch, _ROW_WARPS, 1, fp_fusion=False),
        ),
        sum_launch(problem, arch, placed=True),
    )


def row_block(n: int) -> int:
    """Columns of a row of n that a program takes: whole groups."""
    return min(_ROW_BLOCK, max(GROUP, power_of_two(n)))
