"""DeepGEMM's products for Hopper and Blackwell: bf16, and fp8 with block scales; on Hopper grouped by expert too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from bidispatch.device import Device
from bidispatch.ops.quantize import FP8
from bidispatch.ops.schema import Problem
from bidispatch.registry import Implementation, Params, Registry
from bidispatch.requirements import AnyOf, Check, DimAtMost, DimIn, DimMultipleOf, Package
from bidispatch_backends.deep_gemm import moe_params
from bidispatch_backends.deep_gemm.moe_rounding import grouped_rounding
from bidispatch_backends.numerics import fp8_block_numerics, product_numerics

__all__ = ["register"]


def _whole_k(params: Params, problem: Problem) -> str:
    return product_numerics(problem, input_precision="ieee", k_chunk=0)


def _labelled(label: str) -> Callable[[Params, Problem], str]:
    return lambda params, problem: label


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


_INSTALLED = AnyOf((Package("sgl-deep-gemm", "==0.1.5"), Check(_bundled_with_vllm)))

_TRITON = Package("triton", ">=3.6")  # the kernels around the grouped products


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
                _INSTALLED,
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
    # Two kernels of one function of the library. On Hopper (1D2D) fp32 scales are applied between blocks of K by the
    # expression of triton.fp8_block, and an H100 has shown the same bits (tests/gpu/test_fp8.py). On Blackwell (1D1D)
    # scales are powers of two and enter the matrix instruction: given others, the library would round them without
    # asking.
    for name, archs, label, limits, summary in (
        (
            "fp8",
            ("sm90",),
            fp8_block_numerics("fp8"),
            (DimIn("out_dtype", ("bfloat16",)),),
            "fp32 scales between blocks of K",
        ),
        (
            "fp8_ue8m0",
            ("sm100", "sm103"),
            "deep_gemm.1d1d_ue8m0",
            (DimIn("scale_format", ("ue8m0",)), DimIn("out_dtype", ("bfloat16", "float32"))),
            "scales that are powers of two, in the matrix instruction",
        ),
    ):
        registry.register(
            Implementation(
                name=f"deep_gemm.{name}",
                op="gemm.fp8_block",
                load="bidispatch_backends.deep_gemm.fp8:bind_fp8",
                archs=archs,
                dtypes=("float8_e4m3fn",),
                requires=(
                    _INSTALLED,
                    Check(_no_split),
                    DimMultipleOf("n", 8),
                    DimMultipleOf("k", 128),
                    *limits,
                ),
                numerics=_labelled(label),
                libraries=("sgl-deep-gemm", "vllm"),
                chooses_inside=True,
                summary=f"DeepGEMM; {summary}. Compiles when a shape is first called",
            )
        )
    for name, weights, multiple, products in (("moe", "bfloat16", 8, "bf16"), ("moe_fp8_block", FP8, 128, "fp8")):
        registry.register(
            Implementation(
                name=f"deep_gemm.{name}",
                op="moe.experts",
                load="bidispatch_backends.deep_gemm.moe:bind_experts",
                archs=("sm90",),
                dtypes=("bfloat16",),
                requires=(
                    _INSTALLED,
                    _TRITON,
                    DimIn("weight_dtype", (weights,)),
                    DimMultipleOf("hidden", multiple),
                    DimMultipleOf("intermediate", multiple),
                    DimIn("bias", (False,)),  # its products are rounded before one could be added
                    DimIn("out_dtype", ("bfloat16",)),
                    DimAtMost("experts", 2047),
                    DimAtMost("top_k", 64),
                ),
                numerics=moe_params.grouped_numerics,
                tile=moe_params.GroupedTile,
                tiles=moe_params.grouped_tiles,
                search="bidispatch_backends.deep_gemm.moe_params:grouped_tiles_for",
                libraries=("sgl-deep-gemm", "vllm", "triton"),
                chooses_inside=True,
                own_rounding=grouped_rounding,
                summary=f"DeepGEMM's grouped {products} products, masked for few rows, contiguous for more; parts are "
                "rounded before they are weighted. Compiles when a shape is first called",
            )
        )
