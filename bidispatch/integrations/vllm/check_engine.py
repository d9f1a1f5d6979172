"""An engine of vLLM in this process, served step by step, so that what its scheduler and its graphs did can be seen.

Uses, alike in 0.25.1, 0.29.0 and 0.33.0: `EngineArgs`, `LLMEngine.from_engine_args`, `add_request`, `step`,
`reset_prefix_cache`; inside, which is private: `engine_core.engine_core.scheduler` with its `schedule`,
`max_num_scheduled_tokens` and `kv_cache_manager.block_pool`. Ask for `VLLM_ENABLE_V1_MULTIPROCESSING=0` before vLLM is
imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bidispatch.errors import BackendError, UsageError
from bidispatch.integrations.vllm.check_compare import Served
from bidispatch.integrations.vllm.check_steps import Steps

__all__ = ["ServedEngine", "count_replays", "graph_replays", "served_kernels", "start"]

TOP = 20
"""Values compared at each new token; what vLLM returns unless `max_logprobs` is raised."""

_STUCK = 1000
_DRAIN = 8
_replays = 0


def count_replays(worker: Any = None) -> None:
    """Count replays of CUDA graphs in this process; a second call does nothing. worker: vLLM's, not used."""
    import torch

    kind = torch.cuda.CUDAGraph
    original = kind.replay
    if getattr(original, "counts", False):
        return

    def replay(self: Any) -> None:
        global _replays
        _replays += 1
        original(self)

    replay.counts = True  # type: ignore[attr-defined]
    kind.replay = replay  # type: ignore[method-assign]


def graph_replays(worker: Any = None) -> int:
    """Replays counted in this process. worker: vLLM's, not used."""
    return _replays


def served_kernels(worker: Any = None) -> tuple[str, ...]:
    """The kernels that bidispatch bound for layers in this process. worker: vLLM's, not used."""
    from bidispatch.integrations.vllm import ops

    return ops.bound_names()


def start(arguments: Mapping[str, Any]) -> ServedEngine:
    """Build an engine. arguments: of vLLM's EngineArgs.

    Raises `UsageError` for arguments vLLM does not know, `BackendError` where the engine is not as it was read.
    """
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise UsageError("set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported, so that its scheduler is here")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    known = set(EngineArgs.__dataclass_fields__)
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise UsageError(f"this vLLM's EngineArgs has no {', '.join(unknown)}; see --engine-arg")
    # Before anything is captured: vLLM's breakable graphs keep `replay` as it was then (v0.25.1,
    # compilation/breakable_cudagraph.py), so that theirs are not seen in workers of their own processes.
    count_replays()
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    return ServedEngine(engine)


