"""Every kernel and tile a profile can select compiles for its arch and fits its shared memory, with no GPU.

Binaries are cached by source in Triton's own cache (TRITON_CACHE_DIR), so a second run takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bidispatch
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.ops.schema import Problem
from bidispatch.profiles.load import builtin_folder
from bidispatch.profiles.tiles import read_tuned
from bidispatch.registry import Registry, Rung
from bidispatch.runtime.bind import load_attribute
from bidispatch_backends.triton import fp8_gemm, register
from bidispatch_backends.triton.compile import Variant, compile_variant, target_of, variants
from bidispatch_backends.triton.fp8_params import Fp8BlockParams
from bidispatch_backends.triton.gemm_params import GemmParams, GemmTile, ProductTile, SplitParams

COMPILED_ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942")
SUMMING_OPS = ("rms_norm", "fused_add_rms_norm", "qk_norm", "softmax", "log_softmax", "token_logprob", "mean", "sum")
ROW_OPS = (*SUMMING_OPS, "silu_and_mul", "gelu_tanh_and_mul")
HEADS = {"num_heads": 32, "num_kv_heads": 8}
EXPERTS = {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}
DTYPES = ("bfloat16", "float16", "float32")
DTYPES_16_BIT = ("bfloat16", "float16")
FP8 = "float8_e4m3fn"


def _problem(op: str, dtype: str = "bfloat16", **dims: Any) -> Problem:
    return ops.get(op).problem(dtype, dims)


def _row_problem(op: str, dtype: str, n: int) -> Problem:
    return _problem(op, dtype, head_dim=n, **HEADS) if op == "qk_norm" else _problem(op, dtype, n=n)


# Between them these and OTHER_ROWS reach every tile of every ladder.
TILED = (
    *(_problem("gemm", dtype, n=n, k=4096) for dtype in DTYPES for n in (64, 1024, 4096, 24576)),
    *(_problem("gemm.int4", dtype, n=4096, k=4096) for dtype in DTYPES_16_BIT),
    *(_problem("gemm.int4", n=n, k=4096) for n in (1536, 24576)),
    *(_row_problem(op, dtype, 4096) for op in ROW_OPS for dtype in DTYPES),
    *(_problem(op, n=151936, out_dtype="float32") for op in ("softmax", "log_softmax")),
    _problem("token_logprob", n=151936),
    _problem("qk_norm", head_dim=128, **HEADS),
    *(_problem("attention", dtype, head_dim=128, **HEADS) for dtype in DTYPES),
    *(_problem("attention", dtype, head_dim=256, **HEADS) for dtype in DTYPES),
    *(_problem("attention.mla", dtype, num_heads=heads) for dtype in DTYPES_16_BIT for heads in (128, 32, 16)),
    *(_problem("moe.router", dtype, experts=128, top_k=8) for dtype in DTYPES),
    *(_problem("moe.experts", dtype, **EXPERTS) for dtype in DTYPES_16_BIT),
)
# A row op's rows and warps follow n: one arch of each vendor is enough.
OTHER_ROWS = tuple(_row_problem(op, "bfloat16", n) for op in SUMMING_OPS for n in (64, 256, 1024, 2048, 8192, 16384))
# The kernel and tiles of gemm with other strides; masks, odd sizes and features: one arch of each vendor is enough.
ODD = (
    *OTHER_ROWS,
    *(_problem("bmm", dtype, n=128, k=512) for dtype in DTYPES),
    _problem("gemm", n=4097, k=1000, bias=True, out_dtype="float32"),
    _problem("gemm.int4", n=1536, k=384, zero_points=True, group_size=32, bias=True, out_dtype="float32"),
    _problem("gemm.int4", "float16", n=4112, k=14336, zero_points=True, group_size=64),
    _problem("gemm.int4", n=4096, k=3584, group_size=3584),
    _problem("bmm", n=7, k=4097),
    _problem("rms_norm", n=100, gemma=True),
    _problem("rms_norm", "float32", n=20003),
    _problem("fused_add_rms_norm", n=151, gemma=True),
    _problem("fused_add_rms_norm", n=20003),
    _problem("qk_norm", "float32", head_dim=80, num_heads=6, num_kv_heads=3, gemma=True),
    _problem("silu_and_mul", n=100),
    _problem("log_softmax", "float32", n=151936),
    _problem("softmax", "float16", n=9001),
    _problem("token_logprob", "float32", n=9001),
    _problem("mean", n=1),
    _problem("mean", "float32", n=20003),
    _problem("attention", head_dim=64, causal=False, **HEADS),
    _problem("attention", head_dim=96, page_size=5, num_heads=40, num_kv_heads=1),
    _problem("attention", head_dim=128, window=4096, softcap=50.0, sinks=True, **HEADS),
    _problem("attention.mla", num_heads=16, page_size=16),
    _problem("attention.mla", "float16", num_heads=5, kv_lora_rank=96, rope_dim=24, page_size=5),
    _problem("moe.router", experts=256, top_k=8, scoring="sigmoid", correction_bias=True, n_group=8, topk_group=4),
    _problem("moe.router", "float16", experts=1000, top_k=10, renormalize=False),
    _problem("moe.experts", experts=1, top_k=1, hidden=17, intermediate=1),
    _problem("moe.experts", "float16", **{**EXPERTS, "intermediate": 100}, activation="gelu", shared=True),
    _problem(
        "moe.experts",
        **{**EXPERTS, "hidden": 2880, "activation": "swiglu_clamped", "bias": True, "out_dtype": "float32"},
        expert_map=True,
        global_experts=1024,
    ),
    _problem("attention", head_dim=192, alibi=True, page_size=24, **HEADS),
    _problem("attention", head_dim=128, kv_dtype=FP8, page_size=64, alibi=True, softcap=9.0, **HEADS),
    _problem("attention", "float16", head_dim=80, kv_dtype=FP8, window=512, sinks=True, **HEADS),
    _problem("attention", "float32", head_dim=64, kv_dtype=FP8, num_heads=8, num_kv_heads=2),
)
# e4m3 came with Ada. One of each scale format and dtype: neither follows the arch.
FP8_ARCHS = ("sm89", "sm90", "sm100", "sm103", "sm120")
FP8_PRODUCTS = tuple(_problem(op, FP8, n=n, k=4096) for op in ("gemm.fp8_block", "gemm.fp8") for n in (64, 24576))
FP8_ROW_OPS = ("rms_norm.fp8_group", "fused_add_rms_norm.fp8_group")
QUANTIZATIONS = (
    *(_problem(f"quantize.fp8_{kind}", dtype, k=4096) for kind in ("group", "token", "tensor") for dtype in DTYPES),
    *(_problem(op, dtype, n=4096) for op in (*FP8_ROW_OPS, "silu_and_mul.fp8_group") for dtype in DTYPES),
)
FP8_EXPERTS = tuple(_problem("moe.experts", dtype, **EXPERTS, weight_dtype=FP8) for dtype in DTYPES_16_BIT)
FP8_ODD = (
    _problem(
        "moe.experts",
        **{**EXPERTS, "hidden": 7168, "activation": "swiglu_clamped", "bias": True, "out_dtype": "float32"},
        expert_map=True,
        global_experts=256,
        weight_dtype=FP8,
        scale_format="ue8m0",
    ),
    *(_problem(op, n=n) for op in FP8_ROW_OPS for n in (40, 100, 256, 1024, 2048, 8192, 16384)),
    _problem("rms_norm.fp8_group", n=4096, scale_format="ue8m0", gemma=True),
    _problem("quantize.fp8_group", k=1003, scale_format="ue8m0"),
    *(_problem(f"quantize.fp8_{kind}", k=1003) for kind in ("token", "tensor")),
    _problem("silu_and_mul.fp8_group", n=40, scale_format="ue8m0"),
    _problem("gemm.fp8_block", FP8, n=4097, k=1000, out_dtype="float32"),
    _problem("gemm.fp8_block", FP8, n=7, k=7, out_dtype="float16"),
    _problem("gemm.fp8", FP8, n=4097, k=1000, bias=True, x_scaling="tensor", weight_scaling="tensor"),
)
INSTRUCTION_SETS = ("sm90", "gfx942")
CASES = [(arch, problem) for arch in COMPILED_ARCHS for problem in TILED]
CASES += [(arch, problem) for arch in INSTRUCTION_SETS for problem in ODD]
CASES += [(arch, problem) for arch in FP8_ARCHS for problem in (*FP8_PRODUCTS, *FP8_EXPERTS, *QUANTIZATIONS)]
CASES += [("sm90", problem) for problem in FP8_ODD]


KERNELS = {"gemm.fp8_block": "triton.fp8_block"}
"""Which Triton kernel does an op that libraries do too, where it is not named after the op."""


OLDEST_ALIKE = {"sm86": "sm80", "sm89": "sm80", "sm103": "sm100"}
"""Archs that Triton compiles for as it does for an older one: what they have of their own is their shared memory, and
with it their tiles. `test_archs_that_are_alike_are_compiled_alike` shows it; fp8, which sm80 lacks, stays apart."""


def compiled_as(arch: str, variant: Variant) -> str:
    """The arch whose binary stands for this one's."""
    fp8 = any("fp8" in kind for kind in variant.signature.values())
    return arch if fp8 else OLDEST_ALIKE.get(arch, arch)


