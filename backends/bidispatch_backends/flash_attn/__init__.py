"""FlashAttention's kernels over a paged cache: FA2 of the `flash-attn` package or of vLLM, FA3 of vLLM.

This file only registers; it imports neither torch nor a library. What keeps each implementation's bits, and the source
it was read in, is said in `params`, where the conditions are.
"""

from __future__ import annotations

from bidispatch.invariance import Invariance
from bidispatch.registry import Implementation, Registry
from bidispatch.requirements import Check, DimAtMost, DimIn, DimMultipleOf, Package, Requirement
from bidispatch_backends.flash_attn import params
from bidispatch_backends.flash_attn.discovery import FA2, FA2_PACKAGE, FA2_VLLM, FA3, Libraries
from bidispatch_backends.triton.attention_params import AttentionParams, AttentionTile

__all__ = ["register"]

_DTYPES = ("bfloat16", "float16")
_TRITON = Package("triton", ">=3.2", alternatives=("triton-rocm", "pytorch-triton-rocm"))
_FA2_ARCHS = ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")


def _fa2(libraries: Libraries) -> tuple[Requirement, ...]:
    return (
        libraries,
        _TRITON,
        DimMultipleOf("head_dim", 8),
        DimAtMost("head_dim", 256),
        Check(params.no_window),
        Check(params.no_sinks),
        Check(params.plain_scores_and_cache),
    )


_FA3: tuple[Requirement, ...] = (
    FA3,
    _TRITON,
    Check(params.causal_kept),
    Check(params.pages_below_a_tile),
    Check(params.no_window),
    Check(params.no_sinks),
    Check(params.plain_scores_and_cache),
)


_FA3_MLA: tuple[Requirement, ...] = (FA3, _TRITON, DimIn("kv_lora_rank", (512,)), DimIn("rope_dim", (64,)))
"""The widths whose tile was read; others have other tiles, or no kernel (hopper/flash_api.cpp, `q_v`)."""


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
    registry.register(
        Implementation(
            name="flash_attn.fa2",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa2",
            archs=_FA2_ARCHS,
            dtypes=_DTYPES,
            requires=_fa2(FA2),
            numerics=params.fa2_numerics,
            claims=Invariance.SEQUENCE,
            params=params.OneSplitParams,
            tile=params.OneSplitTile,
            tiles=params.one_split_tiles,
            search="bidispatch_backends.flash_attn.params:search_one_split",
            libraries=("flash-attn", "vllm"),
            summary="FA2, paged, one split; never the heuristic that splits by the batch",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa2_splits",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa2_splits",
            archs=_FA2_ARCHS,
            dtypes=_DTYPES,
            requires=_fa2(FA2_VLLM),
            numerics=params.fa2_splits_numerics,
            claims=Invariance.BATCH,
            params=params.SplitsParams,
            tile=params.WorkspaceTile,
            tiles=params.workspace_tiles,
            libraries=("vllm",),
            summary="vLLM's FA2; a fixed number of splits of a lone query's own KV, longer queries in one",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa2_capacity_splits",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa2_capacity_splits",
            archs=_FA2_ARCHS,
            dtypes=_DTYPES,
            requires=(*_fa2(FA2_PACKAGE), Check(params.pages_divide_splits)),
            numerics=params.fa2_capacity_splits_numerics,
            claims=Invariance.BATCH,
            params=params.CapacitySplitsParams,
            tile=params.WorkspaceTile,
            tiles=params.workspace_tiles,
            libraries=("flash-attn",),
            summary="FA2; a lone query's KV in splits of kv_capacity / num_splits positions, longer queries in one",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa2_kv_split",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa2_kv_split",
            archs=_FA2_ARCHS,
            dtypes=_DTYPES,
            requires=(*_fa2(FA2), Check(params.pages_divide_splits)),
            numerics=params.fa2_kv_split_numerics,
            claims=Invariance.BATCH,
            params=params.SplitSizeParams,
            tile=params.WorkspaceTile,
            tiles=params.workspace_tiles,
            libraries=("flash-attn", "vllm", "triton"),
            summary="FA2; a lone query's KV in splits of one size, merged in ascending order; longer queries in one",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa3",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa3",
            archs=("sm90",),
            dtypes=_DTYPES,
            requires=(*_FA3, DimIn("head_dim", (64, 128))),
            numerics=params.fa3_numerics,
            claims=Invariance.SEQUENCE,
            params=params.OneSplitParams,
            libraries=("vllm",),
            summary="vLLM's FA3, paged, one split, its tile pinned",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa3_kv_split",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa3_kv_split",
            archs=("sm90",),
            dtypes=_DTYPES,
            requires=(*_FA3, DimIn("head_dim", (128,))),
            numerics=params.fa3_kv_split_numerics,
            claims=Invariance.BATCH,
            params=params.SplitSizeParams,
            tile=params.WorkspaceTile,
            tiles=params.workspace_tiles,
            libraries=("vllm", "triton"),
            summary="vLLM's FA3; a lone query's KV in splits of one size, merged in ascending order; longer in one",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa3_triton_splits",
            op="attention",
            load="bidispatch_backends.flash_attn.attention:bind_fa3_triton_splits",
            archs=("sm90",),
            dtypes=_DTYPES,
            requires=(*_FA3, DimIn("head_dim", (64, 128))),
            numerics=params.fa3_triton_splits_numerics,
            claims=Invariance.BATCH,
            params=AttentionParams,
            tile=AttentionTile,
            tiles=params.lone_split_tiles,
            libraries=("vllm", "triton"),
            summary="vLLM's FA3, one split; lone queries by the parallel splits of triton.paged_attention",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa3_mla",
            op="attention.mla",
            load="bidispatch_backends.flash_attn.attention:bind_fa3_mla",
            archs=("sm90",),
            dtypes=_DTYPES,
            requires=_FA3_MLA,
            numerics=params.fa3_mla_numerics,
            claims=Invariance.SEQUENCE,
            params=params.OneSplitParams,
            libraries=("vllm",),
            summary="vLLM's FA3 with q_v, paged, one split, no load by TMA",
        )
    )
    registry.register(
        Implementation(
            name="flash_attn.fa3_mla_splits",
            op="attention.mla",
            load="bidispatch_backends.flash_attn.attention:bind_fa3_mla_splits",
            archs=("sm90",),
            dtypes=_DTYPES,
            requires=_FA3_MLA,
            numerics=params.fa3_mla_splits_numerics,
            claims=Invariance.BATCH,
            params=params.LatentSplitsParams,
            tile=params.WorkspaceTile,
            tiles=params.latent_workspace_tiles,
            libraries=("vllm",),
            summary="vLLM's FA3 with q_v; splits of a lone query's own KV, never by the batch; longer queries in one",
        )
    )
