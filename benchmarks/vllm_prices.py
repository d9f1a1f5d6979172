"""What a vLLM engine in this process costs: start-up, prefill and decode steps, compilations, workspaces.

The process of one arm of vllm_serving.py: `python vllm_prices.py SPEC RESULT`, with the switches of the arm set.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bidispatch.integrations.vllm import check_child, check_engine
from bidispatch.integrations.vllm.check_steps import Steps

DECODE, PREFILL = "decode", "prefill"

_SHORT_MS, _MOST_REPEATS = 300, 15
"""A prefill is repeated until all took so many milliseconds together, so often at most: a short one waits for the host,
whose time varies."""


@dataclass(frozen=True)
class Price:
    """One case of one phase. ms: wall; gpu_ms: the time in which some kernel ran, None where it was not seen."""

    phase: str
    batch: int
    tokens: int
    """Of each prompt."""
    ms: float
    gpu_ms: float | None
    least_ms: float
    samples: int


def busy_ms(intervals: Iterable[tuple[float, float]]) -> float:
    """Milliseconds covered by intervals (start, end) in microseconds, overlaps once."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total / 1000


class Compilations:
    """Counts Triton kernels made ready after this was made: compiled, or taken from the cache on disk."""

    def __init__(self) -> None:
        from triton import knobs

        self.names: list[str] = []
        before = knobs.runtime.jit_post_compile_hook

        def hook(*args: Any, **named: Any) -> Any:
            function = named.get("fn")
            self.names.append(f"{getattr(function, 'module', None)}.{getattr(function, 'name', None)}")
            return before(*args, **named) if before is not None else None

        knobs.runtime.jit_post_compile_hook = hook


class Prices:
    """Times cases on an engine that is up."""

    def __init__(self, engine: check_engine.ServedEngine, *, repeats: int, steps: int, seed: int = 0) -> None:
        self.engine = engine
        self.repeats, self.steps = repeats, steps
        self.draw = random.Random(seed)  # noqa: S311 - prompts, not secrets
        self.vocabulary = engine.config.model_config.get_vocab_size()
        self.count = 0
        self.pending: set[str] = set()

    def attempt(self, batch: int, tokens: int, faults: list[str]) -> list[Price]:
        """`measure`; where that cannot be, none, with why in `faults` and its requests gone."""
        try:
            return self.measure(batch, tokens)
        except RuntimeError as error:
            faults.append(f"{batch} x {tokens}: {type(error).__name__}: {error}")
            check_child.say(faults[-1])
            self.engine.engine.abort_request(list(self.pending))
            self._until(lambda: not self.engine.engine.has_unfinished_requests(), self.pending)
            self.pending.clear()
            return []

    def measure(self, batch: int, tokens: int) -> list[Price]:
        """Prefill and decode of `batch` prompts of `tokens` tokens."""
        prompts = [[self.draw.randrange(self.vocabulary) for _ in range(tokens)] for _ in range(batch)]
        self._prefill(prompts)  # warm
        walls: list[float] = []
        while len(walls) < self.repeats or (sum(walls) < _SHORT_MS and len(walls) < _MOST_REPEATS):
            walls.append(self._prefill(prompts))
        prefill_gpu = self._profiled(lambda: self._prefill(prompts), 1)
        found = [
            Price(PREFILL, batch, tokens, statistics.median(walls), prefill_gpu, min(walls), len(walls)),
            self._decode(prompts),
        ]
        for price in found:
            check_child.say(
                f"{price.phase} {batch} x {tokens}: {price.ms:.3f} ms"
                + ("" if price.gpu_ms is None else f", GPU {price.gpu_ms:.3f} ms")
            )
        return found

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Milliseconds from the first step to the first token of the last prompt, nothing cached."""
        self.engine.forget_prefixes()
        names = self._add(prompts, 1)
        _synchronize()
        began = time.perf_counter()
        self._until(lambda: not names, names)
        _synchronize()
        return (time.perf_counter() - began) * 1000

    def _decode(self, prompts: Sequence[Sequence[int]]) -> Price:
        """A step in which all prompts decode: the median time between the returns of two calls of the engine.

        vLLM schedules ahead by default, so nothing is synchronised in between: a call returns when the tokens of a step
        are on the host.
        """
        profiled, margin = 6, 8
        names = self._add(prompts, self.steps + profiled + 2 * margin)
        counters = self.engine.steps.counters
        started: set[str] = set()
        while len(started) < len(prompts):
            before = counters.steps
            started |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
            if counters.steps == before and not self.engine.engine.has_unfinished_requests():
                raise RuntimeError("requests ended before all had begun to decode: lower the batch")
        preempted, mixed = counters.preemptions, counters.prefill_steps + counters.mixed_steps
        for _ in range(margin // 2):
            self.engine.step()
        _synchronize()
        gc.collect()
        walls = []
        last = time.perf_counter()
        for _ in range(self.steps):
            outputs = self.engine.step()
            now = time.perf_counter()
            if any(output.finished for output in outputs):
                raise RuntimeError("a request ended while it was timed: the batch was too slow to begin together")
            if outputs:
                walls.append((now - last) * 1000)
                last = now
        gpu = self._profiled(lambda: [self.engine.step() for _ in range(profiled)], profiled)
        if counters.preemptions != preempted or counters.prefill_steps + counters.mixed_steps != mixed:
            raise RuntimeError(
                f"{len(prompts)} x {len(prompts[0])}: not every step was decode of all, the KV cache is too small for "
                "this case: raise gpu_memory_utilization, or leave the case out with --case"
            )
        self._until(lambda: not names, names)
        return Price(DECODE, len(prompts), len(prompts[0]), statistics.median(walls), gpu, min(walls), len(walls))

    def _add(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> set[str]:
        from vllm import SamplingParams

        names = set()
        for prompt in prompts:
            name = f"price{self.count}"
            self.count += 1
            self.engine.steps.add(name, len(prompt))
            self.engine.engine.add_request(
                name,
                {"type": "token", "prompt_token_ids": list(prompt)},
                SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False),
            )
            names.add(name)
        self.pending = names
        return names

    def _until(self, done: Any, names: set[str]) -> None:
        idle = 0
        while not done():
            before = self.engine.steps.counters.steps
            names -= {output.request_id for output in self.engine.step() if output.finished}
            idle = 0 if self.engine.steps.counters.steps > before else idle + 1
            if idle > 1000:
                raise RuntimeError("vLLM scheduled nothing in 1000 calls: the KV cache is too small for this case")

    def _profiled(self, run: Any, steps: int) -> float | None:
        """GPU milliseconds a step; None where the kernels run in other processes, or the profiler saw none."""
        import torch

        if self.engine.config.parallel_config.world_size > 1 or not torch.cuda.is_available():
            return None
        from torch.profiler import ProfilerActivity, profile

        _synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            _synchronize()
        # What is annotated on the host is shown on the GPU too, as one span over the gaps between its kernels.
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith("## ")
        ]
        return round(busy_ms(spans) / steps, 4) if spans else None


def workspace_bytes() -> int | None:
    """Bytes of the tensors that bidispatch's bound kernels own; None where none is bound."""
    import torch

    from bidispatch.runtime.bound import BoundKernel

    seen: dict[int, int] = {}
    visited: set[int] = set()
    gc.unfreeze()  # vLLM freezes what is there when it is up, and frozen objects are not listed
    kernels = [each for each in gc.get_objects() if type(each) is BoundKernel]
    stack: list[Any] = list(kernels)
    while stack:
        each = stack.pop()
        if id(each) in visited:
            continue
        visited.add(id(each))
        if isinstance(each, torch.Tensor):
            if each.device.type == "cuda":
                storage = each.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, (list, tuple, set, frozenset)):
            stack += each
        elif isinstance(each, dict):
            stack += each.values()
        elif type(each).__module__.startswith(("bidispatch", "bidispatch_backends")) or type(each).__name__ in (
            "function",
            "method",
            "partial",
            "cell",
        ):
            stack += _held(each)
    return sum(seen.values()) if kernels else None


