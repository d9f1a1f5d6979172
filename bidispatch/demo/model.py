"""A Qwen3 or Llama decoder over flattened tokens and a paged KV cache.

Every sum goes through a bound op. What the model does itself, gathering embeddings, rotating heads and writing the
cache, is row-local and exact: copies, products and sums of two fp32 numbers, each rounded alone, so no bit of a row
can depend on the batch. Functions that torch evaluates otherwise at the tail of a vector (sin, cos, exp) appear only
when the tables are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from bidispatch.demo.config import ModelConfig
from bidispatch.demo.kernels import Kernels
from bidispatch.demo.problems import attention_role, decoder_problems
from bidispatch.demo.weights import LayerWeights, Weights
from bidispatch.errors import UsageError
from bidispatch.runtime.context import Limits

__all__ = ["Batch", "Decoder", "KVCache", "rope_tables", "rotate"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens, sequence after sequence. Sequence b owns rows query_start_loc[b] to query_start_loc[b + 1]."""

    tokens: torch.Tensor
    """[tokens] int64."""
    positions: torch.Tensor
    """[tokens] int64: each token's position in its own sequence."""
    slots: torch.Tensor
    """[tokens] int64: where its key and value go, page · page_size + offset."""
    block_table: torch.Tensor
    """[seqs, max_pages] int32, of constant width."""
    seq_lens: torch.Tensor
    """[seqs] int32: KV positions after this step."""
    query_start_loc: torch.Tensor
    """[seqs + 1] int32."""
    logit_rows: torch.Tensor
    """[rows] int64: the tokens whose log-probabilities are wanted."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def copy_(self, other: Batch) -> None:
        """Overwrite in place with a batch of the same shapes."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, each [pages, page_size, kv_heads, head_dim]."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


def rope_tables(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position below `length`: two [length, head_dim / 2] fp32, computed in fp64.

    Source: RoFormer (arXiv 2104.09864); the llama3 scaling is that of Llama 3.1's reference code.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if scaling := config.rope_scaling:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies[None, :]
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads, first half against second, in fp32, rounded once.

    x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2] fp32.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Decoder:
    """``decoder(batch, cache)`` runs a step and returns fp32 log-probabilities [logit rows, vocab_size].

    `limits` bounds the steps it will be given; every op is bound for them here, once.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels, limits: Limits, page_size: int) -> None:
        if limits.max_seq_len > config.max_position_embeddings:
            raise UsageError(
                f"sequences of up to {limits.max_seq_len} positions, the model has {config.max_position_embeddings} "
                "(max_position_embeddings); shorten the requests"
            )
        self.config, self.page_size = config, page_size
        self._weights = weights
        self._device = weights.embedding.device
        self._cos, self._sin = (table.to(self._device) for table in rope_tables(config, limits.max_seq_len))
        problems = decoder_problems(config, weights.dtype, page_size)
        per_head = replace(limits, max_tokens=limits.max_tokens * config.num_attention_heads)
        sampled = replace(limits, max_tokens=limits.max_seqs)
        self._input_norm = kernels.bind(problems["input_norm"], limits)
        self._qkv = kernels.bind(problems["qkv"], limits)
        self._qk_norm = kernels.bind(problems["qk_norm"], per_head) if config.qk_norm else None
        self._attention = tuple(
            kernels.bind(problems[attention_role(config.window(layer))], limits)
            for layer in range(config.num_hidden_layers)
        )
        self._o = kernels.bind(problems["o"], limits)
        self._add_norm = kernels.bind(problems["add_norm"], limits)
        self._gate_up = kernels.bind(problems["gate_up"], limits)
        self._silu_and_mul = kernels.bind(problems["silu_and_mul"], limits)
        self._down = kernels.bind(problems["down"], limits)
        self._lm_head = kernels.bind(problems["lm_head"], sampled)
        self._log_softmax = kernels.bind(problems["log_softmax"], sampled)

    def new_cache(self, pages: int) -> KVCache:
        """A cache filled with NaN: a kernel that reads what no sequence has written shows it at once."""
        config = self.config
        shape = (pages, self.page_size, config.num_key_value_heads, config.head_dim)

        def layers() -> tuple[torch.Tensor, ...]:
            dtype = self._weights.embedding.dtype
            return tuple(
                torch.full(shape, float("nan"), dtype=dtype, device=self._device)
                for _ in range(config.num_hidden_layers)
            )

        return KVCache(layers(), layers())

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        eps = self.config.rms_norm_eps
        cos = self._cos[batch.positions][:, None, :]
        sin = self._sin[batch.positions][:, None, :]
        residual = self._weights.embedding[batch.tokens]
        layers = self._weights.layers
        x = self._input_norm(residual, layers[0].input_norm, eps=eps)
        for index, layer in enumerate(layers):
            x = self._attend(index, layer, x, cos, sin, batch, cache)
            x, residual = self._add_norm(x, residual, layer.post_attention_norm, eps=eps)
            x = self._silu_and_mul(self._gate_up(x, layer.gate_up, layer.gate_up_bias))
            x = self._down(x, layer.down, layer.down_bias)
            next_norm = layers[index + 1].input_norm if index + 1 < len(layers) else self._weights.norm
            x, residual = self._add_norm(x, residual, next_norm, eps=eps)
        logits = self._lm_head(x[batch.logit_rows], self._weights.lm_head, None)
        log_probabilities: torch.Tensor = self._log_softmax(logits)
        return log_probabilities

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        cache: KVCache,
    ) -> torch.Tensor:
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = self._qkv(x, layer.qkv, layer.qkv_bias)
        q, k, v = qkv.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=-1)
        q = rotate(self._normed(q, heads, layer.q_norm), cos, sin)
        k = rotate(self._normed(k, kv_heads, layer.k_norm), cos, sin)
        keys, values = cache.keys[index], cache.values[index]
        keys.view(-1, kv_heads, head_dim)[batch.slots] = k
        values.view(-1, kv_heads, head_dim)[batch.slots] = v.reshape(-1, kv_heads, head_dim)
        out = self._attention[index](q, keys, values, batch.block_table, batch.seq_lens, batch.query_start_loc)
        return self._o(out.view(-1, heads * head_dim), layer.o, layer.o_bias)  # type: ignore[no-any-return]

    def _normed(self, x: torch.Tensor, heads: int, weight: torch.Tensor | None) -> torch.Tensor:
        """Split heads off, [tokens, heads, head_dim], and norm each where the model does."""
        head_dim = self.config.head_dim
        if self._qk_norm is not None:
            x = self._qk_norm(x.reshape(-1, head_dim), weight, eps=self.config.rms_norm_eps)
        return x.reshape(-1, heads, head_dim)
