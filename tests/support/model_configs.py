"""Configs of models, for tests that read what a `config.json` says."""

from __future__ import annotations

__all__ = ["QWEN3_8B"]

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}
