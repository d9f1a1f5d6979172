"""`triton.paged_attention` on a GPU: splits that grow with the position, speculative decode, sequences that are walked,
many sequences.

Shown against the same rows of one prefill, which is near the fp64 reference.
"""

from __future__ import annotations

import pytest
import torch
from bound_kernels import same_bits

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits

NAME = "triton.paged_attention"
HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
FP8 = {"kv_dtype": "float8_e4m3fn"}
FEATURES = [{}, {"alibi": True}, {"window": 1000, "sinks": True}, {"page_size": 64, "softcap": 30.0}]


def bound(problem, device, limits, **sizes):
    implementation = default_registry().get(NAME)
    if why := implementation.unmet(device, problem):
        pytest.skip(why[0])
    params = implementation.params()
    ((_, tile),) = implementation.tiles(device, problem, params)
    return bind(problem, device, (Rung(implementation, params, tile.model_copy(update=sizes)),), limits)


def steps(problem, arguments, ends, queries):
    """The last `queries` positions before each of `ends` of the one sequence in `arguments`, as a batch of its own."""
    q, k_cache, v_cache, table, _, _, *per_head = arguments
    rows = torch.cat([torch.arange(end - queries, end) for end in ends]).to(q.device)
    batch = [
        q[rows],
        k_cache,
        v_cache,
        table.expand(len(ends), -1).contiguous(),
        torch.tensor(ends, dtype=torch.int32, device=q.device),
        torch.arange(0, len(rows) + 1, queries, dtype=torch.int32, device=q.device),
        *per_head,
    ]
    return rows, batch


@pytest.mark.parametrize("dims", [*FEATURES, FP8, {**FP8, "alibi": True, "page_size": 24}], ids=str)
def test_decode_is_prefill_on_both_sides_of_every_size_of_split(dims):
    device = Device.detect()
    problem = ops.get("attention").problem("bfloat16", {**HEADS, **dims})
    length = 66000
    arguments = paged_batch(problem, [length], [length], device="cuda")
    whole = bound(problem, device, Limits(length, 1, length, length))(*arguments)
    edges = [1, 255, 256, 257, 4095, 4096, 4097, 4608, 16384, 16385, 17408, 65536, 65537, 65999, 66000]
    for queries in (1, 2, 3, 8):
        ends = [end for end in edges if end >= queries]
        rows, batch = steps(problem, arguments, ends, queries)
        for limits in (
            Limits(len(rows), len(ends), 131072, queries),
            Limits(8192, 256, 131072),
        ):
            for sizes in ({}, {"decode_programs": 1}, {"workspace_mb": 32}, {"decode_query_len": 0}):
                out = bound(problem, device, limits, **sizes)(*batch)
                assert same_bits(out, whole[rows]), (queries, limits, sizes)
    (reference,) = load_attribute(ops.get("attention").reference)(problem, *batch, problem.size("head_dim") ** -0.5)
    assert float((whole[rows].double() - reference).norm() / reference.norm()) < 1e-2


SMALL = {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64}
MANY = 264
"""Sequences that are enough for segments, of any of the numbers of programs below."""


@pytest.mark.parametrize("dims", [*FEATURES, FP8, SMALL, {"num_heads": 16, "num_kv_heads": 16}], ids=str)
def test_many_sequences_in_segments_have_the_bits_of_prefill(dims):
    """Wherever a program's part begins and ends, among empty sequences, and as few sequences have, in splits."""
    device = Device.detect()
    problem = ops.get("attention").problem("bfloat16", {**HEADS, **dims})
    length = 20000
    arguments = paged_batch(problem, [length], [length], device="cuda")
    whole = bound(problem, device, Limits(length, 1, length, length))(*arguments)
    edges = [1, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 4608, 16384, 16385, 17408, length]
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 3000, (MANY - len(edges),), generator=random).tolist()
    for queries in (1, 2, 5, 16):
        ends = [max(end, queries) for end in [*edges, *lengths]]
        ends = [ends[i] for i in torch.randperm(MANY, generator=random)]
        rows, batch = steps(problem, arguments, ends, queries)
        batch[3] = torch.cat([batch[3], batch[3][:3]])
        batch[4] = torch.cat([batch[4], batch[4].new_zeros(3)])
        batch[5] = torch.cat([batch[5], batch[5][-1:].expand(3)])
        limits = Limits(len(rows), MANY + 3, 131072, queries)
        two_warps = {"segment_programs": 4, "segment_warps": 2}
        for sizes in ({}, *({"segment_programs": n} for n in (0, 1, 3, 8)), {"workspace_mb": 8}, two_warps):
            out = bound(problem, device, limits, **sizes)(*batch)
            assert same_bits(out, whole[rows]), (queries, sizes)


@pytest.mark.parametrize("dims", [{}, SMALL, {"window": 1000, "sinks": True}], ids=str)
def test_few_sequences_of_any_length_in_segments_have_the_bits_of_prefill(dims):
    """Parts that are cut out of long sequences, from 1 to 49 of a KV head, equal lengths and unequal ones, and of short
    ones, which fewer programs share."""
    device = Device.detect()
    problem = ops.get("attention").problem("bfloat16", {**HEADS, **dims})
    length = 40000
    arguments = paged_batch(problem, [length], [length], device="cuda")
    whole = bound(problem, device, Limits(length, 1, length, length))(*arguments)
    few = ([length], [1025], [2000, 9000], [1024] * 2, [1, 700, length, 64])
    many = ([length] * 8, [8192] * 12, [4097, length, 1, 300, 17408, 16384, 9000, 33333, 12000, 2, 65, 20000])
    for ends in (*few, *many):
        rows, batch = steps(problem, arguments, ends, 1)
        for programs in (1, 2, 3):
            sizes = {"segment_programs": programs, "segment_parts": 64}
            attend = bound(problem, device, Limits(len(ends), len(ends), 131072, 1), **sizes)
            assert same_bits(attend(*batch), whole[rows]), (ends, programs)


@pytest.mark.parametrize("batch", [8, 16, MANY])
def test_a_graph_captured_at_the_longest_context_serves_short_ones(batch):
    device = Device.detect()
    problem = ops.get("attention").problem("bfloat16", HEADS)
    length = 9000
    arguments = paged_batch(problem, [length], [length], device="cuda", max_pages=131072 // 16)
    whole = bound(problem, device, Limits(length, 1, 131072, length))(*arguments)
    attend = bound(problem, device, Limits(batch, batch, 131072, 1))
    _, static = steps(problem, arguments, [length] * batch, 1)
    out = torch.empty_like(static[0])
    attend(*static, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(*static, out=out)
    for ends in ([1] * batch, [length] * batch, torch.randint(1, length, (batch,)).tolist()):
        rows, moved = steps(problem, arguments, ends, 1)
        for tensor, value in zip(static[:6], moved[:6], strict=True):
            tensor.copy_(value)
        graph.replay()
        assert same_bits(out, whole[rows])
