"""`attention.mla`: the catalogue's entry, reference and stock, the kernel of the processor, and what a plan says."""

from __future__ import annotations

import math

import pytest
import torch

import bidispatch
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ArgumentError, SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.mla import as_attention
from bidispatch.ops.reference import attention as attention_reference
from bidispatch.ops.reference.mla import attention_mla, attention_mla_inputs, latent_batch
from bidispatch.ops.schema import Problem
from bidispatch.ops.stock import attention_mla as stock_attention_mla
from bidispatch.runtime.arguments import check_tensors, tensor_specs
from bidispatch.runtime.context import BindContext, Limits
from bidispatch_backends.torch_cpu.mla import bind_attention_mla
from bidispatch_backends.torch_cpu.params import AttentionParams
from bidispatch_backends.triton.mla import launches
from bidispatch_backends.triton.mla_params import MlaParams, mla_tiles, mla_tiles_for, seesaws, walks_runs

CPU = Device.parse("cpu")
MLA = ops.get("attention.mla")
SMALL = {"num_heads": 3, "kv_lora_rank": 32, "rope_dim": 16, "page_size": 5}
SCALE = 144**-0.5


def problem_of(dtype: str = "float16", **dims: int) -> Problem:
    return MLA.problem(dtype, {**SMALL, **dims})


def run_cpu(problem: Problem, batch: list, **params: int) -> torch.Tensor:
    context = BindContext(CPU, problem, AttentionParams(**params), None, Limits(1024, 16, 1024))
    out = batch[0].new_full((*batch[0].shape[:2], problem.size("kv_lora_rank")), float("nan"))
    bind_attention_mla(context)(*batch, SCALE, out)
    return out


# -- the op ------------------------------------------------------------------------------------------------------------


def test_deepseeks_dims_are_the_defaults():
    problem = MLA.problem("bfloat16", {"num_heads": 128})
    assert dict(problem.dims) == {"num_heads": 128, "kv_lora_rank": 512, "rope_dim": 64, "page_size": 64}
    assert MLA.scalars[0].default_for(problem) == pytest.approx(1 / math.sqrt(192))
    assert MLA.caches == ("kv_cache",)
    assert ops.get("attention").caches == ("k_cache", "v_cache")
    assert ops.get("gemm").caches == ()


@pytest.mark.parametrize("dims", [{"num_heads": 0}, {"kv_lora_rank": 0}, {"head_dim": 576}, {"tokens": 3}])
def test_dims_it_does_not_have_are_refused(dims):
    with pytest.raises(UsageError):
        problem_of(**dims)


def test_a_shape_can_be_the_sum_of_two_dims():
    problem = problem_of()
    specs = tensor_specs(MLA.arguments, problem)
    batch = latent_batch(problem, [2, 1], [7, 9])
    assert check_tensors(problem, specs, batch, torch.device("cpu"))["tokens"] == 3
    assert batch[0].shape == (3, 3, 48)
    assert batch[1].shape[1:] == (5, 48)
    for place, wrong in ((0, batch[0][..., :-1].contiguous()), (1, batch[1][..., :32].contiguous())):
        spoiled = [*batch]
        spoiled[place] = wrong
        with pytest.raises(ArgumentError, match=MLA.arguments[place].name):
            check_tensors(problem, specs, spoiled, torch.device("cpu"))


# -- reference and stock -----------------------------------------------------------------------------------------------


def test_the_reference_is_attention_with_one_head_whose_values_are_cut():
    problem = problem_of()
    batch = attention_mla_inputs(problem, 40)
    (out,) = attention_mla(problem, *batch, SCALE)
    q, cache, *paging = batch
    alike = as_attention(problem)
    absent = [None for argument in ops.get("attention").arguments if argument.when]
    latent = cache[:, :, None]
    (wide,) = attention_reference.attention(alike, q, latent, latent, *paging, *absent, SCALE)
    assert out.dtype is torch.float64
    assert torch.allclose(out, wide[..., :32], rtol=1e-12, atol=1e-14)


