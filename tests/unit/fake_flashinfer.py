"""A stand-in for `flashinfer`, computing with torch on the CPU.

It decides what the library decides for a whole plan (rows of a query tile from the mean packed length; whether partial
results are merged), and lets each decision show in the results: rows computed under different ones differ. It is as
strict as the library about lengths, workspaces and the shape of q.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

MARKS = {"tile": 1 / 2048, "split": 1 / 8}
"""What a plan's decisions add to its results, as a part of them: as another order of additions would, only more."""


TABLES = 8 << 20
"""Bytes of a wrapper's integers (flashinfer 0.6.13, prefill.py)."""


def table_bytes(items: int, rows: int, requests: int, split: bool) -> int:
    """What `PrefillPlan` takes of them, each piece at a multiple of 16 but the size of a split (scheduler.cuh)."""
    pieces = [4 * items, 4 * items, 4 * items, 4 * (requests + 1) + 4]
    if split:
        pieces += [4 * (rows + 1), items]
    return sum(-(-piece // 16) * 16 for piece in pieces)


def tile_rows(mean: int, head_dim: int) -> int:
    if mean > 64 and head_dim < 256:
        return 128
    return 64 if mean > 16 else 16


class FakeFlashInfer(ModuleType):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("flashinfer")
        self.plans: list[dict[str, Any]] = []
        self.error = error
        library = self

        class BatchPrefillWithPagedKVCacheWrapper:
            def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, *, backend="auto"):
                assert (kv_layout, use_cuda_graph, backend) == ("NHD", False, "fa2")
                assert float_workspace_buffer.dtype is torch.uint8
                self.workspace = float_workspace_buffer.numel()

            def plan(self, *lengths, **options):
                if library.error:
                    raise library.error
                self.planned = library.plan(self.workspace, *lengths, **options)

            def run(self, q, paged_kv_cache, *, out=None):
                assert len(q) == self.planned["query_starts"][-1]
                result = attend(self.planned, q, *paged_kv_cache)
                if out is None:
                    return result
                assert out.is_contiguous()
                return out.copy_(result)

        self.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper

    def plan(
        self, workspace, qo_indptr, kv_indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, **options
    ):
        for tensor in (qo_indptr, kv_indptr, indices, last_page_len):
            assert tensor.dtype is torch.int32
        queries, pages = qo_indptr.diff().tolist(), kv_indptr.diff().tolist()
        assert len(indices) == kv_indptr[-1]
        assert all(1 <= last <= page_size for last in last_page_len.tolist())
        packed = [query * heads // kv_heads for query in queries]
        tile = tile_rows(sum(packed) // len(packed), head_dim)
        size, whole = options["fixed_split_size"], options["disable_split_kv"]
        assert whole == (size is None)
        chunks = [1 if whole else -(-count // size) for count in pages]
        items = sum(-(-rows // tile) * count for rows, count in zip(packed, chunks, strict=True))
        split = max(chunks) > 1
        needed = heads * items * tile * (head_dim + 1) * 4 if split else 0
        if needed > workspace:
            raise RuntimeError(f"Buffer overflow when allocating memory for batch_prefill_tmp_v: {needed}")
        if (tables := table_bytes(items, sum(queries), len(queries), split)) > TABLES:
            raise RuntimeError(f"Buffer overflow when allocating memory for batch_prefill_merge_indptr: {tables}")
        planned = {
            "query_starts": qo_indptr.tolist(),
            "page_starts": kv_indptr.tolist(),
            "indices": indices,
            "kv_lens": [(n - 1) * page_size + last for n, last in zip(pages, last_page_len.tolist(), strict=True)],
            "tile": tile,
            "split": split,
            "size": size,
            "items": items,
            "heads": (heads, kv_heads, head_dim, page_size),
            **options,
        }
        self.plans.append(planned)
        return planned


def attend(planned, q, k_cache, v_cache):
    out = torch.empty(q.shape, dtype=q.dtype)
    heads, kv_heads, _, _ = planned["heads"]
    for request, kv_len in enumerate(planned["kv_lens"]):
        first, stop = planned["query_starts"][request : request + 2]
        pages = planned["indices"][slice(*planned["page_starts"][request : request + 2])].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:kv_len].double().repeat_interleave(heads // kv_heads, dim=1)
            for cache in (k_cache, v_cache)
        )
        for row in range(first, stop):
            seen = kv_len - (stop - row - 1) if planned["causal"] else kv_len
            scores = torch.einsum("hd,khd->hk", q[row].double(), keys[:seen]) * planned["sm_scale"]
            if cap := planned["logits_soft_cap"]:
                scores = cap * torch.tanh(scores / cap)
            result = torch.einsum("hk,khd->hd", torch.softmax(scores, dim=-1), values[:seen])
            mark = 1 + sum(planned[name] * mark for name, mark in MARKS.items())
            out[row] = (result * mark).to(q.dtype)
    return out
