"""`gemm.fp8_block` against DeepGEMM called directly and cuBLAS in bf16, on this machine's GPU.

    python benchmarks/fp8.py [--m 64]... [--shape "Qwen3-8B"]... [--quick] [--out FILE]

Shapes come from sweeps/fp8.yaml. Every kernel is timed in CUDA graphs over weights that together exceed the L2, rivals
in turns, medians; each cell twice, with x in fp8 already and with x in bf16, quantised in the graph. DeepGEMM is called
as a host would, with its own defaults, on scales that lie as it reads them; quantised by vLLM's kernel where vLLM is
installed, by ours where it is not (`quantiser` of a row). `triton` is our portable kernel where the plan has another.
Prints a summary last, and exits 1 if a figure is missed:

- geometric mean of ours / DeepGEMM at most 1.02, with and without the quantisation;
- without it, no cell slower than bf16 where DeepGEMM is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gemm import MOST_SETS, floor_us, stock_product
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
from bidispatch.ops.quantize import FP8, GROUP
from bidispatch.ops.schema import Problem
from bidispatch.ops.shapes import Shape
from bidispatch.registry import Rung, default_registry
from bidispatch.runtime.bind import bind
from bidispatch.runtime.context import Limits

SHAPES = SWEEPS / "fp8.yaml"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_ROWS = (1, 16, 64, 512, 4096)
OURS, DEEP_GEMM, CUBLAS, TRITON = "ours", "deep_gemm", "cublas_bf16", "triton"
PORTABLE = "triton.fp8_block"
MEAN_LIMIT = 1.02

Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """One cell: microseconds of a call, and of the bound by the device's peaks."""

    op: str
    dtype: str
    n: int
    k: int
    m: int
    names: tuple[str, ...]
    quantised: bool
    """Whether the quantisation of x is part of it: of ours and DeepGEMM's; bf16 needs none."""
    quantiser: str
    """Whose kernel quantises before DeepGEMM; empty where none does."""
    floor_us: float
    ours_us: float
    impl: str
    numerics: str
    peers: Mapping[str, float]

    def ratio(self, peer: str) -> float:
        """Our time as a part of a peer's."""
        return self.ours_us / self.peers[peer]

    @property
    def over_bf16(self) -> bool:
        """Whether it is slower than bf16 where DeepGEMM is not."""
        bf16 = self.peers[CUBLAS]
        return not self.quantised and self.ours_us > bf16 >= self.peers.get(DEEP_GEMM, float("inf"))

    def __str__(self) -> str:
        others = ", ".join(f"{name} {time:.1f}" for name, time in self.peers.items())
        step = "with quantisation" if self.quantised else "alone"
        return (
            f"{self.n}x{self.k} M={self.m} {step}: ours {self.ours_us:.1f}, {others} µs, {self.impl}, {self.names[0]}"
        )