@lru_cache(maxsize=len(COMPILED_ARCHS))
def plan_for(arch: str) -> bidispatch.Plan:
    return bidispatch.plan(device=Device(ARCHS[arch], arch, predicted=True))


def triton_rungs(arch: str, problem: Problem) -> tuple[Rung, ...]:
    """The Triton rungs that a plan for this arch selects, or would without the libraries it prefers."""
    rungs = plan_for(arch).select_problem(problem).rungs
    if any(rung.implementation.backend != "triton" for rung in rungs):
        name = KERNELS.get(problem.op, f"triton.{problem.op}")
        with bidispatch.override(f"{problem.op}={name}"):
            rungs = plan_for(arch).select_problem(problem).rungs
    return tuple(rung for rung in rungs if rung.implementation.backend == "triton")


def selected_variants(arch: str, problem: Problem) -> Mapping[str, Variant]:
    """Every binary of those rungs, by its key: rungs can share one."""
    return {
        variant.key: variant
        for rung in triton_rungs(arch, problem)
        for variant in variants(rung.implementation.name, problem, rung.params, rung.tile, ARCHS[arch])
    }


def shared_memory_faults(arch: str, found: Mapping[str, Variant]) -> list[str]:
    """Variants that need more shared memory than a block of the arch may use."""
    limit = ARCHS[arch].shared_memory
    faults = []
    for variant in found.values():
        shared = compile_variant(variant, target_of(ARCHS[compiled_as(arch, variant)])).metadata.shared
        if shared > limit:
            faults.append(f"{variant}: {shared} bytes of shared memory, {arch} has {limit}")
    return faults


