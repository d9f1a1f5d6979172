"""Multi-head latent attention: near the reference, and the same bits however a sequence is cut, cached or batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from interpreted import (
    TOLERANCE,
    bind,
    check_rows_without_positions,
    reference,
    relative_error,
    same_bits,
    scalars,
    tiles,
)

from bidispatch import ops
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.ops.reference.mla import latent_batch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import Kernel, Limits
from bidispatch.runtime.scratch import Scratch
from bidispatch_backends.triton import mla
from bidispatch_backends.triton.mla import Runs
from bidispatch_backends.triton.mla_params import MlaParams

PARAMS = MlaParams(kv_split="48/64@96/80@224", block_n=16)
LIMITS = Limits(max_tokens=512, max_seqs=16, max_seq_len=512)
SMALL = {"num_heads": 4, "kv_lora_rank": 32, "rope_dim": 16, "page_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "one head, page of 1": {**SMALL, "num_heads": 1, "page_size": 1},
    "widths that are no powers of two, page of 5": {**SMALL, "kv_lora_rank": 24, "rope_dim": 10, "page_size": 5},
    "18 heads, more than a tile has rows": {**SMALL, "num_heads": 18, "page_size": 64},
    "3 heads": {**SMALL, "num_heads": 3},
    "DeepSeek-V3 in 8 shards": {"num_heads": 16},
}
PATHS = ("parallel", "segments", "walked")
# Query and KV lengths: a decode, a prefill, an empty sequence, a chunk behind a prefix, a whole split, a first token.
QUERIES, KVS = [1, 18, 0, 5, 1, 1], [100, 18, 0, 60, 48, 1]


def problem_of(dims: dict[str, Any]) -> Problem:
    """In fp16: Triton's interpreter has no arithmetic of bf16."""
    return ops.get("attention.mla").problem("float16", dims)


def bind_path(
    problem: Problem, path: str, params: MlaParams = PARAMS, programs: int = 3, limits: Limits = LIMITS
) -> Kernel:
    """One of the three paths for calls of any size, in tiles of 16 rows: numpy's own order follows the number of rows.

    programs: of the segments.
    """
    (tile,) = tiles(problem, params)
    most = 0 if path == "walked" else LIMITS.max_tokens
    tile = tile.model_copy(update={"decode_query_len": most, "decode_block_m": 16, "prefill_block_m": 16})
    tile = tile.model_copy(update={"segment_programs": programs if path == "segments" else 0, "decode_overlap": False})
    return bind(problem, params=params, tile=tile, limits=limits)


def attend(kernel: Kernel, problem: Problem, batch: Sequence[Any]) -> torch.Tensor:
    """Run into a poisoned output."""
    out = batch[0].new_full((*batch[0].shape[:2], problem.size("kv_lora_rank")), float("nan"))
    kernel(*batch, *scalars(problem), out)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_the_paths_agree_in_every_bit_and_with_the_reference(shape: str) -> None:
    problem = problem_of(SHAPES[shape])
    batch = latent_batch(problem, QUERIES, KVS, padding_rows=2)
    walked = attend(bind_path(problem, "walked"), problem, batch)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    segments = attend(bind_path(problem, "segments"), problem, batch)
    rows = sum(QUERIES)
    assert same_bits(walked[:rows], parallel[:rows])
    assert same_bits(walked[:rows], segments[:rows])
    assert relative_error(walked[:rows], reference(problem, batch)[0][:rows]) < TOLERANCE["float16"]
    for out in (walked, parallel, segments):
        assert out[rows:].isnan().all(), "rows that no sequence owns were written"


@pytest.mark.parametrize("distribution", ["normal", "positive", "scaled"])
def test_default_params_and_tiles_are_near_the_reference(distribution: str) -> None:
    """A decode and a short chunk in parallel; the longest query is left to the walk."""
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1, 40, 12], [1100, 40, 90], distribution=distribution)
    kernel = bind(problem, limits=Limits(1024, 16, 2048))
    assert relative_error(attend(kernel, problem, batch), reference(problem, batch)[0]) < TOLERANCE["float16"]


# Query and KV lengths of a decode step: nothing, one position, both sides of a tile's, a split's and a size's boundary,
# and a padding sequence of a captured batch.
STEP = [(1, kv) for kv in (1, 15, 16, 17)] + [(0, 0)] + [(1, kv) for kv in (47, 48, 49, 96, 97, 223, 224, 225, 310)]