def _held(each: Any) -> list[Any]:
    held: list[Any] = [getattr(each, name, None) for name in _slots(type(each))]
    held += vars(each).values() if hasattr(each, "__dict__") else ()
    held += [_part(each, name) for name in ("__self__", "__func__", "func", "args", "keywords", "__closure__")]
    held.append(_part(each, "cell_contents"))
    return [one for one in held if one is not None]


def _part(each: Any, name: str) -> Any:
    try:
        return getattr(each, name, None)
    except ValueError:  # an empty cell
        return None


def _slots(kind: type) -> list[str]:
    return [name for base in kind.__mro__ for name in _as_names(base.__dict__.get("__slots__", ()))]


def _as_names(slots: Any) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _keep(to: str, result: dict[str, Any]) -> None:
    """Write what is there already, should the process be ended before it is done."""
    Path(to).write_text(json.dumps({**result, "error": "it was ended before it was done"}), encoding="utf-8")


def main(words: Sequence[str]) -> int:
    spec = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    compiled: Compilations | None = None
    engine: check_engine.ServedEngine | None = None
    check_child.end_with_parent()
    began = time.perf_counter()
    try:
        check_child.load_plugin(spec["tp"])
        engine = check_engine.start(check_child.engine_arguments(spec))
        seconds = time.perf_counter() - began
        check_child.say(f"engine is up after {seconds:.1f} s")
        compiled = None if spec["tp"] > 1 else Compilations()
        config = engine.config
        result = {
            "kernels": check_child.require_arm(engine, spec["arm"]),
            "vllm": version("vllm"),
            "layers": int(config.model_config.hf_text_config.num_hidden_layers),
            "start_s": seconds,
            "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "kv_tokens": int(config.cache_config.num_gpu_blocks or 0) * int(config.cache_config.block_size or 0),
            "prices": [],
            "faults": [],
        }
        if spec["only_start"]:
            return 0

        prices = Prices(engine, repeats=spec["repeats"], steps=spec["steps"])
        for batch, tokens in spec["cases"]:
            result["prices"] += [asdict(price) for price in prices.attempt(batch, tokens, result["faults"])]
            _keep(words[1], result)
        if spec["check"]:
            engine.steps = Steps()
            result["check"] = check_child.check_served(engine, spec)
    except Exception as error:  # noqa: BLE001 - becomes the result, whatever it is
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        if compiled is not None:
            ours = [name for name in compiled.names if name.startswith("bidispatch")]
            result["compiled_after_ready"] = len(ours)
            result["compiled_by_others"] = len(compiled.names) - len(ours)
            result["compiled_names"] = sorted(set(compiled.names))
        result["workspace_bytes"] = workspace_bytes()
        Path(words[1]).write_text(json.dumps(result), encoding="utf-8")
        check_child.close(engine)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
