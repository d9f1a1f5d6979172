"""DeepGEMM's dense bf16 product for Hopper and Blackwell."""

from __future__ import annotations

from bidispatch.registry import Registry

__all__ = ["register"]


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
