"""A stand-in for FlashAttention's operators on the CPU, with the real ones' schemas and, on purpose, their traps.

A row's result is a chain of steps over KV blocks, each of one shape, so that its bits follow the blocks and the
splits as the real kernels' do. What these follow is what was read in flash-attn 2.8.3 and vllm-project/flash-attention
617264c1: the heuristic of a varlen call with max_seqlen_q = 1, the capacity or the own length behind a split's extent,
FA3's block by max_seqlen_q x group, causal and page size, and with q_v its one block, and its load by TMA, which
brings what is behind a sequence in its last page. FA2 refuses a row that sees no key in a varlen call: the real one
writes out of bounds there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType

import torch

FA2_SCHEMAS = {
    "varlen_fwd": "(Tensor! q, Tensor k, Tensor v, Tensor!? out, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, "
    "int max_seqlen_k, float p_dropout, float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool return_softmax, int num_splits, Generator? gen) -> Tensor[]",
    "fwd_kvcache": "(Tensor! q, Tensor kcache, Tensor vcache, Tensor? k, Tensor? v, Tensor? seqlens_k, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_batch_idx, Tensor? leftpad_k, Tensor? block_table, "
    "Tensor? alibi_slopes, Tensor!? out, float softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool is_rotary_interleaved, int num_splits) -> Tensor[]",
}
FA3_SCHEMAS = {
    "fwd": "(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, "
    "int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, int window_size_right, "
    "float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, "
    "int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]",
}
LATENT_BLOCK = 64
"""Rows and KV positions of FA3's tile with q_v, whatever the call: hopper/tile_size.h:18."""
_SMS = 8  # of the pretended GPU, so that small batches make the heuristic split


@dataclass
class Call:
    """What bits and memory safety rest on."""

    operator: str
    max_query: int | None = None
    max_kv: int | None = None
    num_splits: int = 0
    width: int = 0
    causal: bool = False
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    rest: dict = field(default_factory=dict)


calls: list[Call] = []
"""Every call of any operator since a test cleared it."""


def fa2_block(head_dim):
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


def fa3_block(head_dim, max_query, group, causal, page_size):
    """hopper/tile_size.h for 16-bit inputs, head_dim 64 and 128."""
    few = max_query * group <= 64
    gathered = not (page_size % 128 == 0 and max_query * group > (64 if few else 192 if head_dim <= 64 else 128))
    if head_dim <= 64:
        return 192 if few else 128 if causal else 160 if gathered else 192
    return 128 if causal or gathered else 176 if few else 160


def loads_by_tma(page_size, block, most_rows, block_m, leftpad):
    """hopper/flash_api.cpp, `get_pagedkv_tma`."""
    return leftpad is None and page_size % block == 0 and most_rows > block_m


