"""vLLM's attention interfaces as small modules, for an environment without vLLM: what 0.25.1 and 0.33.0 share.

Signatures and names are those of v1/attention/backend.py, backends/registry.py and selector.py.
"""

from __future__ import annotations

import enum
import functools
import importlib
import sys
import types
from abc import ABC, abstractmethod
from importlib.machinery import ModuleSpec
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    NEVER = 0


class AttentionMetadata:
    pass


class AttentionMetadataBuilder(ABC, Generic[T]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...


class AttentionImpl(ABC, Generic[T]):
    @abstractmethod
    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ): ...


class MLAAttentionImpl(ABC, Generic[T]):
    @abstractmethod
    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer): ...


class MultipleOf:
    def __init__(self, base):
        self.base = base


class AttentionBackend(ABC):
    @staticmethod
    @abstractmethod
    def get_name(): ...

    @classmethod
    def is_mla(cls):
        return False

    @classmethod
    def supports_sink(cls):
        return False

    @classmethod
    def supports_batch_invariance(cls):
        return False

    @classmethod
    def validate_configuration(
        cls, head_size, dtype, kv_cache_dtype, use_mla, has_sink, attn_type, use_batch_invariant, device_capability
    ):
        return [
            reason
            for wrong, reason in (
                (dtype not in cls.supported_dtypes, "dtype not supported"),
                (kv_cache_dtype not in cls.supported_kv_cache_dtypes, "kv_cache_dtype not supported"),
                (use_mla != cls.is_mla(), "MLA mismatch"),
                (has_sink and not cls.supports_sink(), "attention sinks not supported"),
                (attn_type != "decoder", f"attention type {attn_type} not supported"),
                (use_batch_invariant and not cls.supports_batch_invariance(), "batch invariance not supported"),
            )
            if wrong
        ]


class AttentionSelectorConfig(NamedTuple):
    head_size: int
    dtype: torch.dtype
    kv_cache_dtype: str | None
    use_mla: bool = False
    has_sink: bool = False
    attn_type: str = "decoder"
    use_batch_invariant: bool = True


_overrides: dict[Any, str] = {}


class AttentionBackendEnum(enum.Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def is_overridden(self):
        return self in _overrides

    def get_path(self):
        return _overrides[self]

    def clear_override(self):
        _overrides.pop(self, None)


def register_backend(backend, class_path):
    _overrides[backend] = class_path


@functools.cache
def _cached_get_attn_backend(backend, attn_selector_config, num_heads=None):
    raise NotImplementedError


def resolve_obj_by_qualname(qualname):
    module, _, name = qualname.rpartition(".")
    return getattr(importlib.import_module(module), name)


def get_current_vllm_config():
    raise RuntimeError("no config is set")


_CONTENT = {
    "vllm": (),
    "vllm.config": (get_current_vllm_config,),
    "vllm.utils": (),
    "vllm.utils.import_utils": (resolve_obj_by_qualname,),
    "vllm.v1": (),
    "vllm.v1.attention": (),
    "vllm.v1.attention.backend": (
        MultipleOf,
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
        MLAAttentionImpl,
    ),
    "vllm.v1.attention.backends": (),
    "vllm.v1.attention.backends.registry": (AttentionBackendEnum, register_backend),
    "vllm.v1.attention.selector": (AttentionSelectorConfig,),
}


def install() -> list[str]:
    """Put the modules where `import vllm` finds them; return their names."""
    for name, content in _CONTENT.items():
        module = types.ModuleType(name)
        # As a package that is there but has no files: what looks for vLLM's libraries asks for its spec.
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for thing in content:
            setattr(module, thing.__name__, thing)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    sys.modules["vllm.v1.attention.selector"]._cached_get_attn_backend = _cached_get_attn_backend
    return list(_CONTENT)
