"""Reduction params, class labels and conditions of FlashAttention's kernels. Imports neither torch nor a library.

Read in flash-attn 2.8.3 (csrc/flash_attn/) and vllm-project/flash-attention 617264c1 (csrc/flash_attn/, hopper/):

- FA2's paged kernel is `flash_fwd_splitkv_kernel`. Its KV block follows head_dim and, in newer versions, whether there
  is one split (flash_fwd_launch_template.h, `run_mha_fwd_splitkv_dispatch`). Blocks begin at absolute position 0 and
  are walked downwards; one that a row does not see adds zeros. With one split a row's bits are its own: `sequence`.
- A varlen call splits by the batch's size if `max_seqlen_q` is 1 and query heads share KV heads (flash_api.cpp,
  `seqlenq_ngroups_swapped`). From 2 on it never does; there `max_seqlen_q` is a bound of the grid and no more.
- A varlen row that sees no key makes that kernel write its LSE outside of its buffer (flash_fwd_kernel.h, the early
  exit of `compute_attn_1rowblock_splitkv` knows no unpadded LSE). No such row is ever passed.
- `fwd_kvcache` takes a number of splits. A split's extent is, in flash-attn, the capacity of the block table over the
  number (flash_fwd_kernel.h:528, `params.seqlen_k`): absolute, if the table has one width. In vLLM's it is the
  sequence's own length over the number (`binfo.actual_seqlen_k`): free of the batch, not of the position, so that
  level `batch` is all there is. Hence two implementations and two labels.
- FA3 counts a sequence's splits by the batch (hopper/flash_prepare_scheduler.cu), unless it is handed a schedule that
  says how many there are (`scheduler_metadata`): for one split none is needed, for more it is made here, from the
  sequence's own length. It cuts the KV that a tile of rows sees into so many parts of as many blocks (hopper/block.h,
  `get_n_block_min_max`), keeps them in fp32 and adds them in ascending order (flash_fwd_combine_kernel.h), so that for
  a lone query all follows from its length. A call of more than 992 sequences has one split
  (flash_api.cpp, `PREPARE_VARLEN_MAX_BATCHES_1CTA`), so more are taken in turn.
- FA3's tile follows
  `max_seqlen_q` x group <= 64 (hopper/heuristics.h, `use_one_mma_wg`), which moves the KV block where head_dim is 64;
  causal, which `max_seqlen_q` = 1 drops (hopper/flash_api.cpp, `mha_fwd`); a page that is a multiple of a KV block
  (same, `get_pagedkv_tma`); and a window, which moves where blocks begin.

- FA3 with `q_v` (`attention.mla`: the rotary 64 in q and k, the latent 512 in q_v and v) has one tile, 64 rows by 64 KV
  positions without overlap, whatever causality, the load and `use_one_mma_wg` are: hopper/tile_size.h:18, asked before
  any of them, in every version since 2025-04. Neither a cluster nor the TMA load of packed queries is compiled for a
  head_dim below 128 or another one of values (flash_fwd_launch_template.h:222, 233). So nothing but the split moves the
  order of its sums, and one split is `sequence`. What is left to follow `max_seqlen_q` is the load: by TMA where pages
  hold whole KV blocks, here from 64 positions on, and a call more than 64 packed rows (flash_api.cpp:466,
  `get_pagedkv_tma`). That load brings what is behind a sequence in its last page, and a NaN there times the weight 0
  is NaN; the other one puts zeros in its place (paged_kv.h:249-276). `leftpad_k`, here zeros, is what turns TMA off,
  for any page size, and packed queries on (flash_api.cpp:312). Its cp.async takes 16 bytes: rows must begin on those.

A *lone query* is a sequence with one row in the call. The implementations that split serve lone queries in splits and
longer ones with one split, in one call by fixed launches. Which one a row gets follows from its own sequence, so they
claim `batch`: a decode step is not the bits of that row within a prefill.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch_backends.flash_attn.discovery import FA2, FA2_PACKAGE, FA2_VLLM, FA3
from bidispatch_backends.triton.attention_params import AttentionTile, attention_numerics, attention_tiles

__all__ = [
    "CapacitySplitsParams",
    "LatentSplitsParams",
    "OneSplitParams",
    "OneSplitTile",
    "SplitSizeParams",
    "SplitsParams",
    "WorkspaceTile",
    "causal_kept",
    "fa2_capacity_splits_numerics",
    "fa2_kv_split_numerics",
    "fa2_numerics",
    "fa2_splits_numerics",
    "fa3_kv_split_numerics",
    "fa3_mla_numerics",
    "fa3_mla_splits_numerics",
    "fa3_numerics",
    "fa3_triton_splits_numerics",
    "latent_workspace_tiles",
    "lone_split_tiles",
    "no_sinks",
    "no_window",
    "one_split_tiles",
    "pages_below_a_tile",
    "pages_divide_splits",
    "plain_scores_and_cache",
    "search_one_split",
    "workspace_tiles",
]

_MOST_SPLITS = 128  # flash_api.cpp, set_params_splitkv
_LARGEST_BLOCK = 256
_LATENT_BLOCK = 64  # hopper/tile_size.h:18
_LATENT_WORKSPACE_MB = 2304
_LONE_WORKSPACE_MB = 1024
"""Every lone query must have its splits in parallel: who served it else would depend on how many there are."""


class OneSplitParams(Params):
    """One split. `num_splits` is there to say so."""

    num_splits: int = 1

    @field_validator("num_splits")
    @classmethod
    def _only_one(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                f"num_splits={value}: only 1 keeps prefill = decode; at level batch, flash_attn.fa2_splits, "
                "flash_attn.fa2_capacity_splits and the kv_split implementations of flash_attn split"
            )
        return value


class SplitsParams(Params):
    """So many splits of a sequence's own KV, in fp32 partial results that the library adds in ascending order."""

    num_splits: int = Field(default=16, ge=2, le=_MOST_SPLITS)


