"""Packed 4-bit weights: the layout, and AWQ's and GPTQ's formats against plain definitions of each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bidispatch as bid
from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.errors import UsageError
from bidispatch.int4 import dequantize, from_awq, from_compressed, from_gptq, pack, unpack
from bidispatch.ops.reference.int4 import gemm_int4, gemm_int4_inputs
from bidispatch_backends.triton import int4_params

N, K, GROUP = 24, 256, 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies in nibble i of a word (AutoAWQ 0.2.9, awq/modules/linear/gemm.py, `order_map`)."""


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def awq_words(q: torch.Tensor) -> torch.Tensor:
    """[rows, columns] to [rows, columns / 8], a nibble at a time."""
    rows = [
        [signed(sum(row[8 * c + AWQ_ORDER[i]] << 4 * i for i in range(8))) for c in range(len(row) // 8)]
        for row in q.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def gptq_rows(q: torch.Tensor) -> torch.Tensor:
    """[k, n] to [k / 8, n]: word r of a column holds rows 8 r to 8 r + 7."""
    columns = [
        [signed(sum(column[8 * r + i] << 4 * i for i in range(8))) for r in range(len(column) // 8)]
        for column in q.T.tolist()
    ]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def gptq_columns(zeros: torch.Tensor) -> torch.Tensor:
    """[groups, n] to [groups, n / 8], each as it is."""
    return gptq_rows(zeros.T).T.contiguous()


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [k, n], zeros [k / group, n], scales [k / group, n], as both formats have them."""
    scales = torch.rand(K // GROUP, N, generator=torch.Generator().manual_seed(seed)).half()
    return integers(K, N, seed=seed), integers(K // GROUP, N, seed=seed + 1), scales


def weights(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[n, k], by the definition."""
    groups = torch.arange(K) // GROUP
    return ((q - zeros[groups]).half() * scales[groups]).T


def test_every_element_lies_where_the_layout_says() -> None:
    q = integers(3, 384)
    packed = pack(q)
    assert packed.shape == (3, 48)
    for element in range(384):
        block, rest = divmod(element, 128)
        j, s, h, c, p = rest // 32, rest // 16 % 2, rest // 8 % 2, rest // 2 % 4, rest % 2
        word = packed[:, 16 * block + 4 * c + j]
        assert torch.equal((word >> (16 * p + 8 * s + 4 * h)) & 15, q[:, element])


def test_unpacking_undoes_packing() -> None:
    q = integers(N, K)
    assert torch.equal(unpack(pack(q)).int(), q)


def test_slices_of_a_packed_weight_are_the_packed_slices() -> None:
    q = integers(N, K)
    assert torch.equal(pack(q)[8:16], pack(q[8:16]))
    assert torch.equal(pack(q)[:, 16:], pack(q[:, 128:]))


@pytest.mark.parametrize("q", [integers(4, 100), integers(4, 128) + 1, integers(4, 128) - 1, torch.zeros(4, 128)])
def test_what_is_no_matrix_of_nibbles_is_refused(q: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="pack takes integers"):
        pack(q)


def test_awq_is_repacked_exactly() -> None:
    q, zeros, scales = layer()
    found = from_awq(awq_words(q), awq_words(zeros), scales)
    assert found.group_size == GROUP
    assert torch.equal(unpack(found.weight).int(), q.T)
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))


@pytest.mark.parametrize("g_idx", [None, torch.arange(K, dtype=torch.int32) // GROUP])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_is_repacked_exactly(checkpoint_format: str, g_idx: torch.Tensor | None) -> None:
    q, zeros, scales = layer()
    assert (zeros == 0).any()  # stored as 15, for there is no -1
    stored = zeros if checkpoint_format == "gptq_v2" else (zeros - 1) & 15
    found = from_gptq(gptq_rows(q), gptq_columns(stored), scales, g_idx, checkpoint_format=checkpoint_format)
    assert torch.equal(unpack(found.weight).int(), q.T)
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))


def test_compressed_tensors_are_repacked_exactly() -> None:
    q, zeros, scales = layer()
    packed = gptq_rows(q).T.contiguous()
    found = from_compressed(packed, scales.T.contiguous(), gptq_rows(zeros.T))
    assert torch.equal(unpack(found.weight).int(), q.T)
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))
    symmetric = from_compressed(packed, scales.T.contiguous())
    assert symmetric.zeros is None
    assert torch.equal(dequantize(*symmetric), weights(q, torch.full_like(zeros, 8), scales))


def test_zero_points_that_a_symmetric_checkpoint_has_are_not_read() -> None:
    q, zeros, scales = layer()
    found = from_gptq(gptq_rows(q), None, scales)
    assert found.zeros is None
    assert torch.equal(dequantize(*found), weights(q, torch.full_like(zeros, 8), scales))


def test_zeros_that_are_all_8_are_left_out() -> None:
    q, _, scales = layer()
    zeros = torch.full((K // GROUP, N), 8, dtype=torch.int32)
    found = from_gptq(gptq_rows(q), gptq_columns(zeros - 1), scales)
    assert found.zeros is None
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))
    assert from_awq(awq_words(q), awq_words(zeros), scales).zeros is None


def test_one_format_is_not_taken_for_another() -> None:
    """Negative control: the checks above tell AWQ's order, GPTQ's and its two conventions of a zero point apart."""
    q, zeros, scales = layer()
    right = weights(q, zeros, scales)
    assert not torch.equal(dequantize(*from_awq(gptq_columns(q), awq_words(zeros), scales)), right)
    assert not torch.equal(dequantize(*from_gptq(gptq_rows(q), gptq_columns(zeros), scales)), right)


def test_activation_order_is_refused_with_the_reason() -> None:
    q, zeros, scales = layer()
    shuffled = torch.arange(K, dtype=torch.int32).flip(0) // GROUP
    with pytest.raises(UsageError, match="desc_act=true"):
        from_gptq(gptq_rows(q), gptq_columns(zeros), scales, shuffled)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    q, zeros, scales = layer()
    with pytest.raises(UsageError, match="weight_packed must be"):
        from_compressed(gptq_rows(q).T[:16], scales.T)
    with pytest.raises(UsageError, match="zero points"):
        from_compressed(gptq_rows(q).T, scales.T, gptq_rows(zeros.T)[:1])
    with pytest.raises(UsageError, match="unknown checkpoint_format 'gptq_v3'; known: gptq, gptq_v2"):
        from_gptq(gptq_rows(q), gptq_columns(zeros), scales, checkpoint_format="gptq_v3")
    with pytest.raises(UsageError, match=r"qweight must be torch.int32 \[256, 3\], not torch.int64"):
        from_awq(awq_words(q).long(), awq_words(zeros), scales)
    with pytest.raises(UsageError, match=r"qweight must be torch.int32 \[32, 24\], not torch.int32 \[32, 16\]"):
        from_gptq(gptq_rows(q)[:, :16], gptq_columns(zeros), scales)
    with pytest.raises(UsageError, match=r"zero points \(unpacked\) must be .* \[4, 24\], not .* \[3, 24\]"):
        from_awq(awq_words(q), awq_words(zeros)[:3], scales)
    with pytest.raises(UsageError, match="scales must be floating point"):
        from_awq(awq_words(q), awq_words(zeros), scales.int())


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"k": 200}, "k=200 is not a multiple of 128"),
        ({"k": 384, "group_size": 256}, "group_size=256 must divide k=384"),
        ({"k": 384, "group_size": 96}, "group_size=96 must divide k=384, and divide 128 or be a multiple of it"),
    ],
)
def test_groups_that_do_not_fit_k_are_refused(dims: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ops.get("gemm.int4").problem("bfloat16", {"n": 64, **dims})


def test_the_class_of_a_weight_follows_k_and_never_n() -> None:
    """Hosts merge and shard by rows: every n has the class of every other, on every GPU."""
    import bidispatch as bid

    for arch in ("sm80", "sm90", "sm100", "sm120"):
        plan = bid.plan(arch)
        for k in (1024, 4096, 8192, 28672):
            labels = {
                plan.select("gemm.int4", dtype="bfloat16", n=n, k=k, zero_points=zero_points).numerics
                for n in (16, 1536, 8192, 8208, 57344)
                for zero_points in (False, True)
            }
            assert len(labels) == 1


def test_a_width_that_no_kernel_takes_is_refused_with_the_reason() -> None:
    import bidispatch as bid

    with pytest.raises(bid.SelectionError, match="needs n a multiple of 16, asked for 24"):
        bid.plan("sm90").select("gemm.int4", dtype="bfloat16", n=24, k=4096)


def test_on_the_processor_a_row_alone_has_the_bits_it_has_in_a_batch_and_those_of_gemm() -> None:
    import bidispatch as bid

    plan = bid.plan("cpu")
    op = ops.get("gemm.int4")
    for dtype in op.dtypes:
        problem = op.problem(dtype, {"n": 48, "k": 256, "zero_points": True, "group_size": 32, "bias": True})
        x, weight, scales, zeros, bias = gemm_int4_inputs(problem, 40)
        layer = plan.select_problem(problem).bind(max_tokens=40)
        whole = layer(x, weight, scales, zeros, bias)
        for row in range(40):
            assert torch.equal(layer(x[row : row + 1], weight, scales, zeros, bias)[0], whole[row])
        gemm = plan.select("gemm", dtype=dtype, n=48, k=256, bias=True).bind(max_tokens=40)
        assert torch.equal(gemm(x, dequantize(weight, scales, zeros), bias), whole)
        (exact,) = gemm_int4(problem, x, weight, scales, zeros, bias)
        assert float((whole.double() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("zero_points", [False, True])
def test_inputs_are_quantised_as_quantisers_do(zero_points: bool) -> None:
    problem = ops.get("gemm.int4").problem("bfloat16", {"n": 64, "k": 512, "zero_points": zero_points})
    _, weight, scales, zeros, bias = gemm_int4_inputs(problem, 3)
    assert (zeros is not None) == zero_points
    assert bias is None
    q = unpack(weight)
    assert (int(q.min()), int(q.max())) == (0, 15)
    stood_for = dequantize(weight, scales, zeros).float()
    assert float(stood_for.std() * 512**0.5) == pytest.approx(1, abs=0.1)
    plain = dequantize(weight, torch.ones_like(scales), zeros)
    assert float(plain.abs().max()) <= 15


@given(
    n=st.integers(1, 8000).map(lambda count: 16 * count),
    blocks=st.integers(1, 240),
    group=st.sampled_from([32, 64, 128]),
    chunk=st.sampled_from([256, 1024, 2048]),
    units=st.integers(1, 300),
    arch=st.sampled_from(["sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942"]),
)
def test_every_weight_has_a_ladder_of_tiles_that_divide_k_and_its_chunks(
    n: int, blocks: int, group: int, chunk: int, units: int, arch: str
) -> None:
    problem = ops.get("gemm.int4").problem("bfloat16", {"n": n, "k": 128 * blocks, "group_size": group})
    device = Device(ARCHS[arch], arch, predicted=True, compute_units=units)
    ladders = (
        int4_params.int4_tiles(device, problem, int4_params.Int4Params(k_chunk=0)),
        int4_params.int4_tiles(device, problem, int4_params.Int4Params(k_chunk=chunk)),
        int4_params.int4_split_tiles(device, problem, int4_params.SplitInt4Params(k_chunk=chunk)),
    )
    for ladder in ladders:
        bounds = [max_m for max_m, _ in ladder]
        assert bounds[-1] is None
        assert bounds[:-1] == sorted(bound for bound in bounds if bound)
        for max_m, tile in ladder:
            assert problem.size("k") % tile.block_k == chunk % tile.block_k == 0
            assert max_m is None or tile.block_m <= max(16, max_m)
            if arch in ("sm100", "sm103"):
                assert int4_params.fits_tensor_memory(tile.block_m, tile.block_n, tile.num_warps)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("int4")
    for name in ("int4", "gemm"):
        sys.modules.pop(name, None)


def test_the_bound_counts_half_a_byte_a_weight_and_its_scales(benchmark: Any) -> None:
    peaks = {"bfloat16": 989e12}, 3.35e12
    problem = ops.get("gemm.int4").problem("bfloat16", {"n": 6144, "k": 4096})
    moved = 2 * 4096 + 6144 * 4096 / 2 + 32 * 6144 * 2 + 2 * 6144
    assert benchmark.floor_us(problem, 1, *peaks) == pytest.approx(moved / 3.35e12 * 1e6)
    awq = ops.get("gemm.int4").problem("bfloat16", {"n": 6144, "k": 4096, "zero_points": True})
    assert benchmark.floor_us(awq, 1, *peaks) == pytest.approx((moved + 32 * 6144) / 3.35e12 * 1e6)


@pytest.mark.parametrize(("ours", "m", "missed"), [(12.4, 1, 0), (12.6, 64, 1), (99.0, 128, 0)])
def test_the_figure_is_judged_at_few_rows(benchmark: Any, ours: float, m: int, missed: int) -> None:
    peers = {"vllm_marlin": 10.0, "cublas_bf16": 20.0}
    row = benchmark.Row("gemm.int4", "bfloat16", 1, 1, 128, False, m, ("x qkv",), 5.0, ours, "triton.int4", peers)
    lines, found = benchmark.summary([row])
    assert len(found) == missed
    assert any("/ cublas_bf16" in line for line in lines)


def test_without_marlin_nothing_is_judged(benchmark: Any) -> None:
    row = benchmark.Row(
        "gemm.int4", "bfloat16", 1, 1, 128, False, 1, ("x",), 5.0, 99.0, "triton.int4", {"cublas_bf16": 1.0}
    )
    assert benchmark.summary([row])[1] == []


def test_every_shape_of_the_sweep_is_a_problem_that_a_gpu_serves(benchmark: Any) -> None:
    import bidispatch as bid

    plan = bid.plan("sm90")
    shapes = benchmark.named(benchmark.SWEEP, [])
    assert len(shapes) >= 20
    for shape in shapes:
        assert plan.select_problem(ops.get("gemm.int4").problem("bfloat16", shape.dims)).rungs


def test_an_unknown_shape_is_a_usage_error(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        benchmark.main(["--shape", "GPT-5"])
    assert found.value.code == 2
    assert "the names are Qwen3-8B qkv" in " ".join(capsys.readouterr().err.split())


def test_what_tune_times_has_the_arguments_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from bidispatch.bench import operands

    held = []
    monkeypatch.setattr(operands, "copies_beyond_cache", lambda size, device, most: held.append(size) or 2)
    problem = ops.get("gemm.int4").problem("bfloat16", {"n": 32, "k": 256, "zero_points": True})
    made = operands.operands_of(problem, torch.device("cpu"))
    assert held == [32 * 256 // 2]
    calls = made.calls(3)
    assert [tuple(t.shape) if t is not None else None for t in calls[0]] == [(3, 256), (32, 32), (2, 32), (2, 32), None]
    assert not torch.equal(calls[0][1], calls[1][1])
    assert bid.plan("cpu").select_problem(problem).bind(max_tokens=3)(*calls[1]).shape == (3, 32)
    flops, moved = made.work(3)
    assert flops == 2 * 3 * 32 * 256
    assert moved == 32 * 256 / 2 + 2 * (3 * 256 + 2 * 32) + 2 * 3 * 32
