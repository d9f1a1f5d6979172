"""`gemm` against stock cuBLAS and the one tile that peers use, on this machine's GPU.

    python benchmarks/gemm.py [--dtype bf16]... [--m 64]... [--shape "Qwen3-8B"]... [--quick] [--out FILE]

Shapes come from sweeps/gemm.yaml, of fp32 from sweeps/gemm_fp32.yaml. Every kernel is timed in CUDA graphs over weights
that together exceed the L2, rivals in turns, medians. Prints a summary last, and exits 1 if a figure is missed:

- bf16, fp16: geometric mean of ours / cuBLAS at most 1.00, no cell above 1.10, or, where cuBLAS takes less than 8 µs,
  none more than 0.7 µs over it; fp32: geometric mean at most 1.15, both without TF32;
- bf16, fp16 at M <= 64: geometric mean of ours / one tile at most 0.5, over the cells where the one tile is not within
  twice the bound already; the others are given beside it.

gemm_host.py takes the host's time of a call.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import (
    HERE,
    SWEEPS,
    best_of_run,
    conclude,
    environment,
    geometric_mean,
    named,
    peaks_of,
    save,
    serving,
    text_of,
    used_by,
)

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.timing import Launch, copies_beyond_cache, interleaved
from bidispatch.ops.schema import DTYPES, Problem, parse_dtype
from bidispatch.ops.shapes import Shape
from bidispatch.runtime.bound import BoundKernel

MEASURED = {"bf16": SWEEPS / "gemm.yaml", "fp16": SWEEPS / "gemm.yaml", "fp32": SWEEPS / "gemm_fp32.yaml"}
"""The shapes of each dtype."""
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (1, 16, 64, 512, 2048)
OURS, CUBLAS, ONE_TILE = "ours", "cublas", "one_tile_128"
MOST_SETS = 64
"""Of weights: the smallest one would need 41 to exceed three times the L2."""

MEAN_LIMIT = {"bfloat16": 1.00, "float16": 1.00, "float32": 1.15}
CELL_LIMIT = {"bfloat16": 1.10, "float16": 1.10, "float32": math.inf}
SHORT_US, SHORT_OVER_US = 8.0, 0.7
SMALL_M, ONE_TILE_LIMIT, NEAR_BOUND = 64, 0.5, 2.0


@dataclass(frozen=True)
class Row:
    """One cell: microseconds of a call, and of the bound by the device's peaks."""

    op: str
    dtype: str
    n: int
    k: int
    m: int
    names: tuple[str, ...]
    role: str
    out_dtype: str
    floor_us: float
    ours_us: float
    impl: str
    peers: Mapping[str, float]

    def ratio(self, peer: str) -> float:
        """Our time as a part of a peer's."""
        return self.ours_us / self.peers[peer]

    @property
    def over_limit(self) -> bool:
        """Whether it is too slow by itself beside stock."""
        stock = self.peers[CUBLAS]
        if stock < SHORT_US:
            return self.dtype in ("bfloat16", "float16") and self.ours_us - stock > SHORT_OVER_US
        return self.ratio(CUBLAS) > CELL_LIMIT[self.dtype]

    def __str__(self) -> str:
        return (
            f"{DTYPES[self.dtype]} {self.n}x{self.k} M={self.m}: ours {self.ours_us:.1f}, cuBLAS "
            f"{self.peers[CUBLAS]:.1f} µs ({self.ratio(CUBLAS):.2f}), {self.impl}, {self.names[0]}"
        )


# --- what can be computed without a GPU -----------------------------------------------------------------------------


def floor_us(problem: Problem, m: int, flops: Mapping[str, float], bandwidth: float) -> float:
    """max(FLOP / peak, bytes / bandwidth): every operand read once, the result written once."""
    n, k = problem.size("n"), problem.size("k")
    item, out_item = (getattr(torch, name).itemsize for name in (problem.dtype, str(problem["out_dtype"])))
    moved = (m * k + n * k) * item + m * n * out_item
    return max(2 * m * n * k / flops[problem.dtype], moved / bandwidth) * 1e6


