"""What benchmarks/attention.py measured, against the figures it is to reach. Needs no GPU.

- decode: ours beside the faster of FA3's and FlashInfer's own choice. Level `batch`: geometric mean at most 1.00, no
  cell above 1.15; level `sequence`: 1.03 and 1.20.
- decode of one sequence of 32k positions and more: FA3 with num_splits=1 takes at least 5 times as long, 3.5 times
  with one query head a KV head.
- prefill: at most 1.05 times FA3 at level `batch`; at level `sequence` at most 1.5 times, and faster than vLLM's Triton
  attention in invariant mode. In every cell.
- MLA decode: geometric mean at most 1.10 times FlashMLA's default schedule at level `batch`.
- MLA prefill: the price of the absorbed form, beside FA3 on keys and values that are projected up. Not judged.

A figure whose peers are not there is not judged, and named.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "FA3_AUTO",
    "FA3_LATENT",
    "FA3_ONE",
    "FA3_PROJECTED",
    "FLASHINFER",
    "FLASH_MLA",
    "PHASES",
    "PREFILLS",
    "VLLM_TRITON",
    "Row",
    "summary",
]

PHASES = ("decode", "prefill", "mla", "mla_prefill")
PREFILLS = ("prefill", "mla_prefill")
"""Those of whole prompts."""
FA3_AUTO, FA3_ONE, FA2_ONE, FA3_PROJECTED = "fa3_auto", "fa3_1", "fa2_1", "fa3_projected"
FA3_LATENT = "fa3_latent_auto"
"""FA3 with q_v, as vLLM's backend FLASH_ATTN_MLA."""
FLASHINFER, VLLM_TRITON, FLASH_MLA = "flashinfer_auto", "vllm_triton", "flash_mla"
LEVELS = ("batch", "sequence")

DECODE_MEAN = {"batch": 1.00, "sequence": 1.03}
DECODE_CELL = {"batch": 1.15, "sequence": 1.20}
LONG_CONTEXT, LONG_FASTER, LONG_FASTER_ALONE = 32768, 5.0, 3.5
PREFILL_CELL = {"batch": 1.05, "sequence": 1.5}
MLA_MEAN = 1.10
WORST = 10
"""Cells that are listed."""


@dataclass(frozen=True)
class Row:
    """One cell at one level: microseconds of a call, of each peer's, and of the bound by the device's peaks."""

    op: str
    phase: str
    dtype: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    floor_us: float
    ours_us: float
    impl: str
    level: str
    peers: Mapping[str, float] = field(default_factory=dict)

    def fastest(self, *names: str) -> float | None:
        """The least time of these peers; None where none of them was there."""
        return min((self.peers[name] for name in names if name in self.peers), default=None)

    def over(self, *names: str) -> float | None:
        """Our time as a part of the fastest of these peers'."""
        stock = self.fastest(*names)
        return None if stock is None else self.ours_us / stock

    def __str__(self) -> str:
        peers = ", ".join(f"{name} {time:.1f}" for name, time in self.peers.items())
        return (
            f"{self.phase} {self.heads}/{self.kv_heads}x{self.head_dim} batch {self.batch} context {self.context} "
            f"{self.level}: ours {self.ours_us:.1f} µs, floor {self.floor_us:.1f}, {peers or 'no peer'}; {self.impl}"
        )


class _Judgement:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.missed: list[str] = []

    def at_most(self, text: str, value: float, limit: float) -> None:
        self.lines.append(f"{text}: {value:.3f} (at most {limit:.2f})")
        if value > limit:
            self.missed.append(self.lines[-1])

    def cells(self, text: str, rows: Sequence[Row], ratio: Callable[[Row], float], limit: float) -> None:
        """Judge each cell: its ratio may not be above the limit."""
        worst = sorted(rows, key=lambda row: -ratio(row))
        over = [row for row in worst if ratio(row) > limit]
        self.lines.append(f"{text}: worst {ratio(worst[0]):.3f} (at most {limit:.2f}), {len(over)} cells over it")
        self.lines += [f"    {ratio(row):.3f} {row}" for row in worst[:WORST]]
        self.missed += [f"{text}: {ratio(row):.3f} {row}" for row in over]

    def absent(self, text: str) -> None:
        self.lines.append(f"{text}: not judged, no such peer was there")


