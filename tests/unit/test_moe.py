"""The mixture of experts as far as it needs no GPU: dims that are refused, tiles, grids, the processor's kernels."""

from __future__ import annotations

import json

import pytest
import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.operands import operands_of
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ArgumentError, UsageError
from bidispatch.runtime.bind import load_attribute
from bidispatch.tune.models import expert_shapes
from bidispatch_backends.triton.moe_params import ExpertsTile, experts_tiles, experts_tiles_for, most_blocks

SMALL = {"experts": 6, "top_k": 2, "hidden": 32, "intermediate": 24}
MODELS = {
    "qwen": {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    "mixtral": {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 1792},
    "deepseek": {
        "experts": 32, "top_k": 8, "hidden": 7168, "intermediate": 2048, "expert_map": True, "global_experts": 256,
    },
    "alone": {"experts": 1, "top_k": 1, "hidden": 64, "intermediate": 64},
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_act": "silu",
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
}


def problem(dtype="float16", **dims):
    return ops.get("moe.experts").problem(dtype, {**SMALL, **dims})


def device(arch="sm90"):
    return Device(ARCHS[arch], arch, predicted=True)


@pytest.mark.parametrize(
    ("op", "dims", "message"),
    [
        ("moe.experts", {**SMALL, "top_k": 7}, "top_k=7 exceeds the 6 experts there are"),
        ("moe.experts", {**SMALL, "global_experts": 12}, "expert_map=true says which"),
        ("moe.experts", {**SMALL, "expert_map": True}, "needs global_experts of at least experts=6, not 0"),
        ("moe.experts", {**SMALL, "expert_map": True, "global_experts": 12, "top_k": 13}, "exceeds the 12 experts"),
        ("moe.experts", {**SMALL, "weight_dtype": "fp8"}, "needs hidden a multiple of 128, not 32"),
        (
            "moe.experts",
            {**SMALL, "hidden": 128, "weight_dtype": "fp8"},
            "needs intermediate a multiple of 128, not 24",
        ),
        ("moe.experts", {**SMALL, "weight_dtype": "fp16"}, "weight_dtype is bfloat16 or float8_e4m3fn, not float16"),
        ("moe.router", {"experts": 4, "top_k": 5}, "top_k=5 exceeds experts=4"),
        ("moe.router", {"experts": 10, "top_k": 2, "n_group": 4}, "experts=10 is not divided by n_group=4"),
        ("moe.router", {"experts": 8, "top_k": 2, "n_group": 4, "topk_group": 5}, "topk_group=5 exceeds n_group=4"),
        ("moe.router", {"experts": 8, "top_k": 4, "n_group": 4, "topk_group": 1}, "2 experts, fewer than top_k=4"),
        (
            "moe.router",
            {"experts": 4, "top_k": 1, "n_group": 4, "correction_bias": True},
            "leaves one expert a group",
        ),
    ],
)
def test_dims_that_contradict_each_other_are_refused(op, dims, message):
    with pytest.raises(UsageError, match=message):
        ops.get(op).problem("bf16", dims)


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm120", "gfx942"])
@pytest.mark.parametrize("dims", MODELS.values(), ids=MODELS)
def test_the_ladder_rises_and_ends_open(dims, arch):
    ladder = experts_tiles(device(arch), ops.get("moe.experts").problem("bf16", dims), None)
    bounds = [max_m for max_m, _ in ladder]
    assert bounds[-1] is None
    assert bounds[:-1] == sorted(set(bounds[:-1]))
    rows = [tile.block_m for _, tile in ladder]
    assert rows == sorted(rows)
    for max_m, tile in ladder:
        if tile.counted:
            assert max_m * dims["top_k"] <= tile.counted


@pytest.mark.parametrize("m", [1, 16, 300, 4096])
def test_shapes_to_try_are_many_and_begin_with_the_own_choice(m):
    chosen = ops.get("moe.experts").problem("bf16", MODELS["qwen"])
    found = list(experts_tiles_for(device(), chosen, None, m))
    ladder = experts_tiles(device(), chosen, None)
    assert found[0] == next(tile for max_m, tile in ladder if max_m is None or m <= max_m)
    assert len(found) >= 5
    assert len(set(found)) == len(found)


def test_a_tile_of_other_sizes_than_powers_of_two_is_refused():
    (_, tile), *_ = experts_tiles(device(), problem(), None)
    with pytest.raises(ValueError, match="48 is not a power of two"):
        ExpertsTile(**{**tile.model_dump(), "up_block_n": 48})


@pytest.mark.parametrize(("pairs", "experts", "block_m"), [(1, 8, 16), (33, 8, 16), (5000, 128, 64), (20, 300, 16)])
def test_the_grid_has_room_for_every_spread(pairs, experts, block_m):
    most = most_blocks(pairs, experts, block_m)
    generator = torch.Generator().manual_seed(0)
    spreads = [torch.randint(experts, (pairs,), generator=generator) for _ in range(20)]
    spreads += [torch.zeros(pairs, dtype=torch.long), torch.arange(pairs) % experts]
    # The worst: a block more than is full for as many experts as there can be.
    spreads.append(torch.cat([torch.arange(min(pairs, experts)), torch.zeros(max(0, pairs - experts)).long()]))
    needed = [int((-(-spread.bincount() // block_m)).sum()) for spread in spreads]
    assert max(needed) <= most
    assert max(needed) >= most - 1


@pytest.mark.parametrize(
    "dims",
    [
        {},
        {"hidden": 256, "intermediate": 128, "weight_dtype": "float8_e4m3fn"},
        {"activation": "gelu", "bias": True, "shared": True},
        {
            "activation": "swiglu_clamped",
            "bias": True,
            "expert_map": True,
            "global_experts": 20,
            "out_dtype": "float32",
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_processor_is_near_the_reference_and_rows_do_not_follow_the_batch(dtype, dims):
    chosen = problem(dtype, **dims)
    op = ops.get("moe.experts")
    arguments = load_attribute(op.inputs)(chosen, 30)
    bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=30)
    with torch.no_grad():
        out = bound(*arguments)
        (exact,) = load_attribute(op.reference)(chosen, *arguments)
        assert float((out.double() - exact).norm() / exact.norm()) < (4e-3 if dtype == "bfloat16" else 5e-4)
        for row in (0, 7, 29):
            alone = list(arguments)
            for place, spec in enumerate(op.arguments):
                if spec.shape[0] == "m" and arguments[place] is not None:
                    alone[place] = arguments[place][row : row + 1]
            assert torch.equal(bound(*alone), out[row : row + 1])


def test_no_rows_give_no_rows_and_more_than_it_was_bound_for_are_refused():
    chosen = problem()
    bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=4)
    arguments = load_attribute(ops.get("moe.experts").inputs)(chosen, 5)
    none = [t[:0] if t is not None and spec.shape[0] == "m" else t
            for t, spec in zip(arguments, ops.get("moe.experts").arguments, strict=True)]  # fmt: skip
    with torch.no_grad():
        assert bound(*none).shape == (0, 32)
        with pytest.raises(ArgumentError, match="5 m, but it was bound for at most 4"):
            bound(*arguments)


def test_scales_of_another_shape_are_refused_and_experts_without_them_too():
    chosen = problem(hidden=256, intermediate=128, weight_dtype="fp8")
    bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=4)
    arguments = load_attribute(ops.get("moe.experts").inputs)(chosen, 3)
    wrong = [*arguments[:7], arguments[7][:, :1], *arguments[8:]]
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"w13_scales must be \[6, 2, 2\], not \[6, 1, 2\]"):
        bound(*wrong)
    with torch.no_grad(), pytest.raises(ArgumentError, match="w13_scales is missing"):
        bound(*arguments[:7])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_scale_that_is_no_number_reaches_only_the_rows_of_its_expert(value):
    chosen = problem(hidden=256, intermediate=128, weight_dtype="fp8")
    bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=20)
    arguments = load_attribute(ops.get("moe.experts").inputs)(chosen, 20)
    with torch.no_grad():
        clean = bound(*arguments)
        arguments[7][2] = value
        dirty = bound(*arguments)
    reached = (arguments[4] == 2).any(dim=1)
    assert torch.equal(clean[~reached], dirty[~reached])
    assert reached.any()
    assert torch.isfinite(dirty[reached]).all() == (value == 0)


def test_ids_of_another_dtype_and_weights_of_another_shape_are_refused():
    chosen = problem()
    bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=4)
    arguments = load_attribute(ops.get("moe.experts").inputs)(chosen, 3)
    wrong = [*arguments[:4], arguments[4].long(), *arguments[5:]]
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"topk_ids must be torch.int32, not torch.int64"):
        bound(*wrong)
    wrong = [arguments[0], arguments[1][:, 1:], *arguments[2:]]
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"w13 must be \[6, 48, 32\], not \[6, 47, 32\]"):
        bound(*wrong)


