"""FlashMLA's dense decode for Hopper, as vLLM ships it. This file only registers; it imports neither torch nor vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bidispatch.device import Device
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Params, Registry
from bidispatch.requirements import Check, DimIn

__all__ = ["register"]


def _library(device: Device, problem: Problem) -> str | None:
    """Looks for the file: importing vLLM to ask it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    if device.predicted or any(any(Path(folder).glob("_flashmla_C*.so")) for folder in folders):
        return None
    return "needs a vllm that brings vllm._flashmla_C (a CUDA build); install vllm>=0.25.1"


def _numerics(params: Params, problem: Problem) -> str:
    return "flash_mla.one_part"


def register(registry: Registry) -> None:
    """Add `flash_mla.decode`.

    Its conditions are the library's: dense decode is for sm_90a, pages of 64, 512 + 64 wide (FlashMLA 9241ae3,
    csrc/api/dense_decode.h:27, 67).
    """
    registry.register(
        Implementation(
            name="flash_mla.decode",
            op="attention.mla",
            load="bidispatch_backends.flash_mla.decode:bind_decode",
            archs=("sm90",),
            dtypes=("bfloat16", "float16"),
            requires=(
                Check(_library),
                DimIn("kv_lora_rank", (512,)),
                DimIn("rope_dim", (64,)),
                DimIn("page_size", (64,)),
                DimIn("num_heads", (16, 32, 64, 128)),
            ),
            numerics=_numerics,
            claims=Invariance.BATCH,
            libraries=("vllm",),
            summary="FlashMLA; every query token a request, a request never split, whatever the batch",
        )
    )
