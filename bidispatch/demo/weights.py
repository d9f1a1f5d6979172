"""A decoder's weights: random ones at trained-like scale, or those of a safetensors folder.

Both come as tensors under Hugging Face's names and are merged the same way: q, k and v into one product, gate and
up into another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bidispatch.demo.config import ModelConfig
from bidispatch.demo.memory import require_memory
from bidispatch.errors import DeviceError, UsageError

__all__ = ["LayerWeights", "Weights", "has_safetensors", "load", "merge", "random", "tensor_shapes"]

# What makes greedy decoding of random weights lively, as a trained model's is: logits of this standard deviation give
# it a clear favourite among the words; attention scores this much sharper than plain noise's, and layers that add
# this much more than they read, make the favourite follow the context. With gains of 1 it circles around a few words,
# and around one where the head is tied to the embedding.
_LOGIT_SCALE = 3.0
_EMBEDDING_SCALE = 0.3
_QK_GAIN = 2.0
_OUTPUT_GAIN = 2.0
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Matrices are [out_features, in_features]; what a model lacks is None."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything a decoder multiplies by. embedding and lm_head: [vocab_size, hidden_size]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor
    source: str
    """Where they came from, for people."""

    @property
    def dtype(self) -> str:
        """The dtype's name, as the catalogue spells it."""
        return str(self.embedding.dtype).removeprefix("torch.")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model under its Hugging Face name, with its shape."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            linear(f"{layer}.self_attn.{name}_proj", rows, hidden, config.attention_bias)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
        linear(f"{layer}.self_attn.o_proj", hidden, q_width, config.attention_bias)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{layer}.mlp.gate_proj", wide, hidden, config.mlp_bias)
        linear(f"{layer}.mlp.up_proj", wide, hidden, config.mlp_bias)
        linear(f"{layer}.mlp.down_proj", hidden, wide, config.mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random(config: ModelConfig, *, dtype: str, device: str = "cpu", seed: int = 0) -> Weights:
    """Draw weights, on the CPU and in fp32, so that a seed means the same weights whatever device serves them.

    Raises `UsageError` for a model bigger than the memory that is free.
    """
    _require_room(config, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _draw(name, shape, config, generator).to(device=device, dtype=getattr(torch, dtype))
        for name, shape in tensor_shapes(config).items()
    }
    return merge(config, tensors.pop, f"random, seed {seed}")


def _require_room(config: ModelConfig, dtype: str, device: str) -> None:
    """All weights on the device, and the biggest of them, as it is drawn, on the CPU."""
    sizes = [math.prod(shape) for shape in tensor_shapes(config).values()]
    needed = {device: sum(sizes) * getattr(torch, dtype).itemsize}
    needed["cpu"] = needed.get("cpu", 0) + max(sizes) * torch.float32.itemsize
    layers = f"{config.num_hidden_layers} layer{'s' if config.num_hidden_layers > 1 else ''}"
    for place, count in needed.items():
        require_memory(
            count,
            place,
            f"{config.model_type} with {layers} of random weights in {dtype}",
            "free some, or give --model a smaller config.json",
        )


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        weight = noise.mul_(0.1).add_(1.0)
        return weight.mul_(_QK_GAIN) if name.endswith(("q_norm.weight", "k_norm.weight")) else weight
    if name.endswith(".bias"):
        return noise.mul_(0.02)
    if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
        return noise.mul_(_EMBEDDING_SCALE)
    gain = 1.0
    if name in ("lm_head.weight", "model.embed_tokens.weight"):
        gain = _LOGIT_SCALE
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = _OUTPUT_GAIN
    elif name.endswith(("q_proj.weight", "k_proj.weight")) and not config.qk_norm:
        gain = _QK_GAIN
    return noise.mul_(gain / math.sqrt(shape[-1]))


def merge(config: ModelConfig, tensor: Callable[[str], torch.Tensor], source: str) -> Weights:
    """Make `Weights` of tensors asked for by Hugging Face name."""

    def stacked(prefix: str, parts: tuple[str, ...], suffix: str) -> torch.Tensor:
        return torch.cat([tensor(f"{prefix}.{part}_proj.{suffix}") for part in parts])

    def layer(index: int) -> LayerWeights:
        name = f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        biased, mlp_biased = config.attention_bias, config.mlp_bias
        return LayerWeights(
            input_norm=tensor(f"{name}.input_layernorm.weight"),
            qkv=stacked(attention, ("q", "k", "v"), "weight"),
            qkv_bias=stacked(attention, ("q", "k", "v"), "bias") if biased else None,
            q_norm=tensor(f"{attention}.q_norm.weight") if config.qk_norm else None,
            k_norm=tensor(f"{attention}.k_norm.weight") if config.qk_norm else None,
            o=tensor(f"{attention}.o_proj.weight"),
            o_bias=tensor(f"{attention}.o_proj.bias") if biased else None,
            post_attention_norm=tensor(f"{name}.post_attention_layernorm.weight"),
            gate_up=stacked(mlp, ("gate", "up"), "weight"),
            gate_up_bias=stacked(mlp, ("gate", "up"), "bias") if mlp_biased else None,
            down=tensor(f"{mlp}.down_proj.weight"),
            down_bias=tensor(f"{mlp}.down_proj.bias") if mlp_biased else None,
        )

    embedding = tensor("model.embed_tokens.weight")
    return Weights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=tensor("model.norm.weight"),
        lm_head=embedding if config.tie_word_embeddings else tensor("lm_head.weight"),
        source=source,
    )


def has_safetensors(folder: Path) -> bool:
    """Whether the folder holds weights, as one file or as shards with an index."""
    return (folder / _INDEX).is_file() or any(folder.glob("*.safetensors"))


def load(folder: Path, config: ModelConfig, *, dtype: str, device: str = "cpu") -> Weights:
    """Load a folder's safetensors, converted to `dtype`.

    Raises `UsageError` that lists every missing, extra and mis-shaped tensor, or says which file is broken, and
    `DeviceError` where the package safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise DeviceError(f"{folder} holds safetensors; reading them needs `pip install safetensors`") from error

    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{path} cannot be read: {error}; download it again") from error
            files.update(dict.fromkeys(file.keys(), file))
        _check(folder, config, {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()})

        def tensor(name: str) -> torch.Tensor:
            found: torch.Tensor = files[name].get_tensor(name)
            return found.to(device=device, dtype=getattr(torch, dtype))

        return merge(config, tensor, str(folder))


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"{folder} holds no *.safetensors")
        return files
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no safetensors index ({error!r}); download it again") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UsageError(f"{index} names files that are not there: {', '.join(missing)}; download them")
    return [folder / name for name in sorted(names)]


def _check(folder: Path, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    expected = tensor_shapes(config)
    faults = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        if name not in expected:
            # Kept by old exports and recomputed or shared by everyone who loads them.
            if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                faults.append(f"extra {name} {list(shape)}")
        elif shape != expected[name]:
            faults.append(f"{name} is {list(shape)}, the config needs {list(expected[name])}")
    if faults:
        raise UsageError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(faults))
