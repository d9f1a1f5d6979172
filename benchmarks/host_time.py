"""Host time: what importing, planning, choosing a rung and checking arguments cost, against the limits we set.

    python benchmarks/host_time.py [--out FILE]

Prints a table, writes JSON, and exits 1 if a figure is over its limit. Needs torch and no GPU: everything measured
happens on the host, and the argument checks read sizes only, so tensors of any device cost the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.environment import describe
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Params, Rung
from bidispatch.runtime.arguments import check_tensors, tensor_specs
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import Limits

PROCESSES = 15
"""How many processes each import and planning figure is the median of."""
REPEATS, CALLS = 201, 1000
"""A time a call is the least of REPEATS means over CALLS calls: what else runs on the host only ever adds."""
CPU = Device(ARCHS["cpu"], "cpu")
TORCH_CPU = torch.device("cpu")

PLAN = """
import time
start = time.perf_counter()
import bidispatch as bid
imported = time.perf_counter()
times = []
for _ in range(6):
    began = time.perf_counter()
    bid.plan("sm103").select("gemm", dtype="bfloat16", n=4096, k=4096)
    times.append(time.perf_counter() - began)
print(imported - start, times[0], sorted(times[1:])[2])
"""


@dataclass(frozen=True)
class Row:
    """One figure. `limit` None: measured for comparison only."""

    figure: str
    limit: float | None
    measured: float
    unit: str

    @property
    def missed(self) -> bool:
        return self.limit is not None and self.measured > self.limit


def process_rows() -> list[Row]:
    """Import and planning, each process fresh; the files are in the page cache after the first."""
    samples = [_run_plan() for _ in range(PROCESSES + 1)][1:]
    imported, first, later = (statistics.median(column) * 1e3 for column in zip(*samples, strict=True))
    torch_imported = subprocess.run(
        [sys.executable, "-c", "import sys, bidispatch; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return [
        Row("import bidispatch", 60, imported, "ms"),
        Row("  torch imported by it (0 no, 1 yes)", 0, float(torch_imported == "True"), ""),
        Row("first plan, one selection", 300, first, "ms"),
        Row("later plans, one selection", 50, later, "ms"),
    ]


def _run_plan() -> tuple[float, ...]:
    # With compiled modules, as an installed package has them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, check=True, env=environment)
    return tuple(float(word) for word in done.stdout.split())


def microseconds(call: Callable[[], Any]) -> float:
    """The time of one call, less that of calling an empty function in the same way."""
    for_nothing = min(timeit.repeat(lambda: None, number=CALLS, repeat=REPEATS))
    spent = min(timeit.repeat(call, number=CALLS, repeat=REPEATS))
    return (spent - for_nothing) / CALLS * 1e6


def kernel(*arguments: Any) -> None:
    """Stands for a kernel's launch, which costs nothing here, so that what is around it shows."""


def bound(problem: Problem, rungs: int) -> BoundKernel:
    implementation = Implementation(
        f"bench.{problem.op}", problem.op, "", ("*",), (problem.dtype,), lambda params, problem: ""
    )
    ladder = [Rung(implementation, Params(), None, 16 << i if i < rungs - 1 else None) for i in range(rungs)]
    return BoundKernel(ops.get(problem.op), problem, CPU, ladder, [kernel] * rungs, Limits(8192, 256, 8192, 8192))


def call_rows(problem: Problem, arguments: tuple[Any, ...], out: torch.Tensor) -> list[Row]:
    """Argument checks and the rung, for one op. `out` is given, as an engine does."""
    op = ops.get(problem.op)
    ladder = bound(problem, 5)
    everything = (*arguments, *(scalar.default_for(problem) for scalar in op.scalars), out)
    specs = tensor_specs((*op.arguments, *op.outputs), problem)
    tensors = (*arguments, out)

    bare = microseconds(lambda: kernel(*everything))
    launched = microseconds(lambda: ladder.launch(*everything))
    checked = microseconds(lambda: check_tensors(problem, specs, tensors, TORCH_CPU))
    called = microseconds(lambda: ladder(*arguments, out=out))
    return [
        Row(f"{op.name}: choosing among 5 rungs and calling", 1, launched - bare, "µs"),
        Row(f"{op.name}: argument checks", 5, checked, "µs"),
        Row(f"{op.name}: whole checked call, kernel not counted", None, called - bare, "µs"),
    ]


def rows() -> list[Row]:
    torch.set_grad_enabled(False)
    gemm = ops.get("gemm").typical("bfloat16")
    n, k = gemm.size("n"), gemm.size("k")
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((64, k), (n, k), (64, n)))
    attention = ops.get("attention").typical("bfloat16")
    heads, kv_heads, width = (attention.size(name) for name in ("num_heads", "num_kv_heads", "head_dim"))
    q = torch.zeros(64, heads, width, dtype=torch.bfloat16)
    cache = torch.zeros(32, attention.size("page_size"), kv_heads, width, dtype=torch.bfloat16)
    lens, starts = torch.zeros(64, dtype=torch.int32), torch.zeros(65, dtype=torch.int32)
    table = torch.zeros(64, 512, dtype=torch.int32)
    return [
        *process_rows(),
        *call_rows(gemm, (x, weight, None), out),
        *call_rows(attention, (q, cache, cache, table, lens, starts, None, None, None, None), torch.empty_like(q)),
    ]


def main() -> int:
    device = Device.detect()
    slug = device.slug
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / slug / "host_time.json")
    arguments = parser.parse_args()

    measured = rows()
    table = Table("figure", "limit", "measured", title=f"host time, torch {torch.__version__}, {device.name}")
    for row in measured:
        limit = "" if row.limit is None else f"{row.limit:g} {row.unit}"
        color = "red" if row.missed else "default"
        table.add_row(row.figure, limit, f"[{color}]{row.measured:.2f} {row.unit}[/]")
    Console().print(table)
    environment = {**describe(device, ()), "libraries": {"torch": torch.__version__}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "rows": [asdict(row) for row in measured]}
    arguments.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any(row.missed for row in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
