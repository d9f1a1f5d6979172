"""`gemm.int4` against vLLM's Marlin kernel and cuBLAS in bf16, on this machine's GPU.

    python benchmarks/int4.py [--m 64]... [--shape "Qwen3-8B"]... [--quick] [--libraries FOLDER]... [--out FILE]
    python benchmarks/int4.py --try [--chunk 2048]... [--m 64]... [--shape "Qwen3-8B"]...

Shapes come from sweeps/int4.yaml. Every kernel is timed in CUDA graphs over weights that together exceed the L2, rivals
in turns, medians. Prints a summary last, and exits 1 if the figure is missed: M <= 64, geometric mean of ours / Marlin
at most 1.25. Without vLLM there is no Marlin, and nothing is judged.

With --try it times every launch shape that `tune` would, in chunks as the profile has them or as given, and prints the
fastest of each; it judges nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gemm import MOST_SETS
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
from bidispatch.int4 import dequantize
from bidispatch.ops.schema import DTYPES, Problem, parse_dtype
from bidispatch.ops.shapes import Shape
from bidispatch.registry import Rung
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import Limits

SWEEP = SWEEPS / "int4.yaml"
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_ROWS = (1, 16, 64, 1024)
OURS, MARLIN, CUBLAS = "ours", "vllm_marlin", "cublas_bf16"
SMALL_M, MARLIN_LIMIT = 64, 1.25


@dataclass(frozen=True)
class Row:
    """One cell: microseconds of a call, and of the bound by the device's peaks."""

    op: str
    dtype: str
    n: int
    k: int
    group_size: int
    zero_points: bool
    m: int
    names: tuple[str, ...]
    floor_us: float
    ours_us: float
    impl: str
    peers: Mapping[str, float]

    def ratio(self, peer: str) -> float:
        """Our time as a part of a peer's."""
        return self.ours_us / self.peers[peer]

    def __str__(self) -> str:
        peers = ", ".join(f"{name} {us:.1f} ({self.ratio(name):.2f})" for name, us in self.peers.items())
        return (
            f"{DTYPES[self.dtype]} {self.n}x{self.k} M={self.m}: ours {self.ours_us:.1f}, {peers}, bound "
            f"{self.floor_us:.1f} µs; {self.impl}, {self.names[0]}"
        )


def floor_us(problem: Problem, m: int, flops: Mapping[str, float], bandwidth: float) -> float:
    """max(FLOP / peak, bytes / bandwidth): every operand read once, the result written once."""
    n, k = problem.size("n"), problem.size("k")
    of_group = 2 + problem.flag("zero_points")
    moved = 2 * m * k + n * k // 2 + k // problem.size("group_size") * n * of_group + 2 * m * n
    return max(2 * m * n * k / flops[problem.dtype], moved / bandwidth) * 1e6


