"""`moe.experts` against vLLM's fused MoE, with its tuned tiles and with the one of its invariant mode, on this GPU.

    python benchmarks/moe.py [--dtype bf16]... [--m 64]... [--shape "Qwen3"]... [--quick] [--out FILE]

Shapes of one rank come from sweeps/moe.yaml. Experts are drawn evenly, anew for each launch. Every kernel is timed in
CUDA graphs over weights that together exceed the L2, rivals in turns, medians. Prints a summary last, and exits 1 if a
figure is missed:

- geometric mean of ours / vLLM at most 1.00, no cell above 1.10;
- geometric mean of vLLM's one tile / ours at least 1.4.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
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
from peers import vllm_moe
from peers.installed import AbsentError

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.operands import ExpertsOperands
from bidispatch.bench.timing import Launch, interleaved
from bidispatch.ops.moe import known_experts
from bidispatch.ops.schema import DTYPES, parse_dtype
from bidispatch.ops.shapes import Shape
from bidispatch.requirements import installed_version

SWEEP = SWEEPS / "moe.yaml"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_ROWS = (1, 8, 64, 512, 4096)
OURS, STOCK, ONE_TILE = "ours", "vllm_stock", "vllm_invariant"
MEAN_LIMIT, CELL_LIMIT, ONE_TILE_GAIN = 1.00, 1.10, 1.4
MOST_SETS = 8


@dataclass(frozen=True)
class Row:
    """One cell: microseconds of a call, and of the bound by the device's peaks."""

    op: str
    dtype: str
    dims: Mapping[str, Any]
    m: int
    names: tuple[str, ...]
    floor_us: float
    ours_us: float
    impl: str
    peers: Mapping[str, float]
    stock: str
    """vLLM's backend and its file of tuned tiles; why it was not timed."""

    def ratio(self, peer: str) -> float:
        """Our time as a part of a peer's."""
        return self.ours_us / self.peers[peer]

    def __str__(self) -> str:
        beside = "".join(f", {name} {us:.1f} ({self.ratio(name):.2f})" for name, us in self.peers.items())
        return (
            f"{DTYPES[self.dtype]} {self.names[0]} M={self.m}: floor {self.floor_us:.1f}, ours {self.ours_us:.1f} µs"
            f"{beside}, {self.impl}"
        )


# --- what can be computed without a GPU -----------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    lines: list[str] = []
    missed: list[str] = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        cells = [row for row in rows if row.dtype == dtype and STOCK in row.peers]
        if not cells:
            lines.append(f"{DTYPES[dtype]}: vLLM was not timed: {rows[0].stock}")
            continue
        mean = geometric_mean(row.ratio(STOCK) for row in cells)
        lines.append(f"{DTYPES[dtype]}: ours / vLLM, geometric mean of {len(cells)} cells: {mean:.3f} (at most 1.00)")
        if mean > MEAN_LIMIT:
            missed.append(lines[-1])
        over = sorted((row for row in cells if row.ratio(STOCK) > CELL_LIMIT), key=lambda row: -row.ratio(STOCK))
        lines.append(f"  cells over {CELL_LIMIT}: {len(over)}")
        lines += [f"    {row}" for row in over]
        missed += [f"cell over the limit: {row}" for row in over]
        gain = geometric_mean(1 / row.ratio(ONE_TILE) for row in cells)
        lines.append(f"{DTYPES[dtype]}: vLLM's one tile / ours, geometric mean: {gain:.3f} (at least {ONE_TILE_GAIN})")
        if gain < ONE_TILE_GAIN:
            missed.append(lines[-1])
    return lines, missed


# --- what needs the GPU ---------------------------------------------------------------------------------------------


def measure_shape(
    plan: bid.Plan, shape: Shape, dtype: str, rows: Sequence[int], peaks: tuple[Mapping[str, float], float]
) -> list[Row]:
    """Every M of one shape in one dtype."""
    problem = ops.get("moe.experts").problem(dtype, shape.dims)
    device = torch.device(plan.device.torch_device)
    bound = plan.select_problem(problem).bind(max_tokens=max(rows))
    operands = ExpertsOperands(problem, device, MOST_SETS)
    flops, bandwidth = peaks
    found = []
    for m in rows:
        calls = operands.calls(m)
        out = torch.empty(m, problem.size("hidden"), device=device, dtype=getattr(torch, dtype))
        work, moved = operands.work(m)
        bound_us = max(work / flops[str(problem["weight_dtype"])], moved / bandwidth) * 1e6
        rivals: dict[str, Launch] = {OURS: lambda i, calls=calls, out=out: bound(*calls[i % len(calls)], out=out)}
        try:
            stock = vllm_moe.experts(calls, known_experts(problem.dims))
            sizes = problem.size("experts"), problem.size("intermediate")
            tuned_file = vllm_moe.tuned_file(*sizes, problem["weight_dtype"] == "float8_e4m3fn")
            tuned = f"vllm {installed_version('vllm')} Triton, tuned file: {tuned_file}"
            rivals |= {STOCK: stock, ONE_TILE: vllm_moe.invariant(stock)}
        except AbsentError as error:
            tuned = str(error)
        timings = interleaved(rivals, operand_sets=len(calls), estimate_us=bound_us)
        times = {name: round(timing.median_us, 3) for name, timing in timings.items()}
        impl = text_of(serving(bound.rungs, m))
        row = Row(
            "moe.experts", dtype, dict(problem.dims), m, shape.names, round(bound_us, 3), times.pop(OURS), impl, times,
            tuned,
        )  # fmt: skip
        print(row, flush=True)
        found.append(row)
    return found


def main(words: Sequence[str] | None = None) -> int:
    arguments, parser = _arguments(words)
    shapes = named(SWEEP, arguments.shape)
    if not shapes:
        known = ", ".join(name for shape in named(SWEEP, []) for name in shape.names)
        parser.error(f"no shape to measure is named like {', '.join(arguments.shape)}; the names are {known}")
    dtypes = [parse_dtype(dtype) for dtype in arguments.dtype or ["bf16"]]
    rows = tuple(arguments.m or (QUICK_ROWS if arguments.quick else ROWS))
    whole = not (arguments.quick or arguments.m or arguments.shape or arguments.dtype)
    plan = bid.plan("cuda")
    to = arguments.out or (HERE / "results" / plan.device.slug / "moe.json" if whole else None)
    torch.set_grad_enabled(False)

    began = time.monotonic()
    best = best_of_run(torch.device(plan.device.torch_device))
    peaks = peaks_of(plan.device.name) or best
    found: list[Row] = []
    for dtype in dtypes:
        for shape in shapes:
            found += measure_shape(plan, shape, dtype, rows, peaks)
            torch.cuda.empty_cache()
    if to:
        described = environment(plan, used_by([plan]), peaks, best)
        described["libraries"]["vllm"] = installed_version("vllm")
        save(to, described, found)
    lines, missed = summary(found)
    return conclude(lines, missed, len(found), plan.device.name, began)


def _arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["bf16", "fp16"], help="bf16 if not given")
    parser.add_argument("--m", action="append", type=int, help="rows; 13 sizes from 1 to 4096 if not given")
    parser.add_argument("--shape", action="append", default=[], help="shapes whose name holds this text")
    parser.add_argument("--quick", action="store_true", help=f"M = {', '.join(map(str, QUICK_ROWS))}")
    parser.add_argument("--out", type=Path, help="JSON; results/<device>/moe.json for a whole run, none for a part")
    return parser.parse_args(words), parser


if __name__ == "__main__":
    sys.exit(main())
