"""Row ops against plain torch and a copy of the same bytes: norms, activations, softmax, reductions.

    python benchmarks/rows.py [--out FILE] [--ops OP ...] [--rows M ...]
    python benchmarks/rows.py --try [--ops OP ...]

The first times what a plan selects on this GPU, writes JSON and prints a table, worst first. `bytes` is what an op must
read and write once; the copy beside it moves as many. The second times launch shapes around those of the ladders
and prints the best for each op, size and M; where blocks and chunks are tried too, these are other classes of bits. It
writes nothing.

CUDA graphs, operands rotated through more than the L2 (calls of few rows do not fill it), rivals interleaved, medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.timing import Launch, copies_beyond_cache, interleaved
from bidispatch.environment import describe
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Rung, default_registry
from bidispatch.runtime.arguments import output_shape, tensor_specs
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits

ROWS = (1, 4, 16, 64, 256, 2048, 8192)
HEADS = {"num_heads": 32, "num_kv_heads": 8}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("rms_norm", "bfloat16", {"n": n}) for n in (2048, 4096, 8192)),
    *(("fused_add_rms_norm", "bfloat16", {"n": n}) for n in (2048, 4096, 8192)),
    ("qk_norm", "bfloat16", {"head_dim": 128, **HEADS}),
    *(("silu_and_mul", "bfloat16", {"n": n}) for n in (6144, 12288, 25600)),
    *(("quantize.fp8_group", "bfloat16", {"k": k}) for k in (2048, 4096, 7168, 12288)),
    ("quantize.fp8_group", "bfloat16", {"k": 7168, "scale_format": "ue8m0"}),
    *(("silu_and_mul.fp8_group", "bfloat16", {"n": n}) for n in (2048, 12288, 18432)),
    *(("rms_norm.fp8_group", "bfloat16", {"n": n}) for n in (4096, 7168)),
    *(("fused_add_rms_norm.fp8_group", "bfloat16", {"n": n}) for n in (4096, 7168)),
    ("gelu_tanh_and_mul", "bfloat16", {"n": 12288}),
    *(("softmax", dtype, {"n": 4096, "out_dtype": "float32"}) for dtype in ("bfloat16", "float32")),
    *(("softmax", dtype, {"n": 151936, "out_dtype": "float32"}) for dtype in ("bfloat16", "float32")),
    *(("log_softmax", dtype, {"n": 4096, "out_dtype": "float32"}) for dtype in ("bfloat16", "float32")),
    *(("log_softmax", dtype, {"n": 151936, "out_dtype": "float32"}) for dtype in ("bfloat16", "float32")),
    *(("token_logprob", dtype, {"n": 151936}) for dtype in ("bfloat16", "float32")),
    *(("mean", dtype, {"n": 4096}) for dtype in ("bfloat16", "float32")),
)
MOST_BYTES = 8 << 30
"""Of one set of operands: larger batches are left out."""
BYTES_A_US = 3.0e6
"""About what a GPU's memory moves in a microsecond, to tell long launches from short ones."""
MOST_SETS = 64
ALIGNMENT = 512
"""Bytes that a copy's size is rounded up to."""

TRIED = (
    ("rms_norm", "bfloat16", {"n": 4096}),
    ("rms_norm", "bfloat16", {"n": 8192}),
    ("fused_add_rms_norm", "bfloat16", {"n": 4096}),
    ("qk_norm", "bfloat16", {"head_dim": 128, **HEADS}),
    ("mean", "bfloat16", {"n": 4096}),
    ("silu_and_mul", "bfloat16", {"n": 12288}),
    ("quantize.fp8_group", "bfloat16", {"k": 7168}),
    ("silu_and_mul.fp8_group", "bfloat16", {"n": 12288}),
    ("rms_norm.fp8_group", "bfloat16", {"n": 4096}),
    ("softmax", "bfloat16", {"n": 4096, "out_dtype": "float32"}),
    ("log_softmax", "bfloat16", {"n": 151936, "out_dtype": "float32"}),
    ("token_logprob", "bfloat16", {"n": 151936}),
)
TRIED_ROWS = (1, 64, 2048, 8192)
TRIED_REPLAYS = 4
ELEMENTS_A_THREAD = (8, 64)
"""Fewer leave no 16-byte load, more no registers."""
MOST_ELEMENTS = 8192
"""Of a program with several rows."""


@dataclass(frozen=True)
class Row:
    """One op at one M. Times in microseconds; `peers` by name."""

    op: str
    dtype: str
    n: int
    m: int
    bytes: int
    copy_us: float
    ours_us: float
    impl: str
    peers: dict[str, float]
    numerics: str
    dims: dict[str, Any] = field(default_factory=dict)

    @property
    def of_copy(self) -> float:
        """Our share of the copy's speed."""
        return self.copy_us / self.ours_us

    @property
    def of_torch(self) -> float:
        """torch's time over ours: above 1 is faster."""
        return self.peers["torch"] / self.ours_us