def test_ties_of_the_processors_router_go_to_the_lower_expert():
    chosen = ops.get("moe.router").problem("float32", {"experts": 9, "top_k": 3})
    bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=4)
    logits = torch.zeros(2, 9)
    logits[0, [8, 4]] = 1.0
    logits[1, 3] = float("nan")
    with torch.no_grad():
        _, ids = bound(logits, None)
    assert ids.tolist() == [[4, 8, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("config", "ranks", "expert_ranks", "expected"),
    [
        (QWEN3_30B, 4, 1, {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 192}),
        (
            QWEN3_30B,
            8,
            8,
            {
                "experts": 16, "top_k": 8, "hidden": 2048, "intermediate": 768,
                "expert_map": True, "global_experts": 128,
            },
        ),
        (
            GPT_OSS,
            1,
            1,
            {
                "experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 2880,
                "activation": "swiglu_clamped", "bias": True, "swiglu_limit": 7.0,
            },
        ),
    ],
)  # fmt: skip
def test_the_experts_of_a_model(tmp_path, config, ranks, expert_ranks, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (shape,) = expert_shapes(tmp_path, ranks, expert_ranks)
    assert shape.dims == expected
    ops.get("moe.experts").problem("bf16", shape.dims)


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_experts_whose_weights_are_in_fp8_are_a_problem_of_fp8(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_30B, "quantization_config": BLOCKS}))
    (shape,) = expert_shapes(tmp_path)
    assert shape.dims["weight_dtype"] == "float8_e4m3fn"
    ops.get("moe.experts").problem("bf16", shape.dims)


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ({**BLOCKS, "weight_block_size": [64, 64]}, r"fp8 in blocks of \[64, 64\] are not served"),
        ({"quant_method": "fp8"}, "experts with weights of fp8 without blocks are not served"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "experts with weights of awq are not served"),
        ({"quant_method": "mxfp4"}, "weights of mxfp4 are not served; --shapes FILE"),
    ],
)
def test_experts_in_another_format_are_refused_by_name(tmp_path, quantized, message):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_30B, "quantization_config": quantized}))
    with pytest.raises(UsageError, match=message):
        expert_shapes(tmp_path)


