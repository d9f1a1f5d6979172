"""Paged attention: right for every feature, and the same bits however a sequence is cut, cached, paged or batched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise, product
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from interpreted import (
    DTYPES,
    SM90,
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
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.schema import Problem
from bidispatch.runtime.context import Kernel, Limits
from bidispatch_backends.triton import attention, attention_kernels
from bidispatch_backends.triton.attention import launches
from bidispatch_backends.triton.attention_launch import Parallel, even_parts
from bidispatch_backends.triton.attention_params import AttentionParams

FP8 = "float8_e4m3fn"
ON_A_GPU = attention_kernels._AT_ONCE.value  # read before conftest has another
PARAMS = AttentionParams(kv_split="48/64@96/80@224", block_n=16)
LIMITS = Limits(max_tokens=512, max_seqs=16, max_seq_len=512)
HEADS = {"head_dim": 32, "num_heads": 4, "num_kv_heads": 2}
FEATURES: dict[str, dict[str, Any]] = {
    "grouped": HEADS,
    "one head each, page of 1": {**HEADS, "num_kv_heads": 4, "page_size": 1},
    "one KV head for 18, more than a tile has rows": {**HEADS, "num_heads": 18, "num_kv_heads": 1, "page_size": 64},
    "group of 3, head_dim 80, page of 5": {"head_dim": 80, "num_heads": 3, "num_kv_heads": 1, "page_size": 5},
    "head_dim 8": {**HEADS, "head_dim": 8},
    "head_dim 192": {**HEADS, "head_dim": 192, "num_heads": 2, "num_kv_heads": 1},
    "window": {**HEADS, "window": 40},
    "window of 1": {**HEADS, "window": 1},
    "softcap": {**HEADS, "softcap": 5.0},
    "sinks": {**HEADS, "sinks": True},
    "window, softcap and sinks": {**HEADS, "window": 70, "softcap": 20.0, "sinks": True},
    "not causal": {**HEADS, "causal": False},
    "page of 24, in steps with neither tile nor split": {**HEADS, "page_size": 24},
    "ALiBi": {**HEADS, "alibi": True},
    "ALiBi, not causal": {**HEADS, "alibi": True, "causal": False},
    "fp8 cache": {**HEADS, "kv_dtype": FP8},
    "fp8 cache and softcap": {**HEADS, "kv_dtype": FP8, "softcap": 5.0},
}
PATHS = ("parallel", "segments", "walked")
# The features that issue tables list, of which every pair of values is in one of `pairs_of(CHOICES)`.
CHOICES: dict[str, tuple[Any, ...]] = {
    "head_dim": (64, 80, 96, 128, 192, 256),
    "num_kv_heads": (4, 2, 1),
    "page_size": (16, 24, 64),
    "window": (0, 37),
    "softcap": (0.0, 6.0),
    "sinks": (False, True),
    "alibi": (False, True),
    "kv_dtype": ("dtype", FP8),
}
# Query and KV lengths: a decode, a prefill, an empty sequence, a chunk behind a prefix, a whole split, a first token.
QUERIES, KVS = [1, 18, 0, 5, 1, 1], [100, 18, 0, 60, 48, 1]


def problem_of(dtype: str, dims: dict[str, Any]) -> Problem:
    return ops.get("attention").problem(dtype, dims)


def bind_path(
    problem: Problem, path: str, params: AttentionParams = PARAMS, parts: int = 3, limits: Limits = LIMITS, **sizes: int
) -> Kernel:
    """One of the three paths for calls of any size, in tiles of 16 rows: numpy's own order follows the number of rows.

    parts: segments of a KV head, which serve calls of as many sequences. sizes: of the tile, besides.
    """
    (tile,) = tiles(problem, params)
    most = 0 if path == "walked" else LIMITS.max_tokens
    tile = tile.model_copy(update={"decode_query_len": most, "decode_block_m": 16, "prefill_block_m": 16})
    tile = tile.model_copy(
        update=sizes | {"segment_programs": parts * problem.size("num_kv_heads") if path == "segments" else 0}
    )
    return bind(problem, params=params, tile=tile, limits=limits)


def attend(kernel: Kernel, problem: Problem, batch: Sequence[Any]) -> torch.Tensor:
    """Run into a poisoned output."""
    out = torch.full_like(batch[0], float("nan"))
    kernel(*batch, *scalars(problem), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_the_paths_agree_in_every_bit_and_with_the_reference(feature: str, dtype: str) -> None:
    problem = problem_of(dtype, FEATURES[feature])
    batch = paged_batch(problem, QUERIES, KVS, padding_rows=2)
    walked = attend(bind_path(problem, "walked"), problem, batch)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    in_segments = attend(bind_path(problem, "segments"), problem, batch)
    rows = sum(QUERIES)
    assert same_bits(walked[:rows], parallel[:rows])
    assert same_bits(walked[:rows], in_segments[:rows])
    assert relative_error(walked[:rows], reference(problem, batch)[0][:rows]) < TOLERANCE[dtype]
    for out in (walked, parallel, in_segments):
        assert out[rows:].isnan().all(), "rows that no sequence owns were written"


def pairs_of(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few combinations that have every pair of values of two features: each takes the most pairs still missing."""
    names = list(choices)
    missing = {
        ((one, a), (other, b)) for one, other in combinations(names, 2) for a in choices[one] for b in choices[other]
    }
    found = []
    while missing:
        rows = [dict(zip(names, values, strict=True)) for values in product(*choices.values())]
        best = max(rows, key=lambda row: len(missing & set(combinations(row.items(), 2))))
        missing -= set(combinations(best.items(), 2))
        found.append(best)
    return found


