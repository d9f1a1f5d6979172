"""Decode steps replayed from CUDA graphs, one graph for each of a few batch sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bidispatch.demo.model import Batch, Decoder, KVCache

__all__ = ["DecodeGraphs", "bucket_sizes", "padded"]


def bucket_sizes(max_seqs: int) -> tuple[int, ...]:
    """The batch sizes that get a graph: powers of two, and `max_seqs` itself."""
    sizes = [1]
    while sizes[-1] < max_seqs:
        sizes.append(min(2 * sizes[-1], max_seqs))
    return tuple(sizes)


def padded(batch: Batch, size: int, scratch_slot: int) -> Batch:
    """Widen a batch of one-token sequences to `size` sequences.

    Padding sequences have length 0 and own no row; the padding rows write to `scratch_slot`, where no request reads,
    and their log-probabilities mean nothing.
    """
    extra = size - len(batch.seq_lens)

    def widen(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat((tensor, tensor.new_full((extra, *tensor.shape[1:]), value)))

    return Batch(
        tokens=widen(batch.tokens, 0),
        positions=widen(batch.positions, 0),
        slots=widen(batch.slots, scratch_slot),
        block_table=widen(batch.block_table, 0),
        seq_lens=widen(batch.seq_lens, 0),
        query_start_loc=widen(batch.query_start_loc, len(batch.tokens)),
        logit_rows=torch.arange(size, device=batch.tokens.device),
    )


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    log_probabilities: torch.Tensor


class DecodeGraphs:
    """Graphs of the decoder at every bucket size, captured when made. They share one memory pool."""

    def __init__(self, decoder: Decoder, cache: KVCache, max_seqs: int, max_pages: int, scratch_slot: int) -> None:
        self._scratch_slot = scratch_slot
        self._pool = torch.cuda.graph_pool_handle()
        device = cache.keys[0].device
        nobody = Batch(
            tokens=torch.empty(0, dtype=torch.int64),
            positions=torch.empty(0, dtype=torch.int64),
            slots=torch.empty(0, dtype=torch.int64),
            block_table=torch.empty(0, max_pages, dtype=torch.int32),
            seq_lens=torch.empty(0, dtype=torch.int32),
            query_start_loc=torch.zeros(1, dtype=torch.int32),
            logit_rows=torch.empty(0, dtype=torch.int64),
        )
        # Largest first, so that the smaller graphs fit into the memory it took.
        self._graphs = {
            size: self._capture(decoder, cache, padded(nobody, size, scratch_slot).to(device))
            for size in reversed(bucket_sizes(max_seqs))
        }
        self._sizes = bucket_sizes(max_seqs)

    def replay(self, batch: Batch) -> torch.Tensor:
        """Run a batch of one-token sequences; return log-probabilities [its sequences, vocab_size], valid until the
        next replay.
        """
        count = len(batch.seq_lens)
        captured = self._graphs[next(size for size in self._sizes if size >= count)]
        captured.batch.copy_(padded(batch, len(captured.batch.seq_lens), self._scratch_slot))
        captured.graph.replay()
        return captured.log_probabilities[:count]

    def _capture(self, decoder: Decoder, cache: KVCache, batch: Batch) -> _Graph:
        decoder(batch, cache)  # once eagerly: kernels compile and libraries set up, which a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            log_probabilities = decoder(batch, cache)
        return _Graph(graph, batch, log_probabilities)