@pytest.mark.parametrize(
    ("change", "ranks", "expert_ranks", "message"),
    [
        ({"num_experts": None}, 1, 1, "has no experts"),
        ({}, 1, 7, "num_experts=128 is not divided by 7 ranks of --ep"),
        ({}, 5, 1, "is not divided by a tensor-parallel size of 5"),
        ({}, 1, 0, "an expert-parallel size is at least 1"),
        ({"hidden_act": "relu2"}, 1, 1, "hidden_act='relu2' is none of silu and gelu"),
    ],
)
def test_a_model_whose_experts_cannot_be_read_is_refused(tmp_path, change, ranks, expert_ranks, message):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_30B, **change}))
    with pytest.raises(UsageError, match=message):
        expert_shapes(tmp_path, ranks, expert_ranks)


def test_what_is_timed_has_the_arguments_of_the_op(monkeypatch):
    from bidispatch.bench import operands

    monkeypatch.setattr(operands, "copies_beyond_cache", lambda size, device, most: 2)
    fp8 = problem(hidden=128, intermediate=128, weight_dtype="fp8")
    scales = operands_of(fp8, torch.device("cpu")).calls(2)[0][7:9]
    assert [tuple(each.shape) for each in scales] == [(6, 2, 1), (6, 1, 1)]
    for chosen in (problem(expert_map=True, global_experts=12, bias=True, shared=True), problem()):
        made = operands_of(chosen, torch.device("cpu"))
        calls = made.calls(3)
        assert len(calls) == 16
        bound = bid.plan("cpu").select_problem(chosen).bind(max_tokens=3)
        with torch.no_grad():
            assert bound(*calls[5]).shape == (3, 32)
        assert not torch.equal(calls[0][4], calls[1][4])
        flops, moved = made.work(3)
        share = 6 / (12 if chosen.flag("expert_map") else 6)
        assert flops == pytest.approx(6 * 3 * 2 * share * 32 * 24)
        assert 0 < moved < 2 * (3 * 6 * 32 * 24 + 2 * 3 * 32) + 1
        assert made.estimate_us(3) > 0
    with pytest.raises(UsageError, match=r"rms_norm is not timed by itself; gemm, .*, moe.experts, .* are"):
        operands_of(ops.get("rms_norm").typical("bfloat16"), torch.device("cpu"))