@pytest.mark.parametrize("dims", pairs_of(CHOICES), ids=lambda dims: "-".join(map(str, dims.values())))
def test_features_combine(dims: dict[str, Any]) -> None:
    problem = problem_of("float16", {"num_heads": 4, **dims})
    batch = paged_batch(problem, [1, 3, 20], [120, 60, 70], sequence_seeds=[7, 8, 9])
    walked = attend(bind_path(problem, "walked"), problem, batch)
    assert same_bits(walked, attend(bind_path(problem, "parallel"), problem, batch))
    assert same_bits(walked, attend(bind_path(problem, "segments"), problem, batch))
    assert relative_error(walked, reference(problem, batch)[0]) < TOLERANCE["float16"]
    chunk = paged_batch(problem, [7, 2], [70, 59], sequence_seeds=[9, 8], page_seed=3)
    again = attend(bind_path(problem, "walked"), problem, chunk)
    assert same_bits(again[:7], walked[-7:])
    assert same_bits(again[7:], walked[1:3])


def test_speculative_decode_packs_tokens_and_heads_into_one_tile() -> None:
    """Eight tokens of eight heads are 64 rows of one tile, bound for them; of 16 rows, four tiles."""
    problem = problem_of("float16", {"head_dim": 32, "num_heads": 8, "num_kv_heads": 1})
    (tile,) = tiles(problem, PARAMS)
    batch = paged_batch(problem, [8, 1, 0, 5, 8], [130, 97, 0, 98, 8])
    packed = tile.model_copy(update={"prefill_block_m": 64, "decode_registers": 0})
    narrow = packed.model_copy(update={"prefill_block_m": 16})
    limits = Limits(64, 8, 512, 8)
    _, _, split, *_ = launches(problem, PARAMS, packed, SM90.arch, limits)
    assert (split.constants["BLOCK_M"], split.constants["TOKENS"]) == (64, 8)
    outs = [attend(bind(problem, params=PARAMS, tile=t, limits=limits), problem, batch) for t in (packed, narrow)]
    assert same_bits(*outs)
    assert same_bits(outs[0], attend(bind_path(problem, "walked"), problem, batch))


def test_sequences_that_the_workspace_has_no_room_for_are_walked() -> None:
    """The first sequences take the room there is, the others are walked, in one call."""
    problem = problem_of("float32", HEADS)
    batch = paged_batch(problem, [5] * 14 + [1, 20], [500] * 14 + [100, 40])
    params = AttentionParams(kv_split=16, block_n=16)
    (tile,) = tiles(problem, params)
    room = (1 << 20) // (problem.size("num_heads") * (problem.size("head_dim") + 2) * 4)
    assert 5 * params.splits_up_to(500) < room < 14 * 5 * params.splits_up_to(500)
    small = tile.model_copy(update={"workspace_mb": 1, "prefill_block_m": 16})
    out = attend(bind(problem, params=params, tile=small, limits=LIMITS), problem, batch)
    assert same_bits(out, attend(bind_path(problem, "walked", params), problem, batch))


