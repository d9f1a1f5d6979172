"""FA3 with q_v on a GPU: flash_attn.fa3_mla and its splits hold what they claim, and the library without care does not.

Skips where vLLM's FA3 is not installed, or the GPU is no Hopper; the skip says what to install.
"""

from __future__ import annotations

import pytest
import torch
from bound_kernels import bound, same_bits

from bidispatch import ops
from bidispatch.ops.reference.mla import attention_mla, latent_batch
from bidispatch.registry import default_registry
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.graphs import check_graphs
from bidispatch.verify.sequences import check_sequences, graph_groups, sequence_limits
from bidispatch.verify.subject import Subject

WHOLE, SPLIT = "flash_attn.fa3_mla", "flash_attn.fa3_mla_splits"
NAMES = (WHOLE, SPLIT)
DTYPES = ("bfloat16", "float16")
SHAPES = (
    {"num_heads": 16},
    {"num_heads": 128},
    {"num_heads": 16, "page_size": 16},
    {"num_heads": 128, "page_size": 32},
    {"num_heads": 20, "page_size": 128},  # tiles that hold parts of tokens
)
CONTEXTS = (300, 1000, 2049, 5000)
SCALE = 192**-0.5
RANK = 512
SIZES = Sizes(
    rows=(1, 2, 7, 16, 33, 64, 200),
    pool=64,
    graph_rows=(1, 16, 64),
    lengths=(1, 17, 63, 64, 65, 512, 777, 2049, 5000),
    chunks=(1, 7, 64),
    decodes=40,
    singles=8,
    max_seqs=64,
)


def problem_of(dtype="bfloat16", **dims):
    return ops.get("attention.mla").problem(dtype, dims)


def batch(problem, pieces, **options):
    """(query rows, KV length, sequence seed) each."""
    queries, lengths, seeds = zip(*pieces, strict=True)
    return latent_batch(problem, queries, lengths, sequence_seeds=seeds, device="cuda", **options)


def by_the_library(plan, problem, arguments, *, max_query, num_splits=1, leftpad=None):
    """FA3 as vLLM's backend FLASH_ATTN_MLA calls it, without the schedule that it makes ahead."""
    from bidispatch_backends.flash_attn import discovery, library

    if reason := discovery.VLLM_FA3.unmet(plan.device, problem):
        pytest.skip(reason)
    q, cache, table, lengths, starts = arguments
    out = torch.empty(*q.shape[:2], RANK, dtype=q.dtype, device=q.device)
    keys, values = cache[..., RANK:].unsqueeze(-2), cache[..., :RANK].unsqueeze(-2)
    library._load(discovery.VLLM_FA3).fwd(
        *(q[..., RANK:], keys, values, None, None, q[..., :RANK], out, starts, None, None, None, lengths, max_query),
        *(int(lengths.max()), table, None, leftpad, *(None,) * 6, SCALE, True, -1, -1, 0.0, True, None, num_splits),
        *(None, 0, None, 1, 0, None),
    )
    return out


def subjects(plan, name, problem):
    claim = default_registry().get(name).claims

    def rebind(limits):
        return Subject(problem, torch.device(plan.device.torch_device), bound(plan, name, problem, limits).launch)

    return claim, rebind, rebind(sequence_limits(problem, SIZES))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_every_check_of_sequences_holds(plan, name, dtype, dims, record_property):
    """At the level it claims: alone, in batches, in chunks, padded, on other pages, beside NaN, bound for any limits;
    prefill = decode for one split.
    """
    claim, rebind, subject = subjects(plan, name, problem_of(dtype, **dims))
    checks = list(check_sequences(subject, claim, SIZES, rebind))
    record_property("rows", sum(check.rows for check in checks))
    assert [str(check) for check in checks if not check.passed] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_heads", [16, 128])
def test_a_graph_serves_other_lengths_with_the_bits_of_rows_alone(plan, name, num_heads, record_property):
    claim, rebind, subject = subjects(plan, name, problem_of(num_heads=num_heads))
    groups = graph_groups(subject, SIZES, claim, rebind)
    checks = [check_graphs(captured, calls, binding) for binding, captured, calls in groups]
    record_property("rows", sum(check.rows for check in checks))
    assert [str(check) for check in checks if not check.passed] == []
    assert all(check.rows for check in checks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(40000, 7, 12345), (131072, 1, 2048, 2049)])
