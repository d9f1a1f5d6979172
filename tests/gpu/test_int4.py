"""`gemm.int4` on this GPU: the bits of `gemm` with the dequantised weight; Marlin beside it, as a negative control."""

from __future__ import annotations

import pytest
import torch
from benchmark_peers import brings, peer
from bound_kernels import same_bits

from bidispatch import ops
from bidispatch.int4 import dequantize, pack
from bidispatch.ops.reference.draw import DISTRIBUTIONS
from bidispatch.ops.reference.int4 import gemm_int4_inputs
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits

ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 300)
LIMIT = max(ROWS)
CASES = (
    (6144, 4096, False, 128),
    (1536, 4096, True, 32),
    (1536, 4096, True, 64),
    (4112, 14336, True, 128),
    (2048, 3584, False, 3584),
    (48, 384, False, 384),
)
"""n, k, zero_points, group_size."""
DTYPES = ("bfloat16", "float16")
NAMES = ("triton.int4", "triton.int4_split_k")


def bound(plan, name, problem, params, tile=None):
    """An implementation with its own ladder, or with one tile."""
    implementation = default_registry().get(name)
    if reasons := implementation.unmet(plan.device, problem):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    chosen = implementation.params(**params)
    shapes = ((None, tile),) if tile else implementation.tiles(plan.device, problem, chosen)
    rungs = tuple(Rung(implementation, chosen, shape, top) for top, shape in shapes)
    return bind(problem, plan.device, rungs, Limits(LIMIT))


def int4(n, k, dtype="bfloat16", **dims):
    return ops.get("gemm.int4").problem(dtype, {"n": n, "k": k, "out_dtype": "float32", **dims})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "chunk"), [("triton.int4", 0), ("triton.int4", 1024), ("triton.int4_split_k", 1024)])
@pytest.mark.parametrize(("n", "k", "zero_points", "group_size"), CASES)
def test_the_fp32_bits_are_those_of_gemm_with_the_dequantised_weight(
    plan, n, k, zero_points, group_size, name, chunk, dtype
):
    problem = int4(n, k, dtype, zero_points=zero_points, group_size=group_size)
    gemm = ops.get("gemm").problem(dtype, {"n": n, "k": k, "out_dtype": "float32"})
    linear = bound(plan, "triton.gemm", gemm, {"k_chunk": chunk})
    kernel = bound(plan, name, problem, {"k_chunk": chunk})
    for distribution in DISTRIBUTIONS:
        x, weight, scales, zeros, _ = gemm_int4_inputs(problem, LIMIT, device="cuda", distribution=distribution)
        wanted = linear(x, dequantize(weight, scales, zeros))
        for m in ROWS:
            assert same_bits(kernel(x[:m], weight, scales, zeros), wanted[:m]), (distribution, m)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_tile_that_tune_tries_gives_the_same_fp32_bits(plan, name, zero_points):
    problem = int4(1600, 4096, zero_points=zero_points)
    x, weight, scales, zeros, _ = gemm_int4_inputs(problem, LIMIT, device="cuda")
    implementation = default_registry().get(name)
    search = load_attribute(implementation.search)
    params = implementation.params(k_chunk=1024)
    wanted = bound(plan, name, problem, {"k_chunk": 1024})(x, weight, scales, zeros)
    tiles = {tile for m in (1, 16, 64, LIMIT) for tile in search(plan.device, problem, params, m)}
    assert len(tiles) > 5
    for tile in tiles:
        kernel = bound(plan, name, problem, {"k_chunk": 1024}, tile)
        for m in (1, 16, 65, LIMIT):
            assert same_bits(kernel(x[:m], weight, scales, zeros), wanted[:m]), (tile, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_zero_point_and_kind_of_scale_is_rounded_as_torch_rounds(plan, dtype):
    """x is the identity, so each output is a weight. Scales span the dtype, subnormals and infinity among them."""
    n, k = 1024, 512
    problem = int4(n, k, dtype, zero_points=True, group_size=32)
    q = torch.arange(k, device="cuda").repeat(n, 1) % 16
    zeros = (torch.arange(16 * n, device="cuda").reshape(16, n) // 64 % 16).to(torch.int8)
    generator = torch.Generator("cuda").manual_seed(0)
    random = torch.randint(-(2**15), 2**15, (16, n), device="cuda", generator=generator, dtype=torch.int16)
    scales = random.view(getattr(torch, dtype)).nan_to_num(nan=1.0)
    weight = pack(q)
    eye = torch.eye(k, device="cuda", dtype=scales.dtype)
    gemm = ops.get("gemm").problem(dtype, {"n": n, "k": k, "out_dtype": "float32"})
    linear = bound(plan, "triton.gemm", gemm, {"k_chunk": 256})
    dense = dequantize(weight, scales, zeros)
    for name in NAMES:
        kernel = bound(plan, name, problem, {"k_chunk": 256})
        for first in range(0, k, LIMIT):
            rows = eye[first : first + LIMIT]
            wanted = linear(rows, dense)
            finite = wanted.isfinite().all(0)  # else 0 · inf spoils a column
            assert int(finite.sum()) > n // 8
            assert same_bits(kernel(rows, weight, scales, zeros)[:, finite], wanted[:, finite])


def marlin_of(*weight):
    """vLLM's kernel with a weight; skips where there is no vLLM with kernels. One that has them and cannot be called
    fails: the control would otherwise go out unseen, with a version that names the operator or its arguments anew.
    """
    try:
        return peer("marlin").Marlin(*weight)
    except peer("installed").AbsentError as error:
        if brings("vllm", "_C*.so"):
            pytest.fail(f"vLLM is installed, with its kernels, and its Marlin was not called: {error}")
        pytest.skip(str(error))


@pytest.mark.filterwarnings("default")  # of vLLM's import
def test_marlin_with_atomics_differs_and_this_does_not(plan, record_property):
    """Negative control: vLLM's kernel where it adds partial sums with atomics, and where its stripes follow M."""
    problem = ops.get("gemm.int4").problem("float16", {"n": 1536, "k": 14336})
    x, weight, scales, zeros, _ = gemm_int4_inputs(problem, 64, device="cuda")
    marlin = marlin_of(weight, scales, zeros)
    ours = plan.select_problem(problem).bind(max_tokens=64)
    exact = (x.double() @ dequantize(weight, scales, zeros).double().T).float()
    for out in (ours(x, weight, scales, zeros), marlin.launch(x)()):
        assert float((out.float() - exact).norm() / exact.norm()) < 2e-3  # both are called as they must be
    whole = marlin.launch(x)()
    by_m = sum(not same_bits(marlin.launch(x[:m])(), whole[:m]) for m in range(1, 64))
    once = marlin.launch(x, use_atomic_add=True)()
    by_run = sum(not same_bits(marlin.launch(x, use_atomic_add=True)(), once) for _ in range(50))
    record_property("marlin: M of 63 that differ", by_m)
    record_property("marlin with atomics: runs of 50 that differ", by_run)
    assert by_m + by_run > 0
    mine = ours(x, weight, scales, zeros)
    assert all(same_bits(ours(x[:m], weight, scales, zeros), mine[:m]) for m in range(1, 64))
    assert all(same_bits(ours(x, weight, scales, zeros), mine) for _ in range(50))