@pytest.mark.parametrize(("arch", "problem"), CASES, ids=str)
def test_every_selected_kernel_compiles_and_fits(arch: str, problem: Problem) -> None:
    found = selected_variants(arch, problem)
    assert found, f"no Triton kernel is selected for {problem} on {arch}"
    assert shared_memory_faults(arch, found) == []


@pytest.mark.parametrize("op", sorted({problem.op for _, problem in CASES}))
def test_the_typical_problem_of_every_op_compiles(op: str) -> None:
    """Few enough to be compiled by a second version of Triton; see Makefile."""
    found = selected_variants("sm90", ops.get(op).typical(ops.get(op).dtypes[0]))
    assert found
    assert shared_memory_faults("sm90", found) == []


@pytest.mark.parametrize("problem", [problem for problem in (*TILED, *ODD) if problem.op == "attention"], ids=str)
def test_what_an_h200_has_of_its_own_compiles_and_fits(problem: Problem) -> None:
    """Its profile, which names the device: launch shapes of attention."""
    plan = bidispatch.plan(device=Device(ARCHS["sm90"], "NVIDIA H200", predicted=True))
    assert plan.profile.name == "h200"
    for rung in plan.select_problem(problem).rungs:
        found = variants(rung.implementation.name, problem, rung.params, rung.tile, ARCHS["sm90"])
        assert shared_memory_faults("sm90", {variant.key: variant for variant in found}) == []


def before_assembly(arch: str, variant: Variant) -> tuple[str, int]:
    """What Triton gives LLVM, less the arch's name and the places in files, and the shared memory of the binary."""
    compiled = compile_variant(variant, target_of(ARCHS[arch]))
    return re.sub(r'"cuda:\d+"|(?m:^#loc.*$)', "", compiled.asm["ttgir"]), compiled.metadata.shared


@pytest.mark.parametrize("op", sorted({problem.op for problem in TILED}))
@pytest.mark.parametrize(("arch", "older"), OLDEST_ALIKE.items())
def test_archs_that_are_alike_are_compiled_alike(arch: str, older: str, op: str) -> None:
    """Every kernel of an op's typical problem, in the tiles of the newer arch, whose assembler takes each too."""
    found = selected_variants(arch, ops.get(op).typical("bfloat16"))
    assert found
    for variant in found.values():
        assert before_assembly(arch, variant) == before_assembly(older, variant), variant


def test_archs_that_are_not_alike_are_seen_to_differ() -> None:
    """Negative control."""
    (variant, *_) = selected_variants("sm80", ops.get("gemm").typical("bfloat16")).values()
    assert before_assembly("sm80", variant) != before_assembly("sm90", variant)


def test_a_tile_that_is_too_large_is_caught() -> None:
    """Negative control: 4 stages of 128x256x64 in bf16 take 192 KB, an sm86 block has 99."""
    problem = ops.get("gemm").problem("bfloat16", {"n": 4096, "k": 4096})
    tile = GemmTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4)
    (variant,) = variants("triton.gemm", problem, GemmParams(), tile, ARCHS["sm86"])
    assert shared_memory_faults("sm86", {variant.key: variant})


