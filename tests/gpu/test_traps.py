"""What is easy to get wrong on a GPU, each by itself: tiles of one class, aliased outputs, offsets beyond 2^31."""

from __future__ import annotations

import itertools

import pytest
import torch
from bound_kernels import same_bits

from bidispatch import ops
from bidispatch.ops.reference.attention import paged_batch
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits

DTYPES = ("bfloat16", "float16")
FP8_ALIBI = {"kv_dtype": "float8_e4m3fn", "alibi": True}
BEYOND = 2**31


def bind_tile(plan, problem, name, limits, **sizes):
    """One implementation with one launch shape, its other sizes as its own ladder's last."""
    implementation = default_registry().get(name)
    params = implementation.params()
    tile = implementation.tiles(plan.device, problem, params)[-1][1]
    rung = Rung(implementation, params, tile.model_copy(update=sizes))
    return bind(problem, plan.device, (rung,), limits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (1000, 1003), (4096, 12288)])
def test_tiles_of_16_to_128_rows_give_the_same_fp32_bits(plan, dtype, n, k):
    problem = ops.get("gemm").problem(dtype, {"n": n, "k": k, "out_dtype": "float32"})
    x = torch.randn(300, k, device="cuda", dtype=getattr(torch, dtype))
    weight = torch.randn(n, k, device="cuda", dtype=getattr(torch, dtype)) * k**-0.5
    results = []
    for block_m, (block_n, block_k) in itertools.product((16, 32, 64, 128), ((64, 128), (128, 64))):
        tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": 8 if block_m > 64 else 4}
        results.append(bind_tile(plan, problem, "triton.gemm", Limits(300), **tile, num_stages=2)(x, weight))
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [{}, {"window": 300}, {"softcap": 30.0, "sinks": True}, {"head_dim": 64}, FP8_ALIBI])
def test_attention_is_the_same_over_prefill_tiles_and_as_decode(plan, dtype, dims):
    op = ops.get("attention")
    problem = op.problem(dtype, {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, **dims})
    lengths = [777, 2049, 1, 513, 5000]
    arguments = paged_batch(problem, lengths, lengths, device="cuda")
    limits = Limits(sum(lengths), len(lengths), max(lengths), max(lengths))
    name = "triton.paged_attention"
    prefills = [
        bind_tile(plan, problem, name, limits, prefill_block_m=rows, prefill_warps=warps)(*arguments)
        for rows, warps in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8))
    ]
    assert all(same_bits(result, prefills[0]) for result in prefills[1:])

    start = sum(lengths[:-1])
    q, k_cache, v_cache, table, _, _, *per_head = arguments
    for batch in (1, 7, 64):
        positions = torch.randint(5000, (batch,), device="cuda")
        step = [
            q[start + positions],
            k_cache,
            v_cache,
            table[-1:].expand(batch, -1).contiguous(),
            (positions + 1).to(torch.int32),
            torch.arange(batch + 1, device="cuda", dtype=torch.int32),
            *per_head,
        ]
        for most in (0, 16):
            decode = bind_tile(plan, problem, name, Limits(64, 64, 5000, 1), decode_query_len=most)
            assert same_bits(decode(*step), prefills[0][start + positions])


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_fused_norm_in_place_gives_the_same_bits(plan, dtype, gemma):
    norm = plan.select("fused_add_rms_norm", dtype=dtype, n=4096, gemma=gemma).bind(max_tokens=300)
    x, residual = (torch.randn(300, 4096, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    weight = torch.randn(4096, device="cuda").to(getattr(torch, dtype))
    out, residual_out = norm(x, residual, weight)
    norm(x, residual, weight, out=x, residual_out=residual)
    assert same_bits(x, out)
    assert same_bits(residual, residual_out)


def needs_memory(gib):
    seen = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] / 2**30 if seen else 0
    return pytest.mark.skipif(free < gib, reason=f"needs {gib} GiB of free GPU memory, {free:.0f} are free")


@needs_memory(12)
def test_a_product_writes_beyond_two_to_the_31_elements(plan):
    n, k = 65536, 64
    rows = BEYOND // n + 65
    linear = plan.select("gemm", dtype="bfloat16", n=n, k=k).bind(max_tokens=rows)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    linear(x, weight, out=out)
    for row in (0, 1, rows // 2, BEYOND // n - 1, BEYOND // n, rows - 1):
        assert same_bits(out[row], linear(x[row : row + 1].clone(), weight)[0])


@needs_memory(12)
def test_a_product_reads_beyond_two_to_the_31_elements(plan):
    n, k = 64, 65536
    rows = BEYOND // k + 65
    linear = plan.select("gemm", dtype="bfloat16", n=n, k=k).bind(max_tokens=rows)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    out = linear(x, weight)
    for row in (0, 1, rows // 2, BEYOND // k - 1, BEYOND // k, rows - 1):
        assert same_bits(out[row], linear(x[row : row + 1].clone(), weight)[0])


@needs_memory(12)
@pytest.mark.parametrize("op", ["softmax", "rms_norm", "silu_and_mul"])
def test_rows_beyond_two_to_the_31_elements_are_right(plan, op):
    n = 65536
    width = 2 * n if op == "silu_and_mul" else n
    rows = BEYOND // width + 5
    kernel = plan.select(op, dtype="bfloat16", n=n).bind(max_tokens=rows)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, device="cuda", dtype=torch.bfloat16)] if op == "rms_norm" else []
    out = kernel(x, *weights)
    for row in (0, rows // 2, BEYOND // width - 1, BEYOND // width, rows - 1):
        assert same_bits(out[row], kernel(x[row : row + 1].clone(), *weights)[0])


@needs_memory(16)
def test_a_cache_beyond_two_to_the_31_elements_is_read_where_it_is(plan):
    op = ops.get("attention")
    problem = op.problem("bfloat16", {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16})
    q, k_cache, v_cache, table, seq_lens, starts, *_ = paged_batch(problem, [600], [600], device="cuda")
    attend = plan.select_problem(problem).bind(max_tokens=600, max_seqs=1, max_seq_len=600)
    near = attend(q, k_cache, v_cache, table, seq_lens, starts)
    pages = BEYOND // k_cache[0].numel() + 64
    far = [torch.full((pages, *k_cache.shape[1:]), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for cache, source in zip(far, (k_cache, v_cache), strict=True):
        cache[-len(source) :] = source
    moved = table + (pages - len(k_cache))
    assert same_bits(attend(q, *far, moved, seq_lens, starts), near)
