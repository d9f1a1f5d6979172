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
import json
import math
import re
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.timing import Launch, copies_beyond_cache, interleaved, launches_for
from bidispatch.environment import describe
from bidispatch.ops.schema import DTYPES, Problem, parse_dtype
from bidispatch.ops.shapes import Shape, read_shapes
from bidispatch.registry import Implementation, Rung
from bidispatch.requirements import installed_version
from bidispatch.runtime.bound import BoundKernel

HERE = Path(__file__).parent
SWEEPS = HERE / "sweeps"
MEASURED = {"bf16": SWEEPS / "gemm.yaml", "fp16": SWEEPS / "gemm.yaml", "fp32": SWEEPS / "gemm_fp32.yaml"}
"""The shapes of each dtype."""
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (1, 16, 64, 512, 2048)
OURS, CUBLAS, ONE_TILE = "ours", "cublas", "one_tile_128"
MOST_SETS = 64
"""Of weights: the smallest one would need 41 to exceed three times the L2."""

# The vendor's figures: FLOP/s by dtype, and bytes/s.
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}
PEAKS: Mapping[str, tuple[Mapping[str, float], float]] = {
    r"NVIDIA H100 80GB HBM3": (_HOPPER, 3.35e12),
    r"NVIDIA H200( SXM)?": (_HOPPER, 4.8e12),
}

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


def peaks_of(device_name: str) -> tuple[Mapping[str, float], float] | None:
    """The vendor's figures for a device; None where they are not known here."""
    return next((known for pattern, known in PEAKS.items() if re.fullmatch(pattern, device_name)), None)


def floor_us(problem: Problem, m: int, flops: Mapping[str, float], bandwidth: float) -> float:
    """max(FLOP / peak, bytes / bandwidth): every operand read once, the result written once."""
    n, k = problem.size("n"), problem.size("k")
    item, out_item = (getattr(torch, name).itemsize for name in (problem.dtype, str(problem["out_dtype"])))
    moved = (m * k + n * k) * item + m * n * out_item
    return max(2 * m * n * k / flops[problem.dtype], moved / bandwidth) * 1e6


def chosen(words: Sequence[str], dtype: str) -> list[Shape]:
    """The shapes of a dtype (`MEASURED`) with a name that holds one of these words; all without words."""
    return named(MEASURED[dtype], words)


def named(sweep: Path, words: Sequence[str]) -> list[Shape]:
    """The shapes of a sweep with a name that holds one of these words; all without words."""
    shapes = read_shapes(sweep)
    return [shape for shape in shapes if not words or any(word in name for word in words for name in shape.names)]


def serving(rungs: Sequence[Rung], m: int) -> Rung:
    """The rung of a ladder that serves a call of m rows."""
    return rungs[bisect_left([sys.maxsize if rung.max_m is None else rung.max_m for rung in rungs], m)]


def text_of(rung: Rung) -> str:
    """What a rung runs, in short: its name, block sizes as 16x64x128, everything else by name."""
    tile = rung.tile.model_dump() if rung.tile else {}
    blocks = "x".join(str(tile.pop(name)) for name in ("block_m", "block_n", "block_k") if name in tile)
    rest = {**rung.params.model_dump(exclude_defaults=True), **tile}
    return " ".join(word for word in (rung.implementation.name, blocks, *(f"{k}={v}" for k, v in rest.items())) if word)


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


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


def best_of_run(device: torch.device) -> tuple[dict[str, float], float]:
    """The best product (FLOP/s by dtype) and copy (bytes/s) measured here."""
    flops = {}
    for dtype, size in (("bfloat16", 8192), ("float16", 8192), ("float32", 4096)):
        x, weight = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(x)
        timing = interleaved({"product": lambda i, a=x, b=weight, c=out: torch.mm(a, b.t(), out=c)}, estimate_us=2000)
        flops[dtype] = 2 * size**3 / (timing["product"].least_us * 1e-6)
    source = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda i: target.copy_(source)}, estimate_us=500)
    return flops, 2 * source.numel() / (timing["copy"].least_us * 1e-6)


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
        used = {rung.implementation for selection in plan.selections for rung in selection.rungs}
        content = {
            "environment": environment(plan, used, peaks, best),
            "rows": [asdict(row) for row in found],
        }
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines, missed = summary(found)
    for line in lines:
        print(line)
    print(f"{len(found)} cells on {plan.device.name} in {time.monotonic() - began:.0f} s; {len(missed)} figures missed")
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def environment(
    plan: bid.Plan,
    used: Iterable[Implementation],
    peaks: tuple[Mapping[str, float], float],
    best: tuple[Mapping[str, float], float],
) -> dict[str, Any]:
    """What the figures hold for; the peaks that the bound is made of; the best product and copy of this run."""
    described = describe(plan.device, used)
    libraries = {**described["libraries"], "torch": torch.__version__, "triton": installed_version("triton")}
    sources = {"floor": peaks, "measured": best}
    return {
        **described,
        "libraries": libraries,
        "cuda": torch.version.cuda,
        **{name: {"flop_per_s": dict(flops), "bytes_per_s": rate} for name, (flops, rate) in sources.items()},
        "launches_of_a_graph": f"{launches_for(1, 0)} at most, or one for each set of weights",
    }


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
