"""What a decoder asks of a plan: the problem behind each role in the model. Imports no torch."""

from __future__ import annotations

from bidispatch import ops
from bidispatch.demo.config import ModelConfig
from bidispatch.ops.schema import DimValue, Problem

__all__ = ["attention_role", "decoder_problems"]


def attention_role(window: int) -> str:
    """The role of the layers whose queries see `window` positions (0: all)."""
    return f"attention_window_{window}" if window else "attention"


def decoder_problems(config: ModelConfig, dtype: str, page_size: int) -> dict[str, Problem]:
    """Every problem the decoder binds, by role. Logits and log-probabilities are fp32 whatever the dtype."""
    hidden, wide, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def gemm(n: int, k: int, **more: DimValue) -> Problem:
        return ops.get("gemm").problem(dtype, {"n": n, "k": k, **more})

    def rows(op: str, n: int, op_dtype: str = dtype) -> Problem:
        return ops.get(op).problem(op_dtype, {"n": n})

    problems = {
        "input_norm": rows("rms_norm", hidden),
        "qkv": gemm((heads + 2 * kv_heads) * head_dim, hidden, bias=config.attention_bias),
        "o": gemm(hidden, heads * head_dim, bias=config.attention_bias),
        "add_norm": rows("fused_add_rms_norm", hidden),
        "gate_up": gemm(2 * wide, hidden, bias=config.mlp_bias),
        "silu_and_mul": rows("silu_and_mul", wide),
        "down": gemm(hidden, wide, bias=config.mlp_bias),
        "lm_head": gemm(config.vocab_size, hidden, out_dtype="float32"),
        "log_softmax": rows("log_softmax", config.vocab_size, "float32"),
    }
    if config.qk_norm:
        problems["qk_norm"] = rows("rms_norm", head_dim)
    for window in sorted({config.window(layer) for layer in range(config.num_hidden_layers)}):
        problems[attention_role(window)] = ops.get("attention").problem(
            dtype,
            {
                "head_dim": head_dim,
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "page_size": page_size,
                "window": window,
            },
        )
    return problems
