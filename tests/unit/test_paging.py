"""`BIDISPATCH_DEBUG=1`: a paged batch whose integers lie is refused before a kernel reads them."""

from __future__ import annotations

import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.errors import ArgumentError
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.mla import latent_batch

ATTENTION = ops.get("attention").problem(
    "bfloat16", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
)
LATENT = ops.get("attention.mla").problem(
    "bfloat16", {"num_heads": 4, "kv_lora_rank": 32, "rope_dim": 16, "page_size": 16}
)
BATCHES = {"attention": (ATTENTION, paged_batch), "attention.mla": (LATENT, latent_batch)}


def attend(problem):
    return bid.plan("cpu").select_problem(problem).bind(max_tokens=64, max_seqs=8, max_seq_len=256)


def entry(name, place, value):
    return lambda batch: batch[name].__setitem__(place, value)


LIES = {
    "a page past the cache": (entry("block_table", (1, 1), 10_000), "block_table[1, 1] is page 10000"),
    "a negative page": (entry("block_table", (0, 0), -1), "block_table[0, 0] is page -1"),
    "a length past the table": (entry("seq_lens", 1, 4096), "sequence 1 has 4096 positions, its block table"),
    "fewer positions than queries": (entry("seq_lens", 1, 2), "3 query rows, but seq_lens says 2"),
    "starts that fall": (entry("query_start_loc", 1, 9), "never fall"),
    "more rows than q has": (entry("query_start_loc", 2, 9), "ends at 9, but q has 4 rows"),
}


@pytest.mark.parametrize("op", BATCHES)
@pytest.mark.parametrize("lie", LIES)
def test_a_batch_that_lies_is_refused(op, lie, monkeypatch):
    monkeypatch.setenv("BIDISPATCH_DEBUG", "1")
    problem, make = BATCHES[op]
    batch = make(problem, [1, 3], [20, 40])
    change, said = LIES[lie]
    change(dict(zip((argument.name for argument in ops.get(op).arguments), batch, strict=True)))
    with pytest.raises(ArgumentError) as caught:
        attend(problem)(*batch)
    assert said in str(caught.value)


@pytest.mark.parametrize("op", BATCHES)
def test_an_honest_batch_has_the_same_bits_and_pages_behind_its_end_may_hold_anything(op, monkeypatch):
    problem, make = BATCHES[op]
    batch = make(problem, [1, 3, 0], [20, 40, 0], max_pages=8)
    wanted = attend(problem)(*batch)
    monkeypatch.setenv("BIDISPATCH_DEBUG", "1")
    batch[[argument.name for argument in ops.get(op).arguments].index("block_table")][0, 3:] = -1
    assert torch.equal(attend(problem)(*batch), wanted)


def test_pages_behind_a_window_may_have_been_given_away(monkeypatch):
    monkeypatch.setenv("BIDISPATCH_DEBUG", "1")
    problem = ops.get("attention").problem("bfloat16", {**ATTENTION.dims, "window": 16})
    batch = paged_batch(problem, [1], [100])
    batch[3][0, :5] = -1  # the last query sees 84..99
    attend(problem)(*batch)
    batch[3][0, 5] = -1
    with pytest.raises(ArgumentError, match=r"block_table\[0, 5\]"):
        attend(problem)(*batch)


def test_only_what_is_bound_under_the_variable_is_checked(monkeypatch):
    kernel = attend(ATTENTION)
    monkeypatch.setenv("BIDISPATCH_DEBUG", "1")
    batch = paged_batch(ATTENTION, [1, 3], [20, 40])
    batch[5][1] = 9  # falls; the CPU's kernel takes it
    assert kernel.problem == ATTENTION
    with pytest.raises(ArgumentError):
        attend(ATTENTION)(*batch)