def summary(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    lines: list[str] = []
    missed: list[str] = []
    small = [row for row in rows if row.m <= SMALL_M and MARLIN in row.peers]
    if small:
        mean = geometric_mean(row.ratio(MARLIN) for row in small)
        lines.append(
            f"ours / Marlin at M <= {SMALL_M}, geometric mean of {len(small)}: {mean:.3f} (at most {MARLIN_LIMIT})"
        )
        missed += lines if mean > MARLIN_LIMIT else []
        over = [row for row in small if row.ratio(MARLIN) > MARLIN_LIMIT]
        lines.append(f"  {len(over)} cells above {MARLIN_LIMIT}; the 10 slowest:")
        lines += [f"    {row}" for row in sorted(small, key=lambda row: -row.ratio(MARLIN))[:10]]
    for m in sorted({row.m for row in rows}):
        cells = [row for row in rows if row.m == m]
        peers = [peer for peer in (MARLIN, CUBLAS) if all(peer in row.peers for row in cells)]
        means = [f"/ {peer} {geometric_mean(row.ratio(peer) for row in cells):.3f}" for peer in peers]
        bound = geometric_mean(row.ours_us / row.floor_us for row in cells)
        lines.append(f"  M={m}, geometric means: ours {', '.join([*means, f'/ bound {bound:.2f}'])}")
    return lines, missed


def measure_shape(
    plan: bid.Plan,
    shape: Shape,
    dtype: str,
    rows: Sequence[int],
    peaks: tuple[Mapping[str, float], float],
    folders: tuple[Path, ...],
) -> list[Row]:
    """Every M of one shape."""
    problem = ops.get("gemm.int4").problem(dtype, shape.dims)
    n, k = problem.size("n"), problem.size("k")
    device, most = torch.device(plan.device.torch_device), max(rows)
    bound = plan.select_problem(problem).bind(max_tokens=most)
    x, weight, scales, zeros, _ = load_attribute(ops.get(problem.op).inputs)(problem, most, device=device)
    sets = copies_beyond_cache(weight.nbytes, device, most=MOST_SETS)
    layers = [tuple(None if part is None else part.clone() for part in (weight, scales, zeros)) for _ in range(sets)]
    dense = dequantize(weight, scales, zeros)
    dense_sets = [dense.clone() for _ in range(copies_beyond_cache(dense.nbytes, device, most=MOST_SETS))]
    marlins = marlin_layers(layers, folders)
    out = torch.empty(most, n, device=device, dtype=x.dtype)

    def rivals(m: int) -> dict[str, Callable[[int], Any]]:
        """Each rival on the i-th weight."""
        some, into = x[:m], out[:m]
        calls = [layer.launch(some) for layer in marlins]
        marlin: dict[str, Callable[[int], Any]] = {MARLIN: lambda i: calls[i % len(calls)]()} if calls else {}
        return {
            OURS: lambda i: bound(some, *layers[i % sets], out=into),
            **marlin,
            CUBLAS: lambda i: torch.mm(some, dense_sets[i % len(dense_sets)].t(), out=into),
        }

    found = []
    for m in rows:
        bound_us = floor_us(problem, m, *peaks)
        timings = interleaved(rivals(m), operand_sets=max(sets, len(dense_sets)), estimate_us=bound_us)
        times = {name: round(timing.median_us, 3) for name, timing in timings.items()}
        found.append(
            Row(
                problem.op, dtype, n, k, problem.size("group_size"), problem.flag("zero_points"), m, shape.names,
                round(bound_us, 3), times.pop(OURS), text_of(serving(bound.rungs, m)), times,
            )
        )  # fmt: skip
    return found


def try_shapes(plan: bid.Plan, shape: Shape, dtype: str, rows: Sequence[int], chunks: Sequence[int]) -> None:
    """Print the fastest launch shapes of each kernel, chunk and M of one shape."""
    problem = ops.get("gemm.int4").problem(dtype, shape.dims)
    device = torch.device(plan.device.torch_device)
    generate = load_attribute(ops.get(problem.op).inputs)
    profile = plan.select_problem(problem).rungs[0].params.k_chunk
    for m in rows:
        x, weight, scales, zeros, _ = generate(problem, m, device=device)
        layers = [
            tuple(None if part is None else part.clone() for part in (weight, scales, zeros))
            for _ in range(copies_beyond_cache(weight.nbytes, device, most=MOST_SETS))
        ]
        out = torch.empty(m, problem.size("n"), device=device, dtype=x.dtype)
        kernels = {}
        for chunk in chunks or (profile,):
            for implementation in plan.registry.for_op(problem.op):
                if implementation.unmet(plan.device, problem) or (
                    not chunk and implementation.name.endswith("split_k")
                ):
                    continue
                params = implementation.params(k_chunk=chunk)
                for tile in load_attribute(implementation.search)(plan.device, problem, params, m):
                    rung = Rung(implementation, params, tile)
                    kernels[text_of(rung)] = bind(problem, plan.device, (rung,), Limits(m))

        def launch_of(kernel: BoundKernel, layers: Sequence[Any] = layers, x: Any = x, out: Any = out) -> Launch:
            return lambda i: kernel(x, *layers[i % len(layers)], out=out)

        launches = {name: launch_of(kernel) for name, kernel in kernels.items()}
        timings = interleaved(launches, operand_sets=len(layers), estimate_us=10.0, replays=3)
        ranked = sorted(timings.items(), key=lambda pair: pair[1].median_us)
        print(f"{shape.names[0]} {problem.size('n')}x{problem.size('k')} M={m}")
        for name, timing in ranked[:8]:
            print(f"  {timing.median_us:7.2f} {name}", flush=True)


def marlin_layers(layers: Sequence[tuple[Any, ...]], folders: tuple[Path, ...]) -> list[Any]:
    """Each weight as Marlin has it; none, with the reason printed, where it is absent."""
    from peers.installed import AbsentError
    from peers.marlin import Marlin

    try:
        return [Marlin(*layer, folders) for layer in layers]
    except AbsentError as error:
        print(f"no {MARLIN}: {error}", flush=True)
        return []


def main(words: Sequence[str] | None = None) -> int:
    arguments, parser = _arguments(words)
    shapes = named(SWEEP, arguments.shape)
    if not shapes:
        known = ", ".join(dict.fromkeys(name for shape in named(SWEEP, []) for name in shape.names))
        parser.error(f"no shape is named like {', '.join(arguments.shape)}; the names are {known}")
    rows = tuple(arguments.m or (QUICK_ROWS if arguments.quick else ROWS))
    whole = not (arguments.quick or arguments.m or arguments.shape)
    plan = bid.plan("cuda")
    to = arguments.out or (HERE / "results" / plan.device.slug / "int4.json" if whole else None)
    torch.set_grad_enabled(False)

    if arguments.tried:
        for shape in shapes:
            try_shapes(plan, shape, parse_dtype(arguments.dtype), rows, arguments.chunk)
            torch.cuda.empty_cache()
        return 0
    began = time.monotonic()
    best = best_of_run(torch.device(plan.device.torch_device))
    peaks = peaks_of(plan.device.name) or best
    found: list[Row] = []
    for shape in shapes:
        found += measure_shape(
            plan, shape, parse_dtype(arguments.dtype), rows, peaks, tuple(map(Path, arguments.libraries))
        )
        torch.cuda.empty_cache()
        for row in found[-len(rows) :]:
            print(row, flush=True)
    if to:
        save(to, environment(plan, used_by([plan]), peaks, best), found)
    lines, missed = summary(found)
    return conclude(lines, missed, len(found), plan.device.name, began)


def _arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16", help="of the activations")
    parser.add_argument("--m", action="append", type=int, help="rows; 15 sizes from 1 to 4096 if not given")
    parser.add_argument("--shape", action="append", default=[], help="shapes whose name holds this text")
    parser.add_argument("--quick", action="store_true", help=f"M = {', '.join(map(str, QUICK_ROWS))}")
    parser.add_argument("--try", action="store_true", dest="tried", help="time launch shapes instead")
    parser.add_argument("--chunk", action="append", type=int, default=[], help="with --try: k_chunk; 0 for none")
    parser.add_argument("--libraries", action="append", default=[], help="a folder that holds vLLM's compiled ops")
    parser.add_argument("--out", type=Path, help="JSON; results/<device>/int4.json for a whole run, none for a part")
    return parser.parse_args(words), parser


if __name__ == "__main__":
    sys.exit(main())
