"""The scheduler: everyone is served in full, within the budget, in pages of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidispatch.demo.config import CPU_MODEL
from bidispatch.demo.scheduler import EngineLimits, PagePool, Request, Scheduler
from bidispatch.demo.workload import default_workload, make_workload
from bidispatch.errors import UsageError

LIMITS = EngineLimits(max_tokens=8, max_seqs=4, max_seq_len=40, page_size=4, pages=10)


def serve(limits: EngineLimits, requests: list[Request], pool: PagePool) -> dict[int, list[int]]:
    """Run the scheduler with made-up tokens, checking every step; return the positions each request was fed."""
    scheduler = Scheduler(limits, requests, pool)
    fed: dict[int, list[int]] = {request.id: [] for request in requests}
    generated = {request.id: 0 for request in requests}
    while not scheduler.done:
        decoding = {active.request.id for active in scheduler.running if active.decoding}
        chunks = scheduler.schedule()
        assert chunks, "a step with nothing to do"
        assert sum(chunk.length for chunk in chunks) <= limits.max_tokens
        assert len(chunks) <= limits.max_seqs
        kinds = [chunk.decodes for chunk in chunks]
        assert kinds == sorted(kinds, reverse=True), "decodes come first"
        assert {chunk.active.request.id for chunk in chunks if chunk.decodes} == decoding, "every decode runs"
        owned = [page for active in scheduler.running for page in active.pages]
        assert len(owned) == len(set(owned)), "a page has one owner"
        tokens = {}
        for chunk in chunks:
            request = chunk.active.request
            fed[request.id] += range(chunk.start, chunk.stop)
            assert chunk.stop <= len(chunk.active.pages) * limits.page_size
            if chunk.samples:
                generated[request.id] += 1
                tokens[request.id] = 1000 + generated[request.id]
        scheduler.commit(chunks, tokens)
    assert generated == {request.id: request.max_new_tokens for request in requests}
    return fed


@st.composite
def engines_and_requests(draw):
    page_size = draw(st.integers(1, 8))
    max_seqs = draw(st.integers(1, 6))
    longest = draw(st.integers(1, 40))
    pages_each = -(-longest // page_size)
    limits = EngineLimits(
        max_tokens=draw(st.integers(max_seqs, 24)),
        max_seqs=max_seqs,
        max_seq_len=longest,
        page_size=page_size,
        pages=draw(st.integers(pages_each, 3 * pages_each)),
    )
    requests = []
    for index in range(draw(st.integers(0, 10))):
        positions = draw(st.integers(1, longest))
        prompt = draw(st.integers(1, positions))
        requests.append(Request(index, (7,) * prompt, positions - prompt + 1, draw(st.integers(0, 30))))
    return limits, requests


@settings(max_examples=150, deadline=None)
@given(engines_and_requests())
def test_every_request_is_fed_once_and_in_order_and_gives_its_pages_back(case):
    limits, requests = case
    pool = PagePool(limits.pages)
    fed = serve(limits, requests, pool)
    assert fed == {request.id: list(range(request.positions)) for request in requests}
    assert pool.available == limits.pages
    assert sorted(pool.take(limits.pages)) == list(range(limits.pages))


def test_a_page_with_two_owners_is_caught():
    class LeakyPool(PagePool):
        def take(self, count: int) -> tuple[int, ...]:
            pages = super().take(count)
            self.give_back(pages)
            return pages

    requests = [Request(0, (1,) * 5, 3), Request(1, (1,) * 3, 3)]
    serve(LIMITS, requests, PagePool(LIMITS.pages))
    with pytest.raises(AssertionError, match="a page has one owner"):
        serve(LIMITS, requests, LeakyPool(LIMITS.pages))


def test_requests_join_and_leave_in_mid_flight():
    scheduler = Scheduler(LIMITS, [Request(0, (1,) * 2, 9), Request(1, (1,) * 11, 2, arrival_step=2)])
    shapes = []
    while not scheduler.done:
        chunks = scheduler.schedule()
        shapes.append([(chunk.active.request.id, chunk.length) for chunk in chunks])
        scheduler.commit(chunks, {chunk.active.request.id: 5 for chunk in chunks if chunk.samples})
    assert shapes[:6] == [[(0, 2)], [(0, 1)], [(0, 1), (1, 7)], [(0, 1), (1, 4)], [(0, 1), (1, 1)], [(0, 1)]]


def test_nobody_is_admitted_before_its_arrival_and_idle_steps_are_skipped():
    scheduler = Scheduler(LIMITS, [Request(0, (1,), 1), Request(1, (1,), 1, arrival_step=9)])
    first = scheduler.schedule()
    assert [chunk.active.request.id for chunk in first] == [0]
    scheduler.commit(first, {0: 5})
    assert [chunk.active.request.id for chunk in scheduler.schedule()] == [1]


def test_a_request_waits_for_pages_and_reuses_those_of_another():
    pool = PagePool(4)
    limits = EngineLimits(max_tokens=16, max_seqs=4, max_seq_len=16, page_size=4, pages=4)
    scheduler = Scheduler(limits, [Request(0, (1,) * 8, 2), Request(1, (1,) * 8, 2)], pool)
    owners = {}
    while not scheduler.done:
        chunks = scheduler.schedule()
        assert len(chunks) == 1, "three pages each, four in the pool"
        owners[chunks[0].active.request.id] = set(chunks[0].active.pages)
        scheduler.commit(chunks, {chunk.active.request.id: 5 for chunk in chunks if chunk.samples})
    assert owners[0] & owners[1]


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([Request(0, (), 4)], "request 0 has 0 prompt tokens"),
        ([Request(0, (1,), 0)], "wants 0 new ones"),
        ([Request(3, (1,) * 41, 1)], "request 3 fills 41 KV positions, the engine is built for 40"),
        ([Request(5, (1,), 1), Request(5, (2,), 1)], "request ids must differ; [5]"),
        ([Request(0, (1,), 3, forced_tokens=(1, 2))], "2 forced tokens for 3 new ones"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_anything_runs(requests, said):
    with pytest.raises(UsageError) as caught:
        Scheduler(LIMITS, requests)
    assert said in str(caught.value)


def test_a_pool_too_small_for_one_request_is_refused_before_anything_runs():
    limits = EngineLimits(max_tokens=8, max_seqs=4, max_seq_len=40, page_size=4, pages=3)
    with pytest.raises(UsageError, match="request 1 needs 4 pages of 4 positions, the pool has 3; raise pages"):
        Scheduler(limits, [Request(0, (1,) * 4, 2), Request(1, (1,) * 12, 2)])


@pytest.mark.parametrize(
    ("change", "said"),
    [({"max_seqs": 9}, "max_seqs=9 is above max_tokens=8"), ({"pages": 0}, "pages must be at least 1, not 0")],
)
def test_sizes_that_cannot_serve_are_refused(change, said):
    sizes = {"max_tokens": 8, "max_seqs": 4, "max_seq_len": 40, "page_size": 4, "pages": 10} | change
    with pytest.raises(UsageError, match=said):
        EngineLimits(**sizes)


def test_the_demo_s_workload_is_the_same_every_time_and_fits_its_engine():
    workload = make_workload(CPU_MODEL)
    assert workload == make_workload(CPU_MODEL)
    assert workload != make_workload(CPU_MODEL, seed=1)
    lengths = sorted(len(request.prompt) for request in workload.requests)
    assert (lengths[0], lengths[-1]) == (5, 300)
    assert lengths[-1] > workload.limits.max_tokens, "at least one prompt is chunked"
    assert sum(workload.limits.pages_for(request.positions) for request in workload.requests) > workload.limits.pages
    serve(workload.limits, list(workload.requests), PagePool(workload.limits.pages))


@pytest.mark.parametrize("gpu", [False, True])
def test_the_default_workload_is_served_in_full(gpu):
    workload = default_workload(CPU_MODEL, gpu=gpu)
    fed = serve(workload.limits, list(workload.requests), PagePool(workload.limits.pages))
    assert sum(map(len, fed.values())) == sum(request.positions for request in workload.requests)


def test_prompts_are_kept_short_enough_for_a_short_model():
    short = replace(CPU_MODEL, max_position_embeddings=64)
    assert make_workload(short).limits.max_seq_len <= 64
    with pytest.raises(UsageError, match="the model has 30 positions"):
        make_workload(replace(CPU_MODEL, max_position_embeddings=30))
    with pytest.raises(UsageError, match="0 requests asked for"):
        make_workload(CPU_MODEL, requests=0)


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_a_small_workload_still_fits(requests):
    workload = make_workload(CPU_MODEL, requests=requests)
    serve(workload.limits, list(workload.requests), PagePool(workload.limits.pages))
