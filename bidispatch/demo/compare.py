"""Each request served alone against the same request served among the others: how far its logprobs move."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from bidispatch.demo.config import ModelConfig
from bidispatch.demo.engine import Activity, Engine, Observer
from bidispatch.demo.kernels import Kernels
from bidispatch.demo.scheduler import Request
from bidispatch.demo.weights import Weights
from bidispatch.demo.workload import Workload
from bidispatch.errors import UsageError

__all__ = ["Comparison", "Difference", "Progress", "Result", "run"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)`` with tokens generated, phase by phase: `warm-up` (GPUs only), `alone`,
`together`, and `teacher-forced` where decoded tokens differed."""

_MOST_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Result:
    """What moved when other requests were served alongside."""

    kernels: str
    """`stock` or `plan`."""
    requests: int
    max_logprob_difference: float
    """Largest |Δ| over the whole vocabulary at every new token up to and including the first that differs, and
    teacher-forced after it. Infinite where either side is NaN."""
    values_differ: int
    """Log-probabilities whose bits differ, or that are NaN on either side."""
    values_compared: int
    tokens_differ: int
    """New tokens that differ when both decode freely."""
    tokens_compared: int
    seconds: float
    """Serving alone and together; capturing graphs and warming up not counted."""
    alone: Activity
    together: Activity

    @property
    def identical(self) -> bool:
        """Whether something was compared and no bit and no token differed."""
        compared = self.values_compared > 0 and self.tokens_compared > 0
        return compared and not (self.max_logprob_difference or self.values_differ or self.tokens_differ)


@dataclass(slots=True)
class Difference:
    """Running comparison of fp32 values."""

    largest: float = 0.0
    values_differ: int = 0
    values_compared: int = 0

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Compare two fp32 tensors of one shape, bit by bit. A NaN on either side is a difference, an infinite one."""
        if left.shape != right.shape or left.dtype is not torch.float32 or right.dtype is not torch.float32:
            raise UsageError(
                f"compares fp32 tensors of one shape, not {left.dtype} {list(left.shape)} and "
                f"{right.dtype} {list(right.shape)}"
            )
        self.values_compared += left.numel()
        differ = (left.view(torch.int32) != right.view(torch.int32)) | left.isnan() | right.isnan()
        count = int(differ.sum())
        if not count:
            return
        self.values_differ += count
        distance = (left[differ].double() - right[differ].double()).abs().max().item()
        self.largest = max(self.largest, math.inf if math.isnan(distance) else distance)


@dataclass(slots=True)
class Comparison:
    """The metric, fed token by token: first each request alone, then all together, then teacher-forced if asked."""

    difference: Difference = field(default_factory=Difference)
    tokens_differ: int = 0
    tokens_compared: int = 0
    _tokens: dict[int, list[int]] = field(default_factory=dict)
    _logprobs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _first_different: dict[int, int] = field(default_factory=dict)

    def alone(self, request: int, index: int, token: int, logprobs: torch.Tensor) -> None:
        """Keep what a request gave alone."""
        self._tokens.setdefault(request, []).append(token)
        self._logprobs.setdefault(request, []).append(logprobs)

    def together(self, request: int, index: int, token: int, logprobs: torch.Tensor) -> None:
        """Compare what it decodes freely among others, up to and including the first token that differs."""
        self.tokens_compared += 1
        if request not in self._first_different:
            self.difference.add(self._logprobs[request][index], logprobs)
        if token != self._tokens[request][index]:
            self.tokens_differ += 1
            self._first_different.setdefault(request, index)

    def teacher_forced(self, request: int, index: int, token: int, logprobs: torch.Tensor) -> None:
        """Compare what follows the first token that differed, when it is made to go on as it did alone."""
        if index > self._first_different.get(request, index):
            self.difference.add(self._logprobs[request][index], logprobs)

    def forced(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The same requests, made to go on as they did alone; empty where no token differed."""
        if not self._first_different:
            return ()
        return tuple(replace(request, forced_tokens=tuple(self._tokens[request.id])) for request in requests)


def run(
    config: ModelConfig,
    weights: Weights,
    kernels: Kernels,
    workload: Workload,
    *,
    progress: Progress | None = None,
) -> Result:
    """Serve the workload alone and together, on the device the weights are on, and compare.

    Raises `UsageError` before serving when a request does not fit the engine or the model, or the log-probabilities
    to keep would not fit in memory.
    """
    _check_size(config, workload)
    engine = Engine(config, weights, kernels, workload.limits)
    comparison = Comparison()
    requests = workload.requests
    report = progress or (lambda phase, done, total: None)

    def serve(phase: str, runs: Sequence[Sequence[Request]], observe: Observer) -> Activity:
        done, total = 0, workload.new_tokens
        report(phase, done, total)

        def watch(request: int, index: int, token: int, logprobs: torch.Tensor) -> None:
            nonlocal done
            observe(request, index, token, logprobs)
            done += 1
            report(phase, done, total)

        return sum((engine.run(each, watch) for each in runs), start=Activity())

    if weights.embedding.is_cuda:
        # Kernels compile at their first call; that belongs to neither side's time.
        serve("warm-up", [requests], lambda request, index, token, logprobs: None)
    start = time.perf_counter()
    alone = serve("alone", [(replace(request, arrival_step=0),) for request in requests], comparison.alone)
    together = serve("together", [requests], comparison.together)
    seconds = time.perf_counter() - start
    if forced := comparison.forced(requests):
        serve("teacher-forced", [forced], comparison.teacher_forced)
    return Result(
        kernels=kernels.name,
        requests=len(requests),
        max_logprob_difference=comparison.difference.largest,
        values_differ=comparison.difference.values_differ,
        values_compared=comparison.difference.values_compared,
        tokens_differ=comparison.tokens_differ,
        tokens_compared=comparison.tokens_compared,
        seconds=seconds,
        alone=alone,
        together=together,
    )


def _check_size(config: ModelConfig, workload: Workload) -> None:
    needed = workload.new_tokens * config.vocab_size * 4
    if needed > _MOST_BYTES:
        raise UsageError(
            f"keeping {workload.new_tokens} tokens' log-probabilities over {config.vocab_size} words takes "
            f"{needed / 2**30:.1f} GiB, at most {_MOST_BYTES >> 30} are allowed; ask for fewer requests or new tokens"
        )
