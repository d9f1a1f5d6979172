"""Kernels of a mixture's experts: the grouping of (token, slot) pairs by expert, two grouped products, and the sum.

Pair p is slot p % top_k of token p // top_k. Blocks of up to BLOCK_M pairs of one expert are what a program multiplies.
Which pairs share a block, and where in it one lies, follows the batch; what a pair's row gives does not: rows of a
product take no part in each other, and all that orders them is counted in integers.
"""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from bidispatch_backends.triton.activation import swish
from bidispatch_backends.triton.fp8_gemm import accumulate_blocks
from bidispatch_backends.triton.gemm import accumulate, filled_offsets, tile_of

__all__ = ["counts_of", "down_kernel", "experts_of", "gate_up_kernel", "gated_pair", "sort_kernel", "sum_kernel"]

_HALF_PAIR = tl.constexpr(8)
"""Rows of the matrix unit's long side between two that a thread holds: gate and up lie so far apart there."""
_INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)


@triton.jit
def experts_of(
    ids_ptr,
    expert_map_ptr,
    pairs,
    there,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """The rank's expert that each pair names; EXPERTS where it names none."""
    tokens = (pairs // TOP_K).to(tl.int64)
    ids = tl.load(ids_ptr + tokens * stride_ids + pairs % TOP_K, mask=there, other=-1)
    known = (ids >= 0) & (ids < KNOWN)
    if expert_map_ptr is not None:
        ids = tl.load(expert_map_ptr + ids, mask=known, other=-1)
        known = (ids >= 0) & (ids < EXPERTS)
    return tl.where(known, ids, EXPERTS)


@triton.jit
def counts_of(
    ids_ptr,
    expert_map_ptr,
    pairs,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """How many pairs each expert of the rank has: [BLOCK_E], 0 past the last expert."""
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, pairs, BLOCK_P):
        mine = first + tl.arange(0, BLOCK_P)
        local = experts_of(ids_ptr, expert_map_ptr, mine, mine < pairs, stride_ids, TOP_K, EXPERTS, KNOWN)
        counts += tl.histogram(local, BLOCK_E)
    return tl.where(tl.arange(0, BLOCK_E) < EXPERTS, counts, 0)


@triton.jit(do_not_specialize=["pairs"])
def sort_kernel(
    ids_ptr,
    expert_map_ptr,
    order_ptr,
    blocks_ptr,
    pairs,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Program e puts the pairs of expert e, ascending, into order, behind those of the experts before it.

    A pair's place is the number of pairs before it: a counting sort without atomics. blocks[0] is the number of blocks;
    from blocks[3 (b + 1)] on are block b's expert, its first place in order, and the place after the expert's last.
    """
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = counts_of(ids_ptr, expert_map_ptr, pairs, stride_ids, TOP_K, EXPERTS, KNOWN, BLOCK_E, BLOCK_P)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    if expert == 0:
        tl.store(blocks_ptr, tl.sum(blocks, axis=0))
    before = experts < expert
    start = tl.sum(tl.where(before, counts, 0), axis=0)
    count = tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    first_block = tl.sum(tl.where(before, blocks, 0), axis=0)
    if count == 0:
        return
    place = start
    for first in range(0, pairs, BLOCK_P):
        mine = first + tl.arange(0, BLOCK_P)
        local = experts_of(ids_ptr, expert_map_ptr, mine, mine < pairs, stride_ids, TOP_K, EXPERTS, KNOWN)
        same = local == expert
        rank = tl.cumsum(same.to(tl.int32), axis=0)
        tl.store(order_ptr + place + rank - 1, mine, mask=same)
        place += tl.sum(same.to(tl.int32), axis=0)
    own = tl.arange(0, BLOCK_E)
    for first in range(0, tl.cdiv(count, BLOCK_M), BLOCK_E):
        block = first + own
        there = block < tl.cdiv(count, BLOCK_M)
        entry = blocks_ptr + 3 * (first_block + block + 1)
        tl.store(entry, tl.zeros_like(block) + expert, mask=there)
        tl.store(entry + 1, start + block * BLOCK_M, mask=there)
        tl.store(entry + 2, tl.zeros_like(block) + start + count, mask=there)


@triton.jit
def _sorted_block(order_ptr, blocks_ptr, block, BLOCK_M: tl.constexpr):
    """A block as `sort_kernel` left it: its expert; pairs, their rows in act, and which of them are there."""
    entry = blocks_ptr + 3 * (block + 1)
    expert = tl.load(entry)
    places = tl.load(entry + 1) + tl.arange(0, BLOCK_M)
    inside = places < tl.load(entry + 2)
    return expert, tl.load(order_ptr + places, mask=inside, other=0), places, inside


@triton.jit
def _counted_block(
    ids_ptr,
    expert_map_ptr,
    block,
    pairs,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The same of few pairs, which each program counts for itself: the block that pair `block` begins, if it does.

    Its expert is EXPERTS where that pair begins none: another pair's block has it, or it names no expert.
    """
    lanes = tl.arange(0, BLOCK_P)
    local = experts_of(ids_ptr, expert_map_ptr, lanes, lanes < pairs, stride_ids, TOP_K, EXPERTS, KNOWN)
    expert = tl.sum(tl.where(lanes == block, local, 0), axis=0)
    same = local == expert
    before = tl.sum((same & (lanes < block)).to(tl.int32), axis=0)
    rank = tl.cumsum(same.to(tl.int32), axis=0) - 1 - before
    rows = tl.arange(0, BLOCK_M)
    is_row = same[None, :] & (rank[None, :] == rows[:, None])
    mine = tl.sum(tl.where(is_row, lanes[None, :], 0), axis=1)
    inside = tl.sum(is_row.to(tl.int32), axis=1) > 0
    return tl.where(before % BLOCK_M == 0, expert, EXPERTS), mine, mine, inside


@triton.jit
def _row_ptrs(
    x_ptr,
    rows,
    inside,
    stride_row,
    weight_ptr,
    first_column,
    columns,
    stride_weight,
    BLOCK_N: tl.constexpr,
):
    """Pointers to rows of the left operand. Rows of a block that are not there read the weight's (`filled_offsets`)."""
    inside = inside | (columns == 1)
    offsets = tl.where(inside, rows, 0).to(tl.int64) * stride_row
    filler = first_column + 1 + tl.arange(0, rows.shape[0]) % BLOCK_N
    filler = tl.where(filler < columns, filler, columns - 1)
    return x_ptr + filled_offsets(x_ptr, offsets, inside, weight_ptr, filler.to(tl.int64) * stride_weight)


@triton.jit
def _step_ptrs(row_ptrs, column_ptrs, BLOCK_K: tl.constexpr, SWAP: tl.constexpr):
    """What `accumulate` starts from, of rows and of columns whose K is contiguous."""
    steps = tl.arange(0, BLOCK_K)
    if SWAP:
        x_ptrs, weight_ptrs = row_ptrs[None, :] + steps[:, None], column_ptrs[:, None] + steps[None, :]
    else:
        x_ptrs, weight_ptrs = row_ptrs[:, None] + steps[None, :], column_ptrs[None, :] + steps[:, None]
    return x_ptrs, weight_ptrs


@triton.jit
def _product(
    x_ptrs,
    weight_ptrs,
    x_scales_ptr,
    weight_scales_ptr,
    rows,
    inside,
    weight_rows,
    expert,
    stride_expert_scales,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile's sum over K, of fp8 operands with their scales, which lie contiguous: x's [rows, K/128]."""
    if x_scales_ptr is None:
        length = K
        if K <= BLOCK_K:
            # An expert is never negative, which the compiler cannot know: it would unroll a loop of one turn, and then
            # start the products from what follows them, the bias (Triton's combine pass), in the tiles that have one.
            length = tl.where(expert >= 0, K, 0)
        acc = accumulate(x_ptrs, weight_ptrs, BLOCK_K, length, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, "ieee")
    else:
        GROUPS: tl.constexpr = K // BLOCK_K
        x_scale_ptrs = x_scales_ptr + tl.where(inside, rows, 0).to(tl.int64) * GROUPS
        weight_scale_ptrs = weight_scales_ptr + expert.to(tl.int64) * stride_expert_scales
        weight_scale_ptrs += weight_rows // BLOCK_K * GROUPS
        acc = accumulate_blocks(
            *(x_ptrs, weight_ptrs, x_scale_ptrs, weight_scale_ptrs, 1, K),
            *(BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, WIDEN, False),
        )
    return acc


@triton.jit
def gated_pair(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation, in fp32. NaN stays NaN in each, also where it is clamped."""
    if ACTIVATION == "silu":
        act = swish(gate, gate)
    elif ACTIVATION == "gelu":
        act = 0.5 * gate * (1.0 + tl.erf(gate * _INVERSE_SQRT_2))
    else:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1.0
        act = swish(gate, ALPHA * gate)
    return act * up


@triton.jit(do_not_specialize=["pairs"])
def gate_up_kernel(
    x_ptr,
    x_scales_ptr,
    w13_ptr,
    w13_scales_ptr,
    bias_ptr,
    ids_ptr,
    expert_map_ptr,
    order_ptr,
    blocks_ptr,
    act_ptr,
    pairs,
    stride_x,
    stride_expert,
    stride_row,
    stride_bias,
    stride_scales,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SORTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """act [pairs, INNER] = activation(x · w13 of each pair's expert): gate and up in one tile, rounded once.

    A tile has BLOCK_N rows of w13, gate and up of BLOCK_N / 2 outputs. They lie where a thread holds both. DEPENDENT:
    `down_kernel` may be launched before it ends, as it may have been before `sort_kernel` did, where that comes first.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_n = tl.cdiv(INNER, HALF)
    program = tl.program_id(0)
    if SORTED:
        if DEPENDENT:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()  # after the wait: whoever comes next may read what `sort_kernel` left
        blocks = tl.load(blocks_ptr)
        if program >= blocks * tiles_n:
            return
        block, tile_n = tile_of(program, blocks, tiles_n, GROUP_M)
        expert, mine, places, inside = _sorted_block(order_ptr, blocks_ptr, block, BLOCK_M)
    else:
        if DEPENDENT:
            cuda.gdc_launch_dependents()
        block, tile_n = tile_of(program, pairs, tiles_n, GROUP_M)
        expert, mine, places, inside = _counted_block(
            ids_ptr, expert_map_ptr, block, pairs, stride_ids, TOP_K, EXPERTS, KNOWN, BLOCK_P, BLOCK_M
        )
        if expert == EXPERTS:
            return

    lanes = tl.arange(0, BLOCK_N)
    if SWAP:
        is_up = lanes // _HALF_PAIR % 2
        columns = tile_n * HALF + lanes // (2 * _HALF_PAIR) * _HALF_PAIR + lanes % _HALF_PAIR
    else:
        is_up = lanes % 2
        columns = tile_n * HALF + lanes // 2
    columns = tl.where(columns < INNER, columns, 0)
    if ACTIVATION == "swiglu_clamped":
        weight_rows = 2 * columns + is_up
        first_row = tile_n * HALF * 2
    else:
        weight_rows = is_up * INNER + columns
        first_row = tile_n * HALF
    weight_ptr = w13_ptr + expert.to(tl.int64) * stride_expert
    row_ptrs = _row_ptrs(x_ptr, mine // TOP_K, inside, stride_x, weight_ptr, first_row, 2 * INNER, stride_row, BLOCK_N)
    column_ptrs = weight_ptr + weight_rows.to(tl.int64) * stride_row
    x_ptrs, weight_ptrs = _step_ptrs(row_ptrs, column_ptrs, BLOCK_K, SWAP)
    acc = _product(
        *(x_ptrs, weight_ptrs, x_scales_ptr, w13_scales_ptr, mine // TOP_K, inside, weight_rows, expert, stride_scales),
        *(HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, WIDEN),
    )

    outputs = tile_n * HALF + tl.arange(0, HALF)
    if SWAP:
        parts = tl.reshape(acc, (HALF // _HALF_PAIR, 2, _HALF_PAIR, BLOCK_M))
        gate, up = tl.split(tl.permute(parts, (0, 2, 3, 1)))
        gate = tl.trans(tl.reshape(gate, (HALF, BLOCK_M)))
        up = tl.trans(tl.reshape(up, (HALF, BLOCK_M)))
    else:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, HALF, 2)))
    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * stride_bias
        safe = tl.where(outputs < INNER, outputs, 0)
        if ACTIVATION == "swiglu_clamped":
            gate += tl.load(bias_ptr + 2 * safe).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + 2 * safe + 1).to(tl.float32)[None, :]
        else:
            gate += tl.load(bias_ptr + safe).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + INNER + safe).to(tl.float32)[None, :]
    act = gated_pair(gate, up, ACTIVATION, ALPHA, LIMIT).to(act_ptr.dtype.element_ty)
    act_ptrs = act_ptr + places.to(tl.int64)[:, None] * INNER + outputs[None, :]
    tl.store(act_ptrs, act, mask=inside[:, None] & (outputs < INNER)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def down_kernel(
    act_ptr,
    act_scales_ptr,
    w2_ptr,
    w2_scales_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    expert_map_ptr,
    order_ptr,
    blocks_ptr,
    parts_ptr,
    pairs,
    stride_expert,
    stride_row,
    stride_bias,
    stride_scales,
    stride_weights,
    stride_ids,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    SORTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_M: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """parts [pairs, HIDDEN] = (act · w2 of each pair's expert + bias) · the pair's weight, rounded once.

    DEPENDENT: launched before `gate_up_kernel` ended, which began after the sort had.
    """
    tiles_n = tl.cdiv(HIDDEN, BLOCK_N)
    program = tl.program_id(0)
    if SORTED:
        if DEPENDENT:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()
        blocks = tl.load(blocks_ptr)
        if program >= blocks * tiles_n:
            return
        block, tile_n = tile_of(program, blocks, tiles_n, GROUP_M)
        expert, mine, places, inside = _sorted_block(order_ptr, blocks_ptr, block, BLOCK_M)
    else:
        block, tile_n = tile_of(program, pairs, tiles_n, GROUP_M)
        expert, mine, places, inside = _counted_block(
            ids_ptr, expert_map_ptr, block, pairs, stride_ids, TOP_K, EXPERTS, KNOWN, BLOCK_P, BLOCK_M
        )
        if DEPENDENT:  # also those that have nothing to do: this kernel is not to end before the one it waits for
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()
        if expert == EXPERTS:
            return

    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.where(outputs < HIDDEN, outputs, 0)
    weight_ptr = w2_ptr + expert.to(tl.int64) * stride_expert
    row_ptrs = _row_ptrs(act_ptr, places, inside, INNER, weight_ptr, tile_n * BLOCK_N, HIDDEN, stride_row, BLOCK_N)
    x_ptrs, weight_ptrs = _step_ptrs(row_ptrs, weight_ptr + columns.to(tl.int64) * stride_row, BLOCK_K, SWAP)
    acc = _product(
        *(x_ptrs, weight_ptrs, act_scales_ptr, w2_scales_ptr, places, inside, columns, expert, stride_scales),
        *(INNER, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_IS_EVEN, WIDEN),
    )

    tokens = (mine // TOP_K).to(tl.int64)
    weights = tl.load(weights_ptr + tokens * stride_weights + mine % TOP_K, mask=inside, other=0.0)
    places = mine.to(tl.int64) * HIDDEN
    there = outputs < HIDDEN
    if SWAP:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert.to(tl.int64) * stride_bias + columns).to(tl.float32)[:, None]
        parts = (acc * weights[None, :]).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + places[None, :] + outputs[:, None], parts, mask=inside[None, :] & there[:, None])
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert.to(tl.int64) * stride_bias + columns).to(tl.float32)[None, :]
        parts = (acc * weights[:, None]).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + places[:, None] + outputs[None, :], parts, mask=inside[:, None] & there[None, :])


@triton.jit
def sum_kernel(
    parts_ptr,
    rows_ptr,
    weights_ptr,
    ids_ptr,
    expert_map_ptr,
    add_ptr,
    out_ptr,
    stride_weights,
    stride_ids,
    stride_add,
    stride_out,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    KNOWN: tl.constexpr,
    HIDDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token] = the parts of its slots that name an expert of this rank, ascending, in fp32; then add; rounded once.

    rows_ptr: where each pair's part lies, -1 for those that have none; without it pairs lie in their order, and the ids
    say which have. weights_ptr: what parts that are not weighted yet are multiplied by. DEPENDENT: launched before
    `down_kernel` ended.
    """
    if DEPENDENT:
        cuda.gdc_wait()
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot + tl.arange(0, 1)
        if rows_ptr is None:
            row = pair
            there = experts_of(ids_ptr, expert_map_ptr, pair, pair >= 0, stride_ids, TOP_K, EXPERTS, KNOWN) < EXPERTS
        else:
            row = tl.load(rows_ptr + pair)
            there = row >= 0
        part = tl.load(parts_ptr + row.to(tl.int64) * HIDDEN + columns, mask=inside & there, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            weight_ptrs = weights_ptr + token.to(tl.int64) * stride_weights + slot + tl.arange(0, 1)
            part *= tl.load(weight_ptrs, mask=there, other=0.0)
        total += part
    if add_ptr is not None:
        total += tl.load(add_ptr + token.to(tl.int64) * stride_add + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * stride_out + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
