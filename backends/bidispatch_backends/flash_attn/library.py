"""FlashAttention's operators as two calls each, with every argument that could choose by the batch fixed here.

Positional, since the names differ between versions; the registered schema is compared first, so that another version's
argument order cannot pass unseen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bidispatch.errors import BackendError
from bidispatch_backends.flash_attn.discovery import FLASH_ATTN, VLLM_FA2, VLLM_FA3, Source

__all__ = ["Fa2", "Fa3", "fa2_of", "fa3"]

_NO_WINDOW = -1
_NO_DROPOUT = 0.0

# Where the arguments that bits rest on must be, and how many there are: vllm_flash_attn of vllm 0.25.1 and
# vllm-project/flash-attention 617264c1 (csrc/flash_attn/flash_api_torch_lib.cpp, hopper/flash_api_torch_lib.cpp).
_VARLEN = (22, {4: "cu_seqlens_q", 6: "seqused_k", 8: "block_table", 10: "max_seqlen_q", 20: "num_splits"})
_KVCACHE = (20, {5: "seqlens_k", 10: "block_table", 12: "out", 13: "softmax_scale", 19: "num_splits"})
_FA3_FWD = (
    37,
    {
        5: "q_v",
        6: "out",
        7: "cu_seqlens_q",
        10: "seqused_q",
        11: "seqused_k",
        12: "max_seqlen_q",
        14: "page_table",
        16: "leftpad_k",
        23: "softmax_scale",
        29: "scheduler_metadata",
        30: "num_splits",
        31: "pack_gqa",
    },
)


class Fa2:
    """FA2's two paged calls. Both raise RuntimeError for tensors it does not take; neither reads from the device."""

    def __init__(self, varlen: Callable[..., Any], kvcache: Callable[..., Any], *, package: bool) -> None:
        """package: whether the two are flash-attn's own, whose `varlen` takes no number of splits and whose `kvcache`
        wants `out` with the query heads of a KV head for rows, as it takes them itself (flash_api.cpp:1316).
        """
        self._varlen, self._kvcache, self._package = varlen, kvcache, package
        # Never 0: newer versions have other KV blocks for it than for 1.
        self._split_argument = () if package else (1,)

    def varlen(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        kv_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        no_starts: torch.Tensor,
        out: torch.Tensor,
        *,
        max_query_len: int,
        max_kv_len: int,
        scale: float,
        causal: bool,
        softcap: float,
    ) -> None:
        """One split for every row. max_query_len: a bound of the grid, at least 2: 1 would split by the batch.

        no_starts: int32 [seqs + 1] of zeros, which the kernel takes and, with a block table, does not look at.
        """
        self._varlen(
            *(q, k_cache, v_cache, out, query_start_loc, no_starts, kv_lens, None, block_table, None),
            *(max(2, max_query_len), max_kv_len, _NO_DROPOUT, scale, False, causal, _NO_WINDOW, _NO_WINDOW, softcap),
            *(False, *self._split_argument, None),
        )

    def decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        kv_lens: torch.Tensor,
        no_starts: torch.Tensor,
        out: torch.Tensor,
        *,
        num_splits: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """One row an entry: q and out [entries, 1, heads, head_dim]. Returns the fp32 LSE [entries, heads, 1].

        no_starts: int32 [entries + 1] of zeros, which FA2 is not shown.
        """
        if self._package:
            entries, _, heads, head_dim = out.shape
            kv_heads = k_cache.shape[2]
            if heads > kv_heads:
                out = out.view(entries, kv_heads, heads // kv_heads, head_dim).transpose(1, 2)
        no_new = (None,) * 2
        results = self._kvcache(
            *(q, k_cache, v_cache, *no_new, kv_lens, None, None, None, None, block_table, None, out),
            *(scale, False, _NO_WINDOW, _NO_WINDOW, softcap, True, num_splits),
        )
        return results[1]  # type: ignore[no-any-return]


class Fa3:
    """FA3's one operator, with one split and without a schedule, or with splits by a schedule that is made for it.

    A schedule (`scheduler_metadata`) says how many splits each sequence has, so that FA3 does not count them by the
    batch: int32, as `kernels.schedule_kernel` makes it. Only for calls of one row a sequence, which are not causal.

    With `rank`, keys of `attention.mla`: q is [..., rank + rope_dim], and both caches are the one of its op,
    [pages, page_size, rank + rope_dim]. The rotary part is the library's q and k, the rest its q_v and v, all as views.
    """

    def __init__(self, forward: Callable[..., Any], rank: int = 0) -> None:
        """rank: kv_lora_rank of `attention.mla`; 0 for keys and values of their own."""
        self._forward, self._rank = forward, rank

    def varlen(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        kv_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        no_starts: torch.Tensor,
        out: torch.Tensor,
        *,
        max_query_len: int,
        max_kv_len: int,
        scale: float,
        causal: bool,
        softcap: float,
        rows: torch.Tensor | None = None,
        num_splits: int = 1,
        schedule: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Fa2.varlen`; max_query_len chooses the tile, so it must be one number for all calls of a bound kernel.

        rows: how many of each sequence's are served, int32 [seqs], by default all; only for one split. Returns the fp32
        LSE [heads, tokens]. With splits, one whose scores hold NaN is left out of the result.
        """
        lengths = (query_start_loc, None, None, rows, kv_lens, max_query_len, max_kv_len)
        tables, splits = (block_table, no_starts), (num_splits, schedule)
        return self._call(q, k_cache, v_cache, out, lengths, tables, splits, (scale, causal, softcap))

    def decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        kv_lens: torch.Tensor,
        no_starts: torch.Tensor,
        out: torch.Tensor,
        *,
        num_splits: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """As `Fa2.decode`, for one split. One row an entry, so every call has one tile.

        Not for splits, whose schedule is for rows that `cu_seqlens_q` names: where `seqused_q` does instead, what adds
        splits up takes the first entry's for every one (hopper/flash_fwd_combine_launch_template.h).
        """
        if num_splits != 1:
            raise BackendError(f"FA3's splits are for `varlen`, by a schedule; num_splits={num_splits} must be 1")
        lengths, tables = (None, None, None, None, kv_lens, None, None), (block_table, no_starts)
        return self._call(q, k_cache, v_cache, out, lengths, tables, (1, None), (scale, False, softcap))

    def _call(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lengths: tuple[torch.Tensor | int | None, ...],
        tables: tuple[torch.Tensor, torch.Tensor],
        splits: tuple[int, torch.Tensor | None],
        scores: tuple[float, bool, float],
    ) -> torch.Tensor:
        """scores: scale, whether causal, soft cap."""
        (num_splits, schedule), (scale, causal, softcap) = splits, scores
        if (num_splits > 1) != (schedule is not None):
            raise BackendError(f"FA3 counts splits by the batch's lengths: num_splits={num_splits} needs a schedule")
        no_new, no_rotary, no_scales = (None,) * 2, (None,) * 3, (None,) * 3
        block_table, no_starts = tables
        q_v, leftpad = None, None
        if self._rank:
            q_v, q = q[..., : self._rank], q[..., self._rank :]
            k_cache, v_cache = k_cache[:, :, None, self._rank :], v_cache[:, :, None, : self._rank]
            # Nothing is left out; but where it is named, no page is loaded by TMA: see `params`.
            leftpad = no_starts[: len(no_starts) - 1]
        results = self._forward(
            *(q, k_cache, v_cache, *no_new, q_v, out, *lengths, block_table, None, leftpad, *no_rotary, *no_scales),
            *(scale, causal, _NO_WINDOW, _NO_WINDOW, softcap, True, schedule, num_splits, True, 0, None, 1, 0, None),
        )
        return results[1]  # type: ignore[no-any-return]


def fa2_of(source: Source) -> Fa2:
    """Load FA2 of a source. Raises `BackendError` for one that does not load or takes other arguments."""
    if source is FLASH_ATTN:
        module = importlib.import_module(source.library)
        return Fa2(module.varlen_fwd, module.fwd_kvcache, package=True)
    namespace = _load(VLLM_FA2)
    return Fa2(
        _checked(VLLM_FA2, namespace, "varlen_fwd", *_VARLEN),
        _checked(VLLM_FA2, namespace, "fwd_kvcache", *_KVCACHE),
        package=False,
    )


def fa3(rank: int = 0) -> Fa3:
    """Load FA3 of vLLM. Raises `BackendError` for one that does not load or takes other arguments. rank: see `Fa3`."""
    return Fa3(_checked(VLLM_FA3, _load(VLLM_FA3), "fwd", *_FA3_FWD), rank)


def _load(source: Source) -> Any:
    """The namespace of `torch.ops` that a shared object of vLLM's registers; loaded once, vLLM itself never."""
    namespace = getattr(torch.ops, source.library)
    if any(hasattr(namespace, name) for name in ("varlen_fwd", "fwd")):
        return namespace  # vLLM runs in this process, and has loaded it
    file = source.file()
    if file is None:
        raise BackendError(f"vllm is installed without {source.library}; {source.install}")
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BackendError(
            f"{file} does not load with torch {torch.__version__}: {error}; install the vllm that was built for it"
        ) from error
    return namespace


def _checked(source: Source, namespace: Any, name: str, count: int, places: Mapping[int, str]) -> Callable[..., Any]:
    """The operator, if its arguments are where they are expected."""
    overload = getattr(namespace, name).default
    found = [argument.name for argument in overload._schema.arguments]
    if len(found) != count or any(found[place] != wanted for place, wanted in places.items()):
        raise BackendError(
            f"torch.ops.{source.library}.{name} takes {', '.join(found)}: not the {count} arguments of the versions "
            f"that were read ({source.versions}); {source.install}"
        )
    return overload  # type: ignore[no-any-return]
