"""The largest step a vLLM server sends, and what of a server's configuration attention does not cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bidispatch.errors import SelectionError

__all__ = ["StepLimits", "need_covered"]

_MOST_DECODE_QUERIES = 16
"""Above this many query tokens a sequence, kernels do not take the way of decode steps (docs/attention.md)."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What kernels are bound for."""

    max_tokens: int
    max_seqs: int
    max_seq_len: int
    decode_query_len: int
    """Query tokens of a sequence in a decode step: 1, and the drafts of speculative decoding; 0 if those are many."""
    decode_tokens: int
    """Most rows of a decode step."""

    @classmethod
    def of(cls, vllm_config: Any) -> StepLimits:
        """Read them from a `VllmConfig`."""
        scheduler = vllm_config.scheduler_config
        drafts = _drafts(vllm_config)
        captured = getattr(vllm_config.compilation_config, "max_cudagraph_capture_size", None) or 0
        # A graph's step is padded to the size it was captured with.
        max_tokens = max(scheduler.max_num_batched_tokens, captured)
        # Verification may put its last drafts behind the last position.
        max_seq_len = vllm_config.model_config.max_model_len + drafts
        queries = drafts + 1 if drafts < _MOST_DECODE_QUERIES else 0
        rows = min(max_tokens, max(scheduler.max_num_seqs * queries, captured))
        return cls(max_tokens, scheduler.max_num_seqs, max_seq_len, queries, rows)

    def is_decode(self, max_query_len: int, tokens: int) -> bool:
        """Whether the kernel bound for decode steps may serve a step; the other has the same bits."""
        return max_query_len <= self.decode_query_len and tokens <= self.decode_tokens


def _drafts(vllm_config: Any) -> int:
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.num_speculative_tokens is None:
        return 0
    # A parallel drafter verifies as many tokens again (vLLM 0.33.0, v1/attention/backend.py:max_decode_query_len).
    return int(speculative.num_speculative_tokens) * (2 if getattr(speculative, "parallel_drafting", False) else 1)


def need_covered(vllm_config: Any) -> None:
    """Raise `SelectionError` that names all of a configuration that breaks the promise or is not served."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    against = []
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        against.append("decode context parallelism merges parts of a sequence by its length; use size 1")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        against.append("prefill context parallelism is not served; use size 1")
    if getattr(parallel, "use_ubatching", False):
        against.append("two micro-batches at a time would share a kernel's workspace; leave --enable-dbo off")
    if getattr(cache, "calculate_kv_scales", False):
        against.append("calculate_kv_scales takes the scales of the cache from the first batch; give them or use 1.0")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        against.append("kv_sharing_fast_prefill is not served; leave it off")
    if getattr(vllm_config.attention_config, "use_non_causal", False):
        against.append("non-causal attention over the cache is not served")
    if against:
        raise SelectionError("bidispatch's attention in vLLM: " + "; ".join(against))
