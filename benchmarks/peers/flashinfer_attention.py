"""FlashInfer with its own choice of splits, as servers run it: planned on the host at every step, run in a graph."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from peers.installed import AbsentError, Peer

__all__ = ["decode"]

_WORKSPACE = 384 << 20


def _library() -> Any:
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise AbsentError(f"flashinfer does not import: {error}") from error


def _lengths(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each sequence's pages begin, and how many positions its last page has; on the host."""
    pages, size = call.pages_of(call.context), call.pool.shape.page_size
    starts = torch.arange(call.batch + 1, dtype=torch.int32) * pages
    last = torch.full((call.batch,), call.context - (pages - 1) * size, dtype=torch.int32)
    return starts, last


def _heads(call: Any) -> tuple[int, int, int, int]:
    shape = call.pool.shape
    return shape.heads, shape.kv_heads, shape.head_dim, shape.page_size


def _options(call: Any) -> dict[str, Any]:
    dtype = call["q"].dtype
    return {"sm_scale": call.scalars[0], "q_data_type": dtype, "kv_data_type": dtype}


def decode(call: Any) -> Peer:
    """Tensor cores, as vLLM and SGLang take for grouped heads. A wrapper for each block table, all on one workspace."""
    library, device = _library(), call.pool.device
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)

    def wrapper() -> Any:
        sizes = (call.batch + 1, call.batch * call.width, call.batch)
        starts, pages, last = (torch.zeros(size, dtype=torch.int32, device=device) for size in sizes)
        return library.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=starts,
            paged_kv_indices_buffer=pages,
            paged_kv_last_page_len_buffer=last,
        )

    wrappers = [wrapper() for _ in range(call.sets)]

    def prepare() -> None:
        starts, last = _lengths(call)
        for i, planned in enumerate(wrappers):
            pages = call.table(i)[:, : call.pages_of(call.context)].reshape(-1)
            planned.plan(starts, pages, last, *_heads(call), **_options(call))

    cache = (call["k_cache"], call["v_cache"])
    return Peer(lambda i: wrappers[i % len(wrappers)].run(call["q"], cache, out=call.out), prepare)