def in_segments(problem: Problem, batch: Sequence[Any], programs: int, params: MlaParams = PARAMS) -> torch.Tensor:
    """What so many programs give, however few sequences there are."""
    kernel = bind_path(problem, "segments", params, programs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runs, "in_segments", lambda runs, seqs: True)
        return attend(kernel, problem, batch)


@pytest.mark.parametrize("shape", ["small", "18 heads, more than a tile has rows"])
def test_segments_that_begin_and_end_anywhere_have_the_bits_of_splits(shape: str) -> None:
    """From all in one program to more programs than there are splits."""
    problem = problem_of(SHAPES[shape])
    batch = latent_batch(problem, *map(list, zip(*STEP, strict=True)), padding_rows=1)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    for programs in (1, 7, 13, 26) if shape == "small" else (7, 26):
        assert same_bits(parallel[:-1], in_segments(problem, batch, programs)[:-1]), programs


@pytest.mark.parametrize("shape", ["18 heads, more than a tile has rows", "3 heads"])
def test_segments_of_several_query_tokens_have_the_bits_of_a_prefill(shape: str) -> None:
    """In one query tile and in several, which see other positions; of some sequences only the first tiles are there."""
    problem = problem_of(SHAPES[shape])
    batch = latent_batch(problem, [2, 8, 9, 1, 0, 17, 4], [50, 113, 96, 1, 0, 130, 97])
    walked = attend(bind_path(problem, "walked"), problem, batch)
    for programs in (1, 8, 19):
        assert same_bits(walked, in_segments(problem, batch, programs)), programs


def test_segments_leave_what_the_workspace_has_no_room_for_to_the_walk() -> None:
    problem = problem_of({**SMALL, "num_heads": 8})
    params = MlaParams(kv_split=16, block_n=16)
    batch = latent_batch(problem, [5] * 7 + [1, 20], [500] * 7 + [100, 40])
    (tile,) = tiles(problem, params)
    room = (1 << 20) // (problem.size("num_heads") * (problem.size("kv_lora_rank") + 2) * 4)
    assert 5 * params.splits_up_to(500) < room < 7 * 5 * params.splits_up_to(500)
    sizes = {
        "workspace_mb": 1,
        "decode_block_m": 16,
        "prefill_block_m": 16,
        "segment_programs": 5,
        "decode_overlap": False,
    }
    out = attend(bind(problem, params=params, tile=tile.model_copy(update=sizes), limits=LIMITS), problem, batch)
    assert same_bits(out, attend(bind_path(problem, "walked", params), problem, batch))


@pytest.mark.parametrize(
    ("lengths", "programs", "left"),
    [([500] * 8, 4, 0), ([500] * 5 + [40] * 20, 5, 0), ([500, 490] * 6, 7, 8)],
    ids=["whole pairs", "few are cut", "more are cut than there is room for"],
)
def test_only_pairs_that_are_cut_take_room(
    lengths: list[int], programs: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the splits of four sequences of 500 positions; `left` find none, and are walked."""
    problem = problem_of(SMALL)
    params = MlaParams(kv_split=16, block_n=16)
    batch = latent_batch(problem, [1] * len(lengths), lengths)
    made: list[Runs] = []
    decode_of, init = mla._decode_of, Runs.__init__
    room = 4 * params.splits_up_to(500)
    monkeypatch.setattr(mla, "_decode_of", lambda *given: replace(decode_of(*given), capacity=room))
    monkeypatch.setattr(
        Runs, "__init__", lambda runs, *given, **named: made.append(runs) or init(runs, *given, **named)
    )
    monkeypatch.setattr(Runs, "in_segments", lambda runs, seqs: True)
    limits = Limits(len(lengths), len(lengths), 512)
    out = attend(bind_path(problem, "segments", params, programs, limits), problem, batch)
    (runs,) = made
    assert int((runs.bases[: len(lengths)] < 0).sum()) == left
    assert same_bits(out, attend(bind_path(problem, "walked", params, limits=limits), problem, batch))


def test_a_segment_that_carries_its_state_across_splits_is_caught() -> None:
    """Negative control: one split of all positions, as a loop without folds has them."""
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1] * 4, [310] * 4)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    assert same_bits(parallel, in_segments(problem, batch, 5))
    assert not same_bits(parallel, in_segments(problem, batch, 5, MlaParams(kv_split=320, block_n=16)))


def test_few_pairs_are_left_to_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of sequences in the call, whatever their lengths; two blocks of heads are two pairs."""
    asked = []
    original = Runs.in_segments
    monkeypatch.setattr(Runs, "in_segments", lambda runs, seqs: asked.append(original(runs, seqs)) or asked[-1])
    for shape, blocks in (("small", 1), ("18 heads, more than a tile has rows", 2)):
        problem = problem_of(SHAPES[shape])
        for seqs in (1, 2, 3, 4):
            batch = latent_batch(problem, [1] * seqs, [20] * seqs)
            attend(bind_path(problem, "segments", programs=4), problem, batch)
        assert asked == [seqs * blocks >= 4 for seqs in (1, 2, 3, 4)]
        asked.clear()


def test_a_padding_sequence_of_one_query_and_no_positions_is_what_it_is_without_segments() -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1] * 5, [97, 20, 1, 60, 33])
    batch[3][1] = 0
    batch[3][4] = 0
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    assert same_bits(parallel, in_segments(problem, batch, 3))


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_sequence_without_positions_are_0(path: str) -> None:
    problem = problem_of(SMALL)
    kernel = bind_path(problem, path)
    batch = latent_batch(problem, [1, 2, 1, 1], [97, 20, 60, 33])
    check_rows_without_positions(lambda arguments: attend(kernel, problem, arguments), problem, batch, [1, 2])


