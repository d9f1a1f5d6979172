"""flash_attn.* on a stand-in for the library whose bits follow the traps of the real one: ours must not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import CPU, check_rows_without_positions, relative_error, same_bits, scalars
from interpreted_flash_attn import LIMITS, PARAMS, REGISTRY, batch, bind, fake, install, rows_of

from bidispatch import ops
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.reference.attention import attention
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.sequences import check_sequences, sequence_limits
from bidispatch.verify.subject import Subject

SPLITTING = ("fa2_splits", "fa2_capacity_splits", "fa2_kv_split", "fa3_kv_split")
BESIDE = "fa3_triton_splits"
NAMES = ("fa2", "fa3", *SPLITTING, BESIDE)


@pytest.fixture(autouse=True)
def libraries(monkeypatch, tmp_path_factory):
    install(monkeypatch, tmp_path_factory.mktemp("vllm"))


def problem_of(name, dtype="float16", **dims):
    page_size = 256 if name == "fa2_capacity_splits" else 16
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "page_size": page_size}
    return ops.get("attention").problem(dtype, {**sizes, **dims})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dims", [{}, {"num_heads": 2}, {"softcap": 20.0}])
def test_a_mixed_batch_is_attention(name, dims):
    problem = problem_of(name, **dims)
    pieces = [(1, 700, 0), (5, 300, 1), (1, 1, 2), (0, 0, 3), (9, 9, 4), (1, 256, 5), (1, 257, 6)]
    arguments = batch(problem, pieces, padding_rows=3)
    out = bind(name, problem)(arguments)
    exact = attention(problem, *arguments, *scalars(problem))[0]
    assert relative_error(out[:-3], exact[:-3]) < 3e-3
    assert (out[-3:] == 7.0).all()


@pytest.mark.parametrize("name", ["fa2", "fa2_kv_split"])
@pytest.mark.parametrize("num_heads", [2, 4])
def test_the_package_serves_pages_of_256(name, num_heads):
    problem = problem_of(name, page_size=256, num_heads=num_heads)
    arguments = batch(problem, [(1, 700, 0), (5, 300, 1), (1, 256, 5)])
    out = bind(name, problem, **({"tile": {"pack_lone_queries": True}} if name == "fa2" else {}))(arguments)
    exact = attention(problem, *arguments, *scalars(problem))[0]
    assert relative_error(out, exact) < 3e-3
    assert {call.rest.get("package") for call in fake.calls if call.operator == "fa2.varlen"} == {True}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_row_is_its_own_whatever_the_batch(name, data):
    """Bits alone against bits in a batch; at level sequence also against a prefill of the whole sequence."""
    problem = problem_of(name)
    kernel = bind(name, problem)
    lengths = [data.draw(st.sampled_from([1, 15, 100, 128, 129, 256, 300, 513, 700])) for _ in range(3)]
    pieces = []
    for seed, length in enumerate(lengths):
        query = data.draw(st.sampled_from([n for n in (1, 2, 7) if n <= length]))
        pieces.append((query, length, seed))
    width = data.draw(st.sampled_from([None, 1024 // problem.size("page_size")]))
    fake.calls.clear()
    together = rows_of(kernel(batch(problem, pieces, seed=1, max_pages=width)), pieces)
    for piece, rows in zip(pieces, together, strict=True):
        assert same_bits(rows, kernel(batch(problem, [piece])))
        if name in ("fa2", "fa3"):
            query, length, seed = piece
            longest = min(length, 20)
            chunk = kernel(batch(problem, [(longest, length, seed)]))
            assert same_bits(rows[-1], chunk[-1])
            assert same_bits(rows, chunk[-query:])
    for operator in {call.operator for call in fake.calls}:
        seen = [call for call in fake.calls if call.operator == operator]
        assert len({(call.num_splits, call.causal, call.max_kv) for call in seen}) == 1
        if operator != "fa2.varlen":  # there it bounds the grid, and is never 1
            assert len({call.max_query for call in seen}) == 1
        else:
            assert min(call.max_query for call in seen) >= 2
        if name in ("fa2_capacity_splits", "fa2_kv_split", "fa3_kv_split") and operator in ("fa2.kvcache", "fa3.batch"):
            assert len({call.width for call in seen}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_check_of_verify_holds_at_the_level_it_claims(name):
    problem = problem_of(name)
    found = REGISTRY.get(f"flash_attn.{name}")
    sizes = Sizes((1, 7, 33), 4, (1,), (1, 17, 100, 300), (1, 64), decodes=3, singles=2, max_seqs=8)
    params = found.params(**PARAMS.get(name, {}))
    ((_, tile),) = found.tiles(CPU, problem, params) if found.tile else ((None, None),)
    limits = sequence_limits(problem, sizes)

    def subject(limits):
        return Subject(
            problem, torch.device("cpu"), load_attribute(found.load)(BindContext(CPU, problem, params, tile, limits))
        )

    rebind = None if name == "fa2_capacity_splits" else subject  # its capacity is below what the check binds for
    checks = list(check_sequences(subject(limits), found.claims, sizes, rebind))
    assert sum(check.rows for check in checks) > 100
    assert [check.name for check in checks if check.differing] == []
    if found.claims is Invariance.BATCH:  # negative control: what it does not claim does not hold
        above = check_sequences(subject(limits), Invariance.SEQUENCE, sizes)
        assert any(check.differing for check in above)  # up to the first that shows it


def test_packed_lone_queries_are_the_same_bits():
    problem = problem_of("fa2")
    pieces = [(1, 700, 0), (3, 300, 1), (1, 1, 2), (1, 513, 3)]
    arguments = batch(problem, pieces, padding_rows=2)
    plain = bind("fa2", problem)(arguments)
    fake.calls.clear()
    packed = bind("fa2", problem, tile={"pack_lone_queries": True})(arguments)
    assert [call.operator for call in fake.calls] == ["fa2.varlen", "fa2.kvcache"]
    assert {call.num_splits for call in fake.calls} == {1}
    assert same_bits(packed, plain)


@pytest.mark.parametrize("name", SPLITTING)
def test_lone_queries_are_split_and_the_split_is_seen(name):
    """Negative control: the stand-in's bits do follow the split."""
    problem = problem_of(name)
    arguments = batch(problem, [(1, 1000, 0)])
    other = {"num_splits": 2} if "split_size" not in PARAMS[name] else {"split_size": 512}
    assert not same_bits(bind(name, problem)(arguments), bind(name, problem, **other)(arguments))


