"""FlashAttention on a GPU: ours hold what they claim; the library, called without care, is seen to break it.

Each test skips where its library is not installed; the skip says what to install.
"""

from __future__ import annotations

import time

import pytest
import torch
from bound_kernels import same_bits

from bidispatch import ops
from bidispatch.ops.reference.attention import attention, paged_batch
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.compare import bits
from bidispatch.verify.sequences import check_sequences, sequence_limits
from bidispatch.verify.subject import Subject
from bidispatch_backends.flash_attn import discovery

NAMES = ("fa2", "fa2_splits", "fa2_capacity_splits", "fa2_kv_split", "fa3", "fa3_kv_split", "fa3_triton_splits")
DTYPES = ("bfloat16", "float16")
CONTEXTS = (300, 1000, 2049, 5000)
NO_WINDOW = (-1, -1)
SIZES = Sizes(
    rows=(1, 2, 7, 16, 33, 200, 1000),
    pool=64,
    graph_rows=(1, 16),
    lengths=(1, 17, 100, 512, 777, 2049, 5000),
    chunks=(1, 7, 64, 512),
    decodes=40,
    singles=8,
    max_seqs=64,
)


def problem_of(dtype="bfloat16", **dims):
    sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
    return ops.get("attention").problem(dtype, {**sizes, **dims})


def page_size_of(name):
    return 256 if name == "fa2_capacity_splits" else 16


def implementation(plan, name, problem):
    found = default_registry().get(f"flash_attn.{name}")
    if reasons := found.unmet(plan.device, problem):
        pytest.skip(f"{found.name}: {'; '.join(reasons)}")
    return found


def bound(plan, name, problem, limits, **sizes):
    """With its default params; sizes are the tile's."""
    found = implementation(plan, name, problem)
    chosen = found.params()
    tile = found.tiles(plan.device, problem, chosen)[-1][1]
    tile = tile.model_copy(update=sizes) if sizes else tile
    return bind(problem, plan.device, (Rung(found, chosen, tile),), limits)


def library_of(plan, source, problem):
    """The module or namespace of one library, loaded."""
    from bidispatch_backends.flash_attn import library

    if reason := source.unmet(plan.device, problem):
        pytest.skip(reason)
    if source is discovery.FLASH_ATTN:
        import flash_attn_2_cuda

        return flash_attn_2_cuda
    return library._load(source)


def batch(problem, pieces, **options):
    """Arguments of (query rows, KV length, sequence seed) each."""
    queries, lengths, seeds = zip(*pieces, strict=True)
    return paged_batch(problem, queries, lengths, sequence_seeds=seeds, device="cuda", **options)


SHAPES = (
    {},
    {"num_heads": 64},
    {"num_heads": 16, "num_kv_heads": 16},
    {"num_heads": 16, "num_kv_heads": 1, "softcap": 30.0},
    {"head_dim": 64},
    {"head_dim": 96, "page_size": 32},
    {"head_dim": 256, "num_heads": 8, "num_kv_heads": 4},
    {"causal": False},
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_every_check_of_sequences_holds(plan, name, dtype, dims, record_property):
    """At the level it claims. What a shape is refused for is in the skip."""
    problem = problem_of(dtype, **{**dims, **({"page_size": 256} if page_size_of(name) == 256 else {})})
    claim = implementation(plan, name, problem).claims

    def rebind(limits):
        return Subject(problem, torch.device(plan.device.torch_device), bound(plan, name, problem, limits).launch)

    checks = list(check_sequences(rebind(sequence_limits(problem, SIZES)), claim, SIZES, rebind))
    record_property("rows", sum(check.rows for check in checks))
    assert [str(check) for check in checks if not check.passed] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("page_size", [16, 256])
def test_packed_lone_queries_are_the_same_bits(plan, dtype, dims, page_size):
    """FA2's kernel without causality on rows of one group, against the causal one on a row of each head."""
    problem = problem_of(dtype, **{**dims, "page_size": page_size})
    pieces = [(1, length, seed) for seed, length in enumerate((1, 64, 127, 128, 129, 1000, 2049, 5000))]
    arguments = batch(problem, [*pieces, (70, 700, 9)])
    plain, packed = (
        bound(plan, "fa2", problem, Limits(128, 16, 8192), pack_lone_queries=pack)(*arguments) for pack in (False, True)
    )
    assert same_bits(plain, packed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(40000, 7, 12345), (131072, 1, 1024, 1025)])
