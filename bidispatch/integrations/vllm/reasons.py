"""Why layers are not promised, and what helps, where a built model's table and its config's say the same.

Imports nothing, so that a report needs no vLLM.
"""

from __future__ import annotations

__all__ = ["ENCODER", "SAMPLER", "SEES_LATER", "SPARSE", "STATE"]

_NONE_OF_EACH = """--limit-mm-per-prompt '{"image": 0}', and 0 of each other kind,"""

ENCODER = (
    f"attention of an encoder is vLLM's choice (--mm-encoder-attn-backend), and was not looked at; {_NONE_OF_EACH} "
    "leaves the encoder out"
)
# is_mm_prefix_lm of vLLM's ModelConfig. Before 0.29 the override alone counts, later the limits do
# (config/model.py, `_supports_multimodal_for_mm_prefix`).
SEES_LATER = (
    f"tokens of an image see later ones, which is not served; for text alone {_NONE_OF_EACH} with "
    """--hf-overrides '{"is_mm_prefix_lm": false}' makes attention causal"""
)
# v1/attention/selector.py, `_cached_get_mamba_attn_backend`: no backend of these layers claims it, 0.25.1 to 0.33.0.
STATE = (
    "it keeps a state in place of a cache, which nothing here serves, and vLLM stops there in its own mode ('VLLM "
    "batch_invariant mode is not supported for ...'); leave VLLM_BATCH_INVARIANT out, or take a model without"
)
SPARSE = (
    "sparse attention is not served here, and no backend of vLLM's claims it in its own mode; leave "
    "VLLM_BATCH_INVARIANT out, or take a model without"
)
SAMPLER = (
    "sampling, logprobs and prompt_logprobs are vLLM's, in its own batch-invariant mode; greedy tokens follow the "
    "logits alone"
)