class CapacitySplitsParams(Params):
    """So many splits of `kv_capacity` positions, whatever a sequence has of them; fp32 partials, ascending order.

    The capacity is the width of the block table that the library sees, so it is a param and never that of a call.
    """

    num_splits: int = Field(default=32, ge=2, le=_MOST_SPLITS)
    kv_capacity: int = Field(default=131072, ge=_LARGEST_BLOCK)
    """KV positions; no sequence may be longer. A multiple of num_splits x 256, so that splits are whole KV blocks."""

    @model_validator(mode="after")
    def _whole_blocks(self) -> CapacitySplitsParams:
        if self.kv_capacity % (self.num_splits * _LARGEST_BLOCK):
            raise ValueError(
                f"kv_capacity={self.kv_capacity} is not a multiple of num_splits={self.num_splits} x {_LARGEST_BLOCK}"
            )
        return self


class SplitSizeParams(Params):
    """Splits of one size at absolute positions, each a call's own sequence; partial results are in the op's dtype."""

    split_size: int = Field(default=1024, ge=_LARGEST_BLOCK)
    """KV positions, a multiple of 256: whole pages and whole KV blocks."""

    @field_validator("split_size")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % _LARGEST_BLOCK:
            raise ValueError(f"split_size={value} is not a multiple of {_LARGEST_BLOCK}")
        return value


class LatentSplitsParams(Params):
    """Splits of a sequence's own KV, in fp32 partial results that FA3 adds in ascending order.

    A sequence has one for each `split_size` positions that it has begun, at least `least_splits` and at most
    `num_splits`; all of one size, in KV blocks of 64.
    """

    split_size: int = Field(default=512, ge=_LATENT_BLOCK)
    """KV positions, a multiple of 64."""
    least_splits: int = Field(default=1, ge=1)
    """Of a shorter sequence, but no more than one for each `smallest_split`: a few long ones leave a GPU idle."""
    smallest_split: int = Field(default=256, ge=_LATENT_BLOCK)
    """KV positions, a multiple of 64, at most `split_size`. Looked at for `least_splits` alone."""
    num_splits: int = Field(default=32, ge=2, le=_MOST_SPLITS)

    @model_validator(mode="after")
    def _one_rule(self) -> LatentSplitsParams:
        for name in ("split_size", "smallest_split"):
            if getattr(self, name) % _LATENT_BLOCK:
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of {_LATENT_BLOCK}")
        if self.least_splits > self.num_splits:
            raise ValueError(f"least_splits={self.least_splits} is more than num_splits={self.num_splits}")
        if self.least_splits > 1 and self.smallest_split > self.split_size:
            raise ValueError(f"smallest_split={self.smallest_split} is more than split_size={self.split_size}")
        return self


class WorkspaceTile(Tile):
    """How many lone queries are taken at a time."""

    workspace_mb: int = Field(default=512, ge=1)
    """MiB for the copies and partial results of lone queries; more queries than fit are taken in turn."""


class OneSplitTile(WorkspaceTile):
    """How FA2 is shown lone queries: as every other, or as FA2 shows them itself where it may split."""

    pack_lone_queries: bool = False
    """Their query heads that share a KV head as rows of one tile, so that keys are read once for all of them: a copy
    of each row and two small launches a call more. The same blocks, one split: the same bits."""


def one_split_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, OneSplitTile], ...]:
    """The plain call for any number of tokens."""
    return ((None, OneSplitTile()),)


def search_one_split(device: Device, problem: Problem, params: Any, m: int) -> tuple[OneSplitTile, ...]:
    """Both ways where heads share keys."""
    shared = problem.size("num_heads") > problem.size("num_kv_heads")
    return (OneSplitTile(), OneSplitTile(pack_lone_queries=True)) if shared else (OneSplitTile(),)


def latent_workspace_tiles(
    device: Device, problem: Problem, params: Any
) -> tuple[tuple[int | None, WorkspaceTile], ...]:
    """Room for a server's sequences of 128 heads: FA3 holds every split a sequence may have in fp32, 257 KB each."""
    return ((None, WorkspaceTile(workspace_mb=_LATENT_WORKSPACE_MB)),)