def test_every_registered_kernel_is_compiled() -> None:
    registry = Registry()
    register(registry)
    compiled = {(f"triton.{problem.op}", problem.dtype) for problem in (*TILED, *ODD)}
    compiled |= {("triton.paged_attention", dtype) for op, dtype in compiled if op == "triton.attention"}
    compiled |= {("triton.mla", dtype) for op, dtype in compiled if op == "triton.attention.mla"}
    compiled |= {("triton.moe", dtype) for op, dtype in compiled if op == "triton.moe.experts"}
    compiled |= {("triton.moe_router", dtype) for op, dtype in compiled if op == "triton.moe.router"}
    compiled |= {(name, problem.dtype) for name, problem, *_ in SPLIT}
    compiled |= {
        (rung.implementation.name, problem.dtype)
        for problem in (*FP8_PRODUCTS, *FP8_EXPERTS, *QUANTIZATIONS)
        for rung in triton_rungs("sm90", problem)
    }
    int4 = ("triton.int4", "triton.int4_split_k")
    compiled |= {(name, dtype) for op, dtype in compiled if op == "triton.gemm.int4" for name in int4}
    registered = {(found.name, dtype) for found in registry for dtype in found.dtypes}
    assert registered <= compiled


@pytest.mark.parametrize("arch", COMPILED_ARCHS)
def test_no_size_leads_to_a_tile_that_is_not_compiled(arch: str) -> None:
    """Over sizes far from those compiled, every tile of a plan is one of theirs."""

    def tiles(problem: Problem) -> set[tuple[str, str, str]]:
        kernel = "gemm" if problem.op == "bmm" else problem.op  # one kernel serves both
        dtype = "" if problem.op in ROW_OPS else problem.dtype  # their tiles follow n alone
        rungs = [rung for rung in triton_rungs(arch, problem) if rung.implementation.name not in elsewhere]
        return {(kernel, dtype, binary(problem, rung.tile)) for rung in rungs}

    def binary(problem: Problem, tile: Any) -> str:
        """A tile but for what is no part of a binary: how many programs of segments are launched."""
        return str(tile.model_copy(update={"segment_programs": 1}) if problem.op == "attention" else tile)

    elsewhere = {name for name, *_ in SPLIT}  # whose tiles do not follow the size
    compiled = set().union(*(tiles(problem) for problem in (*TILED, *OTHER_ROWS)))
    for dtype in DTYPES:
        for n in (1, 7, 64, 511, 512, 1000, 3000, 8192, 50257, 151936):
            for op in ROW_OPS:
                assert tiles(_row_problem(op, dtype, n)) <= compiled, f"{op} {dtype} n={n}"
            assert tiles(_problem("gemm", dtype, n=n, k=3 * n)) <= compiled
            assert tiles(_problem("bmm", dtype, n=n, k=n)) <= compiled
        for head_dim in (16, 64, 80, 96, 128, 192, 256):
            for heads in ((8, 8), (32, 8), (16, 1)):
                dims = {"head_dim": head_dim, "num_heads": heads[0], "num_kv_heads": heads[1]}
                assert tiles(_problem("attention", dtype, **dims)) <= compiled, f"attention {dtype} {dims}"
    for dtype in DTYPES_16_BIT:
        for heads in (1, 16, 20, 32, 64, 96, 128):
            assert tiles(_problem("attention.mla", dtype, num_heads=heads)) <= compiled, f"MLA {dtype} {heads}"


@pytest.mark.parametrize("arch", COMPILED_ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["gemm", "bmm"])
def test_ladders_rise_and_start_with_16_rows(op: str, dtype: str, arch: str) -> None:
    registry = Registry()
    register(registry)
    found = registry.get(f"triton.{op}")
    ladder = found.tiles(Device(ARCHS[arch], arch, predicted=True), ops.get(op).typical(dtype), found.params())
    bounds = [max_m for max_m, _ in ladder]
    assert bounds[:3] == [16, 32, 64]
    assert bounds[-1] is None
    assert bounds[:-1] == sorted(bounds[:-1], key=lambda bound: bound or 0)
    rows = [tile.block_m for _, tile in ladder if isinstance(tile, GemmTile)]
    assert rows[:2] == [16, 32]
    assert rows[-1] == 128


# Kernels that a plan takes for few rows, or for roles, with the params a profile gives them.
SPLIT = (
    *(("triton.gemm_split_k", _problem("gemm", dtype, n=4096, k=4096), SplitParams(), 2048) for dtype in DTYPES),
    (
        "triton.gemm_split_k",
        _problem("gemm", n=256, k=7168, role="router", out_dtype="float32"),
        SplitParams(k_chunk=1792),
        2048,
    ),
    ("triton.gemm_split_k", _problem("gemm", "float32", n=61, k=4097, bias=True), SplitParams(), 8),
)


@pytest.mark.parametrize("arch", COMPILED_ARCHS)
@pytest.mark.parametrize(("name", "problem", "params", "most"), SPLIT, ids=str)
def test_kernels_with_chunks_in_parallel_compile_and_fit(
    name: str, problem: Problem, params: Any, most: int, arch: str
) -> None:
    registry = Registry()
    register(registry)
    tiles = registry.get(name).tiles(Device(ARCHS[arch], arch, predicted=True), problem, params)
    found = {v.key: v for _, tile in tiles for v in variants(name, problem, params, tile, ARCHS[arch])}
    assert shared_memory_faults(arch, found) == []


