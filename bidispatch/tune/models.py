"""The products, experts and rows of a model on one rank, from its Hugging Face `config.json`. Imports no torch.

Names and fusions are those of serving engines: q, k and v in one weight, gate and up in one, DeepSeek's q_a with kv_a.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bidispatch import ops
from bidispatch.errors import UsageError
from bidispatch.ops.quantize import FP8, FUSED
from bidispatch.ops.schema import DimValue
from bidispatch.ops.shapes import Shape
from bidispatch.tune.formats import format_of

__all__ = ["EXPERT_COUNTS", "expert_shapes", "model_shapes", "of_text", "read_config", "router_shape", "row_shapes"]

EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
"""What families call the number of a layer's experts, over all ranks."""

_VOCABULARY_MULTIPLE = 64
"""Serving engines pad the vocabulary to this before they shard it."""

_Named = tuple[str, Mapping[str, DimValue]]


def model_shapes(path: Path, tensor_parallel: int = 1) -> list[Shape]:
    """The distinct products of one rank: n, k and, for a router, its role and fp32 result; each with its layers' names.

    path: a `config.json` or the folder it is in. Raises `UsageError` for a file that is no such config, a model whose
    layers are not known here, and a tensor-parallel size that does not divide it.
    """
    reader = _reader(path, tensor_parallel)
    names: dict[str, tuple[list[str], Mapping[str, DimValue]]] = {}
    for name, dims in reader.products():
        names.setdefault(json.dumps(dims, sort_keys=True), ([], dims))[0].append(f"{reader.model} {name}")
    return [Shape(tuple(found), dims) for found, dims in names.values()]


def expert_shapes(path: Path, tensor_parallel: int = 1, expert_parallel: int = 1) -> list[Shape]:
    """The dims of `moe.experts` on one rank. With expert_parallel above 1 a rank has whole experts, as in vLLM's expert
    parallelism, and tensor_parallel divides nothing here; else it divides the width of every expert. Their weights are
    in fp8 where the config says so.

    Raises `UsageError` as `model_shapes` does, for a model without experts, and for weights of another format.
    """
    if expert_parallel < 1:
        raise UsageError(f"an expert-parallel size is at least 1, not {expert_parallel}")
    reader = _reader(path, tensor_parallel)
    return [Shape((f"{reader.model} experts",), reader.experts(expert_parallel))]


def router_shape(path: Path) -> Shape:
    """The dims of `moe.router`, which every rank has whole. Raises `UsageError` as `model_shapes` does, and for a model
    without experts.
    """
    reader = _reader(path, 1)
    return Shape((f"{reader.model} router",), reader.router())


def row_shapes(op: str, path: Path, tensor_parallel: int = 1) -> list[Shape]:
    """The dims of an op that quantises rows, alone or behind another: the rows that one rank's products read.

    Raises `UsageError` as `model_shapes` does, and for an op that has none.
    """
    plain = [shape for shape in model_shapes(path, tensor_parallel) if "role" not in shape.dims]
    before = FUSED[op].name if op in FUSED else ""
    if before == "silu_and_mul":
        plain = [shape for shape in plain if any(name.endswith("down") for name in shape.names)]
    elif before:
        plain = [shape for shape in plain if any(name.endswith(("qkv", "qkv_a", "gate_up")) for name in shape.names)]
    size = "n" if before else "k"
    if size not in ops.get(op).dim_names:
        raise UsageError(f"{op} reads no rows of a product; --shapes FILE takes any shapes")
    names: dict[DimValue, tuple[str, ...]] = {}
    for shape in plain:
        width = shape.dims["k"]
        names[width] = (*names.get(width, ()), *shape.names)
    if not names:
        raise UsageError(f"no layer of {path} reads what {op} gives; --shapes FILE takes any shapes")
    return [Shape(found, {size: width}) for width, found in names.items()]


def read_config(path: Path) -> Mapping[str, Any]:
    """A `config.json`, or that of a folder. Raises `UsageError` where it cannot be read."""
    file = _file(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not a readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} is not a mapping; --model wants a model's config.json, or its folder")
    return config


def of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of the language model, where a model has more than text."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def _file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _reader(path: Path, tensor_parallel: int) -> _Reader:
    return _Reader(_file(path), of_text(read_config(path)), tensor_parallel)


