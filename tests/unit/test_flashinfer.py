"""flashinfer.paged against a stand-in for the library: how batches are parted, what is refused, what it claims."""

from __future__ import annotations

import gc
import itertools
import sys
from dataclasses import replace

import pytest
import torch
from fake_flashinfer import TABLES, FakeFlashInfer, table_bytes, tile_rows
from fakes import CPU, H200, fake, plan_of, registry_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ArgumentError, BackendError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.reference.attention import attention as reference
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.planning.plan import Plan
from bidispatch.records import RecordStore
from bidispatch.registry import Registry, Rung
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.compare import bits
from bidispatch.verify.sequences import check_sequences, sequence_limits
from bidispatch.verify.subject import Subject
from bidispatch_backends.flashinfer import attention, parts, register
from bidispatch_backends.flashinfer.params import PagedParams, PagedTile
from bidispatch_backends.flashinfer.parts import Layout, Part, Request, groups, most_bytes, worst_bytes

SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
LAYOUT = Layout(heads=32, group=4, head_dim=128, decode_split=2048, prefill_split=4096)
PREDICTED = Device(ARCHS["sm90"], "sm90", predicted=True)


def implementation():
    registry = Registry()
    register(registry)
    return registry.get("flashinfer.paged")


def problem_of(dtype="bfloat16", **dims):
    return ops.get("attention").problem(dtype, {**SMALL, **dims})


@pytest.fixture
def library(monkeypatch):
    fake = FakeFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    return fake


def bound(problem, limits=Limits(4096, 64, 4096), params=PagedParams(decode_split=256), tile=PagedTile()):  # noqa: B008
    return bind(problem, CPU, (Rung(implementation(), params, tile),), limits)


def plans(fake):
    """The plans of calls: binding makes one more, to build the kernels."""
    return fake.plans[1:]


# --- parting ----------------------------------------------------------------------------------------------------------

lengths = st.integers(1, 40_000).flatmap(lambda kv: st.tuples(st.integers(0, min(kv, 600)), st.just(kv)))