@pytest.mark.parametrize("distribution", ["positive", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles_are_near_the_reference(dtype: str, distribution: str) -> None:
    problem = problem_of(dtype, HEADS)
    batch = paged_batch(problem, [1, 70, 20], [520, 70, 90], distribution=distribution)
    (tile,) = tiles(problem)
    tile = tile.model_copy(update={"decode_query_len": 0})
    out = attend(bind(problem, tile=tile), problem, batch)
    # Scores of thousands, as `scaled` has them, lose absolute precision to fp32 itself.
    tolerance = max(TOLERANCE[dtype], 1e-4) if distribution == "scaled" else TOLERANCE[dtype]
    assert relative_error(out, reference(problem, batch)[0]) < tolerance


def rows_that_differ(problem: Problem, kernel_for: Any, length: int = 110) -> dict[str, int]:
    """Rows of one sequence that differ from its whole prefill alone, by how the sequence was served instead."""
    seed = 7

    def serve(kv: int, query: int, neighbours: Sequence[tuple[int, int]] = (), **paging: Any) -> torch.Tensor:
        queries, kvs = [n[0] for n in neighbours] + [query], [n[1] for n in neighbours] + [kv]
        seeds = [*range(100, 100 + len(neighbours)), seed]
        batch = paged_batch(problem, queries, kvs, sequence_seeds=seeds, **paging)
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
        "among others": count(serve(length, length, others), 0),
        "a chunk among others": count(serve(length, 20, others), length - 20),
        "in ascending pages": count(serve(length, length, page_order="ascending"), 0),
        "in other pages of a wider table": count(serve(length, 20, page_seed=5, max_pages=30), length - 20),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ["grouped", "window, softcap and sinks", "group of 3, head_dim 80, page of 5"])
def test_a_sequence_has_the_same_bits_however_it_is_served(feature: str, dtype: str) -> None:
    problem = problem_of(dtype, FEATURES[feature])
    kernels = {path: bind_path(problem, path) for path in ("parallel", "segments", "walked")}
    for few in ("parallel", "segments"):
        differ = rows_that_differ(problem, lambda tokens, few=few: kernels[few if tokens < 12 else "walked"])
        assert differ == dict.fromkeys(differ, 0)


def test_splits_that_follow_the_batch_are_caught() -> None:
    """Negative control: a split width that follows the number of tokens, as an occupancy heuristic would choose it."""
    problem = problem_of("float32", HEADS)
    wide = bind_path(problem, "walked", AttentionParams(kv_split=96, block_n=16))
    narrow = bind_path(problem, "parallel")
    differ = rows_that_differ(problem, lambda tokens: narrow if tokens < 12 else wide)
    assert differ["decoded"] > 0
    assert differ["in chunks"] > 0


@pytest.mark.parametrize("at_once", [1, 3, ON_A_GPU])
@pytest.mark.parametrize("path", ["parallel", "segments"])
def test_how_many_splits_a_turn_of_the_fold_loads_does_not_enter_the_bits(
    path: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a turn of a GPU's, most can be behind the last split."""
    problem = problem_of("float16", {**HEADS, "head_dim": 16})
    batch = paged_batch(problem, [1, 2, 1, 1], [310, 60, 225, 1])
    expected = attend(bind_path(problem, "walked"), problem, batch)
    monkeypatch.setattr(attention_kernels, "_AT_ONCE", tl.constexpr(at_once))
    assert same_bits(expected, attend(bind_path(problem, path), problem, batch))


# Query and KV lengths of a decode step: nothing, one position, both sides of a tile's, a split's and a size's boundary,
# and a padding sequence of a captured batch.
STEP = [(1, kv) for kv in (1, 15, 16, 17)] + [(0, 0)] + [(1, kv) for kv in (47, 48, 49, 96, 97, 223, 224, 225, 310)]


def in_segments(problem: Problem, batch: Sequence[Any], parts: int, params: AttentionParams = PARAMS) -> Any:
    """What so many segments of a KV head give, however few sequences there are."""
    kernel = bind_path(problem, "segments", params, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "in_segments", lambda parallel, seqs: True)
        return attend(kernel, problem, batch)


@pytest.mark.parametrize("feature", ["grouped", "window", "window, softcap and sinks", "ALiBi", "fp8 cache"])
def test_segments_that_begin_and_end_anywhere_have_the_bits_of_splits(feature: str) -> None:
    """From all of a KV head in one program to more programs than there are splits."""
    problem = problem_of("float16", FEATURES[feature])
    batch = paged_batch(problem, *map(list, zip(*STEP, strict=True)), padding_rows=1)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    for parts in (1, 3, 7, 16, 40):
        assert same_bits(parallel[:-1], in_segments(problem, batch, parts)[:-1]), parts


@pytest.mark.parametrize("parts", [2, 7, 16])
def test_fewer_programs_of_segments_have_the_bits_of_splits(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each would have few KV tiles, down to one of a KV head, whatever the tile names."""
    problem = problem_of("float16", HEADS)
    batch = paged_batch(problem, *map(list, zip(*STEP, strict=True)), padding_rows=1)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    for least in (32, 256, 1 << 20):
        monkeypatch.setattr(attention, "_LEAST_TILES", least)
        assert same_bits(parallel[:-1], in_segments(problem, batch, parts)[:-1]), least


@pytest.mark.parametrize("feature", ["grouped", "window of 1", "window, softcap and sinks", "not causal"])
def test_segments_of_several_query_tokens_have_the_bits_of_a_prefill(feature: str) -> None:
    """In one query tile and in several, which see other positions."""
    problem = problem_of("float16", FEATURES[feature])
    batch = paged_batch(problem, [2, 8, 9, 1, 0, 30, 3], [50, 113, 96, 1, 0, 130, 3])
    walked = attend(bind_path(problem, "walked"), problem, batch)
    for parts in (1, 3, 8, 31):
        assert same_bits(walked, in_segments(problem, batch, parts)), parts


def test_segments_of_default_splits_have_the_bits_of_splits() -> None:
    problem = problem_of("float16", {"head_dim": 16, "num_heads": 2, "num_kv_heads": 1, "page_size": 64})
    batch = paged_batch(problem, [1] * 7, [64, 255, 256, 257, 1100, 5, 700])
    params = AttentionParams(kv_split="64/128@256")
    parallel = attend(bind_path(problem, "parallel", params, limits=Limits(16, 16, 2048)), problem, batch)
    kernel = bind_path(problem, "segments", params, 4, Limits(16, 16, 2048))
    assert same_bits(parallel, attend(kernel, problem, batch))


def test_few_sequences_are_left_to_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of sequences in the call, whatever their lengths: a pair for every fourth program is enough, or as
    few as the tile says."""
    problem = problem_of("float16", HEADS)
    asked = []
    original = Parallel.in_segments
    monkeypatch.setattr(
        Parallel, "in_segments", lambda parallel, seqs: asked.append(original(parallel, seqs)) or asked[-1]
    )
    for seqs in (1, 2, 3, 4):
        batch = paged_batch(problem, [1] * seqs, [20] * seqs)
        attend(bind_path(problem, "segments", parts=9), problem, batch)
    assert asked == [False, False, True, True]
    asked.clear()
    for parts in (4, 5, 9):
        batch = paged_batch(problem, [1], [20])
        attend(bind_path(problem, "segments", parts=9, segment_parts=parts), problem, batch)
    assert asked == [False, False, True]


@given(st.integers(1, 200), st.integers(1, 600))
def test_parts_are_even_where_a_sixteenth_less_allows_it(most: int, seqs: int) -> None:
    parts = even_parts(most, seqs)
    assert most * 15 // 16 < parts <= most
    evenly = [n for n in range(most, most * 15 // 16, -1) if n % seqs == 0 or seqs % n == 0]
    assert parts == (evenly[0] if evenly else most)


def test_parts_of_an_h200_for_the_batches_of_servers() -> None:
    assert [even_parts(33, seqs) for seqs in (8, 16, 24, 32, 64, 256)] == [32, 32, 33, 32, 32, 32]


def test_a_segment_that_carries_its_state_across_splits_is_caught() -> None:
    """Negative control: one split of all positions, as a loop without folds has them."""
    problem = problem_of("float16", HEADS)
    batch = paged_batch(problem, [1] * 4, [310] * 4)
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    assert same_bits(parallel, in_segments(problem, batch, 5))
    assert not same_bits(parallel, in_segments(problem, batch, 5, AttentionParams(kv_split=320, block_n=16)))


def test_a_padding_sequence_of_one_query_and_no_positions_is_what_it_is_without_segments() -> None:
    problem = problem_of("float16", HEADS)
    batch = paged_batch(problem, [1] * 5, [97, 20, 1, 60, 33])
    batch[4][1] = 0
    batch[4][4] = 0
    parallel = attend(bind_path(problem, "parallel"), problem, batch)
    assert same_bits(parallel, in_segments(problem, batch, 3))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("feature", ["grouped", "window, softcap and sinks"])
def test_rows_of_a_sequence_without_positions_are_0(path: str, feature: str) -> None:
    problem = problem_of("float16", FEATURES[feature])
    kernel = bind_path(problem, path)
    batch = paged_batch(problem, [1, 2, 1, 1], [97, 20, 60, 33])
    check_rows_without_positions(lambda arguments: attend(kernel, problem, arguments), problem, batch, [1, 2])


@pytest.mark.parametrize("path", PATHS)
def test_caches_may_be_strided_views(path: str) -> None:
    """As vLLM holds them: keys and values interleaved, heads before slots."""
    problem = problem_of("float32", HEADS)
    batch = paged_batch(problem, QUERIES, KVS)
    plain = attend(bind_path(problem, path), problem, batch)
    caches = torch.full((batch[1].shape[0], 2, 2, 16, 40), float("nan"))
    views = [caches[:, i, :, :, :32].transpose(1, 2) for i in range(2)]
    for view, cache in zip(views, batch[1:3], strict=True):
        view.copy_(cache)
    wide_q = torch.full((len(batch[0]), 6, 48), float("nan"))
    wide_q[:, 1:5, 8:40] = batch[0]
    strided = [wide_q[:, 1:5, 8:40], *views, *batch[3:]]
    assert same_bits(plain, attend(bind_path(problem, path), problem, strided))


@pytest.mark.parametrize("path", PATHS)
def test_pages_behind_the_window_are_not_read(path: str) -> None:
    """An engine frees them: their table entries then name a page of another sequence, NaN here."""
    problem = problem_of("float32", {**HEADS, "window": 20})
    batch = paged_batch(problem, [3], [150])
    before = attend(bind_path(problem, path), problem, batch)
    poison = batch[1].isnan().all(dim=(1, 2, 3)).nonzero()[0, 0]
    batch[3][0, : (150 - 3 - 19) // 16] = poison.to(torch.int32)
    assert same_bits(before, attend(bind_path(problem, path), problem, batch))


@pytest.mark.parametrize("path", PATHS)
def test_a_sequence_past_the_limits_gives_nan_and_leaves_the_others(path: str) -> None:
    problem = problem_of("float32", HEADS)
    batch = paged_batch(problem, [2, 2], [40, 120])
    expected = attend(bind_path(problem, path), problem, batch)
    batch[3] = batch[3][:, :3].contiguous()  # 48 positions: enough for the first alone
    out = attend(bind_path(problem, path), problem, batch)
    assert same_bits(expected[:2], out[:2])
    assert out[2:].isnan().all()


def test_more_queries_than_bound_for_give_nan_and_leave_the_others() -> None:
    problem = problem_of("float32", HEADS)
    batch = paged_batch(problem, [2, 5, 1], [40, 60, 33])
    (tile,) = tiles(problem, PARAMS)
    tile = tile.model_copy(update={"prefill_block_m": 16})
    out = attend(bind(problem, params=PARAMS, tile=tile, limits=Limits(16, 4, 512, 2)), problem, batch)
    expected = attend(bind_path(problem, "walked"), problem, batch)
    assert out[2:7].isnan().all()
    assert same_bits(out[:2], expected[:2])
    assert same_bits(out[7:], expected[7:])


@pytest.mark.parametrize("path", ["parallel", "segments"])
def test_equal_workspace_use_leaves_no_trace_of_earlier_calls(path: str) -> None:
    problem = problem_of("float32", {**HEADS, "window": 40})
    kernel = bind_path(problem, path, parts=2)
    first, second = paged_batch(problem, [4, 1], [150, 90]), paged_batch(problem, [1, 3], [65, 200], seed=3)
    alone = attend(bind_path(problem, "parallel"), problem, second)
    attend(kernel, problem, first)
    assert same_bits(alone, attend(kernel, problem, second))


def test_the_workspace_limit_changes_the_path_and_not_the_bits() -> None:
    problem = problem_of("float32", HEADS)
    batch = paged_batch(problem, [1, 1], [130, 40])
    (tile,) = tiles(problem, PARAMS)
    walking = tile.model_copy(update={"workspace_mb": 0, "prefill_block_m": 16})
    out = attend(bind(problem, params=PARAMS, tile=walking, limits=LIMITS), problem, batch)
    assert same_bits(out, attend(bind_path(problem, "parallel"), problem, batch))


def test_limits_without_a_sequence_length_are_refused() -> None:
    problem = problem_of("float32", HEADS)
    with pytest.raises(UsageError, match="max_seq_len"):
        bind(problem, limits=Limits(max_tokens=4))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    problem = problem_of("float32", HEADS)
    batch = paged_batch(problem, [1], [3])
    with pytest.raises(ArgumentError, match="scale"):
        bind_path(problem, "walked")(*batch, scale, torch.empty_like(batch[0]))