def test_the_reference_is_the_formula():
    problem = problem_of()
    q, cache, table, *rest = latent_batch(problem, [2], [11])
    (out,) = attention_mla(problem, q, cache, table, *rest, SCALE)
    latent = [cache[int(table[0, p // 5]), p % 5].double() for p in range(11)]
    for row, position in enumerate((9, 10)):
        for head in range(3):
            weights = [math.exp(float(q[row, head].double() @ latent[p]) * SCALE) for p in range(position + 1)]
            wanted = sum(w * latent[p][:32] for p, w in enumerate(weights)) / math.fsum(weights)
            assert torch.allclose(out[row, head], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stock_and_the_processors_kernel_are_near_the_reference(dtype):
    problem = problem_of(dtype)
    batch = attention_mla_inputs(problem, 40)
    (wanted,) = attention_mla(problem, *batch, SCALE)
    for out in (run_cpu(problem, batch), *stock_attention_mla(problem, *batch, SCALE)):
        assert out.shape == wanted.shape
        error = float((out.double() - wanted).norm() / wanted.norm())
        assert error < {"bfloat16": 5e-3, "float16": 8e-4}[dtype]


# -- the processor's kernel --------------------------------------------------------------------------------------------


def rows_that_differ(problem, kernel_for):
    """Sequence 7 in one prefill alone, against itself in chunks and decodes among others."""
    whole = kernel_for(300)(latent_batch(problem, [300], [300], sequence_seeds=[7]))
    differ = 0
    for first, stop in ((0, 1), (0, 64), (64, 129), (129, 300), (255, 256), (299, 300)):
        batch = latent_batch(
            problem, [5, stop - first, 0], [5, stop, 0], sequence_seeds=[1, 7, 2], page_seed=stop, padding_rows=3
        )
        out = kernel_for(stop - first)(batch)
        assert out[-3:].isnan().all(), "rows that no sequence owns were written"
        differ += int((out[5:-3] != whole[first:stop]).flatten(1).any(dim=1).sum())
    return differ


def test_a_decode_has_the_bits_of_a_prefill_and_other_tiles_are_caught():
    problem = problem_of()
    assert rows_that_differ(problem, lambda rows: lambda batch: run_cpu(problem, batch)) == 0
    by_rows = rows_that_differ(
        problem, lambda rows: lambda batch: run_cpu(problem, batch, kv_tile=64 if rows < 200 else 128)
    )
    assert by_rows > 0


# -- planning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [name for name in ARCHS if name != "cpu"])
@pytest.mark.parametrize("heads", [16, 128])
def test_every_gpu_is_served_at_level_sequence(arch, heads):
    plan = bidispatch.plan(device=Device(ARCHS[arch], arch, predicted=True))
    selection = plan.select_problem(MLA.problem("bfloat16", {"num_heads": heads}))
    assert [rung.implementation.name for rung in selection.rungs] == ["triton.mla"]
    assert selection.level is Invariance.SEQUENCE
    assert selection.numerics == "kv_split_mla.256/512@1024/1024@8192/2048@32768.32.exp2"


@pytest.mark.parametrize(
    ("arch", "dims", "seqs", "served"),
    [
        ("sm90", {}, 256, True),
        ("sm90", {"num_heads": 16, "page_size": 16}, 512, True),
        ("sm90", {}, 1024, False),
        ("sm90", {"kv_lora_rank": 256}, 256, False),
        ("sm80", {}, 256, False),
        ("sm100", {}, 256, False),
    ],
)
def test_decode_overlaps_where_the_kernel_was_made_for_it(arch, dims, seqs, served):
    params = MlaParams()
    problem = MLA.problem("bfloat16", {"num_heads": 128, **dims})
    ((_, tile),) = mla_tiles(Device(ARCHS[arch], arch, predicted=True), problem, params)
    assert seesaws(ARCHS[arch], problem, params, tile, seqs) is served
    assert not seesaws(ARCHS[arch], problem, params, tile.model_copy(update={"decode_overlap": False}), seqs)
    assert not seesaws(ARCHS[arch], problem, MlaParams(block_n=64), tile, seqs)


@pytest.mark.parametrize(
    ("splits", "served"), [(MlaParams().kv_split, True), (64, True), (96, False), ("64/96@128", False)]
)
def test_splits_of_tiles_in_pairs_are_walked_in_runs_on_hopper(splits, served):
    """A split must end with a tile of one warpgroup and begin with one of the other."""
    device, problem, _ = hopper(128)
    params = MlaParams(kv_split=splits)
    ((_, tile),) = mla_tiles(device, problem, params)
    assert tile.segment_programs == 1
    assert walks_runs(device.arch, problem, params, tile, 256) is served
    assert not walks_runs(device.arch, problem, params, tile, 1024)
    runs = ["seesaw_segment_kernel", "fold_kernel"]
    for changed, more in (
        ({}, [*runs, "seesaw_walk_kernel"]),
        ({"prefill_overlap": False}, runs),
        ({"segment_programs": 0}, []),
    ):
        made = launches(problem, params, tile.model_copy(update=changed), device.arch)
        kernels = [launch.kernel.fn.__name__ for launch in made]
        assert kernels[2:] == ["seesaw_split_kernel", "fold_kernel", *(more if served else [])]


def test_the_walk_of_pairs_takes_operands_on_16_bytes():
    """Others are Triton's, on a grid of its own."""
    device, problem, params = hopper(16)
    ((_, tile),) = mla_tiles(device, problem, params)
    pairs = launches(problem, params, tile, device.arch)[-1]
    q, cache, out = torch.zeros(4, 16, 577), torch.zeros(3, 64, 576), torch.zeros(4, 16, 512)
    numbers = torch.zeros(17, dtype=torch.int32)
    places = [1.0, 4, 8192, 128]

    def served(q, numbers=numbers, strides=(9216, 576)):
        tensors = (q, cache, numbers, numbers, numbers, numbers, numbers, out)
        return pairs.serves(*tensors, *places, *strides, 64 * 576, 576, 16 * 512, 512)

    assert served(q)
    assert not served(q.flatten()[1:])
    assert not served(q, numbers[1:])
    assert not served(q, strides=(16 * 584, 584))


def test_only_hopper_has_segments_by_default():
    for arch in ("sm80", "sm89", "sm100", "gfx942"):
        device = Device(ARCHS[arch], arch, predicted=True)
        problem, params = MLA.problem("bfloat16", {"num_heads": 128}), MlaParams()
        ((_, tile),) = mla_tiles(device, problem, params)
        assert tile.segment_programs == 0
        assert len(launches(problem, params, tile, device.arch)) == 4
        some = tile.model_copy(update={"segment_programs": 2})
        assert len(launches(problem, params, some, device.arch)) == 6


@pytest.mark.parametrize(("dims", "why"), [({"kv_lora_rank": 1024}, "kv_lora_rank"), ({"rope_dim": 128}, "rope_dim")])
def test_widths_that_the_kernel_was_not_made_for_are_refused_with_a_reason(dims, why):
    plan = bidispatch.plan(device=Device(ARCHS["sm90"], "sm90", predicted=True))
    with pytest.raises(SelectionError, match=f"needs {why} at most"):
        plan.select_problem(MLA.problem("bfloat16", {"num_heads": 128, **dims}))


def hopper(heads):
    return Device(ARCHS["sm90"], "sm90", predicted=True), MLA.problem("bfloat16", {"num_heads": heads}), MlaParams()


@pytest.mark.parametrize(("heads", "rows"), [(1, 16), (16, 16), (20, 32), (64, 32)])
def test_a_tile_of_decode_is_as_tall_as_the_heads_fill(heads, rows):
    device = Device(ARCHS["sm80"], "sm80", predicted=True)
    ((_, tile),) = mla_tiles(device, MLA.problem("bfloat16", {"num_heads": heads}), MlaParams())
    assert tile.decode_block_m == rows


@pytest.mark.parametrize("heads", [1, 16, 64, 128])
def test_on_hopper_it_is_as_tall_as_a_warpgroups_product(heads):
    ((_, tile),) = mla_tiles(*hopper(heads))
    assert tile.decode_block_m == 64


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("tokens", [1, 256, 257, 8192])
def test_shapes_to_try_start_with_the_default_and_change_one_phase(heads, tokens):
    ((_, default),) = mla_tiles(*hopper(heads))
    tiles = list(mla_tiles_for(*hopper(heads), tokens))
    assert tiles[0] == default
    assert len(tiles) == len(set(tiles)) >= 3
    other = "prefill" if tokens <= 256 else "decode"
    for tile in tiles:
        assert not any(name.startswith(other) for name, value in tile if value != getattr(default, name))


def test_splits_hold_whole_tiles():
    with pytest.raises(ValueError, match="not a multiple"):
        MlaParams(kv_split=1000, block_n=32)
