"""flash_attn.fa3_mla and its splits on the stand-in for FA3 with q_v: routing, splits, merge, alignment and NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import check_rows_without_positions, relative_error, same_bits, scalars
from interpreted_flash_attn import REGISTRY, batch, bind, fake, install, launch_of, rows_of

from bidispatch import ops
from bidispatch.errors import ArgumentError
from bidispatch.invariance import Invariance
from bidispatch.ops.reference.mla import attention_mla
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.sequences import check_sequences, sequence_limits
from bidispatch.verify.subject import Subject

WHOLE, SPLIT = "fa3_mla", "fa3_mla_splits"
NAMES = (WHOLE, SPLIT)
RANK, WIDTH = 512, 576
PIECES = [(1, 600, 0), (5, 300, 1), (1, 1, 2), (0, 0, 3), (9, 9, 4), (1, 256, 5), (1, 257, 6)]


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path_factory):
    install(monkeypatch, tmp_path_factory.mktemp("vllm"))


def problem_of(**dims):
    return ops.get("attention.mla").problem("float16", {"num_heads": 2, "page_size": 16, **dims})


def library_alone(problem, arguments, *, max_query, leftpad=None, causal=True, schedule=None, most=1):
    """FA3 as vLLM's backend calls it: views of q and of the cache, one split."""
    q, cache, table, lengths, starts = arguments
    out = torch.empty(*q.shape[:2], RANK, dtype=q.dtype)
    keys, values = cache[..., RANK:].unsqueeze(-2), cache[..., :RANK].unsqueeze(-2)
    longest = table.shape[1] * problem.size("page_size")
    _, lse, *_ = torch.ops._vllm_fa3_C.fwd(
        *(q[..., RANK:], keys, values, None, None, q[..., :RANK], out, starts, None, None, None, lengths, max_query),
        *(
            longest,
            table,
            None,
            leftpad,
            *(None,) * 6,
            *scalars(problem),
            causal,
            -1,
            -1,
            0.0,
            True,
            schedule,
            most,
            True,
        ),
        *(0, None, 1, 0, None),
    )
    return out, lse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dims", [{}, {"num_heads": 3, "page_size": 32}, {"page_size": 64}, {"page_size": 256}])
def test_a_mixed_batch_is_attention(name, dims):
    problem = problem_of(**dims)
    arguments = batch(problem, PIECES, padding_rows=3)
    out = bind(name, problem)(arguments)
    exact = attention_mla(problem, *arguments, *scalars(problem))[0]
    assert relative_error(out[:-3], exact[:-3]) < 3e-3
    assert (out[-3:] == 7.0).all()


def test_one_split_has_the_bits_of_the_library():
    problem = problem_of()
    pieces = [(1, 600, 0), (5, 300, 1), (1, 257, 2)]
    arguments = batch(problem, pieces)
    assert same_bits(bind(WHOLE, problem)(arguments), library_alone(problem, arguments, max_query=64)[0])


def scheduled(rows, splits, heads):
    """A schedule of a few sequences, as hopper/flash_prepare_scheduler.cu lays it out."""
    slack = [0] * (-len(rows) % 4)
    return torch.tensor([*(count * heads for count in rows), *slack, *splits, *slack, 0], dtype=torch.int32)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(
    ("params", "splits"),
    [
        ({}, [1, 2, 4, 4, 1, 4]),
        ({"split_size": 512, "least_splits": 3}, [1, 1, 3, 3, 1, 2]),
        ({"split_size": 512, "least_splits": 4, "smallest_split": 128}, [1, 2, 4, 4, 1, 4]),
    ],
    ids=str,
)
def test_splits_are_the_librarys_by_a_sequences_own_length(page_size, params, splits):
    """Bit by bit: one for each 128 positions, at most four; or for 512, at least three that have 256, or 128.

    Where rows may be more than one, with the same bits.
    """
    problem = problem_of(page_size=page_size)
    pieces = [(1, 128, 0), (1, 129, 1), (1, 700, 2), (1, 1000, 3), (1, 1, 4), (1, 400, 5)]
    arguments = batch(problem, pieces)
    made = scheduled([1] * 6, splits, 2)
    kept = torch.zeros(6, dtype=torch.int32)
    wanted, _ = library_alone(problem, arguments, max_query=1, leftpad=kept, causal=False, schedule=made, most=4)
    assert same_bits(bind(SPLIT, problem, Limits(6, 6, 1024, max_query_len=1), **params)(arguments), wanted)
    assert same_bits(bind(SPLIT, problem, **params)(arguments), wanted)