@pytest.mark.parametrize("name", SPLITTING)
def test_what_a_kernel_is_bound_for_moves_no_bit(name):
    problem = problem_of(name)
    pieces = [(1, 700, 0), (3, 300, 1), (1, 40, 2), (1, 513, 3)]
    arguments = batch(problem, pieces)
    wanted = bind(name, problem)(arguments)
    assert same_bits(bind(name, problem, Limits(6, 4, 700))(arguments), wanted)
    few = bind(name, problem, tile={"workspace_mb": 1})
    fake.calls.clear()
    big = problem_of(name, num_heads=32, num_kv_heads=2)
    bind(name, big, Limits(64, 64, 1024), tile={"workspace_mb": 1})(batch(big, [(1, 40, i) for i in range(20)]))
    assert sum(call.operator in ("fa2.kvcache", "fa3.batch") for call in fake.calls) > 1  # in turn
    assert same_bits(few(arguments), wanted)
    lone = [piece for piece in pieces if piece[0] == 1]
    alone = bind(name, problem, Limits(3, 3, 1024, max_query_len=1))
    fake.calls.clear()
    result = alone(batch(problem, lone))
    assert {call.operator for call in fake.calls} <= {"fa2.kvcache", "fa3.batch"}
    assert same_bits(result, wanted[[0, 4, 5]])