@given(st.lists(lengths, min_size=1, max_size=20), st.sampled_from([64, 128, 256]), st.sampled_from([1, 3, 4, 8, 40]))
def test_what_a_plan_decides_follows_from_a_requests_own_lengths(batch, head_dim, group):
    layout = replace(LAYOUT, head_dim=head_dim, group=group)
    requests = [Request(i, 0, query, kv) for i, (query, kv) in enumerate(batch)]
    found = list(groups(layout, requests, 1 << 40))
    assert sorted(request.index for _, members in found for request in members) == [
        request.index for request in requests if request.query
    ]
    for part, members in found:
        packed = [request.query * group for request in members]
        chunks = [-(-request.kv // part.split) if part.split else 1 for request in members]
        mean = sum(packed) // len(packed)
        assert {tile_rows(rows, head_dim) for rows in (*packed, mean)} == {layout.tile_rows(part.range)}
        assert all(count > 1 for count in chunks) or all(count == 1 for count in chunks)
        for request in members:
            ((alone, _),) = groups(layout, [request], 1 << 40)
            assert alone == part


@given(st.lists(lengths, min_size=1, max_size=30))
def test_every_group_fits_the_workspace_that_one_request_needs(batch):
    requests = [Request(i, 0, query, kv) for i, (query, kv) in enumerate(batch)]
    workspace = max(floats for _, _, floats, _ in worst_bytes(LAYOUT, 600, 40_000))
    for part, members in groups(LAYOUT, requests, workspace):
        items = sum(LAYOUT.items(part, request.query, request.kv) for request in members)
        assert LAYOUT.float_bytes(part, items) <= workspace
        assert parts.index_bytes(items, sum(r.query for r in members), len(members)) <= parts.INDEX_BYTES


def test_many_long_decodes_with_small_splits_take_several_plans():
    """16 sequences of 32768 positions in splits of 256 overflow a workspace of 128 MiB when planned at once."""
    layout = replace(LAYOUT, decode_split=256)
    requests = [Request(i, i, 1, 32768) for i in range(16)]
    found = [len(members) for _, members in groups(layout, requests, 128 << 20)]
    assert sum(found) == 16
    assert len(found) > 1
    assert [len(members) for _, members in groups(layout, requests, 1 << 30)] == [16]


def test_a_plans_tables_are_bounded_too():
    requests = [Request(i, i, 8192, 8192) for i in range(4000)]
    found = list(groups(replace(LAYOUT, prefill_split=0), requests, 1 << 20))
    assert len(found) > 1
    assert {part for part, _ in found} == {Part(2, 0)}


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(1, 1 << 20), st.booleans())
def test_the_estimate_of_a_plans_tables_covers_them(items, rows, requests, split):
    assert parts.INDEX_BYTES == TABLES
    assert table_bytes(items, rows, requests, split) <= parts.index_bytes(items, rows, requests)


@given(
    st.lists(lengths, min_size=1, max_size=30),
    st.sampled_from([1, 3, 4, 8, 40]),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([0, 256, 2048]),
)
def test_no_part_of_a_call_exceeds_what_its_limits_allow(batch, group, head_dim, prefill_split):
    layout = replace(LAYOUT, group=group, head_dim=head_dim, decode_split=256, prefill_split=prefill_split)
    requests = [Request(i, 0, query, kv) for i, (query, kv) in enumerate(batch)]
    longest, tokens = max(query for query, _ in batch), sum(query for query, _ in batch)
    if not tokens:
        return
    most = most_bytes(layout, longest, max(kv for _, kv in batch), tokens, len(batch))
    assert most >= max(floats for _, _, floats, _ in worst_bytes(layout, longest, max(kv for _, kv in batch)))
    whole: dict[Part, int] = {}
    for part, members in groups(layout, requests, 1 << 60):
        items = sum(layout.items(part, request.query, request.kv) for request in members)
        whole[part] = whole.get(part, 0) + items
    assert all(layout.float_bytes(part, items) <= most for part, items in whole.items())


def test_the_largest_call_follows_its_tokens_not_the_longest_query_of_every_sequence():
    layout = replace(LAYOUT, prefill_split=512)
    ((_, _, one, _),) = (worst for worst in worst_bytes(layout, 64, 5000) if worst[1] == 64)
    most = most_bytes(layout, 64, 5000, 64, 64)
    assert one < most < 4 * one  # two full tiles, and one begun for each of three prompts beyond 16 tokens
    assert most_bytes(layout, 1, 5000, 64, 64) == layout.float_bytes(Part(0, 2048), 64 * 3)


def test_the_worst_request_of_each_range_is_within_it():
    worst = {part.range: query for part, query, _, _ in worst_bytes(LAYOUT, 8192, 131072)}
    assert worst == {0: 4, 1: 16, 2: 8192}
    assert {part.range for part, *_ in worst_bytes(LAYOUT, 1, 131072)} == {0}
    wide = {part.range: query for part, query, _, _ in worst_bytes(replace(LAYOUT, group=40), 1, 1024)}
    assert wide == {1: 1}


def test_one_token_takes_decodes_split_however_many_heads_share_its_kv():
    shared = replace(LAYOUT, group=32, prefill_split=0)
    assert [shared.part_of(query, 5000) for query in (1, 2, 3)] == [Part(1, 2048), Part(1, 0), Part(2, 0)]
    assert [LAYOUT.part_of(query, 5000).split for query in (1, 4, 5, 16, 17)] == [2048, 2048, 4096, 4096, 4096]
    most = {(part, query) for part, query, _, _ in worst_bytes(shared, 8192, 131072)}
    assert most == {(Part(1, 2048), 1), (Part(1, 0), 2), (Part(2, 0), 8192)}


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [{}, {"softcap": 20.0}, {"causal": False}, {"num_kv_heads": 4, "page_size": 1}])
def test_a_mixed_batch_is_attention(library, monkeypatch, dims):
    monkeypatch.setattr("fake_flashinfer.MARKS", {})
    problem = problem_of("float16", **dims)
    arguments = paged_batch(problem, [1, 40, 1, 0, 3, 9], [200, 40, 17, 0, 256, 130], padding_rows=2)
    q = arguments[0]
    out = torch.full_like(q, 7)
    bound(problem)(*arguments, out=out)
    (wanted,) = reference(problem, *arguments, problem.size("head_dim") ** -0.5)
    rows = int(arguments[5][-1])
    torch.testing.assert_close(out[:rows].double(), wanted[:rows], rtol=1e-3, atol=1e-3)
    assert (out[rows:] == 7).all()
    assert all(plan["causal"] is problem.flag("causal") for plan in library.plans)


def test_no_row_depends_on_its_neighbours(library):
    problem = problem_of()
    sizes = Sizes(
        rows=(1, 2, 7, 17, 64),
        pool=4,
        graph_rows=(1,),
        lengths=(1, 17, 100, 300, 520),
        chunks=(7, 64),
        decodes=8,
        singles=3,
        max_seqs=9,
    )

    def rebind(limits):
        return Subject(problem, torch.device("cpu"), bound(problem, limits).launch)

    subject = rebind(sequence_limits(problem, sizes))
    for check in check_sequences(subject, Invariance.BATCH, sizes, rebind):
        assert check.passed, str(check)
    assert {(plan["tile"], plan["split"]) for plan in library.plans} == {
        (16, False), (16, True), (64, False), (128, False)
    }  # fmt: skip