@pytest.mark.parametrize("arch", FP8_ARCHS)
def test_no_size_leads_to_an_fp8_tile_that_is_not_compiled(arch: str) -> None:
    for op in ("gemm.fp8_block", "gemm.fp8"):
        compiled = {
            str(rung.tile) for problem in FP8_PRODUCTS if problem.op == op for rung in triton_rungs(arch, problem)
        }
        for n in (1, 7, 64, 512, 1000, 3000, 8192, 50257, 151936):
            assert {str(rung.tile) for rung in triton_rungs(arch, _problem(op, FP8, n=n, k=n))} <= compiled, (op, n)


FP8_INSTRUCTIONS = {
    ("sm89", "fp8"): r"mma\.sync\S+\.e4m3\.e4m3",
    ("sm89", "fp16"): r"mma\.sync\S+\.f32\.f16\.f16",
    ("sm90", "fp8"): r"wgmma\.mma_async\S+\.e4m3\.e4m3",
    ("sm90", "fp16"): r"wgmma\.mma_async\S+\.f32\.f16\.f16",
    ("sm100", "fp8"): r"tcgen05\.mma\S+kind::f8f6f4",
    ("sm100", "fp16"): r"tcgen05\.mma\S+kind::f16",
    ("sm120", "fp8"): r"mma\.sync\S+\.e4m3\.e4m3",
}
ANY_PRODUCT = r"(?:wgmma\.mma_async|tcgen05\.mma\.|mma\.sync)\S*"


def test_products_of_experts_never_start_from_a_bias() -> None:
    """Where K is one step of some tiles and several of others: Triton adds a bias behind a loop, but in front of the
    products of a loop of one turn, which it unrolls (seen on an H100: other bits from another tile).
    """
    problem = ops.get("moe.experts").problem(
        "bfloat16", {"experts": 7, "top_k": 2, "hidden": 100, "intermediate": 72, "bias": True, "out_dtype": "float32"}
    )
    compiled = [
        compile_variant(variant, target_of(ARCHS["sm90"])).asm["ttir"]
        for rung in triton_rungs("sm90", problem)
        for variant in variants(rung.implementation.name, problem, rung.params, rung.tile, ARCHS["sm90"])
    ]
    products = [text for text in compiled if "tt.dot" in text]
    assert products
    assert all(text.index("scf.for") < text.index("tt.dot") for text in products)


@pytest.mark.parametrize("arch", ["sm89", "sm90", "sm100", "sm120"])
def test_experts_multiply_fp8_by_the_instruction_of_their_class(arch: str) -> None:
    """In every tile, those that tune tries too; one that would widen is refused."""
    (problem, _) = FP8_EXPERTS
    tried = load_attribute("bidispatch_backends.triton.moe_params:experts_tiles_for")
    device = Device(ARCHS[arch], arch, predicted=True)
    (rung, *_) = triton_rungs(arch, problem)
    tiles = {str(tile): tile for m in (16, 1024) for tile in tried(device, problem, rung.params, m)}
    found = set()
    for tile in tiles.values():
        for variant in variants(rung.implementation.name, problem, rung.params, tile, ARCHS[arch]):
            text = compile_variant(variant, target_of(ARCHS[arch])).asm["ptx"]
            found |= set(re.findall(ANY_PRODUCT, text))
    assert found
    assert all(re.match(FP8_INSTRUCTIONS[arch, "fp8"], instruction) for instruction in found), found


def test_a_tile_of_experts_that_would_widen_fp8_is_refused() -> None:
    (problem, _) = FP8_EXPERTS
    (rung, *_) = triton_rungs("sm90", problem)
    assert rung.tile is not None
    tile = rung.tile.model_copy(update={"up_swap": False})  # 16 rows on the long side
    with pytest.raises(ValueError, match="products=fp8 needs 64 rows"):
        variants(rung.implementation.name, problem, rung.params, tile, ARCHS["sm90"])


def fp8_products(arch: str, problem: Problem, params: Any, tile: Any) -> set[str]:
    """The matrix instructions of a tile's binary."""
    name = "triton." + problem.op.removeprefix("gemm.")
    (variant,) = variants(name, problem, params, tile, ARCHS[arch])
    return set(re.findall(ANY_PRODUCT, compile_variant(variant, target_of(ARCHS[arch])).asm["ptx"]))