class Operands:
    """As many sets of one call's tensors as exceed the cache, and what runs on them."""

    def __init__(self, problem: Problem, m: int, device: torch.device) -> None:
        self.problem, self.m = problem, m
        op = ops.get(problem.op)
        first = load_attribute(op.inputs)(problem, m, device=device)
        self.scalars = tuple(scalar.default_for(problem) for scalar in op.scalars)
        specs = tensor_specs(op.outputs, problem)
        shapes = [(output_shape(spec, {"m": m}), spec.dtype) for spec in specs]
        per_row = [tensor for tensor, entry in zip(first, op.arguments, strict=True) if "m" in entry.shape]
        outputs = self._outputs(shapes, device)
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*per_row, *outputs))
        count = copies_beyond_cache(self.bytes, device, most=MOST_SETS)
        self.sets = [(first, outputs)]
        for _ in range(count - 1):
            copies = [
                self._like(tensor) if "m" in entry.shape else tensor
                for tensor, entry in zip(first, op.arguments, strict=True)
            ]
            self.sets.append((copies, self._outputs(shapes, device)))
        half = -(-self.bytes // 2 // ALIGNMENT) * ALIGNMENT
        self._copies = torch.empty(count, 2, half, dtype=torch.uint8, device=device)

    @staticmethod
    def _outputs(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]

    @staticmethod
    def _like(tensor: torch.Tensor) -> torch.Tensor:
        """A copy with the same strides: heads are slices of wider rows."""
        if tensor.is_contiguous():
            return tensor.clone()
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return copy.copy_(tensor)

    @property
    def estimate_us(self) -> float:
        return self.bytes / BYTES_A_US

    def kernel(self, launch: Callable[..., None]) -> Launch:
        def run(i: int) -> None:
            arguments, outputs = self.sets[i % len(self.sets)]
            launch(*arguments, *self.scalars, *outputs)

        return run

    def stock(self) -> Launch:
        """Plain torch, which allocates its results, in a graph from the graph's own memory."""
        function = load_attribute(ops.get(self.problem.op).stock)

        def run(i: int) -> None:
            function(self.problem, *self.sets[i % len(self.sets)][0], *self.scalars)

        return run

    def copy(self) -> Launch:
        def run(i: int) -> None:
            source, target = self._copies[i % len(self._copies)]
            target.copy_(source, non_blocking=True)

        return run


def width_of(problem: Problem) -> int:
    return next(problem.size(dim) for dim in ("n", "head_dim", "k") if dim in problem.dims)


def calls(problem: Problem, counts: Sequence[int], device: torch.device) -> Iterator[Operands]:
    """The operands of each M that fits, one at a time."""
    elements = sum(value for name, value in problem.dims.items() if name.startswith("num_"))
    for m in counts:
        if m * width_of(problem) * max(1, elements) * 6 <= MOST_BYTES:
            yield Operands(problem, m, device)
        torch.cuda.empty_cache()


def measure(plan: bid.Plan, chosen: Sequence[str], counts: Sequence[int], say: Callable[[str], None]) -> list[Row]:
    """Every case: the plan's kernel, plain torch, a copy."""
    device = torch.device(plan.device.torch_device)
    rows = []
    for name, dtype, dims in CASES:
        if chosen and name not in chosen:
            continue
        problem = ops.get(name).problem(dtype, dims)
        selection = plan.select_problem(problem)
        kernel = selection.bind(max_tokens=max(counts))
        for operands in calls(problem, counts, device):
            rivals = {"ours": operands.kernel(kernel.launch), "torch": operands.stock(), "copy": operands.copy()}
            timed = interleaved(rivals, operand_sets=len(operands.sets), estimate_us=operands.estimate_us)
            row = Row(
                op=name,
                dtype=dtype,
                n=width_of(problem),
                m=operands.m,
                bytes=operands.bytes,
                copy_us=round(timed["copy"].median_us, 3),
                ours_us=round(timed["ours"].median_us, 3),
                impl=selection.rungs[0].implementation.name,
                peers={"torch": round(timed["torch"].median_us, 3)},
                numerics=selection.numerics,
                dims=dict(problem.dims),
            )
            rows.append(row)
            say(f"{problem} m={row.m}: {row.ours_us:.2f} us, torch {row.peers['torch']:.2f}, copy {row.copy_us:.2f}")
    return rows


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Share of the copy's speed for large M, speed against torch for small M; worst first."""
    columns = ("op", "dtype", "n", "M", "us", "copy us", "% of copy", "torch us", "torch / ours")
    table = Table(*columns, title=title)
    for row in sorted(rows, key=lambda row: row.of_copy if row.m >= 2048 else row.of_torch):
        table.add_row(
            row.op,
            ops.schema.DTYPES[row.dtype],
            str(row.n),
            str(row.m),
            f"{row.ours_us:.2f}",
            f"{row.copy_us:.2f}",
            f"{100 * row.of_copy:.0f}",
            f"{row.peers['torch']:.2f}",
            f"{row.of_torch:.2f}",
        )
    return table


# -- trying launch shapes ------------------------------------------------------------------------------------------


def candidates(problem: Problem) -> Iterator[tuple[Any, Any]]:
    """(params, tile) around the ladders of the problem's Triton kernel: small enough to compile in seconds."""
    found = triton_kernel(problem)
    tile, params = found.tile, found.params
    if tile is None:
        return
    if "block" in tile.model_fields:
        for block, warps in itertools.product((256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
            if 8 <= block // (32 * warps) <= 32:
                yield params(), tile(block=block, num_warps=warps)
        return
    chunks = (4096, 8192, 16384) if "chunk" in params.model_fields and width_of(problem) > 16384 else (None,)
    for chunk in chunks:
        made = params() if chunk is None else params(chunk=chunk)
        width = chunk or 1 << (width_of(problem) - 1).bit_length()
        for rows, warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
            if not _sensible(rows, warps, width, several=chunk is None):
                continue
            for joint in (True, False) if chunk and problem.op != "token_logprob" else (None,):
                sizes = {} if joint is None else {"joint": joint}
                yield made, tile(rows=rows, num_warps=warps, **sizes)


def _sensible(rows: int, warps: int, width: int, *, several: bool) -> bool:
    """Whether a shape is worth its compilation. `several`: whether a program may have several rows."""
    if rows > 1 and (not several or rows * width > MOST_ELEMENTS):
        return False
    if (rows, warps) == (1, 1) and width <= 512:
        return True  # the smallest there is, though its threads may have less than a 16-byte load each
    low, high = ELEMENTS_A_THREAD
    return low <= rows * width // (32 * warps) <= high


def triton_kernel(problem: Problem) -> Implementation:
    (found,) = (i for i in default_registry().for_op(problem.op) if i.backend == "triton")
    return found


def try_shapes(plan: bid.Plan, chosen: Sequence[str], say: Callable[[str], None]) -> Table:
    """Time every candidate; the best of each op, size and M, with the two after it and what the ladder has."""
    device = torch.device(plan.device.torch_device)
    table = Table(
        "op", "n", "M", "copy us", "ladder us", "best us", "best", "then", title=f"shapes, {plan.device.name}"
    )
    for name, dtype, dims in TRIED:
        if chosen and name not in chosen:
            continue
        problem = ops.get(name).problem(dtype, dims)
        limits = Limits(max(TRIED_ROWS))
        found = triton_kernel(problem)
        kernels = {"ladder": plan.select_problem(problem).bind(max_tokens=limits.max_tokens).launch}
        for params, tile in candidates(problem):
            label = " ".join([*(f"{k}={v}" for k, v in params if k != "block"), str(tile)])
            kernels[label] = bind(problem, plan.device, (Rung(found, params, tile),), limits).launch
        for operands in calls(problem, TRIED_ROWS, device):
            rivals = {label: operands.kernel(launch) for label, launch in kernels.items()}
            rivals["copy"] = operands.copy()
            timed = interleaved(
                rivals, operand_sets=len(operands.sets), replays=TRIED_REPLAYS, estimate_us=operands.estimate_us
            )
            times = {label: timing.median_us for label, timing in timed.items()}
            copy, ladder = times.pop("copy"), times.pop("ladder")
            ranked = sorted(times, key=lambda label: times[label])
            then = "; ".join(f"{label} {times[label]:.2f}" for label in ranked[1:3])
            cells = (f"{copy:.2f}", f"{ladder:.2f}", f"{times[ranked[0]]:.2f}", ranked[0], then)
            table.add_row(name, str(width_of(problem)), str(operands.m), *cells)
            say(f"{problem} m={operands.m}: copy {copy:.2f}, ladder {ladder:.2f}")
            for label in ranked:
                say(f"    {times[label]:9.2f}  {label}")
    return table


def main() -> int:
    plan = bid.plan("auto")
    slug = plan.device.slug
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / slug / "rows.json")
    parser.add_argument("--ops", nargs="*", default=[], help="only these")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), metavar="M", help="only these batch sizes")
    parser.add_argument("--try", action="store_true", dest="attempt", help="time launch shapes instead")
    arguments = parser.parse_args()
    console = Console(width=200)
    if plan.device.arch.vendor == "cpu":
        console.print("no GPU here: these are timings of GPU kernels")
        return 3

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    torch.set_grad_enabled(False)
    if arguments.attempt:
        console.print(try_shapes(plan, arguments.ops, say))
        return 0
    rows = measure(plan, arguments.ops, arguments.rows, say)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    used = {triton_kernel(ops.get(row.op).problem(row.dtype, row.dims)) for row in rows}
    content = {"environment": describe(plan.device, used), "rows": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(table_of(rows, f"row ops, {plan.device.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