def workspace_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, WorkspaceTile], ...]:
    """One for any number of tokens."""
    return ((None, WorkspaceTile()),)


# Labels end with the library and its version: the same call has other KV blocks in another. With one split vLLM's FA2
# has blocks of 64 or 128 positions since 2026-07-13 (3286005c, `run_mha_fwd_splitkv_align`), of twice that before.


def fa2_numerics(params: Any, problem: Problem) -> str:
    """`fa2.<library>`."""
    return f"fa2.{FA2.installed(problem)}"


def fa2_splits_numerics(params: Any, problem: Problem) -> str:
    """`fa2_splits.<splits>.<library>`: of the sequence's own length."""
    return f"fa2_splits.{params.num_splits}.{FA2_VLLM.installed(problem)}"


def fa2_capacity_splits_numerics(params: Any, problem: Problem) -> str:
    """`fa2_capacity_splits.<splits>.<capacity>.<library>`. Both: the sum over splits is laid out by their number."""
    return f"fa2_capacity_splits.{params.num_splits}.{params.kv_capacity}.{FA2_PACKAGE.installed(problem)}"


def fa2_kv_split_numerics(params: Any, problem: Problem) -> str:
    """`fa2_kv_split.<positions>.<library>`."""
    return f"fa2_kv_split.{params.split_size}.{FA2.installed(problem)}"


def fa3_numerics(params: Any, problem: Problem) -> str:
    """`fa3.<library>`."""
    return f"fa3.{FA3.installed(problem)}"


def fa3_kv_split_numerics(params: Any, problem: Problem) -> str:
    """`fa3_kv_split.<positions>.<library>`."""
    return f"fa3_kv_split.{params.split_size}.{FA3.installed(problem)}"


def fa3_mla_numerics(params: Any, problem: Problem) -> str:
    """`fa3_mla.<library>`."""
    return f"fa3_mla.{FA3.installed(problem)}"


def fa3_mla_splits_numerics(params: Any, problem: Problem) -> str:
    """`fa3_mla_splits.<positions>.<splits>.<library>`: both as `512` and `32`, or `256-1024` and `16-64`."""
    positions, splits = str(params.split_size), str(params.num_splits)
    if params.least_splits > 1:
        positions, splits = f"{params.smallest_split}-{positions}", f"{params.least_splits}-{splits}"
    return f"fa3_mla_splits.{positions}.{splits}.{FA3.installed(problem)}"


def fa3_triton_splits_numerics(params: Any, problem: Problem) -> str:
    """`fa3_triton_splits.<as of triton.paged_attention>.<library>`."""
    return f"fa3_triton_splits.{attention_numerics(params, problem).partition('.')[2]}.{FA3.installed(problem)}"


def lone_split_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, AttentionTile], ...]:
    """`triton.paged_attention`'s, for one query token, with room for as many as a server has."""
    return tuple(
        (most, tile.model_copy(update={"decode_query_len": 1, "workspace_mb": _LONE_WORKSPACE_MB}))
        for most, tile in attention_tiles(device, problem, params)
    )


def no_window(device: Device, problem: Problem) -> str | None:
    """FA3 shifts its keys to the window of a tile of rows; that FA2 does not is not shown yet."""
    if not problem.size("window"):
        return None
    return f"needs window=0, asked for {problem['window']}: a window moves where FlashAttention's KV blocks begin"


def no_sinks(device: Device, problem: Problem) -> str | None:
    """FA2 has none, FA3's are bf16 (hopper/flash_api.cpp, `s_aux`) where the op's are fp32."""
    if not problem.flag("sinks"):
        return None
    return "needs sinks=False: FA2 takes no sinks, FA3 takes them in bf16"


def plain_scores_and_cache(device: Device, problem: Problem) -> str | None:
    """ALiBi's slopes and a cache's scales are not handed to the libraries yet."""
    if problem.flag("alibi"):
        return "needs alibi=False"
    if problem["kv_dtype"] != problem.dtype:
        return f"needs a cache of {problem.dtype}, asked for kv_dtype={problem['kv_dtype']}"
    return None


def causal_kept(device: Device, problem: Problem) -> str | None:
    """FA3's KV block follows causality where head_dim is 64."""
    return None if problem.flag("causal") else "needs causal=True: FA3's tile follows it"


def pages_below_a_tile(device: Device, problem: Problem) -> str | None:
    """A page that holds whole KV blocks lets FA3 switch to TMA by max_seqlen_q."""
    page_size = problem.size("page_size")
    if page_size in (16, 32, 64):
        return None
    return f"needs page_size in 16, 32, 64, asked for {page_size}: FA3 chooses another load for larger pages"


def pages_divide_splits(device: Device, problem: Problem) -> str | None:
    """Splits are multiples of 256 positions and must be whole pages."""
    page_size = problem.size("page_size")
    if _LARGEST_BLOCK % page_size == 0:
        return None
    return f"needs page_size to divide {_LARGEST_BLOCK}, asked for {page_size}: splits are whole pages"
