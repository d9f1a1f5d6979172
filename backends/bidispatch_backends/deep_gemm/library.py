"""The library itself, and where its heuristic may change a tile. Imports nothing of it until a kernel is bound."""

from __future__ import annotations

import importlib
from typing import Any

from bidispatch import requirements
from bidispatch.runtime.context import Limits

__all__ = ["edges", "library"]

_LARGEST_EDGE = 8192


def library() -> Any:
    """sgl-deep-gemm where it is installed, else vLLM's copy."""
    name = "deep_gemm" if requirements.installed_version("sgl-deep-gemm") else "vllm.third_party.deep_gemm"
    return importlib.import_module(name)


def edges(limits: Limits) -> tuple[int, ...]:
    """Every M below the limit at which the tile may change."""
    known = (16, 32, *range(64, _LARGEST_EDGE + 1, 64))
    return tuple(edge for edge in known if edge < limits.max_tokens)
