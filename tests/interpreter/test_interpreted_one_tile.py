"""The peers' kernel of the benchmarks: right where its tile does not divide, on fewer programs than tiles."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peers import one_tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 300, 70), (130, 140, 64), (257, 129, 33)])
def test_integer_products_are_exact(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randint(-3, 4, (size, k), generator=generator).to(dtype) for size in (m, n))
    for programs, out_dtype in ((1, dtype), (3, torch.float32), (132, dtype)):
        wide = torch.full((m, n + 3), float("nan"), dtype=out_dtype)
        one_tile.bind(dtype, out_dtype, programs)(x, weight, wide[:, :n])
        assert torch.equal(wide[:, :n].double(), x.double() @ weight.double().T)
        assert wide[:, n:].isnan().all()
