"""The host's time of an eager `gemm` call, on this machine's GPU, beside that of torch's own linear.

    python benchmarks/gemm_host.py [--out FILE]

Calls of one row, by each implementation of the plan's ladders: a median over calls that never wait for the queue. Run
it on a machine that does nothing else. Exits 1 if an eager call takes more than 10 µs over `F.linear`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import bidispatch as bid
from bidispatch.environment import describe
from bidispatch.errors import BidispatchError
from bidispatch.ops.shapes import read_shapes

HERE = Path(__file__).parent
HOST_LIMIT_US = 10.0
HOST_SHAPES = ((256, 256), (4096, 4096))
HOST_CALLS, HOST_REPEATS = 200, 5


@dataclass(frozen=True)
class HostRow:
    """Host microseconds of one eager call at M = 1, and over `F.linear`. `judged`: whether the limit is for it."""

    call: str
    impl: str
    n: int
    k: int
    us: float
    over_linear_us: float
    judged: bool

    @property
    def missed(self) -> bool:
        return self.judged and self.over_linear_us > HOST_LIMIT_US


def summary(host: Sequence[HostRow]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    lines, missed = [], []
    for each in host:
        lines.append(
            f"{each.call} {each.n}x{each.k} {each.impl}: {each.us:.1f} µs, "
            f"{each.over_linear_us:+.1f} over F.linear" + (f" (at most {HOST_LIMIT_US:g})" if each.judged else "")
        )
        if each.missed:
            missed.append(lines[-1])
    return lines, missed


def host_us(call: Callable[[], Any], device: torch.device) -> float:
    """Host microseconds of one call: the median of those that find the queue short enough never to wait for it."""
    samples = []
    for _ in range(HOST_REPEATS):
        for _ in range(20):
            call()
        torch.cuda.synchronize(device)
        for _ in range(HOST_CALLS):
            began = time.perf_counter()
            call()
            samples.append(time.perf_counter() - began)
        torch.cuda.synchronize(device)
    return statistics.median(samples) * 1e6


def host_rows(plan: bid.Plan, implementations: Iterable[str], dtype: str = "bfloat16") -> list[HostRow]:
    """Eager calls at M = 1, by each implementation that serves some M of some ladder."""
    gc.disable()
    try:
        return [row for n, k in HOST_SHAPES for row in _host_rows_of(plan, tuple(implementations), dtype, n, k)]
    finally:
        gc.enable()


def _host_rows_of(plan: bid.Plan, implementations: Sequence[str], dtype: str, n: int, k: int) -> list[HostRow]:
    device = torch.device(plan.device.torch_device)
    x, weight = (torch.randn(size, k, device=device, dtype=getattr(torch, dtype)) for size in (1, n))
    out = torch.empty(1, n, device=device, dtype=x.dtype)
    linear = host_us(lambda: F.linear(x, weight), device)
    calls: list[tuple[str, str, float, bool]] = [("F.linear", "torch", linear, False)]
    for name in implementations:
        try:
            with bid.override(f"gemm={name}"):
                bound = plan.select("gemm", dtype=dtype, n=n, k=k).bind(max_tokens=64)
        except BidispatchError as error:
            print(f"host time of {name} at {n}x{k} not taken: {str(error).splitlines()[0]}")
            continue
        calls.append(("bound(x, weight)", name, host_us(lambda f=bound: f(x, weight, None), device), True))
        calls.append(("bound.launch", name, host_us(lambda f=bound.launch: f(x, weight, None, out), device), False))
    with bid.aten_overrides(plan):
        calls.append(("F.linear in aten_overrides", "", host_us(lambda: F.linear(x, weight), device), False))
    return [HostRow(call, impl, n, k, round(us, 2), round(us - linear, 2), judged) for call, impl, us, judged in calls]


def implementations_of(plan: bid.Plan, dtype: str = "bfloat16") -> list[str]:
    """Every implementation that serves some M of some shape of sweeps/gemm.yaml."""
    shapes = read_shapes(HERE / "sweeps" / "gemm.yaml")
    selections = [plan.select("gemm", dtype=dtype, **shape.dims) for shape in shapes]
    return list(dict.fromkeys(name for selection in selections for name in selection.implementations))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON; results/<device>/gemm_host.json if not given")
    arguments = parser.parse_args(words)
    plan = bid.plan("cuda")
    to = arguments.out or HERE / "results" / plan.device.slug / "gemm_host.json"
    torch.set_grad_enabled(False)
    host = host_rows(plan, implementations_of(plan))
    used = {rung.implementation for selection in plan.selections for rung in selection.rungs}
    content = {"environment": describe(plan.device, used), "host": [asdict(each) for each in host]}
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines, missed = summary(host)
    for line in (*lines, *(f"missed: {line}" for line in missed)):
        print(line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