def chosen(words: Sequence[str], dtype: str) -> list[Shape]:
    """The shapes of a dtype (`MEASURED`) with a name that holds one of these words; all without words."""
    return named(MEASURED[dtype], words)


def summary(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    lines: list[str] = []
    missed: list[str] = []

    def judge(text: str, value: float, limit: float) -> None:
        lines.append(f"{text}: {value:.3f} (at most {limit:.2f})")
        if value > limit:
            missed.append(lines[-1])

    for dtype in dict.fromkeys(row.dtype for row in rows):
        cells = [row for row in rows if row.dtype == dtype]
        judge(
            f"{DTYPES[dtype]}: ours / cuBLAS, geometric mean of {len(cells)} cells",
            geometric_mean(row.ratio(CUBLAS) for row in cells),
            MEAN_LIMIT[dtype],
        )
        lines += ["  the 10 slowest beside cuBLAS:"]
        lines += [f"    {row}" for row in sorted(cells, key=lambda row: -row.ratio(CUBLAS))[:10]]
        over = [row for row in cells if row.over_limit]
        lines.append(f"  cells over the limit: {len(over)}")
        lines += [f"    {row}" for row in over]
        missed += [f"cell over the limit: {row}" for row in over]
        lines += _one_tile_lines(dtype, cells, judge)
    return lines, missed


def _one_tile_lines(dtype: str, cells: Sequence[Row], judge: Callable[[str, float, float], None]) -> list[str]:
    small = [row for row in cells if row.m <= SMALL_M and ONE_TILE in row.peers]
    if not small:
        return []
    far = [row for row in small if row.peers[ONE_TILE] > NEAR_BOUND * row.floor_us]
    near = [row for row in small if row not in far]
    lines = [
        f"  ours / one tile at M <= {SMALL_M}, geometric mean of all {len(small)} cells: "
        f"{geometric_mean(row.ratio(ONE_TILE) for row in small):.3f}"
    ]
    if near:
        lines.append(
            f"  of {len(near)} cells where the one tile is within {NEAR_BOUND:g} times the bound: "
            f"{geometric_mean(row.ratio(ONE_TILE) for row in near):.3f}"
        )
    if far:
        mean = geometric_mean(row.ratio(ONE_TILE) for row in far)
        text = f"  of the other {len(far)} cells"
        if dtype == "float32":
            lines.append(f"{text}: {mean:.3f}")
        else:
            judge(f"{DTYPES[dtype]}: ours / one tile at M <= {SMALL_M}, where it can be halved", mean, ONE_TILE_LIMIT)
    return lines


# --- what needs the GPU ---------------------------------------------------------------------------------------------


def stock_product(dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """`f(x, weight_t, out)` as stock torch is fastest. A wider result comes from cuBLAS itself if this torch can."""
    if dtype == out_dtype:
        return lambda x, weight_t, out: torch.mm(x, weight_t, out=out)
    wide: Callable[..., Any] = lambda x, weight_t, out: torch.mm(x, weight_t, out_dtype=out_dtype, out=out)  # noqa: E731
    probe = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        wide(probe, probe, torch.empty(16, 16, device=device, dtype=out_dtype))
    except (TypeError, RuntimeError):
        return lambda x, weight_t, out: out.copy_(torch.mm(x, weight_t))
    return wide


def measure_shape(
    plan: bid.Plan, shape: Shape, dtype: str, rows: Sequence[int], peaks: tuple[Mapping[str, float], float]
) -> list[Row]:
    """Every M of one shape in one dtype."""
    from peers import one_tile

    problem = ops.get("gemm").problem(dtype, shape.dims)
    n, k = problem.size("n"), problem.size("k")
    device, torch_dtype = torch.device(plan.device.torch_device), getattr(torch, dtype)
    out_dtype = getattr(torch, str(problem["out_dtype"]))
    most = max(rows)
    bound = plan.select_problem(problem).bind(max_tokens=most)
    tile = one_tile.bind(torch_dtype, out_dtype, torch.cuda.get_device_properties(device).multi_processor_count)
    stock = stock_product(torch_dtype, out_dtype, device)

    sets = copies_beyond_cache(n * k * torch_dtype.itemsize, device, most=MOST_SETS)
    weights = [torch.randn(n, k, device=device, dtype=torch_dtype).mul_(k**-0.5) for _ in range(sets)]
    weights_t = [weight.t() for weight in weights]
    x = torch.randn(most, k, device=device, dtype=torch_dtype)
    out = torch.empty(most, n, device=device, dtype=out_dtype)
    found = []
    for m in rows:
        bound_us = floor_us(problem, m, *peaks)
        timings = interleaved(
            rivals_of(bound, stock, tile, x[:m], weights, weights_t, out[:m]), operand_sets=sets, estimate_us=bound_us
        )
        times = {name: round(timing.median_us, 3) for name, timing in timings.items()}
        impl = text_of(serving(bound.rungs, m))
        found.append(
            Row(
                "gemm", dtype, n, k, m, shape.names, str(problem["role"]), str(problem["out_dtype"]),
                round(bound_us, 3), times.pop(OURS), impl, times,
            )
        )  # fmt: skip
    return found


def rivals_of(
    bound: BoundKernel,
    stock: Callable[..., Any],
    tile: Callable[..., None],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weights_t: Sequence[torch.Tensor],
    out: torch.Tensor,
) -> dict[str, Launch]:
    """Each rival on the i-th weight. All write one output."""
    sets = len(weights)
    return {
        OURS: lambda i: bound(x, weights[i % sets], None, out=out),
        CUBLAS: lambda i: stock(x, weights_t[i % sets], out),
        ONE_TILE: lambda i: tile(x, weights[i % sets], out),
    }


def main(words: Sequence[str] | None = None) -> int:
    arguments, parser = _arguments(words)
    dtypes = arguments.dtype or list(MEASURED)
    todo = [(parse_dtype(dtype), shape) for dtype in dtypes for shape in chosen(arguments.shape, dtype)]
    if not todo:
        known = ", ".join(
            dict.fromkeys(name for dtype in dtypes for shape in chosen([], dtype) for name in shape.names)
        )
        parser.error(f"no shape to measure is named like {', '.join(arguments.shape)}; the names are {known}")
    rows = tuple(arguments.m or (QUICK_ROWS if arguments.quick else ROWS))
    whole = not (arguments.quick or arguments.m or arguments.shape or arguments.dtype)
    plan = bid.plan("cuda")
    slug = plan.device.slug
    to = arguments.out or (HERE / "results" / slug / "gemm.json" if whole else None)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False

    began = time.monotonic()
    best = best_of_run(torch.device(plan.device.torch_device))
    peaks = peaks_of(plan.device.name) or best
    found: list[Row] = []
    for dtype, shape in todo:
        found += measure_shape(plan, shape, dtype, rows, peaks)
        torch.cuda.empty_cache()
        mine = found[-len(rows) :]
        print(
            f"{DTYPES[dtype]} {shape.names[0]}: ours / cuBLAS {geometric_mean(row.ratio(CUBLAS) for row in mine):.3f}, "
            f"worst {max(row.ratio(CUBLAS) for row in mine):.2f}; {time.monotonic() - began:.0f} s so far",
            flush=True,
        )
    if to:
        save(to, environment(plan, used_by([plan]), peaks, best), found)
    lines, missed = summary(found)
    return conclude(lines, missed, len(found), plan.device.name, began)


def _arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=list(MEASURED), help="all three if not given")
    parser.add_argument("--m", action="append", type=int, help="rows; 19 sizes from 1 to 8192 if not given")
    parser.add_argument("--shape", action="append", default=[], help="shapes whose name holds this text")
    parser.add_argument("--quick", action="store_true", help=f"M = {', '.join(map(str, QUICK_ROWS))}")
    parser.add_argument("--out", type=Path, help="JSON; results/<device>/gemm.json for a whole run, none for a part")
    return parser.parse_args(words), parser


if __name__ == "__main__":
    sys.exit(main())
