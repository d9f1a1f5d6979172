"""DeepGEMM's dense bf16 product for Hopper and Blackwell."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bidispatch.device import Device
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Params, Registry
from bidispatch.requirements import AnyOf, Check, DimIn, DimMultipleOf, Package
from bidispatch_backends.numerics import product_numerics

__all__ = ["register"]


def _whole_k(params: Params, problem: Problem) -> str:
    return product_numerics(problem, input_precision="ieee", k_chunk=0)


def _no_split(device: Device, problem: Problem) -> str | None:
    if device.arch.family != "sm120":
        return None
    return f"DeepGEMM splits K on {device.arch.family}, into as many parts as its shape heuristic likes"


def _bundled_with_vllm(device: Device, problem: Problem) -> str | None:
    """Looks for the files: importing vLLM to ask it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    if device.predicted or any((Path(folder) / "third_party" / "deep_gemm").is_dir() for folder in folders):
        return None
    return "needs a vllm that brings vllm.third_party.deep_gemm"


def register(registry: Registry) -> None:
    """Add every kernel of this backend."""
    registry.register(
        Implementation(
            name="deep_gemm.bf16",
            op="gemm",
            load="bidispatch_backends.deep_gemm.gemm:bind_gemm",
            archs=("sm90", "sm100", "sm103"),
            dtypes=("bfloat16",),
            requires=(
                AnyOf((Package("sgl-deep-gemm", "==0.1.5"), Check(_bundled_with_vllm))),
                Check(_no_split),
                DimMultipleOf("n", 8),  # rows of x, weight and out are whole groups of 16 bytes, as TMA needs them
                DimMultipleOf("k", 8),
                DimIn("bias", (False,)),
                DimIn("out_dtype", ("bfloat16", "float32")),
            ),
            numerics=_whole_k,
            libraries=("sgl-deep-gemm", "vllm"),
            chooses_inside=True,
            summary="DeepGEMM; its tile follows M, its walk along K does not. Compiles when a shape is first called",
        )
    )
