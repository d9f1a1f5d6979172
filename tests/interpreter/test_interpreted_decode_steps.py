"""What `verify` does with attention bound for decode steps, on Triton's kernels: two launches, the bits of prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import bind, implementation, tiles

from bidispatch import ops
from bidispatch.invariance import Invariance
from bidispatch.runtime.context import Limits
from bidispatch.verify.cases import Sizes
from bidispatch.verify.decode_steps import MOST_QUERIES, decode_limits, decode_trials
from bidispatch.verify.sequence_pool import Piece, SequencePool
from bidispatch.verify.sequences import graph_groups, sequence_limits
from bidispatch.verify.subject import Subject, measure
from bidispatch_backends.triton.attention_launch import Parallel

SIZES = Sizes(
    rows=(1, 9),
    pool=1,
    graph_rows=(1, 9),
    lengths=(1, 17, 70),
    chunks=(7,),
    decodes=4,
    singles=2,
    max_seqs=4,
)
PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("attention", {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "page_size": 8}),
    "window and sinks": (
        "attention",
        {"head_dim": 16, "num_heads": 2, "num_kv_heads": 2, "page_size": 8, "window": 30, "sinks": True},
    ),
    "not causal": ("attention", {"head_dim": 16, "num_heads": 2, "num_kv_heads": 1, "page_size": 8, "causal": False}),
    "latent": ("attention.mla", {"num_heads": 2, "kv_lora_rank": 16, "rope_dim": 8, "page_size": 8}),
}


def of(kind: str, kv_split: str = "32/48@64") -> Any:
    """The problem, and what binds it as a `Subject`; a sequence of `SIZES` has several of these splits."""
    op, dims = PROBLEMS[kind]
    problem = ops.get(op).problem("float16", dims)
    params = implementation(problem).params(kv_split=kv_split, block_n=16)
    # Tiles of one height: numpy's own order follows the number of rows.
    tile = tiles(problem, params)[0].model_copy(update={"decode_block_m": 16, "prefill_block_m": 16})

    def rebind(limits: Limits) -> Subject:
        return Subject(problem, torch.device("cpu"), bind(problem, params=params, tile=tile, limits=limits))

    return problem, rebind


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call, whether sequences are left to the walk."""
    found: list[bool] = []
    asked = Parallel.leaves

    def noted(self: Parallel, tokens: int) -> bool:
        found.append(asked(self, tokens))
        return found[-1]

    monkeypatch.setattr(Parallel, "leaves", noted)
    return found


@pytest.mark.parametrize(("kind", "queries"), [("grouped", 1), ("latent", 1), *((kind, 8) for kind in PROBLEMS)])
def test_steps_have_the_bits_of_prompts_in_two_launches(kind: str, queries: int, left: list[bool]) -> None:
    problem, rebind = of(kind)
    pool = SequencePool(rebind(sequence_limits(problem, SIZES)), SIZES.lengths, Invariance.SEQUENCE)
    trials = list(decode_trials(pool, SIZES, queries))
    assert any(left), "the rows alone did not come from the walk"
    left.clear()
    check = measure("steps", rebind(decode_limits(SIZES, queries)), trials)
    assert check.passed, check
    assert check.rows > len(trials)
    assert len(left) == len(trials)
    assert not any(left)


def test_what_is_replayed_runs_as_it_is_bound_and_has_the_same_bits(left: list[bool]) -> None:
    problem, rebind = of("grouped")
    subject = rebind(sequence_limits(problem, SIZES))
    for binding, bound, groups in graph_groups(subject, SIZES, Invariance.SEQUENCE, rebind):
        trials = [trial for group in groups for trial in group]
        left.clear()
        check = measure(binding, bound, trials)
        assert check.passed, check
        assert len(left) == len(trials)
        assert not (binding and any(left))


def test_other_splits_in_the_decode_binding_are_seen() -> None:
    """Negative control, on the kernels themselves."""
    problem, rebind = of("grouped")
    _, rebind_otherwise = of("grouped", kv_split="16")
    limits = decode_limits(SIZES, MOST_QUERIES[-1])
    pool = SequencePool(rebind(sequence_limits(problem, SIZES)), SIZES.lengths, Invariance.SEQUENCE)
    steps = pool.trial([pool.whole(0), Piece(2, 8, 70)])
    assert measure("steps", rebind(limits), [steps]).passed
    assert measure("steps", rebind_otherwise(limits), [steps]).differing