class _Reader:
    """One config, asked for what it must hold."""

    def __init__(self, file: Path, config: Mapping[str, Any], ranks: int) -> None:
        if ranks < 1:
            raise UsageError(f"a tensor-parallel size is at least 1, not {ranks}")
        self._file, self._config, self._ranks = file, config, ranks
        self.model = str(config.get("model_type", "model"))

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            there = "missing" if value is None else repr(value)
            raise UsageError(
                f"{self._file}: {key} is {there}; a decoder's config.json has a positive number there. "
                "--shapes FILE takes any shapes"
            )
        return value

    def _share(self, size: int, of: str) -> int:
        if size % self._ranks:
            raise UsageError(f"{self._file}: {of}={size} is not divided by a tensor-parallel size of {self._ranks}")
        return size // self._ranks

    def products(self) -> Iterator[_Named]:
        """Every product of one rank, with its name."""
        hidden = self._size("hidden_size")
        yield from self._latent_attention(hidden) if "kv_lora_rank" in self._config else self._attention(hidden)
        experts = self._experts_key()
        if experts:
            yield "router", {"n": self._size(experts), "k": hidden, "role": "router", "out_dtype": "float32"}
            if self._config.get("n_shared_experts"):
                inner = self._size("moe_intermediate_size") * self._size("n_shared_experts")
                yield from self._mlp(hidden, inner, "shared_")
            elif self._config.get("shared_expert_intermediate_size"):  # Qwen2-MoE: one, which a gate of its own scales
                yield from self._mlp(hidden, self._size("shared_expert_intermediate_size"), "shared_")
                yield "shared_expert_gate", {"n": 1, "k": hidden}  # every rank has it whole
        some_dense = ("first_k_dense_replace", "mlp_only_layers")
        every_nth = (self._config.get("decoder_sparse_step") or 1) != 1
        if not experts or every_nth or any(self._config.get(key) for key in some_dense):
            yield from self._mlp(hidden, self._size("intermediate_size"), "")
        vocabulary = -(-self._size("vocab_size") // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        yield "lm_head", {"n": self._share(vocabulary, "the padded vocab_size"), "k": hidden}

    def _experts_key(self) -> str | None:
        return next((key for key in EXPERT_COUNTS if self._config.get(key)), None)

    def _routed(self) -> tuple[int, int]:
        """The experts of a layer, over all ranks, and how many of them a token takes."""
        key = self._experts_key()
        if key is None:
            raise UsageError(f"{self._file}: {self.model} has no experts; `tune gemm` takes its products")
        return self._size(key), self._size("num_experts_per_tok")

    def router(self) -> Mapping[str, DimValue]:
        experts, top_k = self._routed()
        renormalize = self._config.get("norm_topk_prob")
        return {
            "experts": experts,
            "top_k": top_k,
            "scoring": str(self._config.get("scoring_func") or "softmax"),
            "renormalize": True if renormalize is None else bool(renormalize),
            "correction_bias": self._config.get("topk_method") == "noaux_tc",
            "n_group": self._size("n_group", 1),
            "topk_group": self._size("topk_group", 1),
            "routed_scaling_factor": float(self._config.get("routed_scaling_factor") or 1.0),
        }

    def experts(self, expert_parallel: int) -> Mapping[str, DimValue]:
        """The dims of one rank's experts."""
        everywhere, top_k = self._routed()
        if everywhere % expert_parallel:
            raise UsageError(
                f"{self._file}: {self._experts_key()}={everywhere} is not divided by {expert_parallel} ranks of --ep"
            )
        width_key = "moe_intermediate_size" if self._config.get("moe_intermediate_size") else "intermediate_size"
        width = self._size(width_key)
        dims: dict[str, DimValue] = {
            "experts": everywhere // expert_parallel,
            "top_k": top_k,
            "hidden": self._size("hidden_size"),
            "intermediate": width if expert_parallel > 1 else self._share(width, width_key),
        }
        if expert_parallel > 1:
            dims |= {"expert_map": True, "global_experts": everywhere}
        found = format_of(self._config)
        if found.experts:
            raise UsageError(f"{self._file}: {found.experts}; --shapes FILE takes any shapes")
        of_fp8: dict[str, DimValue] = {"weight_dtype": FP8} if found.fp8_experts else {}
        return {**dims, **self._activation(), **of_fp8}

    def _activation(self) -> Mapping[str, DimValue]:
        if self.model == "gpt_oss":
            return {"activation": "swiglu_clamped", "bias": True, "swiglu_limit": float(self._config["swiglu_limit"])}
        name = str(self._config.get("hidden_act", "silu"))
        if name not in ("silu", "gelu"):
            raise UsageError(
                f"{self._file}: hidden_act={name!r} is none of silu and gelu; --shapes FILE takes any shapes"
            )
        return {} if name == "silu" else {"activation": name}

    def _attention(self, hidden: int) -> Iterator[_Named]:
        heads = self._size("num_attention_heads")
        kv_heads = self._size("num_key_value_heads", heads)
        width = self._size("head_dim", hidden // heads)
        mine = self._share(heads, "num_attention_heads")
        # With fewer key heads than ranks, each rank holds a copy of one.
        if kv_heads < self._ranks and self._ranks % kv_heads:
            raise UsageError(
                f"{self._file}: num_key_value_heads={kv_heads} does not divide a tensor-parallel size of {self._ranks}"
            )
        kv_mine = self._share(kv_heads, "num_key_value_heads") if kv_heads >= self._ranks else 1
        yield "qkv", {"n": (mine + 2 * kv_mine) * width, "k": hidden}
        yield "o", {"n": hidden, "k": mine * width}

    def _latent_attention(self, hidden: int) -> Iterator[_Named]:
        """DeepSeek-V2 and V3."""
        heads = self._share(self._size("num_attention_heads"), "num_attention_heads")
        latent, rope = self._size("kv_lora_rank"), self._size("qk_rope_head_dim")
        plain, value = self._size("qk_nope_head_dim"), self._size("v_head_dim")
        if self._config.get("q_lora_rank"):
            rank = self._size("q_lora_rank")
            yield "qkv_a", {"n": rank + latent + rope, "k": hidden}
            yield "q_b", {"n": heads * (plain + rope), "k": rank}
        else:
            yield "q", {"n": heads * (plain + rope), "k": hidden}
            yield "kv_a", {"n": latent + rope, "k": hidden}
        yield "kv_b", {"n": heads * (plain + value), "k": latent}
        yield "o", {"n": hidden, "k": heads * value}

    def _mlp(self, hidden: int, inner: int, prefix: str) -> Iterator[_Named]:
        mine = self._share(inner, f"{prefix}intermediate size")
        yield f"{prefix}gate_up", {"n": 2 * mine, "k": hidden}
        yield f"{prefix}down", {"n": hidden, "k": mine}
