"""An engine as a check sees one, without vLLM: a scheduler with chunks, a prefix cache, preemption and graph replays.

Values at a token follow from the tokens before it alone, unless a fault is planted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from bidispatch.integrations.vllm.check_compare import Served
from bidispatch.integrations.vllm.check_steps import Steps

TOP = 20


class Request:
    """A request on its way."""

    def __init__(self, name: str, prompt: tuple[int, ...], new_tokens: int) -> None:
        self.name = name
        self.prompt = prompt
        self.new_tokens = new_tokens
        self.tokens: list[int] = []
        self.top: list[dict[int, float]] = []
        self.computed = 0
        self.resumed = False
        self.started = False


class FakeEngine:
    """Serves as vLLM's scheduler does: decoding requests first, then prompts up to the step's budget."""

    def __init__(
        self,
        *,
        budget: int = 512,
        page: int = 16,
        chunking: bool = True,
        prefix: bool = True,
        preempts: bool = True,
        graphs: int = 1,
        plant: Callable[[Request, int], bool] = lambda request, batch: False,
    ) -> None:
        self.steps = Steps()
        self.limit = budget
        self.page = page
        self.chunking, self.prefix, self.preempts, self.graphs, self.plant = chunking, prefix, preempts, graphs, plant
        self.cache: set[tuple[int, ...]] = set()
        self.count = 0
        self.config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 1000))

    @property
    def budget(self) -> int:
        return self.limit

    def forget_prefixes(self) -> None:
        self.cache.clear()

    def count_graphs(self) -> None:
        """Counted as they happen."""

    @contextmanager
    def tokens_a_step(self, budget: int) -> Iterator[None]:
        usual, self.limit = self.limit, min(self.limit, budget)
        try:
            yield
        finally:
            self.limit = usual

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        *,
        arrivals: Sequence[int] | None = None,
        starve: bool = False,
        names: list[str] | None = None,
    ) -> list[Served]:
        requests = []
        for prompt, count in zip(prompts, new_tokens, strict=True):
            requests.append(Request(f"check{self.count}", tuple(prompt), count))
            self.count += 1
            self.steps.add(requests[-1].name, len(prompt))
        if names is not None:
            names += [request.name for request in requests]
        tick = 0
        at = list(arrivals or [0] * len(requests))
        while unfinished := [request for request in requests if len(request.tokens) < request.new_tokens]:
            here = [request for request in unfinished if at[requests.index(request)] <= tick]
            if starve and self.preempts and tick == 6 and len(here) > 1:
                last = here[-1]
                last.resumed, last.computed = last.started, 0
            if here:
                self._step(here)
            tick += 1
        return [Served(tuple(request.tokens), tuple(request.top)) for request in requests]

    def _step(self, requests: Sequence[Request]) -> None:
        left = self.limit
        tokens: dict[str, int] = {}
        new, running, resumed = [], [], set()
        for request in sorted(requests, key=lambda each: len(each.tokens) == 0):
            if not request.started or request.resumed:
                request.computed = self._cached(request)
            wanted = len(request.prompt) + len(request.tokens) - request.computed
            count = min(wanted, left)
            if count <= 0 or (count < wanted and not self.chunking and left < self.limit):
                continue
            count = wanted if not self.chunking else count
            name = f"{request.name}-0a1b2c3d"
            tokens[name] = count
            left -= count
            if request.started:
                running.append((name, request.computed))
                if request.resumed:
                    resumed.add(name)
            else:
                new.append(SimpleNamespace(req_id=name, num_computed_tokens=request.computed))
            request.started, request.resumed = True, False
        self.steps.saw(
            SimpleNamespace(
                num_scheduled_tokens=tokens,
                scheduled_new_reqs=new,
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=[name for name, _ in running],
                    num_computed_tokens=[computed for _, computed in running],
                    resumed_req_ids=resumed,
                ),
            )
        )
        self.steps.replayed(self.graphs)
        for request in requests:
            count = tokens.get(f"{request.name}-0a1b2c3d", 0)
            request.computed += count
            everything = request.prompt + tuple(request.tokens)
            for end in range(self.page, request.computed + 1, self.page):
                self.cache.add(everything[:end])
            if count and request.computed == len(everything):
                self._decode(request, everything, len(tokens))

    def _cached(self, request: Request) -> int:
        everything = request.prompt + tuple(request.tokens)
        end = 0
        while self.prefix and end + self.page < len(everything) and everything[: end + self.page] in self.cache:
            end += self.page
        return end

    def _decode(self, request: Request, everything: tuple[int, ...], batch: int) -> None:
        digest = hashlib.blake2b(repr(everything).encode(), digest_size=8).digest()
        draw = np.random.default_rng(int.from_bytes(digest, "little"))
        values = np.sort(draw.standard_normal(TOP).astype(np.float32))[::-1].copy()
        ids = draw.choice(1000, TOP, replace=False)
        if self.plant(request, batch):
            values.view(np.uint32)[TOP // 2] ^= 1
        request.top.append({int(token): float(value) for token, value in zip(ids, values, strict=True)})
        request.tokens.append(int(ids[0]))