def test_one_plan_for_all_would_be_seen(library, monkeypatch):
    """The naive call: a long prompt beside a decode changes the decode's bits."""
    problem = problem_of()

    def at_once(layout, requests, workspace):
        return [(Part(0, 256), [request for request in requests if request.query])]

    alone = paged_batch(problem, [1], [300], sequence_seeds=[5])
    together = paged_batch(problem, [1, 200], [300, 200], sequence_seeds=[5, 6])

    def decode(arguments):
        return bits(bound(problem)(*arguments)[:1])

    assert torch.equal(decode(alone), decode(together))
    monkeypatch.setattr("bidispatch_backends.flashinfer.attention.groups", at_once)
    assert not torch.equal(decode(alone), decode(together))


def test_splits_are_given_in_pages(library):
    problem = problem_of(page_size=32)
    arguments = paged_batch(problem, [1, 1, 100], [1000, 256, 700])
    bound(problem, params=PagedParams(decode_split=256, prefill_split=512))(*arguments)
    assert [(plan["size"], plan["disable_split_kv"], plan["items"]) for plan in plans(library)] == [
        (None, True, 1),
        (8, False, 4),
        (16, False, 4),
    ]


def test_caches_and_outputs_of_other_strides(library):
    problem = problem_of()
    arguments = paged_batch(problem, [1, 30, 1], [40, 30, 300])
    wanted = bound(problem)(*arguments)
    q, k_cache, v_cache, *rest = arguments
    both = torch.stack((k_cache, v_cache), dim=1)  # as vLLM lays them out
    out = torch.empty(len(q), 4, 128, dtype=q.dtype)[..., :64]
    bound(problem)(q, both[:, 0], both[:, 1], *rest, out=out)
    assert torch.equal(bits(out), bits(wanted))
    with pytest.raises(ArgumentError, match="k_cache and v_cache must have the same strides"):
        bound(problem)(q, both[:, 0], v_cache, *rest)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": [5000, 40]}, "5000 positions; its block table and max_seq_len allow"),
        ({"seq_lens": [0, 40]}, "sequence 0 has 1 query rows and 0 positions"),
        ({"query_start_loc": [0, 1, 30]}, "goes from 0 to 30, q has rows 0 to 3"),
        ({"query_start_loc": [1, 2, 3]}, "goes from 1 to 3"),
        ({"query_start_loc": [0, 3, 1]}, "sequence 1 has -2 query rows"),
    ],
)
def test_lengths_that_make_no_batch_are_refused(library, change, message):
    problem = problem_of()
    names = [argument.name for argument in ops.get("attention").arguments]
    arguments = dict(zip(names, paged_batch(problem, [1, 2], [30, 40]), strict=True))
    arguments |= {name: torch.tensor(values, dtype=torch.int32) for name, values in change.items()}
    with pytest.raises(ArgumentError, match=message):
        bound(problem)(*arguments.values())


def test_a_query_longer_than_it_was_bound_for_is_refused(library):
    problem = problem_of()
    kernel = bound(problem, Limits(100, 4, 100, max_query_len=8))
    with pytest.raises(ArgumentError, match="9 query rows, max_query_len is 8"):
        kernel(*paged_batch(problem, [9], [30]))


def test_partial_results_that_cannot_fit_are_refused_when_binding(library):
    problem = problem_of(num_heads=32, num_kv_heads=8, head_dim=128)
    limits = Limits(32768, 4, 131072)
    bound(problem, limits, PagedParams())
    with pytest.raises(UsageError, match=r"prefill_split=4096 needs \d+ MiB for one sequence of 32768 query tokens"):
        bound(problem, limits, PagedParams(prefill_split=4096))
    with pytest.raises(UsageError, match=r"decode_split=256 needs .* workspace_mb is 16"):
        bound(problem, limits, PagedParams(decode_split=256), PagedTile(workspace_mb=16))
    with pytest.raises(UsageError, match="exceed FlashInfer's tables"):
        bound(problem, Limits(1 << 25, 1, 1 << 25), PagedParams(decode_split=0))
    with pytest.raises(ArgumentError, match="max_seq_len"):
        bound(problem, Limits(8, 8))


def test_a_call_of_long_sequences_in_small_splits_takes_no_more_than_the_workspace(library):
    """The stand-in raises as the library does where a plan's partial results or tables exceed what it was given."""
    problem = problem_of(num_heads=4, num_kv_heads=1)
    arguments = paged_batch(problem, [1] * 16, [8192] * 16)
    kernel = bound(problem, Limits(64, 16, 8192), PagedParams(decode_split=256), PagedTile(workspace_mb=1))
    kernel(*arguments)
    assert [plan["items"] for plan in plans(library)] == [32] * 16
    library.plans.clear()
    kernel = bound(problem, Limits(64, 16, 8192), PagedParams(decode_split=256), PagedTile(workspace_mb=2))
    kernel(*arguments)
    assert [plan["items"] for plan in plans(library)] == [96] * 5 + [32]