def test_long_contexts_alone_and_together(plan, name, lengths, record_property):
    problem = problem_of(page_size=page_size_of(name))
    attend = bound(plan, name, problem, Limits(16, 8, 131072))
    began = time.perf_counter()
    pieces = [(1, length, seed) for seed, length in enumerate(lengths)]
    together = attend(*batch(problem, pieces, max_pages=131072 // problem.size("page_size")))
    torch.cuda.synchronize()
    record_property("first_call_s", round(time.perf_counter() - began, 2))  # PTX is compiled at first use
    for row, piece in enumerate(pieces):
        assert same_bits(together[row : row + 1], attend(*batch(problem, [piece])))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_against_fp64(plan, name, dtype, record_property):
    """A kv_split rounds its partial results to the op's dtype: what that costs, beside one split's error."""
    problem = problem_of(dtype, page_size=page_size_of(name))
    arguments = batch(problem, [(1, length, seed) for seed, length in enumerate((5000, 8000, 12000))])
    exact = attention(problem, *arguments, problem.size("head_dim") ** -0.5)[0]

    def error(kernel):
        return float((kernel(*arguments).double() - exact).norm() / exact.norm())

    limits = Limits(8, 8, 16384)
    mine, one_split = error(bound(plan, name, problem, limits)), error(bound(plan, "fa2", problem, limits))
    record_property("error", mine)
    record_property("error_of_one_split", one_split)
    assert mine <= 1.5 * one_split


# What the library does without care. Each is a negative control: if it held, the tests above would show nothing.


def fa2_varlen(source, library, problem, arguments, *, max_query, num_splits):
    q, k, v, table, lengths, starts, *_ = arguments
    out = torch.empty_like(q)
    splits = () if source is discovery.FLASH_ATTN else (num_splits,)
    library.varlen_fwd(
        *(q, k, v, out, starts, torch.zeros_like(starts), lengths, None, table, None, max_query, int(lengths.max())),
        *(0.0, problem.size("head_dim") ** -0.5, False, True, *NO_WINDOW, 0.0, False, *splits, None),
    )
    return out


def fa2_kvcache(library, problem, q, k, v, table, lengths, num_splits):
    """q [seqs, rows, heads, d]."""
    results = library.fwd_kvcache(
        *(q, k, v, None, None, lengths, None, None, None, None, table, None, None),
        *(problem.size("head_dim") ** -0.5, True, *NO_WINDOW, 0.0, True, num_splits),
    )
    return results[0]


def fa3_forward(library, problem, arguments, *, max_query, num_splits=1):
    q, k, v, table, lengths, starts, *_ = arguments
    out = torch.empty_like(q)
    library.fwd(
        *(q, k, v, None, None, None, out, starts, None, None, None, lengths, max_query, int(lengths.max()), table),
        *(None,) * 8,
        *(problem.size("head_dim") ** -0.5, True, *NO_WINDOW, 0.0, True, None, num_splits, None, 0, None, 1, 0, None),
    )
    return out


@pytest.mark.parametrize("source", [discovery.FLASH_ATTN, discovery.VLLM_FA2], ids=["flash_attn", "vllm"])
def test_fa2_with_its_heuristic_follows_the_batch(plan, source, record_property):
    problem = problem_of(page_size=source.page_multiple)
    library = library_of(plan, source, problem)
    pieces = [(1, length, seed) for seed, length in enumerate(CONTEXTS * 8)]

    def naive(chosen):
        return fa2_varlen(source, library, problem, batch(problem, chosen), max_query=1, num_splits=0)

    together = naive(pieces)
    differing = sum(not same_bits(together[i : i + 1], naive([piece])) for i, piece in enumerate(pieces))
    record_property("differing", differing)
    assert differing


@pytest.mark.parametrize("source", [discovery.FLASH_ATTN, discovery.VLLM_FA2], ids=["flash_attn", "vllm"])
@pytest.mark.parametrize(
    "dims", [{}, {"head_dim": 64}, {"num_heads": 8}, {"num_heads": 64, "num_kv_heads": 1}], ids=str
)
def test_fa2_takes_any_bound_of_two_and_more_for_the_same_bits(plan, source, dims):
    """`max_seqlen_q` is the one argument of ours that follows a call's shape: it must be a bound and no more."""
    problem = problem_of(page_size=source.page_multiple, **dims)
    library = library_of(plan, source, problem)
    arguments = batch(problem, [(2, 5000, 0), (1, 2049, 1), (2, 300, 2)])
    results = [
        fa2_varlen(source, library, problem, arguments, max_query=bound, num_splits=1)
        for bound in (2, 3, 8, 64, 65, 128, 129, 1000, 8192)
    ]
    assert all(same_bits(result, results[0]) for result in results[1:])


def decode_and_trimmed(problem, length, page_size, width):
    arguments = batch(problem, [(1, length, 0)], max_pages=width)
    q, k, v, table, lengths, *_ = arguments
    return q[None], k, v, lengths, table, table[:, : -(-length // page_size)].contiguous()


def test_a_trimmed_block_table_moves_the_splits_of_the_package(plan, record_property):
    problem = problem_of(page_size=256)
    library = library_of(plan, discovery.FLASH_ATTN, problem)
    differing = 0
    for length in CONTEXTS:
        q, k, v, lengths, wide, trimmed = decode_and_trimmed(problem, length, 256, 128)
        results = [fa2_kvcache(library, problem, q, k, v, table, lengths, 8) for table in (wide, trimmed)]
        differing += not same_bits(*results)
    record_property("differing", differing)
    assert differing


def test_splits_of_one_capacity_are_the_same_in_decode_and_prefill(plan, record_property):
    """What `fa2_capacity_splits` could claim beyond `batch`, if long queries were split too: by the source, equal."""
    problem = problem_of(page_size=256)
    library = library_of(plan, discovery.FLASH_ATTN, problem)
    assert capacity_differences(library, problem, record_property) == 0


def test_splits_of_vllm_follow_a_sequence_of_its_own(plan, record_property):
    """The same with vLLM's: free of the table's width, not of the position, so no more than `batch`."""
    problem = problem_of(page_size=16)
    library = library_of(plan, discovery.VLLM_FA2, problem)
    for length in CONTEXTS:
        q, k, v, lengths, wide, trimmed = decode_and_trimmed(problem, length, 16, 2048)
        results = [fa2_kvcache(library, problem, q, k, v, table, lengths, 8) for table in (wide, trimmed)]
        assert same_bits(*results)
    assert capacity_differences(library, problem, record_property) > 0


def capacity_differences(library, problem, record_property):
    """Rows of a 256-row chunk that differ from the decode of their position, 8 splits, one width of the table."""
    rows, width = 256, 32768 // problem.size("page_size")
    differing = 0
    for length in (2049, 5000):
        q, k, v, table, lengths, *_ = batch(problem, [(rows, length, 0)], max_pages=width)
        chunk = fa2_kvcache(library, problem, q[None], k, v, table, lengths, 8)[0]
        positions = torch.arange(length - rows + 1, length + 1, device="cuda", dtype=torch.int32)
        steps = fa2_kvcache(library, problem, q[:, None], k, v, table.expand(rows, -1).contiguous(), positions, 8)[:, 0]
        differing += int((bits(chunk) != bits(steps)).flatten(1).any(1).sum())
    record_property("differing", differing)
    return differing


def test_fa3_with_its_heuristic_follows_the_batch(plan, record_property):
    problem = problem_of()
    library = library_of(plan, discovery.VLLM_FA3, problem)
    pieces = [(1, length, seed) for seed, length in enumerate(CONTEXTS * 8)]

    def naive(chosen):
        return fa3_forward(library, problem, batch(problem, chosen), max_query=1, num_splits=0)

    together = naive(pieces)
    differing = sum(not same_bits(together[i : i + 1], naive([piece])) for i, piece in enumerate(pieces))
    record_property("differing", differing)
    assert differing


@pytest.mark.parametrize(("head_dim", "holds"), [(64, False), (128, True)])
def test_fa3_switches_its_tile_where_max_seqlen_q_times_group_is_64(plan, head_dim, holds, record_property):
    """head_dim 64 breaks, as vLLM's issue 51902 found; at 128 both tiles have one KV block, and bits hold so far."""
    problem = problem_of(head_dim=head_dim)
    library = library_of(plan, discovery.VLLM_FA3, problem)
    differing = 0
    for length in CONTEXTS:
        arguments = batch(problem, [(1, length, 0)])
        results = [fa3_forward(library, problem, arguments, max_query=longest) for longest in (16, 17)]  # group 4
        differing += not same_bits(*results)
    record_property("differing", differing)
    assert (differing == 0) is holds


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ours_pins_fa3s_tile_whatever_it_is_bound_for(plan, head_dim):
    problem = problem_of(head_dim=head_dim)
    for length in CONTEXTS:
        arguments = batch(problem, [(1, length, 0), (3, 700, 1)])
        results = [
            bound(plan, "fa3", problem, limits)(*arguments)
            for limits in (Limits(4, 2, 5000, 3), Limits(16, 2, 5000), Limits(8192, 64, 131072))
        ]
        assert all(same_bits(result, results[0]) for result in results[1:])


def test_a_sequence_too_long_is_nan_and_no_other(plan):
    problem = problem_of()
    pieces = [(1, 300, 0), (2, 5000, 1), (1, 5000, 2), (1, 20, 3)]
    arguments = batch(problem, pieces)
    for name in NAMES:
        if page_size_of(name) != 16 or default_registry().get(f"flash_attn.{name}").unmet(plan.device, problem):
            continue
        wanted = bound(plan, name, problem, Limits(8, 8, 8192))(*arguments)
        result = bound(plan, name, problem, Limits(8, 8, 4096))(*arguments)
        assert result[1:4].isnan().all()
        assert same_bits(result[[0, 4]], wanted[[0, 4]])
