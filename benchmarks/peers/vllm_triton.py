"""vLLM's Triton attention as its invariant mode runs it: the kernel without splits, for decode and prefill."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from peers.installed import AbsentError, Peer

__all__ = ["attention"]

_MODULES = ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention")
_SPLIT_SWITCH = "seq_threshold_3D"
"""Where the caller gives none, the kernel with splits is never taken. Versions without it choose by themselves."""


def attention(call: Any) -> Peer:
    """Raises `AbsentError` without vllm, or with one whose function chooses splits by itself."""
    function = _function()
    taken = inspect.signature(function).parameters
    if _SPLIT_SWITCH not in taken:
        raise AbsentError("this vllm's unified_attention splits as it likes")
    fixed = {
        "q": call["q"],
        "k": call["k_cache"],
        "v": call["v_cache"],
        "out": call.out,
        "cu_seqlens_q": call.query_start_loc,
        "max_seqlen_q": call.query,
        "seqused_k": call.seq_lens,
        "max_seqlen_k": call.context,
        "softmax_scale": call.scalars[0],
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
    }
    return Peer(lambda i: function(**fixed, block_table=call.table(i)))


def _function() -> Any:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name).unified_attention
        except (ImportError, AttributeError) as error:  # noqa: PERF203 - another version's place
            reasons.append(f"{name}: {error}")
    raise AbsentError(f"no vllm with unified_attention is installed: {'; '.join(reasons)}")
