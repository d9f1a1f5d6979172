"""What the scripts here share: peaks, the environment of a run, shapes by name, what a rung runs, how a run ends."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import bidispatch as bid
from bidispatch.bench.timing import interleaved, launches_for
from bidispatch.environment import describe
from bidispatch.ops.shapes import Shape, read_shapes
from bidispatch.registry import Implementation, Rung
from bidispatch.requirements import installed_version

HERE = Path(__file__).parent
SWEEPS = HERE / "sweeps"

# The vendor's figures: FLOP/s by dtype, and bytes/s.
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float8_e4m3fn": 1979e12}
PEAKS: Mapping[str, tuple[Mapping[str, float], float]] = {
    r"NVIDIA H100 80GB HBM3": (_HOPPER, 3.35e12),
    r"NVIDIA H200( SXM)?": (_HOPPER, 4.8e12),
}


def peaks_of(device_name: str) -> tuple[Mapping[str, float], float] | None:
    """The vendor's figures for a device; None where they are not known here."""
    return next((known for pattern, known in PEAKS.items() if re.fullmatch(pattern, device_name)), None)


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


def used_by(plans: Iterable[bid.Plan]) -> set[Implementation]:
    """What the ladders that plans selected are made of."""
    return {rung.implementation for plan in plans for chosen in plan.selections for rung in chosen.rungs}


def save(to: Path, described: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """Write the JSON of a run: what it holds for, and its rows, which are dataclasses."""
    content = {"environment": described, "rows": [asdict(row) for row in rows]}
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def conclude(lines: Iterable[str], missed: Sequence[str], cells: int, device: str, began: float) -> int:
    """Print what a run found, and the figures it missed; the exit code. began: of `time.monotonic`, seconds."""
    for line in lines:
        print(line)
    print(f"{cells} cells on {device} in {time.monotonic() - began:.0f} s; {len(missed)} figures missed")
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0
