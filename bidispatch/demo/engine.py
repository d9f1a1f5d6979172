"""The engine: turns the scheduler's steps into batches, runs them, decodes greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bidispatch.demo.config import ModelConfig
from bidispatch.demo.graphs import DecodeGraphs
from bidispatch.demo.kernels import Kernels
from bidispatch.demo.model import Batch, Decoder
from bidispatch.demo.scheduler import Chunk, EngineLimits, PagePool, Request, Scheduler
from bidispatch.demo.weights import Weights
from bidispatch.runtime.context import Limits

__all__ = ["Activity", "Engine", "Observer", "make_batch"]

Observer = Callable[[int, int, int, torch.Tensor], None]
"""Called for each new token with the request's id, the token's index among its new ones, the token decoded, and its
fp32 log-probabilities [vocab_size] on the CPU."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What a run did, to show that the paths it is meant to exercise were taken."""

    steps: int = 0
    mixed_steps: int = 0
    """Steps that held decodes and pieces of prompts together."""
    partial_prefills: int = 0
    """Pieces of prompts that left some of the prompt for a later step."""
    most_requests: int = 0
    """The most requests in one step."""
    graph_replays: int = 0

    def __add__(self, other: Activity) -> Activity:
        return Activity(
            steps=self.steps + other.steps,
            mixed_steps=self.mixed_steps + other.mixed_steps,
            partial_prefills=self.partial_prefills + other.partial_prefills,
            most_requests=max(self.most_requests, other.most_requests),
            graph_replays=self.graph_replays + other.graph_replays,
        )


def make_batch(chunks: Sequence[Chunk], limits: EngineLimits) -> Batch:
    """Lay the chunks of a step out as CPU tensors, in their order. Unused block table entries name page 0."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, logit_rows = [0], []
    block_table = torch.zeros(len(chunks), limits.max_pages, dtype=torch.int32)
    for index, chunk in enumerate(chunks):
        pages = chunk.active.pages
        block_table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for position in range(chunk.start, chunk.stop):
            page, offset = divmod(position, limits.page_size)
            tokens.append(chunk.active.token(position))
            positions.append(position)
            slots.append(pages[page] * limits.page_size + offset)
        starts.append(len(tokens))
        if chunk.samples:
            logit_rows.append(len(tokens) - 1)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_table=block_table,
        seq_lens=torch.tensor([chunk.stop for chunk in chunks], dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )


class Engine:
    """Serves requests by continuous batching. Its cache and pages live on from run to run.

    On a GPU, with kernels that may be captured, steps of one token a request are replayed from CUDA graphs.
    """

    @torch.inference_mode()
    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels, limits: EngineLimits) -> None:
        self.limits = limits
        self._device = weights.embedding.device
        bounds = Limits(
            max_tokens=limits.max_tokens,
            max_seqs=limits.max_seqs,
            max_seq_len=limits.max_seq_len,
            max_query_len=limits.max_tokens,
        )
        self._decoder = Decoder(config, weights, kernels, bounds, limits.page_size)
        self._pool = PagePool(limits.pages)
        # The page behind the pool's is nobody's: padding rows of graphs write there.
        self._cache = self._decoder.new_cache(limits.pages + 1)
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda" and kernels.cuda_graphs:
            scratch_slot = limits.pages * limits.page_size
            self._graphs = DecodeGraphs(self._decoder, self._cache, limits.max_seqs, limits.max_pages, scratch_slot)

    @property
    def free_pages(self) -> int:
        """Pages no request owns; all of them between runs."""
        return self._pool.available

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], observe: Observer) -> Activity:
        """Serve the requests to the end. Raises `UsageError`, before it starts, for one that cannot be served."""
        scheduler = Scheduler(self.limits, requests, self._pool)
        activity = Activity()
        while not scheduler.done:
            chunks = scheduler.schedule()
            log_probabilities, replayed = self._forward(chunks)
            activity += _activity(chunks, replayed)
            scheduler.commit(chunks, self._sample(chunks, log_probabilities, observe))
        return activity

    def _forward(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, bool]:
        """Log-probabilities [sampling chunks, vocab_size] on the CPU, and whether a graph gave them."""
        batch = make_batch(chunks, self.limits)
        if self._graphs is not None and all(chunk.length == 1 for chunk in chunks):
            return self._graphs.replay(batch)[batch.logit_rows.to(self._device)].cpu(), True
        return self._decoder(batch.to(self._device), self._cache).cpu(), False

    def _sample(self, chunks: Sequence[Chunk], log_probabilities: torch.Tensor, observe: Observer) -> dict[int, int]:
        """Decode greedily, show what was decoded, and return the tokens to go on with."""
        tokens = {}
        sampling = [chunk.active for chunk in chunks if chunk.samples]
        for active, row in zip(sampling, log_probabilities, strict=True):
            request, index = active.request, len(active.generated)
            token = int(row.argmax())
            observe(request.id, index, token, row)
            tokens[request.id] = token if request.forced_tokens is None else request.forced_tokens[index]
        return tokens


def _activity(chunks: Sequence[Chunk], replayed: bool) -> Activity:
    kinds = {chunk.decodes for chunk in chunks}
    return Activity(
        steps=1,
        mixed_steps=int(len(kinds) == 2),
        partial_prefills=sum(not chunk.samples for chunk in chunks),
        most_requests=len(chunks),
        graph_replays=int(replayed),
    )