def test_no_workspace_is_so_large_that_32_bits_could_not_count_what_is_in_it():
    with pytest.raises(ValidationError):
        PagedTile(workspace_mb=16385)
    workspace = PagedTile(workspace_mb=16384).workspace_mb << 20
    for group, head_dim, range_ in itertools.product((1, 4, 40), (64, 128, 256), range(3)):
        layout = replace(LAYOUT, group=group, head_dim=head_dim)
        part = Part(range_, 2048)
        # The most rows that so many items can have, times splits: what a plan's offsets count.
        items = workspace // layout.float_bytes(part, 1)
        assert items * layout.tile_rows(range_) // group * layout.heads * head_dim < 1 << 32


def test_a_kernel_ends_only_when_its_last_plan_is_copied():
    class Kernel:
        pass

    class Event:
        waited = 0

        def synchronize(self):
            self.waited += 1

    kernel, event = Kernel(), Event()
    attention._wait_at_end(kernel, event)
    gc.collect()
    assert not event.waited
    del kernel
    gc.collect()
    assert event.waited == 1


def test_a_library_that_cannot_build_its_kernels_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashInfer(RuntimeError("Could not find nvcc")))
    with pytest.raises(BackendError, match=r"flashinfer\.paged was chosen.*Could not find nvcc"):
        bound(problem_of())


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(BackendError, match=r"flashinfer\.paged was chosen, but .* does not load"):
        bound(problem_of())


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_it_claims_no_more_than_batch_and_no_graphs():
    found = implementation()
    assert found.claims is Invariance.BATCH
    assert found.cuda_graph is False
    assert found.numerics(PagedParams(), problem_of()) == "flashinfer_fa2.2048.0"
    assert found.libraries == ("flashinfer-python",)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"head_dim": 80}, "needs head_dim in 64, 128, 256, asked for 80"),
        ({"page_size": 48}, "needs page_size in 1, 2, 4"),
        ({"window": 128}, "needs window in 0, asked for 128"),
        ({"sinks": True}, "takes no sinks but False, asked for True"),
    ],
)
def test_what_it_does_not_take_is_a_reason(dims, reason):
    (found,) = implementation().unmet(PREDICTED, problem_of(**dims))
    assert reason in found


def test_versions_are_bounded(monkeypatch):
    installed = {"flashinfer-python": "0.6.12"}
    monkeypatch.setattr("bidispatch.requirements.installed_version", installed.get)
    (reason,) = implementation().unmet(H200, problem_of())
    assert reason == "needs flashinfer-python>=0.6.13,<0.8, 0.6.12 is installed"
    for version, fits in (("0.6.13", True), ("0.7.2.post1", True), ("0.8.0", False)):
        installed["flashinfer-python"] = version
        assert (implementation().unmet(H200, problem_of()) == ()) is fits


@pytest.mark.parametrize("split", [16, 300, 128, -1])
def test_splits_hold_whole_pages_of_every_size(split):
    with pytest.raises(ValidationError):
        PagedParams(decode_split=split)


def test_plans_that_need_graphs_or_more_reject_it_with_the_reason(tmp_path):
    rule = "  attention:\n    - dtypes: [bfloat16]\n      candidates: [{impl: flashinfer.paged}, {impl: other.paged}]"
    registry = registry_of(implementation(), fake("other.paged", "attention", tile=None))
    plain = plan_of(tmp_path, registry, rule, device=PREDICTED, head="invariance: {require: batch}")
    assert [rung.implementation.name for rung in plain.select_problem(problem_of()).rungs] == ["flashinfer.paged"]

    def reasons(plan):
        selection = plan.select_problem(problem_of())
        assert [rung.implementation.name for rung in selection.rungs] == ["other.paged"]
        return " ".join(selection.decisions[0].reasons)

    def planned(require, cuda_graph):
        return Plan(PREDICTED, plain.profile, registry, RecordStore(PREDICTED), require, cuda_graph=cuda_graph)

    assert "cannot be captured in a CUDA graph" in reasons(planned(Invariance.BATCH, True))
    assert "claims level batch, the plan requires sequence" in reasons(planned(Invariance.SEQUENCE, False))


def test_it_loads_as_an_entry_point_would():
    found = registry_of(implementation()).find("sm90", "attention", "bfloat16")
    assert [one.name for one in found] == ["flashinfer.paged"]
    assert registry_of(implementation()).find("sm90", "attention", "float32") == ()