@pytest.mark.parametrize("path", ["parallel", "segments"])
def test_no_call_leaves_a_trace_in_the_workspace(path: str) -> None:
    problem = problem_of(SMALL)
    kernel = bind_path(problem, path, programs=2)
    first, second = latent_batch(problem, [4, 1], [150, 90]), latent_batch(problem, [1, 3], [65, 200], seed=3)
    alone = attend(bind_path(problem, "parallel"), problem, second)
    attend(kernel, problem, first)
    assert same_bits(alone, attend(kernel, problem, second))


def rows_that_differ(problem: Problem, kernel_for: Callable[[int], Kernel], length: int = 110) -> dict[str, int]:
    """Rows of one sequence that differ from its whole prefill alone, by how the sequence was served instead."""
    seed = 7

    def serve(kv: int, query: int, neighbours: Sequence[tuple[int, int]] = (), **paging: Any) -> torch.Tensor:
        queries, kvs = [n[0] for n in neighbours] + [query], [n[1] for n in neighbours] + [kv]
        seeds = [*range(100, 100 + len(neighbours)), seed]
        batch = latent_batch(problem, queries, kvs, sequence_seeds=seeds, **paging)
        return attend(kernel_for(len(batch[0])), problem, batch)[-query:]

    whole = serve(length, length)

    def count(out: torch.Tensor, start: int) -> int:
        expected = whole[start : start + len(out)]
        return sum(not same_bits(a, b) for a, b in zip(out, expected, strict=True))

    ends = [0, 1, 40, 48, 49, 97, length]
    others = [(3, 90), (1, 40), (5, 5)]
    return {
        "decoded": sum(count(serve(p + 1, 1), p) for p in (0, 15, 16, 47, 48, 96, 109)),
        "in chunks": sum(count(serve(b, b - a), a) for a, b in pairwise(ends)),
        "behind a cached prefix": count(serve(length, length - 64), 64),
        "among others": count(serve(length, length, others), 0),
        "a chunk among others": count(serve(length, 20, others), length - 20),
        "in ascending pages": count(serve(length, length, page_order="ascending"), 0),
        "in other pages of a wider table": count(serve(length, 20, page_seed=5, max_pages=30), length - 20),
    }


@pytest.mark.parametrize(
    "shape", ["small", "3 heads", "18 heads, more than a tile has rows", "widths that are no powers of two, page of 5"]
)
def test_a_sequence_has_the_same_bits_however_it_is_served(shape: str) -> None:
    problem = problem_of(SHAPES[shape])
    kernels = {path: bind_path(problem, path) for path in PATHS}
    for few in ("parallel", "segments") if shape in ("small", "3 heads") else ("parallel",):
        differ = rows_that_differ(problem, lambda tokens, few=few: kernels[few if tokens < 12 else "walked"])
        assert differ == dict.fromkeys(differ, 0)


def test_splits_that_follow_the_batch_are_caught() -> None:
    """Negative control: a split width that follows the number of tokens, as an occupancy heuristic would choose it."""
    problem = problem_of(SMALL)
    wide = bind_path(problem, "walked", MlaParams(kv_split=96, block_n=16))
    narrow = bind_path(problem, "parallel")
    differ = rows_that_differ(problem, lambda tokens: narrow if tokens < 12 else wide)
    assert differ["decoded"] > 0
    assert differ["in chunks"] > 0