def test_long_contexts_alone_and_together(plan, name, lengths):
    problem = problem_of(num_heads=16)
    attend = bound(plan, name, problem, Limits(16, 8, 131072))
    pieces = [(1, length, seed) for seed, length in enumerate(lengths)]
    together = attend(*batch(problem, pieces, max_pages=131072 // problem.size("page_size")))
    for row, piece in enumerate(pieces):
        assert same_bits(together[row : row + 1], attend(*batch(problem, [piece])))


@pytest.mark.parametrize("num_heads", [16, 128])
def test_one_split_is_the_prefill_of_its_decodes(plan, num_heads):
    """300 rows of a chunk, whose tiles hold several tokens of 16 heads, and half a token of 128."""
    problem = problem_of(num_heads=num_heads)
    attend = bound(plan, WHOLE, problem, Limits(512, 64, 8192))
    for length in (300, 2049, 5000):
        rows = 300
        chunk = attend(*batch(problem, [(rows, length, 0)]))
        q, cache, table, *_ = batch(problem, [(rows, length, 0)])
        for last in range(0, rows, 37):
            step = (q[last : last + 1], cache, table, *positions(length - rows + last + 1))
            assert same_bits(attend(*step), chunk[last : last + 1])


def positions(length):
    """seq_lens and query_start_loc of one lone query."""
    return (torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([length], [0, 1]))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_and_bounds_move_no_bit_of_the_librarys_one_split(plan, num_heads, page_size):
    """What the claim rests on: one tile for any max_seqlen_q and page. Pages are full, so that TMA brings no NaN."""
    small = problem_of(num_heads=num_heads, page_size=16)
    wanted = None
    for length in (320, 2048, 4992):
        arguments = batch(small, [(3, length, 0)])
        wanted = bound(plan, WHOLE, small, Limits(64, 8, 8192))(*arguments)
        problem = problem_of(num_heads=num_heads, page_size=page_size)
        same = batch(problem, [(3, length, 0)])
        for max_query in (3, 4, 5, 64, 1000):
            assert same_bits(by_the_library(plan, problem, same, max_query=max_query), wanted)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_the_librarys_own_splits_follow_the_batch(plan, num_heads, record_property):
    """Negative control. Ours never do."""
    problem = problem_of(num_heads=num_heads, page_size=16)
    pieces = [(1, length, seed) for seed, length in enumerate(CONTEXTS * 8)]

    def differing(attend):
        together = attend(batch(problem, pieces))
        return sum(
            not same_bits(together[row : row + 1], attend(batch(problem, [piece]))) for row, piece in enumerate(pieces)
        )

    theirs = differing(lambda arguments: by_the_library(plan, problem, arguments, max_query=1, num_splits=0))
    record_property("differing", theirs)
    assert theirs
    for name in NAMES:
        ours = bound(plan, name, problem, Limits(64, 64, max(CONTEXTS)))
        assert differing(lambda arguments, ours=ours: ours(*arguments)) == 0


def test_the_load_by_tma_brings_what_is_behind_a_sequence(plan):
    """Negative control: NaN behind 100 positions of pages of 64. A leftpad of zeros turns TMA off."""
    problem = problem_of(num_heads=128)
    arguments = batch(problem, [(1, 100, 0)])
    assert by_the_library(plan, problem, arguments, max_query=2).isnan().any()
    kept = torch.zeros(1, dtype=torch.int32, device="cuda")
    without = by_the_library(plan, problem, arguments, max_query=2, leftpad=kept)
    assert not without.isnan().any()
    assert same_bits(bound(plan, WHOLE, problem, Limits(64, 8, 8192))(*arguments), without)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [16, 128])
def test_errors_against_fp64(plan, name, dtype, num_heads, record_property):
    """Beside triton.mla's, whose partial results stay in fp32."""
    problem = problem_of(dtype, num_heads=num_heads)
    arguments = batch(problem, [(1, length, seed) for seed, length in enumerate((1000, 5000, 8000, 12000))])
    (exact,) = attention_mla(problem, *arguments, SCALE)
    limits = Limits(8, 8, 16384)
    errors = [
        float((bound(plan, which, problem, limits)(*arguments).double() - exact).norm() / exact.norm())
        for which in (name, "triton.mla")
    ]
    record_property("error", errors[0])
    record_property("of triton.mla's", errors[0] / errors[1])
    assert errors[0] <= 1.5 * errors[1], errors


def test_a_sequence_too_long_is_nan_and_no_other(plan):
    problem = problem_of(num_heads=16)
    arguments = batch(problem, [(1, 300, 0), (2, 5000, 1), (1, 5000, 2), (1, 20, 3)])
    for name in NAMES:
        wanted = bound(plan, name, problem, Limits(8, 8, 8192))(*arguments)
        result = bound(plan, name, problem, Limits(8, 8, 4096))(*arguments)
        assert result[1:4].isnan().all()
        assert same_bits(result[[0, 4]], wanted[[0, 4]])
    lone = batch(problem, [(1, 300, 0), (1, 5000, 1), (1, 50, 2), (1, 20, 3)])
    lone[3][2] = 0
    for name in NAMES:
        wanted = bound(plan, name, problem, Limits(4, 4, 8192, 1))(*lone)
        result = bound(plan, name, problem, Limits(4, 4, 4096, 1))(*lone)
        assert result[1].isnan().all()
        assert same_bits(result[[0, 2, 3]], wanted[[0, 2, 3]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [Limits(8, 8, 16384), Limits(3, 3, 16384, 1)], ids=str)
def test_nan_of_a_sequences_own_touches_no_other_row(plan, name, limits):
    """It stays NaN with one split. Of several FA3 leaves out the one that has it."""
    problem = problem_of(num_heads=16)
    arguments = batch(problem, [(1, 300, 0), (1, 9000, 1), (1, 90, 2)])
    wanted = bound(plan, name, problem, limits)(*arguments)
    arguments[1][arguments[2][1, 3].long(), 5] = float("nan")
    result = bound(plan, name, problem, limits)(*arguments)
    assert not same_bits(result[1], wanted[1])
    assert result[1].isnan().all() == (name == WHOLE)
    assert same_bits(result[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_cache_with_gaps_and_views_of_q(plan, page_size):
    """Rows 584 elements apart, q of a wider tensor: strides are the library's to follow."""
    problem = problem_of(num_heads=16, page_size=page_size)
    arguments = batch(problem, [(1, 300, 0), (5, 5000, 1)])
    wide_cache = torch.full((*arguments[1].shape[:2], 584), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide_q = torch.full((6, 16, 640), float("nan"), dtype=torch.bfloat16, device="cuda")
    cache, q = wide_cache[..., :576].copy_(arguments[1]), wide_q[..., :576].copy_(arguments[0])
    for name in NAMES:
        attend = bound(plan, name, problem, Limits(8, 8, 8192))
        assert same_bits(attend(q, cache, *arguments[2:]), attend(*arguments))
