"""FlashMLA's dense decode with its default schedule, as vLLM calls it: the schedule is made before the graph runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peers.installed import AbsentError, Peer, load_op

__all__ = ["decode"]

PAGE_SIZE = 64


def decode(call: Any, folders: tuple[Path, ...]) -> Peer:
    """One query row a sequence; Hopper alone."""
    shape = call.pool.shape
    if shape.page_size != PAGE_SIZE:
        raise AbsentError(f"FlashMLA takes pages of {PAGE_SIZE}, not {shape.page_size}")
    if torch.cuda.get_device_capability(call.pool.device) != (9, 0):
        raise AbsentError("FlashMLA's dense decode is built for sm90 alone")
    op = load_op("_flashmla_C", "dense_decode_fwd", "_flashmla_C*.so", folders)
    (cache,) = call.pool.caches.values()
    queries = [value for value in (call[name] for name in call.names_by_token()) if value is not None]
    joined = torch.cat(queries, dim=-1) if len(queries) > 1 else queries[0]
    q = joined.view(call.batch, 1, shape.heads, shape.head_dim)
    blocks = cache.view(-1, PAGE_SIZE, 1, shape.head_dim)

    def launch_of(i: int, metadata: torch.Tensor | None, splits: torch.Tensor | None) -> Any:
        # By place: vLLM registers it without the arguments' names. The last but one are its schedule, the last its out.
        values = (q, blocks, shape.value_dim, call.seq_lens, call.table(i), call.scalars[0], True, metadata, splits)
        return lambda: op(*values, None)

    def schedule() -> tuple[torch.Tensor, torch.Tensor]:
        """Without one it makes its own, and returns it after the result and its logarithms."""
        _, _, metadata, splits = launch_of(0, None, None)()
        return metadata, splits

    kept = schedule()
    launches = [launch_of(i, *kept) for i in range(call.sets)]

    def prepare() -> None:
        for old, new in zip(kept, schedule(), strict=True):
            old.copy_(new)

    return Peer(lambda i: launches[i % len(launches)](), prepare)
