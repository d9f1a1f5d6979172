"""Splits that grow with the position, the class they name, what needs which GPU, and the launch shapes to try."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Registry
from bidispatch_backends.triton import register
from bidispatch_backends.triton.attention_params import (
    AttentionParams,
    attention_numerics,
    attention_tiles,
    overlaps,
)
from bidispatch_backends.triton.search import attention_tiles_for


def problem(dtype: str = "bfloat16", **dims: object) -> Problem:
    return ops.get("attention").problem(dtype, {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8, **dims})


def device(arch: str) -> Device:
    return Device(ARCHS[arch], arch, predicted=True)


def starts_by_counting(params: AttentionParams, end: int) -> list[int]:
    starts, position = [], 0
    while position < end:
        starts.append(position)
        position += [size for start, size in params.ranges if start <= position][-1]
    return starts


@pytest.mark.parametrize(
    "kv_split",
    [256, ((0, 256), (4096, 512), (16384, 1024), (65536, 2048)), ((0, 192), (384, 320)), ((0, 64), (64, 128))],
)
def test_the_lines_give_the_boundaries_and_their_number(kv_split: object) -> None:
    params = AttentionParams.model_validate({"kv_split": kv_split})
    starts = starts_by_counting(params, 131072)
    lines = list(zip(params.lines[::2], params.lines[1::2], strict=True))
    assert [max(i * size + offset for size, offset in lines) for i in range(len(starts))] == starts
    for end in (1, 64, 65, 4096, 4097, 16384, 70000, 131072):
        assert params.splits_up_to(end) == len([start for start in starts if start < end])


def test_long_contexts_have_few_splits_and_short_ones_many() -> None:
    assert AttentionParams().splits_up_to(131072) == 120
    assert AttentionParams().splits_up_to(1024) == 4


@pytest.mark.parametrize(
    ("kv_split", "message"),
    [
        (100, "kv_split=100 is not a multiple of block_n=64"),
        ("256@64", "nor sizes from position 0 on"),
        ("256/512@4096/", "nor sizes from position 0 on"),
        ("", "nor sizes from position 0 on"),
        (0, "kv_split=0 is not a multiple"),
        (-64, "nor sizes from position 0 on"),
        ([], "pairs"),
        ([[0, 256], [1000, 512]], "1000 is not a boundary of the splits of 256 from 0; next are 768 and 1024"),
        ([[0, 256], [1024, 128]], "positions and sizes must both grow"),
        ([[0, 256], [0, 512]], "positions and sizes must both grow"),
        ([[0, 256, 3]], "pairs"),
        (256.0, "kv_split"),
    ],
)
def test_splits_that_cannot_be_are_refused(kv_split: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AttentionParams.model_validate({"kv_split": kv_split})


def test_params_survive_json_and_name_their_class() -> None:
    params = AttentionParams(kv_split="256/512@4096")
    assert params == AttentionParams.model_validate({"kv_split": [[0, 256], [4096, 512]]})
    assert AttentionParams.model_validate(json.loads(json.dumps(params.model_dump()))) == params
    assert attention_numerics(params, problem()) == "kv_split.256/512@4096.64.exp2"
    assert attention_numerics(AttentionParams(kv_split=512), problem()) == "kv_split.512.64.exp2"


@pytest.mark.parametrize(("arch", "served"), [("sm80", False), ("sm86", False), ("sm89", True), ("sm90", True)])
def test_an_fp8_cache_is_refused_where_triton_cannot_read_it(arch: str, served: bool) -> None:
    registry = Registry()
    register(registry)
    unmet = registry.get("triton.paged_attention").unmet(device(arch), problem(kv_dtype="float8_e4m3fn"))
    assert not unmet if served else any("needs sm89 or later for kv_dtype=float8_e4m3fn" in why for why in unmet)
    assert not registry.get("triton.paged_attention").unmet(device(arch), problem())


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize("tokens", [1, 256, 257, 8192])
def test_shapes_to_try_start_with_the_default_and_change_one_phase(arch: str, tokens: int) -> None:
    params = AttentionParams()
    ((_, default),) = attention_tiles(device(arch), problem(), params)
    tiles = list(attention_tiles_for(device(arch), problem(), params, tokens))
    assert tiles[0] == default
    assert len(tiles) == len(set(tiles)) >= (3 if arch.startswith("sm") else 1)
    others = ("prefill",) if tokens <= 256 else ("decode", "segment")
    for tile in tiles:
        fields = {name for name, value in tile if value != getattr(default, name)}
        assert not any(name.startswith(others) for name in fields)


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "programs"),
    [
        ("sm90", "bfloat16", 128, 2),
        ("sm90", "bfloat16", 256, 1),
        ("sm80", "bfloat16", 128, 2),
        ("sm86", "bfloat16", 128, 1),
        ("sm86", "bfloat16", 64, 2),
    ],
)
def test_segments_have_as_many_programs_as_run_at_once(arch: str, dtype: str, head_dim: int, programs: int) -> None:
    ((_, tile),) = attention_tiles(device(arch), problem(dtype, head_dim=head_dim), AttentionParams())
    assert tile.segment_programs == programs


@pytest.mark.parametrize(
    ("arch", "dims", "served"),
    [
        ("sm90", {}, True),
        ("sm90", {"head_dim": 64, "window": 128, "sinks": True}, True),
        ("sm90", {"head_dim": 96}, False),
        ("sm90", {"head_dim": 256}, False),
        ("sm90", {"softcap": 30.0}, False),
        ("sm90", {"alibi": True}, False),
        ("sm90", {"kv_dtype": "float8_e4m3fn"}, False),
        ("sm80", {}, False),
        ("sm100", {}, False),
    ],
)
def test_prefill_overlaps_where_the_kernel_was_made_for_it(arch: str, dims: dict[str, object], served: bool) -> None:
    params = AttentionParams()
    ((_, tile),) = attention_tiles(device(arch), problem(**dims), params)
    assert overlaps(ARCHS[arch], problem(**dims), params, tile) is served
    assert not overlaps(ARCHS[arch], problem(**dims), params, tile.model_copy(update={"prefill_overlap": False}))
    assert not overlaps(ARCHS[arch], problem(**dims), AttentionParams(block_n=32), tile)