def heuristic(units, blocks):
    """Any rule that follows the batch will do."""
    return max(1, min(blocks, 2 * _SMS // max(1, units)))


def _extent(positions, block, splits):
    """Whole blocks of a split: n_blocks_per_split in flash_fwd_kernel.h."""
    blocks = math.ceil(positions / block)
    return math.ceil(blocks / splits) * block


def _coarse(values):
    """The state is carried with few bits, so that the rounding of a result does not hide an order of additions."""
    return values.half().float()


def _attend(q, keys, values, visible, begin, end, block, scale, softcap, length):
    """One row, q [heads, d], over blocks of positions [begin, end), downwards: (maximum, total, acc), fp32.

    keys and values have `length` positions, or as many more as a load brings.
    """
    heads, dim = q.shape
    maximum = torch.full((heads,), -math.inf)
    total, acc = torch.zeros(heads), torch.zeros(heads, values.shape[-1])
    for start in reversed(range(begin, end, block)):
        k, v = torch.zeros(block, heads, dim), torch.zeros(block, heads, values.shape[-1])
        stop = min(start + block, len(keys))
        k[: stop - start], v[: stop - start] = keys[start:stop], values[start:stop]
        scores = (k * q).sum(-1).T * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores[:, torch.arange(start, start + block) >= visible] = -math.inf
        highest = torch.maximum(maximum, scores.amax(-1))
        reference = torch.where(highest.isinf(), 0.0, highest)
        weights, decay = (scores - reference[:, None]).exp(), (maximum - reference).exp()
        total = total * decay + weights.sum(-1)
        if len(values) == length:
            v[max(0, visible - start) :] = 0.0  # the kernels clear what is behind a sequence
        acc = _coarse(acc * decay[:, None] + (weights.T[:, :, None] * v).sum(0))
        maximum = highest
    return maximum, total, acc


def _row(q, keys, values, visible, block, splits, extent, scale, softcap, length, *, drops_nan=False):
    """A row's result and its LSE, by `splits` of `extent` positions added in ascending order.

    drops_nan: whether a split whose scores hold NaN counts for nothing, as in hopper/softmax.h, where its LSE is -inf,
    and flash_fwd_combine_kernel.h, where its weight then is 0.
    """
    parts = []
    for split in range(splits):
        begin, end = split * extent, min((split + 1) * extent, length)
        if begin < end:
            parts.append(_attend(q, keys, values, visible, begin, end, block, scale, softcap, length))
    if drops_nan:
        for maximum, total, acc in parts:
            lost = total.isnan()
            maximum[lost], total[lost], acc[lost] = -math.inf, 0.0, 0.0
    highest = torch.stack([part[0] for part in parts]).amax(0)
    reference = torch.where(highest.isinf(), 0.0, highest)
    total, acc = torch.zeros(len(q)), torch.zeros(parts[0][2].shape)
    for maximum, part_total, part_acc in parts:
        weight = (maximum - reference).exp()
        total = total + part_total * weight
        acc = _coarse(acc + part_acc * weight[:, None])
    return torch.where(total[:, None] == 0.0, 0.0, acc / total[:, None]), reference + total.log()


def _gather(cache, table_row, length, group, *, whole_pages=False):
    """The keys or values of a sequence, fp32, one for each query head. Raises for a page that does not exist."""
    page_size = cache.shape[1]
    pages = table_row[: -(-length // page_size)].long()
    assert len(pages) * page_size >= length, "read past the block table"
    assert ((pages >= 0) & (pages < len(cache))).all(), "a page that does not exist"
    rows = cache[pages].flatten(0, 1)
    return (rows if whole_pages else rows[:length]).float().repeat_interleave(group, 1)


def _sequence(
    q,
    k_cache,
    v_cache,
    table_row,
    length,
    causal,
    block,
    splits,
    extent,
    scale,
    softcap,
    q_v=None,
    *,
    whole_pages=False,
    drops_nan=False,
):
    """q [rows, heads, d] of one sequence: out and LSE [heads, rows]. q_v: what is asked of the values, added to it."""
    group = q.shape[1] // k_cache.shape[2]
    keys, values = (_gather(cache, table_row, length, group, whole_pages=whole_pages) for cache in (k_cache, v_cache))
    if q_v is not None:
        q, keys = torch.cat((q, q_v), -1), torch.cat((keys, values), -1)
    seen = [length - len(q) + i + 1 if causal else length for i in range(len(q))]
    results = [
        _row(row, keys, values, visible, block, splits, extent, scale, softcap, length, drops_nan=drops_nan)
        for row, visible in zip(q.float(), seen, strict=True)
    ]
    return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results], 1)


def _fa2_varlen(
    *arguments,
    package,
    page_multiple,
):
    q, k, v, out, cu_q, cu_k, used, leftpad, table, alibi, max_q, max_k, dropout, scale, zero, causal = arguments[:16]
    left, right, softcap, return_softmax, splits, generator = arguments[16:]
    assert k.shape[1] % page_multiple == 0, "page size"
    assert (leftpad, alibi, generator, zero, return_softmax, dropout) == (None, None, None, False, False, 0.0)
    assert (left, right) == (-1, -1)
    assert used.dtype == cu_q.dtype == cu_k.dtype == table.dtype == torch.int32
    assert used.is_contiguous()
    assert cu_q.is_contiguous()
    assert len(cu_q) == len(cu_k) == len(used) + 1 == len(table) + 1 <= 65535
    starts, lengths = cu_q.tolist(), used.tolist()
    rows = [stop - start for start, stop in pairwise(starts)]
    calls.append(
        Call(
            "fa2.varlen",
            max_q,
            max_k,
            splits,
            table.shape[1],
            causal,
            tuple(rows),
            tuple(lengths),
            {"package": package},
        )
    )
    group = q.shape[1] // k.shape[2]
    block = fa2_block(q.shape[2])
    swapped = max_q == 1 and group > 1
    count = 1
    if swapped and not splits:
        count = heuristic(len(rows) * k.shape[2], -(-max_k // block))
    for i, (length, number) in enumerate(zip(lengths, rows, strict=True)):
        assert number <= max_q, "rows beyond the grid"
        assert length <= max_k, "keys beyond the split"
        if not number:
            continue
        assert length >= (number if causal else 1), "a row that sees no key writes its LSE out of bounds"
        extent = _extent(max_k if package else length, block, count)
        owned = slice(starts[i], starts[i + 1])
        out[owned] = _sequence(
            *(q[owned], k, v, table[i], length, causal and max_q > 1, block, count, extent, scale, softcap)
        )[0].to(out.dtype)
    return [out, torch.empty(0)]


def _fa2_kvcache(*arguments, package, page_multiple):
    q, k, v, k_new, v_new, lengths, cos, sin, index, leftpad, table, alibi, out = arguments[:13]
    scale, causal, left, right, softcap, _, splits = arguments[13:]
    assert k.shape[1] % page_multiple == 0, "page size"
    assert (k_new, v_new, cos, sin, index, leftpad, alibi) == (None,) * 7
    assert (left, right) == (-1, -1)
    assert 1 <= splits <= 128
    heads, kv_heads = q.shape[2], k.shape[2]
    if out is None:
        out = torch.empty_like(q)
    elif package and q.shape[1] == 1 and heads > kv_heads:  # it has made groups of heads rows before it looks at out
        assert out.shape == (len(q), heads // kv_heads, kv_heads, q.shape[3])
        out = out.transpose(1, 2).view(q.shape)
    assert q.shape == out.shape
    assert len(q) * (q.shape[2] if splits > 1 else 1) <= 65535
    lens = lengths.tolist()
    calls.append(
        Call("fa2.kvcache", q.shape[1], None, splits, table.shape[1], causal, (q.shape[1],) * len(q), tuple(lens))
    )
    block = fa2_block(q.shape[3])
    lse = torch.full((len(q), q.shape[2], q.shape[1]), math.inf)
    for i, length in enumerate(lens):
        if not length:
            out[i] = 0
            continue
        whole = table.shape[1] * k.shape[1] if package else length
        extent = _extent(whole, block, splits)
        result, lse[i] = _sequence(
            q[i], k, v, table[i], length, causal and q.shape[1] > 1, block, splits, extent, scale, softcap
        )
        out[i] = result.to(out.dtype)
    return [out, lse]


def _splits_by(schedule, most, causal, rows, lens, block, group):
    """Rows and splits of each: hopper/flash_prepare_scheduler.cu, and how a schedule that is made ahead is laid out;
    flash_api.cpp, for 992.
    """
    if most == 1:
        assert schedule is None
        return rows, [1] * len(lens)
    assert len(lens) <= 992
    if schedule is None:
        blocks = [math.ceil(length / block) * (count > 0) for count, length in zip(rows, lens, strict=True)]
        share = math.ceil(1.1 * sum(blocks) / _SMS)
        return rows, [max(1, min(math.ceil(count / max(1, share)), most)) for count in blocks]
    rounded = math.ceil(len(lens) / 4) * 4
    assert not causal, "one more vector"
    assert schedule.shape == (2 * rounded + 1,)
    assert schedule.dtype == torch.int32
    shown = [packed // group for packed in schedule[: len(lens)].tolist()]
    assert schedule[: len(lens)].tolist() == [count * group for count in shown]
    assert all(count in (0, row) for count, row in zip(shown, rows, strict=True))
    assert schedule[-1] == 0, "a counter that has been used"
    numbers = schedule[rounded : rounded + len(lens)].tolist()
    assert all(1 <= number <= most for number in numbers)
    schedule[-1] = 99  # as a counter that has run
    return shown, numbers


def _fa3_forward(*arguments):
    q, k, v, k_new, v_new, q_v, out, cu_q, cu_k, cu_new, used_q, used, max_q, max_k, table = arguments[:15]
    leftpad = arguments[16]
    scale, causal, left, right, softcap, _, metadata, splits, pack, margin, sinks = arguments[23:34]
    assert (k_new, v_new, cu_k, cu_new, sinks) == (None,) * 5
    assert used_q is None or (used_q.dtype == torch.int32 and used_q.shape == used.shape)
    assert leftpad is None or (leftpad.shape == used.shape and leftpad.dtype == torch.int32 and not leftpad.any())
    assert (left, right, margin) == (-1, -1, 0)
    assert pack in (True, None)
    varlen = cu_q is not None
    lens = used.tolist()
    starts = cu_q.tolist() if varlen else list(range(0, len(q) * q.shape[1] + 1, q.shape[1]))
    rows = [stop - start for start, stop in pairwise(starts)]
    max_query = max_q if varlen else q.shape[1]
    calls.append(
        Call(
            f"fa3.{'varlen' if varlen else 'batch'}",
            max_query,
            max_k,
            splits,
            table.shape[1],
            causal,
            tuple(rows),
            tuple(lens),
            {"leftpad": leftpad is not None, "used_q": None if used_q is None else tuple(used_q.tolist())},
        )
    )
    group = q.shape[-2] // k.shape[2]
    if max_query == 1 and q.shape[-1] <= 64:
        causal = False
    block, whole_pages = fa3_block(q.shape[-1], max_query, group, causal, k.shape[1]), False
    flat_q, flat_out = q.flatten(0, -3), out.view(-1, *out.shape[-2:])
    flat_qv = None
    if q_v is not None:
        assert q.shape[-1] <= 64
        assert v.shape[-1] >= 256
        assert q_v.shape == out.shape == (*q.shape[:-1], v.shape[-1])
        assert all(t.stride(-1) == 1 and t.data_ptr() % 16 == 0 for t in (q, k, v, q_v, out)), "loads of 16 bytes"
        block, flat_qv = LATENT_BLOCK, q_v.flatten(0, -3)
        whole_pages = loads_by_tma(k.shape[1], block, max_query * group, LATENT_BLOCK, leftpad)
    lse = torch.full((q.shape[-2], len(flat_q)), -math.inf)
    used_rows = rows if used_q is None else used_q.tolist()
    shown, numbers = _splits_by(metadata, splits, causal, used_rows, lens, block, group)
    for i, length in enumerate(lens):
        owned = slice(starts[i], starts[i + 1])
        assert used_rows[i] in (0, rows[i])
        assert shown[i] <= max_query
        if not shown[i]:
            # What adds splits up looks at the schedule for their number, not for rows: what is left there from before.
            if rows[i] and (numbers[i] > 1 or (splits > 1 and metadata is None)):
                flat_out[owned] = lse[:, owned] = 99.0
            continue
        if not length:
            flat_out[owned] = 0
            continue
        result, lse[:, owned] = _sequence(
            *(flat_q[owned], k, v, table[i], length, causal, block, numbers[i], _extent(length, block, numbers[i])),
            *(scale, softcap),
            None if flat_qv is None else flat_qv[owned],
            whole_pages=whole_pages,
            drops_nan=numbers[i] > 1,
        )
        flat_out[owned] = result.to(out.dtype)
    if splits > 1 and not varlen and used_q is not None:  # flash_fwd_combine_launch_template.h: the first entry's
        flat_out[1:] = flat_out[0].clone()
    return [out, lse if varlen else lse.T.reshape(len(q), q.shape[1], -1).transpose(1, 2)]


_libraries: list[torch.library.Library] = []


def register():
    """Register vLLM's operators, once a process, as loading its shared objects would."""
    if _libraries:
        return
    fa2, fa3 = torch.library.Library("_vllm_fa2_C", "DEF"), torch.library.Library("_vllm_fa3_C", "DEF")
    _libraries.extend((fa2, fa3))
    for library, schemas in ((fa2, FA2_SCHEMAS), (fa3, FA3_SCHEMAS)):
        for name, schema in schemas.items():
            library.define(name + schema)
    vllm = {"package": False, "page_multiple": 16}
    fa2.impl("varlen_fwd", lambda *arguments: _fa2_varlen(*arguments, **vllm), "CPU")
    fa2.impl("fwd_kvcache", lambda *arguments: _fa2_kvcache(*arguments, **vllm), "CPU")
    fa3.impl("fwd", _fa3_forward, "CPU")


def package():
    """The extension module of the flash-attn package: the same calls, whose varlen one takes no number of splits."""
    module = ModuleType("flash_attn_2_cuda")
    own = {"package": True, "page_multiple": 256}
    module.varlen_fwd = lambda *arguments: _fa2_varlen(*arguments[:20], 0, arguments[20], **own)
    module.fwd_kvcache = lambda *arguments: _fa2_kvcache(*arguments, **own)
    return module
