"""Wheels of vLLM that are only unpacked, for tests that read them."""

from __future__ import annotations

import os
from importlib.metadata import distributions
from pathlib import Path

__all__ = ["unpacked"]


def unpacked() -> dict[str, Path]:
    """The folders `vllm` of `BIDISPATCH_VLLM_SOURCES=DIR:DIR`, where wheels were unpacked, by their versions."""
    found = {}
    for place in filter(None, os.environ.get("BIDISPATCH_VLLM_SOURCES", "").split(":")):
        versions = [each.version for each in distributions(name="vllm", path=[place])]
        if len(versions) != 1 or not Path(place, "vllm").is_dir():
            raise FileNotFoundError(f"{place} holds no unpacked wheel of vLLM: no vllm beside one vllm-*.dist-info")
        found[versions[0]] = Path(place, "vllm")
    return found
