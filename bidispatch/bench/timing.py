"""The timing protocol: CUDA-graph replay over operands that together exceed the L2, rivals interleaved, medians.

Imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Captures", "Launch", "Timing", "copies_beyond_cache", "interleaved", "launches_for"]

Launch = Callable[[int], None]
"""`launch(i)` runs a kernel once, on the i-th set of operands (modulo how many there are). No allocation, no sync."""

_LAUNCHES = 24
"""Launches a graph holds, at least, where they are short: its own start is then a small part of what is timed."""
_GRAPH_US = 4000.0
"""About the longest graph made of launches that need no repeating."""
_REPLAYS = (3, 11)
"""The fewest and the most replays that are timed."""
_TIMED_US = 20_000.0
"""About the time given to one rival: what takes longer is replayed less, down to the fewest."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds a launch: the median over replays, and the least and the most."""

    median_us: float
    least_us: float
    most_us: float

    @property
    def spread(self) -> float:
        """(most - least) / median."""
        return (self.most_us - self.least_us) / self.median_us


def copies_beyond_cache(bytes_of_one: int, device: torch.device, most: int = 32) -> int:
    """How many sets of operands exceed three times the L2 together, so that none is found there when it comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, -(-3 * cache // max(1, bytes_of_one))))


def launches_for(operand_sets: int, estimate_us: float) -> int:
    """Launches of one graph: every operand set once, and short ones often. estimate_us: 0 if not known."""
    often = _LAUNCHES if estimate_us <= 0 else min(_LAUNCHES, int(_GRAPH_US // estimate_us))
    return max(1, operand_sets, often)


def interleaved(
    rivals: Mapping[str, Launch], *, operand_sets: int = 1, replays: int | None = None, estimate_us: float = 0.0
) -> dict[str, Timing]:
    """Time rivals against each other: a graph each, replayed in turns, so that all see the same clocks and heat.

    operand_sets: how many sets the launches rotate over. estimate_us: about how long a launch takes, 0 if not known;
    long ones are repeated less. replays: how often each graph is timed; by default as often as a fiftieth of a second
    allows, and at least three times.
    """
    return Captures(rivals).timed(launches_for(operand_sets, estimate_us), replays=replays)


class Captures:
    """Rivals whose graphs are kept, to be replayed with operands that change in place, as a server does at every step.

    A graph is captured when a number of launches is first asked for, with the operands as they are then: they must be
    the largest, where a kernel or its launch follows from sizes that the host sees.
    """

    def __init__(self, rivals: Mapping[str, Launch]) -> None:
        self._rivals = dict(rivals)
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}

    def capture(self, launches: int) -> None:
        """Capture a graph of so many launches for every rival that has none yet."""
        for name, launch in self._rivals.items():
            if (name, launches) not in self._graphs:
                self._graphs[name, launches] = _captured(launch, launches)

    def timed(self, launches: int, *, replays: int | None = None) -> dict[str, Timing]:
        """Replay the graphs of so many launches in turns; `replays` as in `interleaved`."""
        self.capture(launches)
        graphs = {name: self._graphs[name, launches] for name in self._rivals}
        longest = max(_replay_us(graph) for graph in graphs.values())  # also brings up clocks and caches
        fewest, most = _REPLAYS
        times = max(fewest, min(most, int(_TIMED_US / longest))) if replays is None else replays
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(times):
            for name, graph in graphs.items():
                samples[name].append(_replay_us(graph) / launches)
        return {name: _summary(values) for name, values in samples.items()}


def _captured(launch: Launch, launches: int) -> torch.cuda.CUDAGraph:
    """The graph of so many launches. Captured by hand: torch's own context collects garbage each time, which takes
    longer than most of what is timed here.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)  # kernels compile and load here, which a capture does not allow
        stream.synchronize()
        graph.capture_begin()
        try:
            for i in range(launches):
                launch(i)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _summary(values: Sequence[float]) -> Timing:
    return Timing(statistics.median(values), min(values), max(values))
