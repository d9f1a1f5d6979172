"""cuBLASLt, pinned in the call: no workspace, no split of K, algorithms fixed when a layer is built."""

from __future__ import annotations

from bidispatch.registry import Registry

__all__ = ["register"]


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