def test_lone_queries_beside_fa3_have_the_splits_of_their_class_and_the_library_is_not_asked_for_them():
    problem = problem_of(BESIDE)
    pieces = [(1, 700, 0), (3, 300, 1), (1, 40, 2), (1, 513, 3)]
    wanted = bind(BESIDE, problem)(batch(problem, pieces))
    assert [call.operator for call in fake.calls] == ["fa3.varlen"]
    assert not same_bits(bind(BESIDE, problem, kv_split=512)(batch(problem, pieces)), wanted)
    fake.calls.clear()
    lone = [piece for piece in pieces if piece[0] == 1]
    alone = bind(BESIDE, problem, Limits(3, 3, 1024, max_query_len=1))(batch(problem, lone))
    assert fake.calls == []
    assert same_bits(alone, wanted[[0, 4, 5]])
    whole = bind("fa3", problem)(batch(problem, pieces))
    assert same_bits(whole[1:4], wanted[1:4])
    assert not same_bits(whole, wanted)


def test_lone_queries_beside_fa3_all_fit_or_it_is_not_bound():
    problem = problem_of(BESIDE, num_heads=32)
    with pytest.raises(UsageError, match=r"64 lone queries of 1024 positions.*workspace_mb=1 holds"):
        bind(BESIDE, problem, Limits(64, 64, 1024), tile={"workspace_mb": 1})
    with pytest.raises(UsageError, match="decode_query_len=16"):
        bind(BESIDE, problem, tile={"decode_query_len": 16})


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_and_their_pages_do_not_matter(name):
    problem = problem_of(name)
    kernel = bind(name, problem)
    pieces = [(1, 300, 0), (4, 40, 1)]
    wanted = kernel(batch(problem, pieces))
    arguments = batch(problem, [*pieces, (3, 90, 2)], seed=5)
    pages = arguments[3][2, : -(-90 // problem.size("page_size"))].long()
    for cache in arguments[1:3]:
        cache[pages] = float("nan")
    assert same_bits(kernel(arguments)[:5], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_promised_gives_nan(name):
    """A sequence longer than bound for, or than its table holds; more rows than bound for."""
    problem = problem_of(name)
    pieces = [(1, 300, 0), (2, 900, 1), (1, 900, 2), (1, 20, 3)]
    arguments = batch(problem, pieces)
    wanted = bind(name, problem)(arguments)
    result = bind(name, problem, Limits(64, 8, 512))(arguments)
    assert result[1:4].isnan().all()
    assert same_bits(result[[0, 4]], wanted[[0, 4]])
    narrow = [*arguments]
    narrow[3] = arguments[3][:, : 512 // problem.size("page_size")].contiguous()
    result = bind(name, problem)(narrow)
    assert result[1:4].isnan().all()
    assert same_bits(result[[0, 4]], wanted[[0, 4]])
    if name in SPLITTING:
        result = bind(name, problem, Limits(64, 8, 1024, max_query_len=1))(arguments)
        assert result[1:3].isnan().all()
        assert same_bits(result[[0, 3, 4]], wanted[[0, 3, 4]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [Limits(64, 8, 1024), Limits(4, 4, 1024, max_query_len=1)], ids=str)
def test_rows_of_a_sequence_without_positions_are_0(name, limits):
    """FA2 is never shown such a row, and its stand-in would not take it."""
    problem = problem_of(name)
    count = 1 if limits.max_query_len == 1 else 3
    arguments = batch(problem, [(1, 300, 0), (1, 40, 1), (count, 70, 2), (1, 90, 3)])
    check_rows_without_positions(bind(name, problem, limits), problem, arguments, [1, 2])


@pytest.mark.parametrize("name", ["fa2", "fa2_kv_split"])
def test_any_stride_of_q_and_out_and_unaligned_ones(name):
    problem = problem_of(name)
    pieces = [(1, 300, 0), (3, 40, 1)]
    arguments = batch(problem, pieces)
    wanted = bind(name, problem)(arguments)
    kernel = load_attribute(REGISTRY.get(f"flash_attn.{name}").load)
    found = REGISTRY.get(f"flash_attn.{name}")
    params, tile = found.params(**PARAMS.get(name, {})), found.tile() if found.tile else None
    launch = kernel(BindContext(CPU, problem, params, tile, LIMITS))
    for offset, extra in ((0, 8), (1, 3)):
        memory = torch.zeros(2, 4 * (4 * 128 + extra) + offset, dtype=torch.float16)
        strides = (4 * 128 + extra, 128, 1)
        q, out = (part[offset:].as_strided((4, 4, 128), strides) for part in memory)
        q.copy_(arguments[0])
        launch(q, *arguments[1:], *scalars(problem), out)
        assert same_bits(out, wanted)


def test_caches_must_be_aligned():
    problem = problem_of("fa2")
    arguments = batch(problem, [(1, 30, 0)])
    memory = torch.zeros(arguments[1].numel() + 1, dtype=torch.float16)
    arguments[1] = memory[1:].view(arguments[1].shape)
    with pytest.raises(ArgumentError, match="k_cache begins at"):
        bind("fa2", problem)(arguments)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_heads", [2, 4, 32, 130])
def test_fa3_never_meets_the_tile_of_few_rows(head_dim, num_heads):
    problem = problem_of("fa3", num_heads=num_heads, head_dim=head_dim)
    for limits in (Limits(1, 1, 64), Limits(64, 4, 64), Limits(64, 4, 64, max_query_len=1)):
        fake.calls.clear()
        bind("fa3", problem, limits)(batch(problem, [(1, 40, 0)]))
        (call,) = fake.calls
        assert call.max_query * (num_heads // 2) > 64
        assert call.max_query >= 2
        assert call.causal


def varlen(problem, arguments, *, max_query, num_splits=0, max_kv=None):
    """vLLM's FA2 as it is called without care."""
    q, k, v, table, lengths, starts, *_ = arguments
    out = torch.empty_like(q)
    torch.ops._vllm_fa2_C.varlen_fwd(
        *(q, k, v, out, starts, torch.zeros_like(starts), lengths, None, table, None, max_query),
        *(max_kv or int(lengths.max()), 0.0, *scalars(problem), False, True, -1, -1, 0.0, False, num_splits, None),
    )
    return out


def test_a_heuristic_by_the_batch_is_seen():
    """Negative control: max_seqlen_q = 1 and no number of splits."""
    problem = problem_of("fa2")
    pieces = [(1, 700, seed) for seed in range(4)]
    together = rows_of(varlen(problem, batch(problem, pieces), max_query=1), pieces)
    alone = [varlen(problem, batch(problem, [piece]), max_query=1) for piece in pieces]
    assert not all(map(same_bits, together, alone))


@pytest.mark.parametrize("package", [True, False])
def test_a_trimmed_block_table_moves_the_splits_of_the_package_alone(package):
    """Negative control, and what tells the two libraries apart: the extent is the capacity's or the own length's."""
    problem = problem_of("fa2_capacity_splits")
    q, k, v, table, lengths, *_ = batch(problem, [(1, 700, 0)], max_pages=8)
    operator = fake.package().fwd_kvcache if package else torch.ops._vllm_fa2_C.fwd_kvcache
    results = []
    for width in (8, 3):
        nothing = (None,) * 4
        out, _ = operator(
            *(q[None], k, v, None, None, lengths, *nothing, table[:, :width], None, None, *scalars(problem)),
            *(True, -1, -1, 0.0, True, 4),
        )
        results.append(out)
    assert same_bits(*results) is not package


@pytest.mark.parametrize(("head_dim", "same"), [(64, False), (128, True)])
def test_fa3_switches_its_tile_by_the_longest_query(head_dim, same):
    """Negative control: max_seqlen_q x group on both sides of 64, as the longest query of a batch moves it."""
    problem = problem_of("fa3", head_dim=head_dim)
    q, k, v, table, lengths, starts, *_ = batch(problem, [(1, 700, 0)])
    results = []
    for max_query in (32, 33):
        out = torch.empty_like(q)
        torch.ops._vllm_fa3_C.fwd(
            *(q, k, v, None, None, None, out, starts, None, None, None, lengths, max_query, 1024, table, None, None),
            *(None,) * 6,
            *(*scalars(problem), True, -1, -1, 0.0, True, None, 1, True, 0, None, 1, 0, None),
        )
        results.append(out)
    assert same_bits(*results) is same
