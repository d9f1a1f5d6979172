"""deep_gemm.moe as far as it needs no kernel: what it takes, its ladder, its rooms, its classes."""

from __future__ import annotations

import pytest
from fakes import H200

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.registry import default_registry
from bidispatch_backends.deep_gemm.moe_params import (
    BLOCK_ROWS,
    GroupedTile,
    Room,
    expected_rows,
    grouped_tiles,
    grouped_tiles_for,
    most_tokens,
)

SM90 = Device(ARCHS["sm90"], "sm90", predicted=True)
QWEN = {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}
DEEPSEEK = {"experts": 256, "top_k": 8, "hidden": 7168, "intermediate": 2048}
FP8 = {"weight_dtype": "float8_e4m3fn"}
NAMES = ("deep_gemm.moe", "deep_gemm.moe_fp8_block")


def problem(dtype="bfloat16", **dims):
    return ops.get("moe.experts").problem(dtype, {**QWEN, **dims})


@pytest.mark.parametrize(
    ("name", "arch", "dtype", "dims", "says"),
    [
        ("deep_gemm.moe", "sm90", "bfloat16", {}, []),
        ("deep_gemm.moe_fp8_block", "sm90", "bfloat16", FP8, []),
        ("deep_gemm.moe_fp8_block", "sm90", "bfloat16", {**FP8, "scale_format": "ue8m0", "shared": True}, []),
        ("deep_gemm.moe", "sm90", "bfloat16", FP8, ["needs weight_dtype in bfloat16"]),
        ("deep_gemm.moe_fp8_block", "sm90", "bfloat16", {}, ["needs weight_dtype in float8_e4m3fn"]),
        ("deep_gemm.moe", "sm90", "bfloat16", {"bias": True}, ["needs bias in False"]),
        ("deep_gemm.moe", "sm90", "bfloat16", {"out_dtype": "float32"}, ["needs out_dtype in bfloat16"]),
        ("deep_gemm.moe", "sm90", "bfloat16", {"hidden": 2044}, ["needs hidden a multiple of 8"]),
        ("deep_gemm.moe", "sm100", "bfloat16", {}, ["needs sm90"]),
    ],
)
def test_what_it_cannot_do_is_said(name, arch, dtype, dims, says):
    predicted = Device(ARCHS[arch], arch, predicted=True)
    reasons = default_registry().get(name).unmet(predicted, problem(dtype, **dims))
    assert len(reasons) == len(says)
    assert all(said in reason for said, reason in zip(says, reasons, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_fp16_and_a_missing_library_are_said(name):
    kernel = default_registry().get(name)
    dims = FP8 if name.endswith("fp8_block") else {}
    assert any("takes bfloat16" in reason for reason in kernel.unmet(SM90, problem("float16", **dims)))
    assert any("sgl-deep-gemm==0.1.5" in reason for reason in kernel.unmet(H200, problem(**dims)))


def test_its_classes_are_its_own():
    registry = default_registry()
    labels = {
        registry.get(name).numerics(registry.get(name).params(), chosen)
        for name, chosen in zip((*NAMES, "triton.moe"), (problem(), problem(**FP8), problem()), strict=True)
    }
    assert labels == {"deep_gemm.grouped.k_sequential", "deep_gemm.grouped.fp8_blocks.fp8", "moe.k_sequential"}
    assert all(registry.get(name).chooses_inside for name in NAMES)


def test_few_tokens_are_masked_where_there_is_room():
    layouts = [(most, tile.layout) for most, tile in grouped_tiles(SM90, problem(**FP8), None)]
    assert layouts == [(64, "masked"), (None, "contiguous")]
    large = problem(**{**DEEPSEEK, "experts": 512}, **FP8)
    assert [(most, tile.layout) for most, tile in grouped_tiles(SM90, large, None)] == [(None, "contiguous")]
    assert {tile.layout for tile in grouped_tiles_for(SM90, problem(), None, 16)} == {"masked", "contiguous"}
    assert {tile.layout for tile in grouped_tiles_for(SM90, problem(), None, 4096)} == {"contiguous"}


@pytest.mark.parametrize("tokens", [1, 3, 64, 129, 4096])
def test_rooms_are_whole_tiles_and_hold_every_spread(tokens):
    masked = Room.of(problem(), GroupedTile(layout="masked"), tokens)
    contiguous = Room.of(problem(), GroupedTile(layout="contiguous"), tokens)
    assert masked.groups == 128
    assert masked.rows >= tokens
    assert contiguous.groups == 1
    assert masked.rows % BLOCK_ROWS == contiguous.rows % BLOCK_ROWS == 0
    assert contiguous.rows >= tokens * 8  # all to one expert
    assert contiguous.rows >= min(128, tokens * 8) * BLOCK_ROWS  # one row to as many as there can be


@pytest.mark.parametrize(
    ("tokens", "dims", "rows"), [(1, {}, 1), (64, {}, 4), (8192, {}, 512), (64, {"experts": 8}, 64)]
)
def test_what_the_library_expects_is_an_even_spread(tokens, dims, rows):
    assert expected_rows(problem(**dims), tokens) == rows


def test_a_call_takes_no_more_memory_at_a_time_than_its_tile_says():
    tile = GroupedTile(layout="contiguous")
    large = problem(**DEEPSEEK, **FP8)
    most = most_tokens(large, tile, 8192)
    assert 128 <= most < 8192
    assert Room.of(large, tile, most).bytes_of(large) <= 1 << 30 < Room.of(large, tile, most + 128).bytes_of(large)
    assert most_tokens(large, GroupedTile(layout="masked"), 64) == 64


def test_it_is_selected_by_name(monkeypatch, as_json):
    monkeypatch.setenv("BIDISPATCH_IMPL", "moe.experts=deep_gemm.moe_fp8_block")
    dims = [word for name, value in (QWEN | FP8).items() for word in ("--dim", f"{name}={value}")]
    code, document = as_json("explain", "moe.experts", "--device", "sm90", "--dtype", "bf16", *dims)
    assert code == 0
    assert document["selection"]["numerics"] == "deep_gemm.grouped.fp8_blocks.fp8"