@pytest.mark.parametrize("path", PATHS)
def test_queries_cache_and_output_may_be_strided_views(path: str) -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, QUERIES, KVS)
    plain = attend(bind_path(problem, path), problem, batch)
    wide_q = batch[0].new_full((len(batch[0]), 6, 64), float("nan"))
    wide_q[:, 1:5, 8:56] = batch[0]
    wide_cache = batch[1].new_full((len(batch[1]), 20, 56), float("nan"))
    wide_cache[:, :16, :48] = batch[1]
    wide_out = batch[0].new_full((len(batch[0]), 6, 40), float("nan"))
    out = wide_out[:, 2:6, 4:36]
    bind_path(problem, path)(wide_q[:, 1:5, 8:56], wide_cache[:, :16, :48], *batch[2:], *scalars(problem), out)
    assert same_bits(plain, out)
    out.fill_(float("nan"))
    assert wide_out.isnan().all(), "memory around the output was written"


@pytest.mark.parametrize("path", PATHS)
def test_a_sequence_past_the_limits_gives_nan_and_leaves_the_others(path: str) -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [2, 2], [40, 120])
    expected = attend(bind_path(problem, path), problem, batch)
    batch[2] = batch[2][:, :3].contiguous()  # 48 positions: enough for the first alone
    out = attend(bind_path(problem, path), problem, batch)
    assert same_bits(expected[:2], out[:2])
    assert out[2:].isnan().all()


def test_the_workspace_limit_changes_the_path_and_not_the_bits() -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1, 1], [130, 40])
    (tile,) = tiles(problem, PARAMS)
    walking = tile.model_copy(update={"workspace_mb": 0, "prefill_block_m": 16})
    out = attend(bind(problem, params=PARAMS, tile=walking, limits=LIMITS), problem, batch)
    assert same_bits(out, attend(bind_path(problem, "parallel"), problem, batch))


def test_decode_steps_bound_apart_are_not_walked_and_have_the_bits_of_a_mixed_call() -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1, 2, 1], [130, 40, 7])
    (tile,) = tiles(problem, PARAMS)
    tile = tile.model_copy(update={"decode_block_m": 16, "prefill_block_m": 16})
    steps = bind(problem, params=PARAMS, tile=tile, limits=Limits(16, 16, 512, 2))
    out = attend(steps, problem, batch)
    assert same_bits(out, attend(bind_path(problem, "walked"), problem, batch))


def test_kernels_that_share_their_workspace_one_after_another_keep_their_bits() -> None:
    problem = problem_of(SMALL)
    batch, other = latent_batch(problem, [1, 2, 1], [130, 40, 7]), latent_batch(problem, [2, 1], [60, 300], seed=1)
    (tile,) = tiles(problem, PARAMS)
    tile = tile.model_copy(update={"decode_block_m": 16, "prefill_block_m": 16})
    scratch = Scratch()
    named = {"params": PARAMS, "tile": tile, "scratch": scratch}
    mixed, steps = (bind(problem, limits=limits, **named) for limits in (LIMITS, Limits(16, 16, 512, 2)))
    wanted = attend(bind_path(problem, "walked"), problem, batch)
    for kernel, neighbour in ((mixed, steps), (steps, mixed)):
        attend(neighbour, problem, other)
        assert same_bits(attend(kernel, problem, batch), wanted)


def test_more_query_tokens_than_the_limits_name_give_nan_and_leave_the_others() -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1, 3], [130, 40])
    (tile,) = tiles(problem, PARAMS)
    tile = tile.model_copy(update={"decode_block_m": 16, "prefill_block_m": 16})
    out = attend(bind(problem, params=PARAMS, tile=tile, limits=Limits(16, 16, 512, 2)), problem, batch)
    assert same_bits(out[:1], attend(bind_path(problem, "walked"), problem, batch)[:1])
    assert out[1:].isnan().all()


def test_limits_without_a_sequence_length_are_refused() -> None:
    with pytest.raises(UsageError, match="max_seq_len"):
        bind(problem_of(SMALL), limits=Limits(max_tokens=4))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    problem = problem_of(SMALL)
    batch = latent_batch(problem, [1], [3])
    with pytest.raises(ArgumentError, match="scale"):
        bind_path(problem, "walked")(*batch, scale, torch.empty(1, 4, 32, dtype=torch.float16))
