"""What a dense Qwen3 or Llama decoder is, read from a Hugging Face `config.json` or built in. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from bidispatch.errors import UsageError, did_you_mean

__all__ = ["CPU_MODEL", "GPU_MODEL", "Llama3Rope", "ModelConfig"]

MODEL_TYPES = ("qwen3", "llama")
ROPE_TYPES = ("default", "llama3")

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1's scaling of the rotary frequencies: long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's architecture. Names and defaults are those of Hugging Face's `config.json`."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_windows: tuple[int, ...] = ()
    """Positions each layer's queries see, their own included; 0 sees all. Empty: every layer sees all."""

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed head by head, as Qwen3 does."""
        return self.model_type == "qwen3"

    def window(self, layer: int) -> int:
        """The sliding window of a layer, 0 where it sees all."""
        return self.layer_windows[layer] if self.layer_windows else 0

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json`. Raises `UsageError`: no file, one that cannot be read, broken JSON, or a model
        this demo cannot run.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{path} does not exist; --model takes a Hugging Face folder with a config.json") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}; --model takes a folder you may read") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not JSON: {error}; download the model's config.json again") from None
        if not isinstance(raw, dict):
            raise UsageError(f"{path} must hold a JSON object, it holds a {type(raw).__name__}")
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Make a config of `config.json`'s content. Raises `UsageError` that lists everything wrong with it."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UsageError(
                f"{source}: model_type is {model_type!r}; this demo runs dense models of type "
                f"{' or '.join(MODEL_TYPES)}{did_you_mean(str(model_type), MODEL_TYPES)}"
            )
        reader = _Reader(raw)
        config = _parse(reader, model_type)
        if reader.faults:
            raise UsageError(f"{source}: {'; '.join(reader.faults)}")
        return config


class _Reader:
    """Takes typed values out of a mapping and collects what is wrong, so that one message can say it all."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.faults: list[str] = []

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is int and value >= 1:
            return value
        return self._wrong(key, "a whole number of at least 1", value, default or 1)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value)
        return self._wrong(key, "a number above 0", value, default or 1.0)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._value(key, default)
        return value if isinstance(value, bool) else self._wrong(key, "true or false", value, default)

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def _wrong(self, key: str, wanted: str, value: Any, stand_in: _Value) -> _Value:
        there = "is missing" if value is None else f"is {value!r}"
        self.faults.append(f"{key} {there}, it must be {wanted}")
        return stand_in


def _parse(read: _Reader, model_type: str) -> ModelConfig:
    raw = read.raw
    qwen3 = model_type == "qwen3"
    hidden_size, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    layers = read.whole("num_hidden_layers")
    theta, scaling = _rope(read)
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=read.whole("num_key_value_heads", 32 if qwen3 else heads),
        head_dim=read.whole("head_dim", 128 if qwen3 else max(1, hidden_size // heads)),
        intermediate_size=read.whole("intermediate_size"),
        vocab_size=read.whole("vocab_size"),
        max_position_embeddings=read.whole("max_position_embeddings", 32768 if qwen3 else 2048),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        layer_windows=_windows(read, qwen3, layers),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        read.faults.append(
            f"num_attention_heads is {heads}, it must be a multiple of num_key_value_heads, "
            f"{config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        read.faults.append(f"head_dim is {config.head_dim}, rotary embedding needs it even")
    if qwen3 and config.mlp_bias:
        read.faults.append("mlp_bias is true, Qwen3 has none")
    if (act := raw.get("hidden_act", "silu")) != "silu":
        read.faults.append(f"hidden_act is {act!r}, this demo runs silu")
    if raw.get("quantization_config"):
        read.faults.append("quantization_config is set, this demo runs unquantised weights")
    return config


def _rope(read: _Reader) -> tuple[float, Llama3Rope | None]:
    """Base and scaling, from `rope_theta` with `rope_scaling`, or from the `rope_parameters` that replaced them."""
    key = "rope_parameters" if read.raw.get("rope_parameters") else "rope_scaling"
    rope = read.raw.get(key) or {}
    if not isinstance(rope, Mapping):
        read.faults.append(f"{key} is {rope!r}, it must be an object")
        return 1.0, None
    inner = _Reader(rope)
    theta = inner.number("rope_theta") if "rope_theta" in rope else read.number("rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "llama3":
        scaling = Llama3Rope(
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_max_position_embeddings=inner.whole("original_max_position_embeddings"),
        )
        if not inner.faults and scaling.high_freq_factor <= scaling.low_freq_factor:
            inner.faults.append("high_freq_factor must be above low_freq_factor")
    elif kind not in ROPE_TYPES:
        inner.faults.append(f"rope_type is {kind!r}, this demo runs {' and '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        inner.faults.append("partial_rotary_factor is set, this demo rotates whole heads")
    read.faults += [f"{key}.{fault}" for fault in inner.faults]
    return theta, scaling


def _windows(read: _Reader, qwen3: bool, layers: int) -> tuple[int, ...]:
    """Sliding windows layer by layer: Qwen3 may slide from layer `max_window_layers` on; Llama never does."""
    sliding = read.flag("use_sliding_window")
    if not qwen3:
        if sliding or read.raw.get("sliding_window"):
            read.faults.append("sliding_window is set, Llama has none")
        return ()
    if not sliding or read.raw.get("sliding_window") is None:
        return ()
    window = read.whole("sliding_window")
    kinds = read.raw.get("layer_types")
    if kinds is None:
        first = read.raw.get("max_window_layers", 28)
        if type(first) is not int:
            read.faults.append(f"max_window_layers is {first!r}, it must be a whole number")
            return ()
        return tuple(window if layer >= first else 0 for layer in range(layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        read.faults.append(f"layer_types must name {' or '.join(known)} for each of {layers} layers, it is {kinds!r}")
        return ()
    return tuple(known[cast(str, kind)] for kind in kinds)


CPU_MODEL = ModelConfig(
    model_type="qwen3",
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=8192,
    max_position_embeddings=4096,
    rope_theta=1e6,
)
"""A Qwen3 small enough for two CPU cores; fp32."""

GPU_MODEL = ModelConfig(
    model_type="qwen3",
    hidden_size=2048,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=6144,
    vocab_size=32768,
    max_position_embeddings=32768,
    rope_theta=1e6,
)
"""A Qwen3 with the layer shapes of Qwen3-1.7B; bf16."""
