"""`gemm` and `bmm`: right at every size and stride, and no row touched by another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import (
    DTYPES,
    TOLERANCE,
    bind,
    draw_inputs,
    poisoned_outputs,
    reference,
    relative_error,
    run,
    same_bits,
    tiles,
)

from bidispatch import ops
from bidispatch.ops.schema import Problem

SIZES = [(1, 1), (7, 1000), (65, 1), (130, 127), (5, 4097), (64, 256)]


def gemm(dtype: str, n: int, k: int, **dims: Any) -> Problem:
    return ops.get("gemm").problem(dtype, {"n": n, "k": k, **dims})


def integers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers: their sums are exact in any order, so a wrong index or mask cannot hide in rounding."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_integer_products_are_exact_in_every_tile(dtype: str, n: int, k: int) -> None:
    problem = gemm(dtype, n, k, out_dtype="float32", bias=True)
    torch_dtype = getattr(torch, dtype)
    for tile in tiles(problem):
        for m in (1, tile.block_m, tile.block_m + 1):
            x = integers(m, k, dtype=torch_dtype, seed=m)
            weight, bias = integers(n, k, dtype=torch_dtype, seed=1), integers(n, dtype=torch_dtype, seed=2)
            (out,) = run(problem, [x, weight, bias], bind(problem, tile=tile))
            assert torch.equal(out.double(), x.double() @ weight.double().T + bias.double()), (tile, m)


@pytest.mark.parametrize("distribution", ["normal", "positive", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_is_near_the_fp64_reference(dtype: str, distribution: str) -> None:
    problem = gemm(dtype, 70, 500, bias=True)
    arguments = draw_inputs(problem, 19, distribution=distribution)
    (out,) = run(problem, arguments)
    assert relative_error(out, reference(problem, arguments)[0]) < TOLERANCE[dtype]


def test_bias_is_added_before_the_only_rounding() -> None:
    problem = gemm("float16", 1, 2, bias=True)
    x, weight, bias = (torch.tensor(v, dtype=torch.float16) for v in ([[2048.0, 1.0]], [[1.0, 1.0]], [1.0]))
    (out,) = run(problem, [x, weight, bias])
    assert out.item() == 2050  # 2049 rounds to 2048 in fp16, so that a bias added after it would give 2048


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_give_the_same_bits(dtype: str) -> None:
    problem = gemm(dtype, 40, 77)
    x, weight, _ = draw_inputs(problem, 5)
    (plain,) = run(problem, [x, weight, None])
    wide_x, wide_weight = torch.full((5, 130), float("nan")), torch.full((40, 99), float("nan"))
    wide_x, wide_weight = wide_x.to(x.dtype), wide_weight.to(x.dtype)
    wide_x[:, 3:80], wide_weight[:, 5:82] = x, weight
    (strided,) = run(problem, [wide_x[:, 3:80], wide_weight[:, 5:82], None])
    assert same_bits(plain, strided)
    wide_out = torch.full((5, 64), -1.0, dtype=x.dtype)
    bind(problem)(x, weight, None, wide_out[:, 8:48])
    assert same_bits(plain, wide_out[:, 8:48])
    assert (wide_out[:, :8] == -1).all()
    assert (wide_out[:, 48:] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beside_nan_and_infinity_keep_their_bits(dtype: str) -> None:
    problem = gemm(dtype, 40, 77)
    x, weight, _ = draw_inputs(problem, 40)
    for tile in tiles(problem):
        kernel = bind(problem, tile=tile)
        (clean,) = run(problem, [x, weight, None], kernel)
        dirty = x.clone()
        dirty[0::3], dirty[1::3] = float("nan"), float("inf")
        (beside,) = run(problem, [dirty, weight, None], kernel)
        assert same_bits(clean[2::3], beside[2::3])
        assert not torch.isfinite(beside[0::3]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 47), (65, 128)])
def test_bmm_is_exact_for_any_strides_of_b(dtype: str, n: int, k: int) -> None:
    problem = ops.get("bmm").problem(dtype, {"n": n, "k": k, "out_dtype": "float32"})
    torch_dtype = getattr(torch, dtype)
    a = integers(2, 18, k, dtype=torch_dtype, seed=0)
    plain = integers(2, k, n, dtype=torch_dtype, seed=1)
    column_major = plain.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.full((2, 2 * k, 3 * n), float("nan"), dtype=torch_dtype)[:, ::2, ::3]
    spread.copy_(plain)
    for tile in tiles(problem):
        for b in (plain, column_major, spread):
            (out,) = run(problem, [a, b], bind(problem, tile=tile))
            assert torch.equal(out.double(), a.double() @ b.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bmm_takes_a_transposed_a(dtype: str) -> None:
    problem = ops.get("bmm").problem(dtype, {"n": 20, "k": 30})
    a, b = draw_inputs(problem, 6)
    (plain,) = run(problem, [a, b])
    by_token = a.transpose(0, 1).contiguous().transpose(0, 1)  # as multi-head latent attention holds it
    assert same_bits(plain, run(problem, [by_token, b])[0])
    assert relative_error(plain, reference(problem, [a, b])[0]) < TOLERANCE[dtype]


def test_a_kernel_that_drops_the_tail_of_k_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the integer check sees a kernel that takes an odd K for an even one."""
    from bidispatch_backends.triton import gemm as module

    problem = gemm("float32", 7, 100, out_dtype="float32", bias=False)
    original = module.launches

    def even(*arguments: Any) -> tuple[Any, ...]:
        (launch,) = original(*arguments)
        launch.constants["K_IS_EVEN"] = True
        return (launch,)

    padded = integers(3, 128, dtype=torch.float32, seed=0), integers(7, 128, dtype=torch.float32, seed=1)
    x, weight = (tensor[:, :100] for tensor in padded)
    exact = x.double() @ weight.double().T
    assert torch.equal(run(problem, [x, weight, None])[0].double(), exact)
    monkeypatch.setattr(module, "launches", even)
    out = poisoned_outputs(problem, [x, weight, None])[0]
    bind(problem)(x, weight, None, out)
    assert not torch.equal(out.double(), exact)