@pytest.mark.parametrize(("arch", "products"), FP8_INSTRUCTIONS)
@pytest.mark.parametrize("op", ["gemm.fp8_block", "gemm.fp8"])
def test_every_fp8_tile_multiplies_by_the_instruction_of_its_class(op: str, arch: str, products: str) -> None:
    """Each tile of the default ladder, and on Hopper each that tune tries: an instruction adds in its own way."""
    registry = Registry()
    register(registry)
    (found,) = registry.for_op(op)
    problem, device = _problem(op, FP8, n=4096, k=4096), Device(ARCHS[arch], arch, predicted=True)
    params = found.params(products=products)
    tiles = [tile for _, tile in found.tiles(device, problem, params)]
    if (arch, op) == ("sm90", "gemm.fp8_block"):
        tiles += [tile for m in (1, 32, 128, 4096) for tile in load_attribute(found.search)(device, problem, params, m)]
    for tile in {str(tile): tile for tile in tiles}.values():
        instructions = fp8_products(arch, problem, params, tile)
        wanted = FP8_INSTRUCTIONS[arch, products]
        assert instructions
        assert all(re.match(wanted, one) for one in instructions), (tile, instructions)


def test_a_tile_that_leaves_its_instruction_is_refused_and_would_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: 16 rows on the left side are mma.sync on fp16 on Hopper, which the test above would see."""
    problem = _problem("gemm.fp8_block", FP8, n=4096, k=4096)
    tile = ProductTile(block_m=16, block_n=64, num_warps=4, num_stages=3)
    with pytest.raises(ValueError, match="needs 64 rows of the left operand on sm90, this tile has 16"):
        variants("triton.fp8_block", problem, Fp8BlockParams(), tile, ARCHS["sm90"])
    monkeypatch.setattr(fp8_gemm, "tile_fault", lambda *arguments: None)
    instructions = fp8_products("sm90", problem, Fp8BlockParams(), tile)
    assert any(re.match(r"mma\.sync\S+\.f16\.f16", one) for one in instructions)


@pytest.mark.parametrize("arch", ["sm90", "sm89", "sm100"])
def test_longer_steps_of_fp8_compile_and_fit(arch: str) -> None:
    registry = Registry()
    register(registry)
    found, problem = registry.get("triton.fp8"), _problem("gemm.fp8", FP8, n=4096, k=4096)
    params = found.params(max_num_imprecise_acc=256)
    tiles = found.tiles(Device(ARCHS[arch], arch, predicted=True), problem, params)
    binaries = {v.key: v for _, tile in tiles for v in variants(found.name, problem, params, tile, ARCHS[arch])}
    assert shared_memory_faults(arch, binaries) == []


@pytest.mark.parametrize("arch", ["sm90", "sm89"])
@pytest.mark.parametrize("op", ["gemm.fp8_block", "gemm.fp8"])
def test_every_fp8_tile_that_tune_tries_fits(op: str, arch: str) -> None:
    registry = Registry()
    register(registry)
    (found,) = registry.for_op(op)
    problem, device = _problem(op, FP8, n=4096, k=4096), Device(ARCHS[arch], arch, predicted=True)
    search = load_attribute(found.search)
    tiles = {str(tile): tile for m in (1, 16, 64, 4096) for tile in search(device, problem, found.params(), m)}
    binaries = [v for tile in tiles.values() for v in variants(found.name, problem, found.params(), tile, ARCHS[arch])]
    assert len(binaries) >= 5
    assert shared_memory_faults(arch, {variant.key: variant for variant in binaries}) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["triton.gemm", "triton.gemm_split_k", "triton.int4", "triton.int4_split_k"])
def test_every_tile_that_tune_tries_compiles_and_fits(name: str, dtype: str) -> None:
    registry = Registry()
    register(registry)
    found = registry.get(name)
    if dtype not in found.dtypes:
        pytest.skip(f"{name} does not take {dtype}")
    problem = _problem(found.op, dtype, n=4096, k=4096)
    device = Device(ARCHS["sm90"], "sm90", predicted=True)
    search = load_attribute(found.search)
    tiles = {
        str(tile): tile for m in (1, 2, 4, 16, 64, 300, 8192) for tile in search(device, problem, found.params(), m)
    }
    binaries = [v for tile in tiles.values() for v in variants(name, problem, found.params(), tile, ARCHS["sm90"])]
    assert len(binaries) >= 5
    assert shared_memory_faults("sm90", {variant.key: variant for variant in binaries}) == []


@pytest.mark.parametrize("arch", ["sm90", "sm86"])
def test_shapes_of_experts_to_try_compile_and_fit(arch: str) -> None:
    registry = Registry()
    register(registry)
    found = registry.get("triton.moe")
    problem = _problem("moe.experts", **EXPERTS)
    device = Device(ARCHS[arch], arch, predicted=True)
    tiles = {tile for m in (1, 64, 512, 4096) for tile in load_attribute(found.search)(device, problem, None, m)}
    binaries = {v.key: v for tile in tiles for v in variants(found.name, problem, found.params(), tile, ARCHS[arch])}
    assert len(binaries) >= 20
    assert shared_memory_faults(arch, binaries) == []


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_attention_shapes_to_try_compile_and_fit(phase: str) -> None:
    """Those of the kernels that a shape changes; the other phase's is the default's."""
    registry = Registry()
    register(registry)
    found = registry.get("triton.paged_attention")
    problem = _problem("attention", head_dim=128, **HEADS)
    device = Device(ARCHS["sm90"], "sm90", predicted=True)
    tiles = load_attribute(found.search)(device, problem, found.params(), 1 if phase == "decode" else 8192)
    kernels = {"decode": ("split_kernel", "segment_kernel"), "prefill": ("walk_kernel",)}[phase]
    binaries = {
        variant.key: variant
        for tile in tiles
        for variant in variants(found.name, problem, found.params(), tile, ARCHS["sm90"])
        if variant.kernel.fn.__name__ in kernels and variant.constants.get("bases_ptr", "") is not None
    }
    assert len(binaries) >= 5
    assert shared_memory_faults("sm90", binaries) == []


@pytest.mark.parametrize("arch", ["sm90", "sm86"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_latent_attention_shapes_to_try_compile_and_fit(phase: str, arch: str) -> None:
    registry = Registry()
    register(registry)
    found = registry.get("triton.mla")
    problem = _problem("attention.mla", num_heads=128)
    device = Device(ARCHS[arch], arch, predicted=True)
    tiles = load_attribute(found.search)(device, problem, found.params(), 1 if phase == "decode" else 8192)
    kernel = {"decode": "latent_split_kernel", "prefill": "latent_walk_kernel"}[phase]
    binaries = {
        variant.key: variant
        for tile in tiles
        for variant in variants(found.name, problem, found.params(), tile, ARCHS[arch])
        if variant.kernel.fn.__name__ == kernel and variant.constants.get("bases_ptr", "") is not None
    }
    assert len(binaries) >= (3 if arch == "sm90" else 2)
    assert shared_memory_faults(arch, binaries) == []


@pytest.mark.parametrize(
    "problem",
    [
        _problem("attention.mla", num_heads=16),
        _problem("attention.mla", num_heads=128),
        _problem("attention", num_heads=32, num_kv_heads=8, head_dim=128),
        _problem("attention", num_heads=32, num_kv_heads=8, head_dim=128, kv_dtype=FP8),
    ],
    ids=str,
)
def test_every_tile_of_attention_gives_a_product_the_same_elements(problem: Problem) -> None:
    """kWidth: neighbours in K that a thread gives the matrix unit, part of the order of the sum. wgmma's is 2.

    Decode's tiles are mma.sync, prefill's wgmma. An fp8 cache had 4 in decode before the widened values were fenced.
    """
    widths = set()
    for variant in selected_variants("sm90", problem).values():
        widths |= set(re.findall(r"kWidth = (\d+)", compile_variant(variant, target_of(ARCHS["sm90"])).asm["ttgir"]))
    assert widths == {"2"}


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120"])
def test_every_tile_of_int4_gives_a_product_the_same_elements(arch: str, zero_points: bool) -> None:
    """The same for weights that are joined from four tensors of integers, which looks narrow to the compiler too."""
    problem = _problem("gemm.int4", n=4096, k=4096, zero_points=zero_points)
    registry = Registry()
    register(registry)
    found = registry.get("triton.int4")
    device = Device(ARCHS[arch], arch, predicted=True)
    search = load_attribute(found.search)
    tiles = {str(tile): tile for m in (1, 64, 300) for tile in search(device, problem, found.params(), m)}
    widths = set()
    for tile in tiles.values():
        for variant in variants(found.name, problem, found.params(), tile, ARCHS[arch]):
            widths |= set(re.findall(r"kWidth = (\d+)", compile_variant(variant, target_of(ARCHS[arch])).asm["ttgir"]))
    assert widths == {"2"}


def test_int4_weights_reach_the_matrix_unit_without_shared_memory() -> None:
    """What a thread unpacks is what the matrix unit reads from it: nothing but scales, a word for each row of a
    tile, is stored in shared memory before the last product.
    """
    problem = _problem("gemm.int4", n=4096, k=4096)
    for variant in selected_variants("sm90", problem).values():
        ptx = compile_variant(variant, target_of(ARCHS["sm90"])).asm["ptx"]
        *before, _ = re.split(r"wgmma\.mma_async|mma\.sync", ptx)
        assert before
        assert sum(part.count("st.shared") for part in before) <= 1


@given(n=st.integers(1, 200_000), k=st.integers(1, 30_000), units=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_few_rows_never_get_a_tall_tile(n: int, k: int, units: int, dtype: str) -> None:
    """For a shape that nobody tuned, on a device of any size."""
    registry = Registry()
    register(registry)
    found = registry.get("triton.gemm")
    for arch in COMPILED_ARCHS:
        device = Device(ARCHS[arch], arch, predicted=True, compute_units=units)
        for max_m, tile in found.tiles(device, _problem("gemm", dtype, n=n, k=k), found.params()):
            assert isinstance(tile, GemmTile)
            assert max_m is None or tile.block_m <= max(16, max_m)


def assembly(arch: str, problem: Problem) -> Iterator[tuple[str, str]]:
    for variant in selected_variants(arch, problem).values():
        compiled = compile_variant(variant, target_of(ARCHS[arch]))
        yield variant.kernel.fn.__name__, compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]


@pytest.mark.parametrize("problem", [p for p in (*TILED, *ODD) if p.op not in ("gemm", "bmm")], ids=str)
def test_no_product_and_sum_is_left_for_the_compiler_to_contract(problem: Problem) -> None:
    """PTX lets ptxas fuse `mul.f32` and `add.f32`; `mul.rn.f32` and `add.rn.f32` stay as they are."""
    for name, text in assembly("sm90", problem):
        assert re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32\b", text) == [], name


def test_a_kernel_compiled_with_fusion_is_seen_to_leave_some() -> None:
    """Negative control of the check above."""
    problem = ops.get("rms_norm").problem("bfloat16", {"n": 4096})
    variant = next(iter(selected_variants("sm90", problem).values()))
    fused = Variant(
        variant.kernel,
        variant.signature,
        variant.constants,
        variant.aligned,
        {**variant.options, "enable_fp_fusion": True},
    )
    text = compile_variant(fused, target_of(ARCHS["sm90"])).asm["ptx"]
    assert re.search(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32\b", text)


@pytest.mark.parametrize("arch", ["sm100", "sm103"])
@pytest.mark.parametrize("op", ["gemm", "bmm", "attention", "attention.mla", "moe.experts"])
def test_no_ladder_crosses_to_another_matrix_unit_where_their_bits_were_never_compared(op: str, arch: str) -> None:
    """Under 64 rows a product is mma.sync there, else tcgen05."""
    units = {
        unit
        for _, text in assembly(arch, ops.get(op).typical("bfloat16"))
        for unit in re.findall(r"tcgen05\.mma|mma\.sync", text)
    }
    assert units == {"mma.sync" if op.startswith("attention") else "tcgen05.mma"}


def test_a_ladder_that_crosses_is_seen_to() -> None:
    """Negative control: the kernel's own ladder has tiles of 16 rows and of 128."""
    problem = ops.get("gemm").typical("bfloat16")
    registry = Registry()
    register(registry)
    found = registry.get("triton.gemm")
    device = Device(ARCHS["sm100"], "sm100", predicted=True)
    units = set()
    for _, tile in found.tiles(device, problem, found.params()):
        for variant in variants(found.name, problem, found.params(), tile, ARCHS["sm100"]):
            text = compile_variant(variant, target_of(ARCHS["sm100"])).asm["ptx"]
            units |= set(re.findall(r"tcgen05\.mma|mma\.sync", text))
    assert units == {"mma.sync", "tcgen05.mma"}


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in ("gemm", "bmm", "attention") for dtype in DTYPES]
    + [(op, dtype) for op in ("attention.mla", "moe.experts") for dtype in DTYPES_16_BIT],
)
def test_amd_uses_one_shape_of_matrix_instruction(op: str, dtype: str) -> None:
    """The shape is part of the order of additions, so no tile may change it."""
    problem = ops.get(op).typical(dtype)
    shapes = {
        shape
        for name, text in assembly("gfx942", problem)
        if name not in ("fold_kernel", "sort_kernel", "sum_kernel")
        for shape in re.findall(r"v_mfma_f32_(\d+x\d+x\d+)", text) or ["none"]
    }
    assert shapes == {"16x16x4" if dtype == "float32" else "16x16x16"}


def test_fp32_products_do_not_use_tf32() -> None:
    for op in ("gemm", "bmm", "attention"):
        for name, text in assembly("sm90", ops.get(op).typical("float32")):
            assert "tf32" not in text, name


@pytest.mark.parametrize("file", sorted(builtin_folder().glob("tiles/*/*.json")), ids=lambda file: file.parent.name)
def test_every_tuned_tile_compiles_and_fits(file: Path) -> None:
    tuned = read_tuned(file)
    registry = Registry()
    register(registry)
    found: dict[str, Variant] = {}
    for entry in tuned.entries:
        problem = ops.get(entry.op).problem(entry.dtype, dict(entry.dims))
        for rung in entry.rungs:
            if rung.impl in registry and rung.tile is not None:
                kernel = registry.get(rung.impl)
                assert kernel.tile is not None
                params, tile = kernel.params.model_validate(rung.params), kernel.tile.model_validate(rung.tile)
                found |= {v.key: v for v in variants(rung.impl, problem, params, tile, ARCHS[tuned.arch])}
    assert found
    assert shared_memory_faults(tuned.arch, found) == []