def summary(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    judged = _Judgement()
    for level in LEVELS:
        _decode(judged, level, [row for row in rows if row.phase == "decode" and row.level == level])
        _prefill(judged, level, [row for row in rows if row.phase == "prefill" and row.level == level])
        _mla(judged, level, [row for row in rows if row.phase == "mla" and row.level == level])
        _mla_prefill(judged, level, [row for row in rows if row.phase == "mla_prefill" and row.level == level])
    return judged.lines, judged.missed


def _with(rows: Sequence[Row], *names: str) -> list[Row]:
    return [row for row in rows if row.fastest(*names) is not None]


def _ratio(*names: str) -> Callable[[Row], float]:
    return lambda row: row.ours_us / min(row.peers[name] for name in names if name in row.peers)


def _decode(judged: _Judgement, level: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    stock = (FA3_AUTO, FLASHINFER)
    cells = _with(rows, *stock)
    there = " and ".join(name for name in stock if any(name in row.peers for row in rows))
    text = f"decode, level {level}: ours / the fastest of {there or ' and '.join(stock)}"
    if cells:
        ratio = _ratio(*stock)
        judged.at_most(f"{text}, geometric mean of {len(cells)} cells", _mean(cells, ratio), DECODE_MEAN[level])
        judged.cells(f"{text}, cells", cells, ratio, DECODE_CELL[level])
    else:
        judged.absent(text)
    _long(judged, level, [row for row in rows if row.batch == 1 and row.context >= LONG_CONTEXT])


def _long(judged: _Judgement, level: str, rows: Sequence[Row]) -> None:
    text = f"decode, level {level}, one sequence of 32k and more: ours / {FA3_ONE}"
    for alone, factor in ((False, LONG_FASTER), (True, LONG_FASTER_ALONE)):
        some = [row for row in rows if (row.heads == row.kv_heads) is alone]
        cells = _with(some, FA3_ONE)
        heads = "one head a KV head" if alone else "grouped heads"
        if cells:
            judged.cells(f"{text}, {heads}", cells, _ratio(FA3_ONE), 1 / factor)
        elif some:
            judged.absent(f"{text}, {heads}")


def _prefill(judged: _Judgement, level: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    limits = [(FA3_AUTO, PREFILL_CELL[level])]
    if level == "sequence":
        limits.append((VLLM_TRITON, 1.0))
    for name, limit in limits:
        text = f"prefill, level {level}: ours / {name}"
        if cells := _with(rows, name):
            judged.lines.append(f"{text}, geometric mean of {len(cells)} cells: {_mean(cells, _ratio(name)):.3f}")
            judged.cells(f"{text}, cells", cells, _ratio(name), limit)
        else:
            judged.absent(text)


def _mla(judged: _Judgement, level: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    text = f"MLA decode, level {level}: ours / {FLASH_MLA}"
    cells = _with(rows, FLASH_MLA)
    if not cells:
        judged.absent(text)
    elif level == "batch":
        judged.at_most(f"{text}, geometric mean of {len(cells)} cells", _mean(cells, _ratio(FLASH_MLA)), MLA_MEAN)
    else:
        judged.lines.append(f"{text}, geometric mean of {len(cells)} cells: {_mean(cells, _ratio(FLASH_MLA)):.3f}")


def _mla_prefill(judged: _Judgement, level: str, rows: Sequence[Row]) -> None:
    text = f"MLA prefill, level {level}: ours / {FA3_PROJECTED}"
    if cells := _with(rows, FA3_PROJECTED):
        mean = _mean(cells, _ratio(FA3_PROJECTED))
        judged.lines.append(f"{text}, geometric mean of {len(cells)} cells: {mean:.3f}")
    elif rows:
        judged.absent(text)


def _mean(rows: Sequence[Row], ratio: Callable[[Row], float]) -> float:
    return statistics.geometric_mean(ratio(row) for row in rows)