class ServedEngine:
    """An engine, and the counters of what it did."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        core = getattr(engine.engine_core, "engine_core", None)
        scheduler = getattr(core, "scheduler", None)
        missing = [
            name
            for name, there in (
                ("engine_core.engine_core.scheduler", scheduler is not None),
                ("scheduler.schedule", hasattr(scheduler, "schedule")),
                ("scheduler.max_num_scheduled_tokens", hasattr(scheduler, "max_num_scheduled_tokens")),
                ("scheduler.kv_cache_manager.block_pool", hasattr(_manager(scheduler), "block_pool")),
            )
            if not there
        ]
        if missing:
            raise BackendError(
                f"this vLLM's engine has no {', '.join(missing)}, so what it did cannot be seen; "
                "vLLM 0.25.1, 0.29.0 and 0.33.0 have"
            )
        self._scheduler: Any = scheduler
        self.steps = Steps()
        self._count = 0
        self._watch()
        self._in_process = engine.vllm_config.parallel_config.world_size == 1
        self._each_worker(count_replays)

    def _watch(self) -> None:
        original = self._scheduler.schedule

        def schedule(*args: Any, **named: Any) -> Any:
            output = original(*args, **named)
            self.steps.saw(output)
            return output

        self._scheduler.schedule = schedule

    def _each_worker(self, function: Callable[..., Any]) -> Any:
        """What a function gives in the first worker."""
        if self._in_process:
            return function()
        return self.engine.model_executor.collective_rpc(function)[0]

    def kernels(self) -> tuple[str, ...]:
        """The kernels that bidispatch bound for layers, in the first worker."""
        return tuple(self._each_worker(served_kernels))

    @property
    def config(self) -> Any:
        """vLLM's VllmConfig."""
        return self.engine.vllm_config

    @property
    def budget(self) -> int:
        """Tokens of a step."""
        return int(self._scheduler.max_num_scheduled_tokens)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        for _ in range(_DRAIN):
            if self.engine.reset_prefix_cache():
                return
            self.step()  # a step scheduled ahead may still hold pages
        raise BackendError("vLLM did not reset its prefix cache though nothing runs")

    @contextmanager
    def tokens_a_step(self, budget: int) -> Iterator[None]:
        """Smaller steps for a while, so that prompts are cut elsewhere."""
        usual = self._scheduler.max_num_scheduled_tokens
        self._scheduler.max_num_scheduled_tokens = min(usual, budget)
        try:
            yield
        finally:
            self._scheduler.max_num_scheduled_tokens = usual

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        *,
        arrivals: Sequence[int] | None = None,
        starve: bool = False,
        names: list[str] | None = None,
    ) -> list[Served]:
        """Serve prompts greedily, in this order.

        new_tokens: how many each gets. arrivals: the call of the engine before which each is added, all before the
        first if left out. starve: once all run, leave no free page of the KV cache until two requests were preempted.
        names: gets the names that `steps` knows them by.
        """
        ids = [f"check{self._count + index}" for index in range(len(prompts))]
        self._count += len(prompts)
        if names is not None:
            names += ids
        for name, prompt in zip(ids, prompts, strict=True):
            self.steps.add(name, len(prompt))
        at = list(arrivals) if arrivals is not None else [0] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lambda index: at[index])
        found: dict[str, Served] = {}
        tick = idle = 0
        hostages = _Hostages(self._scheduler, self.steps) if starve else None
        try:
            while len(found) < len(prompts):
                while waiting and (at[waiting[0]] <= tick or not self.engine.has_unfinished_requests()):
                    index = waiting.pop(0)
                    self._add(ids[index], prompts[index], new_tokens[index])
                if hostages is not None and not waiting:
                    hostages.tick()
                steps = self.steps.counters.steps
                for output in self.step():
                    if output.finished:
                        found[output.request_id] = _served(output)
                tick += 1
                idle = 0 if self.steps.counters.steps > steps else idle + 1
                if idle > _STUCK:
                    raise BackendError(
                        f"vLLM scheduled nothing in {idle} calls with {len(prompts) - len(found)} of {len(prompts)} "
                        "requests unfinished: its KV cache may be too small for one; lower --longest or --new-tokens"
                    )
        finally:
            if hostages is not None:
                hostages.release()
        return [found[name] for name in ids]

    def step(self) -> list[Any]:
        """One call of the engine: what requests gave."""
        before = self._each_worker(graph_replays) if self._in_process else 0
        outputs: list[Any] = self.engine.step()
        if self._in_process:
            self.steps.replayed(graph_replays() - before)
        return outputs

    def close(self) -> None:
        """End the engine and its workers."""
        self.engine.engine_core.shutdown()

    def count_graphs(self) -> None:
        """Fetch what other processes replayed; once, at the end."""
        if not self._in_process:
            self.steps.counters.graph_replays = int(self._each_worker(graph_replays))

    def _add(self, name: str, prompt: Sequence[int], new_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.engine.add_request(
            name,
            {"type": "token", "prompt_token_ids": list(prompt)},
            SamplingParams(
                temperature=0.0,
                max_tokens=new_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=TOP,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )


class _Hostages:
    """Pages of the KV cache that no request can have, so that a growing one preempts another."""

    _PATIENCE = 200

    def __init__(self, scheduler: Any, steps: Steps) -> None:
        self._scheduler = scheduler
        self._steps = steps
        self._pool = _manager(scheduler).block_pool
        self._blocks: list[Any] = []
        self._before = steps.counters.preemptions
        self._ticks = 0
        self._done = False

    def tick(self) -> None:
        """Before a call of the engine: take what is free once nobody waits, and give it back once it had its effect."""
        if self._done:
            return
        waited = len(self._scheduler.waiting)
        if not self._blocks:
            if waited or not self._scheduler.running:
                return
            self._take()
            return
        self._ticks += 1
        preempted = waited + self._steps.counters.preemptions - self._before
        if preempted >= 2 or self._ticks > self._PATIENCE or not self._scheduler.running:
            self.release()
        else:
            self._take()

    def _take(self) -> None:
        free = self._pool.get_num_free_blocks()
        if free:
            self._blocks += self._pool.get_new_blocks(free)

    def release(self) -> None:
        """Give everything back."""
        if self._blocks:
            self._pool.free_blocks(self._blocks)
            self._blocks = []
        self._done = True


def _manager(scheduler: Any) -> Any:
    return getattr(scheduler, "kv_cache_manager", None)


def _served(output: Any) -> Served:
    only = output.outputs[0]
    if only.logprobs is None:
        raise BackendError(f"vLLM returned no logprobs for {output.request_id}")
    tops = tuple({int(token): float(entry.logprob) for token, entry in top.items()} for top in only.logprobs)
    for top in tops:
        if len(top) < 2 or all(math.isnan(value) for value in top.values()):
            raise BackendError(f"vLLM returned no usable logprobs for {output.request_id}: {top}")
    return Served(tuple(only.token_ids), tops)