def test_the_librarys_own_schedule_follows_the_batch():
    """Negative control."""
    problem = problem_of()
    pieces = [(1, 700, 0), (1, 600, 1), (1, 900, 2)]

    def first(pieces):
        return library_alone(problem, batch(problem, pieces), max_query=1, causal=False, most=4)[0][:1]

    assert not same_bits(first(pieces), first(pieces[:1]))
    with_ours = bind(SPLIT, problem)
    assert same_bits(with_ours(batch(problem, pieces))[:1], with_ours(batch(problem, pieces[:1])))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_row_is_its_own_whatever_the_batch(name, data):
    """Bits alone against bits in a batch; at level sequence also against a prefill of the whole sequence."""
    problem = problem_of(page_size=data.draw(st.sampled_from([16, 64])))
    kernel = bind(name, problem)
    lengths = [data.draw(st.sampled_from([1, 15, 63, 64, 65, 256, 300, 513])) for _ in range(3)]
    pieces = []
    for seed, length in enumerate(lengths):
        query = data.draw(st.sampled_from([n for n in (1, 2, 7) if n <= length]))
        pieces.append((query, length, seed))
    width = data.draw(st.sampled_from([None, 1024 // problem.size("page_size")]))
    fake.calls.clear()
    together = rows_of(kernel(batch(problem, pieces, seed=1, max_pages=width)), pieces)
    for piece, rows in zip(pieces, together, strict=True):
        assert same_bits(rows, kernel(batch(problem, [piece])))
        if name == WHOLE:
            query, length, seed = piece
            chunk = kernel(batch(problem, [(min(length, 20), length, seed)]))
            assert same_bits(rows, chunk[-query:])
    for splits in {call.num_splits for call in fake.calls}:
        seen = [call for call in fake.calls if call.num_splits == splits]
        assert len({(call.num_splits, call.causal, call.max_kv, call.max_query) for call in seen}) == 1
        assert {call.rest["leftpad"] for call in seen} == {True}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page_size", [16, 64])
def test_every_check_of_verify_holds_at_the_level_it_claims(name, page_size):
    """Among them slots of NaN in a sequence's last page."""
    problem = problem_of(page_size=page_size)
    found = REGISTRY.get(f"flash_attn.{name}")
    sizes = Sizes((1, 7, 33), 4, (1,), (1, 17, 100, 300), (1, 64), decodes=3, singles=2, max_seqs=8)

    def subject(limits):
        return Subject(problem, torch.device("cpu"), launch_of(name, problem, limits))

    checks = list(check_sequences(subject(sequence_limits(problem, sizes)), found.claims, sizes, subject))
    assert sum(check.rows for check in checks) > 100
    assert [check.name for check in checks if check.differing] == []
    if found.claims is Invariance.BATCH:  # negative control: what it does not claim does not hold
        above = check_sequences(subject(sequence_limits(problem, sizes)), Invariance.SEQUENCE, sizes)
        assert any(check.differing for check in above)  # up to the first that shows it


def test_the_load_by_tma_brings_what_is_behind_a_sequence():
    """Negative control: pages of whole KV blocks and more than 64 packed rows. Ours names a leftpad of zeros."""
    problem = problem_of(page_size=64, num_heads=2)
    arguments = batch(problem, [(1, 100, 0)])
    few, many = (library_alone(problem, arguments, max_query=longest)[0] for longest in (32, 33))
    assert not few.isnan().any()
    assert many.isnan().any()
    kept = torch.zeros(1, dtype=torch.int32)
    assert same_bits(library_alone(problem, arguments, max_query=33, leftpad=kept)[0], few)
    for limits in (Limits(1, 1, 1024), Limits(64, 8, 1024)):
        assert same_bits(bind(WHOLE, problem, limits)(arguments), few)


def test_lone_queries_are_split_and_the_split_is_seen():
    """Negative control: the stand-in's bits do follow the split."""
    problem = problem_of()
    arguments = batch(problem, [(1, 1000, 0)])
    split = bind(SPLIT, problem)(arguments)
    assert [call.num_splits for call in fake.calls] == [1, 4]
    assert not same_bits(split, bind(SPLIT, problem, split_size=512)(arguments))
    assert not same_bits(split, bind(SPLIT, problem, num_splits=3)(arguments))
    assert not same_bits(split, bind(WHOLE, problem)(arguments))


def test_lone_queries_are_shown_to_one_of_two_calls():
    problem = problem_of()
    bind(SPLIT, problem)(batch(problem, [(1, 300, 0), (3, 300, 1), (1, 1, 2)]))
    walked, split = fake.calls
    assert (walked.num_splits, walked.lengths, walked.rest["used_q"]) == (1, (0, 300, 0), (0, 3, 0))
    assert (split.num_splits, split.lengths, split.rows) == (4, (300, 0, 1), (1, 1, 1))


def test_longer_queries_of_the_splits_have_one_split():
    problem = problem_of()
    arguments = batch(problem, [(3, 600, 0)])
    assert same_bits(bind(SPLIT, problem)(arguments), bind(WHOLE, problem)(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_kernel_is_bound_for_moves_no_bit(name):
    problem = problem_of()
    pieces = [(1, 600, 0), (3, 300, 1), (1, 40, 2), (1, 513, 3)]
    arguments = batch(problem, pieces)
    wanted = bind(name, problem)(arguments)
    assert same_bits(bind(name, problem, Limits(6, 4, 600))(arguments), wanted)
    lone = [piece for piece in pieces if piece[0] == 1]
    alone = bind(name, problem, Limits(3, 3, 1024, max_query_len=1))
    fake.calls.clear()
    result = alone(batch(problem, lone))
    (call,) = fake.calls  # rows as they are
    assert call.rows == (1, 1, 1)
    assert same_bits(result, wanted[[0, 4, 5]])


def test_more_lone_queries_than_the_workspace_holds_are_taken_in_turn():
    problem = problem_of(num_heads=16)
    pieces = [(1, 20 * i + 1, i) for i in range(20)]
    limits = Limits(64, 32, 4096)
    little = launch_of(SPLIT, problem, limits, tile={"workspace_mb": 2})
    held = sum(t.numel() * t.element_size() for t in (little._rows, little._partial, little._pages, little._entry_lens))
    inside = 4 * little._queries * 16 * (4 * 513)
    assert held + inside <= 2 << 20
    wanted = bind(SPLIT, problem, limits)(batch(problem, pieces))
    fake.calls.clear()
    assert same_bits(bind(SPLIT, problem, limits, tile={"workspace_mb": 2})(batch(problem, pieces)), wanted)
    assert sum(call.num_splits > 1 for call in fake.calls) > 1


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_and_their_pages_do_not_matter(name):
    problem = problem_of()
    kernel = bind(name, problem)
    wanted = kernel(batch(problem, [(1, 300, 0), (4, 40, 1)]))
    arguments = batch(problem, [(1, 300, 0), (4, 40, 1), (3, 90, 2)], seed=5)
    arguments[1][arguments[2][2, :6].long()] = float("nan")
    assert same_bits(kernel(arguments)[:5], wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [Limits(64, 8, 1024), Limits(3, 3, 1024, max_query_len=1)], ids=str)
def test_nan_of_a_sequences_own_touches_no_other_row(name, limits):
    """It stays NaN with one split. Of several FA3 leaves out the one that has it: see the docs."""
    problem = problem_of()
    arguments = batch(problem, [(1, 300, 0), (1, 900, 1), (1, 90, 2)])
    wanted = bind(name, problem, limits)(arguments)
    arguments[1][arguments[2][1, 3].long(), 5] = float("nan")
    result = bind(name, problem, limits)(arguments)
    assert not same_bits(result[1], wanted[1])
    assert result[1].isnan().all() == (name == WHOLE)
    assert same_bits(result[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_promised_gives_nan(name):
    """A sequence longer than bound for, or than its table holds; more rows than bound for."""
    problem = problem_of()
    arguments = batch(problem, [(1, 300, 0), (2, 900, 1), (1, 900, 2), (1, 20, 3)])
    wanted = bind(name, problem)(arguments)
    result = bind(name, problem, Limits(64, 8, 512))(arguments)
    assert result[1:4].isnan().all()
    assert same_bits(result[[0, 4]], wanted[[0, 4]])
    narrow = [*arguments]
    narrow[2] = arguments[2][:, : 512 // 16].contiguous()
    result = bind(name, problem)(narrow)
    assert result[1:4].isnan().all()
    assert same_bits(result[[0, 4]], wanted[[0, 4]])
    if name == SPLIT:
        result = bind(name, problem, Limits(64, 8, 1024, max_query_len=1))(arguments)
        assert result[1:3].isnan().all()
        assert same_bits(result[[0, 3, 4]], wanted[[0, 3, 4]])


def test_a_long_sequence_among_lone_queries_gives_nan_alone():
    """FA3 is told that it has no row: it would add up what is left of an earlier call in its place."""
    problem = problem_of()
    arguments = batch(problem, [(1, 300, 0), (1, 900, 1), (1, 50, 2), (1, 20, 3)], padding_rows=2)
    arguments[3][2] = 0
    wanted = bind(SPLIT, problem, Limits(8, 8, 1024, max_query_len=1))(arguments)
    result = bind(SPLIT, problem, Limits(8, 8, 512, max_query_len=1))(arguments)
    assert result[1].isnan().all()
    assert same_bits(result[[0, 2, 3, 4, 5]], wanted[[0, 2, 3, 4, 5]])
    assert (result[4:] == 7.0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [Limits(64, 8, 1024), Limits(3, 3, 1024, max_query_len=1)], ids=str)
def test_a_lone_query_of_no_positions_gives_0(name, limits):
    problem = problem_of()
    arguments = batch(problem, [(1, 300, 0), (1, 40, 1), (1, 90, 2)])
    check_rows_without_positions(bind(name, problem, limits), problem, arguments, [1])


@pytest.mark.parametrize("name", NAMES)
def test_any_stride_of_q_cache_and_out_and_unaligned_ones(name):
    problem = problem_of()
    arguments = batch(problem, [(1, 300, 0), (3, 40, 1)])
    wanted = bind(name, problem)(arguments)
    launch = launch_of(name, problem)
    cache = arguments[1]
    padded = torch.full((len(cache), 16, WIDTH + 8), float("nan"), dtype=torch.float16)[..., :WIDTH]
    padded.copy_(cache)
    for offset, extra in ((0, 8), (1, 3)):
        q = torch.zeros(4 * (2 * WIDTH + extra) + offset, dtype=torch.float16)[offset:]
        q = q.as_strided((4, 2, WIDTH), (2 * WIDTH + extra, WIDTH, 1))
        out = torch.zeros(4 * (2 * RANK + extra) + offset, dtype=torch.float16)[offset:]
        out = out.as_strided((4, 2, RANK), (2 * RANK + extra, RANK, 1))
        q.copy_(arguments[0])
        launch(q, padded, *arguments[2:], *scalars(problem), out)
        assert same_bits(out, wanted)


def test_a_cache_that_is_not_aligned_is_refused():
    problem = problem_of()
    arguments = batch(problem, [(1, 30, 0)])
    memory = torch.zeros(arguments[1].numel() + 1, dtype=torch.float16)
    arguments[1] = memory[1:].view(arguments[1].shape)
    with pytest.raises(ArgumentError, match="kv_cache begins at"):
        bind(WHOLE, problem)(arguments)