def summary(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    lines: list[str] = []
    missed: list[str] = []
    for quantised in (False, True):
        cells = [row for row in rows if row.quantised is quantised]
        step = "with the quantisation" if quantised else "alone"
        for peer in (DEEP_GEMM, CUBLAS, TRITON):
            against = [row for row in cells if peer in row.peers]
            if not against:
                continue
            mean = geometric_mean(row.ratio(peer) for row in against)
            lines.append(f"{step}, ours / {peer}, geometric mean of {len(against)} cells: {mean:.3f}")
            if peer == DEEP_GEMM:
                lines[-1] += f" (at most {MEAN_LIMIT:.2f})"
                if mean > MEAN_LIMIT:
                    missed.append(lines[-1])
                lines += ["  the 10 slowest beside it:"]
                lines += [f"    {row}" for row in sorted(against, key=lambda row: -row.ratio(DEEP_GEMM))[:10]]
    missed += [f"slower than bf16 where DeepGEMM is not: {row}" for row in rows if row.over_bf16]
    return lines, missed


def quantised_floor_us(problem: Problem, m: int, flops: Mapping[str, float], bandwidth: float) -> float:
    """The bound of the product, and of reading x once in bf16 and writing it once."""
    return floor_us(problem, m, flops, bandwidth) + m * problem.size("k") * 3 / bandwidth * 1e6


# --- what needs the GPU ---------------------------------------------------------------------------------------------


class Rivals:
    """The kernels and rivals of one shape, bound once."""

    def __init__(self, plan: bid.Plan, shape: Shape, most: int) -> None:
        from peers import deep_gemm
        from peers.installed import AbsentError

        self.shape = shape
        self.problem = ops.get("gemm.fp8_block").problem(FP8, shape.dims)
        self.device = torch.device(plan.device.torch_device)
        self.selection = plan.select_problem(self.problem)
        self.kernel = self.selection.bind(max_tokens=most)
        k = self.problem.size("k")
        quantization = ops.get("quantize.fp8_group").problem("bfloat16", {"k": k})
        self.quantise = plan.select_problem(quantization).bind(max_tokens=most)
        self.portable: Callable[..., None] | None = None
        if self.selection.rungs[0].implementation.name != PORTABLE:
            found = default_registry().get(PORTABLE)
            tiles = found.tiles(plan.device, self.problem, found.params())
            rungs = tuple(Rung(found, found.params(), tile, top) for top, tile in tiles)
            self.portable = bind(self.problem, plan.device, rungs, Limits(most)).launch
        self.absent: list[str] = []
        self.library: deep_gemm.Product | None = None
        self.quantiser: Quantise | None = None
        try:
            self.library = deep_gemm.product()
            self.quantiser = deep_gemm.vllm_quantiser()
        except AbsentError as error:
            self.absent.append(str(error))

    def rows(self, counts: Sequence[int], peaks: tuple[Mapping[str, float], float]) -> list[Row]:
        n, k = self.problem.size("n"), self.problem.size("k")
        groups = -(-k // GROUP)
        sets = copies_beyond_cache(n * k, self.device, most=MOST_SETS)
        weights = [torch.randn(n, k, device=self.device).to(torch.float8_e4m3fn) for _ in range(sets)]
        scales = [torch.rand(-(-n // GROUP), groups, device=self.device).add_(0.5) for _ in range(sets)]
        bf16 = [torch.randn(n, k, device=self.device, dtype=torch.bfloat16).t() for _ in range(sets)]
        most = max(counts)
        x = torch.randn(most, k, device=self.device, dtype=torch.bfloat16)
        out = torch.empty(most, n, device=self.device, dtype=torch.bfloat16)
        found = []
        for m in counts:
            floors = floor_us(self.problem, m, *peaks), quantised_floor_us(self.problem, m, *peaks)
            for quantised, floor in zip((False, True), floors, strict=True):
                rivals = self.launches(x[:m], weights, scales, bf16, out[:m], quantised=quantised)
                timings = interleaved(rivals, operand_sets=sets, estimate_us=floor)
                times = {name: round(timing.median_us, 3) for name, timing in timings.items()}
                quantiser = ("vllm" if self.quantiser else "ours") if quantised and self.library else ""
                found.append(
                    Row(
                        "gemm.fp8_block", FP8, n, k, m, self.shape.names, quantised, quantiser, round(floor, 3),
                        times.pop(OURS), text_of(serving(self.kernel.rungs, m)), self.selection.numerics, times,
                    )
                )  # fmt: skip
        return found

    def launches(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        bf16: Sequence[torch.Tensor],
        out: torch.Tensor,
        *,
        quantised: bool,
    ) -> dict[str, Launch]:
        """Each rival on the i-th weight. All write one output."""
        from peers.deep_gemm import side_by_side

        m, k = x.shape
        sets = len(weights)
        q = torch.empty(m, k, device=self.device, dtype=torch.float8_e4m3fn)
        x_scales = side_by_side(m, -(-k // GROUP), self.device)
        self.quantise(x, q=q, scales=x_scales)
        stock = stock_product(torch.bfloat16, torch.bfloat16, self.device)

        def ours(kernel: Callable[..., None]) -> Launch:
            def run(i: int) -> None:
                if quantised:
                    self.quantise.launch(x, q, x_scales)
                kernel(q, x_scales, weights[i % sets], scales[i % sets], out)

            return run

        def theirs(product: Callable[..., object]) -> Launch:
            def run(i: int) -> None:
                values, its_scales = q, x_scales
                if quantised and self.quantiser:
                    values, its_scales = self.quantiser(x)
                elif quantised:
                    self.quantise.launch(x, q, x_scales)
                product(values, its_scales, weights[i % sets], scales[i % sets], out)

            return run

        rivals = {OURS: ours(self.kernel.launch), CUBLAS: lambda i: stock(x, bf16[i % sets], out)}
        if self.library:
            rivals[DEEP_GEMM] = theirs(self.library)
        if self.portable:
            rivals[TRITON] = ours(self.portable)
        return rivals


def main(words: Sequence[str] | None = None) -> int:
    arguments, parser = _arguments(words)
    shapes = named(SHAPES, arguments.shape)
    if not shapes:
        known = ", ".join(name for shape in named(SHAPES, []) for name in shape.names)
        parser.error(f"no shape to measure is named like {', '.join(arguments.shape)}; the names are {known}")
    counts = tuple(arguments.m or (QUICK_ROWS if arguments.quick else ROWS))
    whole = not (arguments.quick or arguments.m or arguments.shape)
    plan = bid.plan("cuda")
    to = arguments.out or (HERE / "results" / plan.device.slug / "fp8.json" if whole else None)
    torch.set_grad_enabled(False)

    began = time.monotonic()
    best = best_of_run(torch.device(plan.device.torch_device))
    flops, rate = peaks_of(plan.device.name) or best
    peaks = {FP8: 2 * flops["bfloat16"], **flops}, rate
    found: list[Row] = []
    absent: dict[str, None] = {}
    for shape in shapes:
        bound = Rivals(plan, shape, max(counts))
        found += bound.rows(counts, peaks)
        absent |= dict.fromkeys(bound.absent)
        torch.cuda.empty_cache()
        print(f"{shape.names[0]}: {time.monotonic() - began:.0f} s so far", flush=True)
    if to:
        described = {**environment(plan, used_by([plan]), peaks, best), "absent": list(absent)}
        save(to, described, found)
    lines, missed = summary(found)
    lines += [f"not compared: {reason}" for reason in absent]
    return conclude(lines, missed, len(found), plan.device.name, began)


def _arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", action="append", type=int, help="rows; 13 sizes from 1 to 4096 if not given")
    parser.add_argument("--shape", action="append", default=[], help="shapes whose name holds this text")
    parser.add_argument("--quick", action="store_true", help=f"M = {', '.join(map(str, QUICK_ROWS))}")
    parser.add_argument("--out", type=Path, help="JSON; results/<device>/fp8.json for a whole run, none for a part")
    return parser.parse_args(words), parser


if __name__ == "__main__":
    sys.exit(main())
