"""What an engine's scheduler did, step by step: chunks of prompts, prefix hits, mixed steps, preemption.

Reads the scheduler's output (vllm.v1.core.sched.output.SchedulerOutput, the same fields in 0.25.1, 0.29.0 and 0.33.0).
Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["HAPPENINGS", "Counters", "Steps"]

HAPPENINGS: Mapping[str, tuple[str, str]] = {
    "batches": ("requests shared a step", "--prompts 8 or more, --max-num-seqs 8 or more"),
    "chunking": (
        "a prompt was cut elsewhere than it was alone",
        "a longer --longest, a smaller --max-num-batched-tokens, or --engine-arg enable_chunked_prefill=true",
    ),
    "prefix": (
        "a prompt's beginning came from the prefix cache",
        "--engine-arg enable_prefix_caching=true; vLLM's mode switches it off for TRITON_MLA and FLASHINFER",
    ),
    "mixed": ("prompts and decoding tokens shared a step", "more --prompts, more --new-tokens"),
    "preemption": ("a running request was preempted and served again", "more --new-tokens, more --prompts"),
    "graphs": ("a step replayed a CUDA graph", "leave out --engine-arg enforce_eager=true"),
}
"""What must have happened for a check to prove anything: in words, and what makes it happen."""


@dataclass(slots=True)
class Counters:
    """Counts over all steps."""

    steps: int = 0
    most_requests: int = 0
    """In one step."""
    prefill_steps: int = 0
    decode_steps: int = 0
    mixed_steps: int = 0
    chunks: int = 0
    """Parts of prompts that are not whole prompts."""
    cut_elsewhere: int = 0
    """Requests whose prompts were cut elsewhere than they were alone."""
    prefix_hits: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    """Requests that were scheduled anew after they had run."""
    graph_replays: int = 0
    full_graph_steps: int = 0
    """Calls of the engine that replayed one graph."""
    piecewise_graph_steps: int = 0
    """Calls of the engine that replayed more than one."""

    def happened(self) -> dict[str, int]:
        """Each of `HAPPENINGS`, and how often."""
        return {
            "batches": self.most_requests if self.most_requests > 1 else 0,
            "chunking": self.cut_elsewhere,
            "prefix": self.prefix_hits,
            "mixed": self.mixed_steps,
            "preemption": self.preemptions,
            "graphs": self.graph_replays,
        }

    def missing(self, excused: frozenset[str] = frozenset()) -> dict[str, str]:
        """What did not happen though it must: in words, with what makes it happen."""
        return {
            name: f"it never happened that {HAPPENINGS[name][0]}; to make it happen: {HAPPENINGS[name][1]}"
            for name, times in self.happened().items()
            if not times and name not in excused
        }

    def as_json(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


@dataclass(slots=True)
class Steps:
    """Watches a scheduler: `saw` takes each of its outputs, `replayed` the graphs of each call of the engine."""

    counters: Counters = field(default_factory=Counters)
    _prompts: dict[str, int] = field(default_factory=dict)
    _chunks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, request: str, prompt: int) -> None:
        """A request is about to be served. prompt: its length in tokens."""
        self._prompts[request] = prompt
        self._chunks[request] = []

    def chunks_of(self, request: str) -> tuple[tuple[int, int], ...]:
        """Which positions of its prompt were computed together, those taken from the cache left out."""
        return tuple(self._chunks[request])

    def saw(self, output: Any) -> None:
        """One step. output: vLLM's SchedulerOutput."""
        tokens: Mapping[str, int] = output.num_scheduled_tokens
        if not tokens:
            return
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        again = set(cached.resumed_req_ids)
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            name = self._name(new.req_id)
            # The second model runner gets resumed requests as new ones.
            if name is not None and self._chunks[name]:
                again.add(new.req_id)
            elif new.num_computed_tokens:
                self.counters.prefix_hits += 1
                self.counters.prefix_tokens += new.num_computed_tokens
        self.counters.preemptions += len(again)
        prefills = decodes = 0
        for full_name, count in tokens.items():
            name = self._name(full_name)
            if name is None or full_name not in computed:
                continue
            start = computed[full_name]
            length = self._prompts[name]
            if start >= length and full_name not in again:
                decodes += 1
                continue
            prefills += 1
            end = min(start + count, length)
            if start < length and full_name not in again:
                self.counters.chunks += start > 0 or end < length
                self._chunks[name].append((start, end))
        self.counters.steps += 1
        self.counters.most_requests = max(self.counters.most_requests, len(tokens))
        self.counters.prefill_steps += prefills > 0
        self.counters.decode_steps += prefills == 0 and decodes > 0
        self.counters.mixed_steps += prefills > 0 and decodes > 0

    def replayed(self, graphs: int) -> None:
        """A call of the engine replayed so many CUDA graphs."""
        self.counters.graph_replays += graphs
        self.counters.full_graph_steps += graphs == 1
        self.counters.piecewise_graph_steps += graphs > 1

    def _name(self, full_name: str) -> str | None:
        """Ours of a scheduler's request: vLLM adds random characters after a dash."""
        if full_name in self._prompts:
            return full_name
        name = full_name.rpartition("-")[0]
        return name if name in self._prompts else None
