"""Reduction params, tiles, class labels and limits of the cuBLASLt kernels. Imports no torch and no library."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bidispatch.device import Device
from bidispatch.errors import UsageError
from bidispatch.ops.schema import Problem
from bidispatch.registry import Params, Tile
from bidispatch.requirements import Package
from bidispatch_backends.numerics import product_numerics

__all__ = [
    "ITEM_BYTES",
    "CublasLtParams",
    "CublasLtTile",
    "aligned_rows",
    "cublaslt_numerics",
    "cublaslt_tiles",
    "known_result",
]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MOST_PARTIAL_BYTES = 64 * 2**20
_FEW_RESULTS = 1 << 20
"""Two tiles of 64 x 64 for each multiprocessor of an H100 or H200."""
_TRITON = Package("triton", ">=3.2")


class CublasLtParams(Params):
    """How the sum over K is ordered. cuBLASLt walks K, or each chunk of it, in order into an fp32 accumulator."""

    input_precision: Literal["ieee"] = "ieee"
    """How fp32 operands are multiplied: as they are. In TF32 none of the algorithms it offered on an H100 gave the bits
    of Triton's tiles, which are one class, and those for few rows others than those for many."""
    k_chunk: int = Field(default=0, ge=0, multiple_of=32)
    """0: all of K in one accumulator. Else each so many elements of K have one of their own, and these are added in
    ascending order, in fp32, which the result must be. K no longer than a chunk is walked whole."""


class CublasLtTile(Tile):
    """Which of cuBLASLt's algorithms serves, and how chunks of K are run. Neither enters the order of a sum."""

    algorithm: str = Field(default="", pattern=r"^(\d+(\.\d+){6})?$")
    """id.tile.stages.swizzle.custom.cluster.inner, as cuBLASLt numbers them; empty: its own first choice for each M.
    With chunks of K it is that of a chunk, batched where `batch_max_m` is not 0."""
    version: int = Field(default=0, ge=0)
    """The cuBLASLt the algorithm was found with, such as 130200. Another one makes its own choice."""
    batch_max_m: int = Field(default=0, ge=0)
    """Calls of up to so many rows run their chunks of K at once, into a workspace that is then added up; longer calls
    run one chunk after another. Bits are the same."""

    @model_validator(mode="after")
    def _an_algorithm_has_a_version(self) -> CublasLtTile:
        if self.algorithm and not self.version:
            raise ValueError(
                "an algorithm needs the cuBLASLt version it was found with: its numbers are that version's"
            )
        return self


def cublaslt_numerics(params: Any, problem: Problem) -> str:
    """`k_sequential` or `k_chunks.<c>`; for fp32 with the precision of the products."""
    if problem["out_dtype"] != "float32" and 0 < params.k_chunk < problem.size("k"):
        raise UsageError(
            f"k_chunk={params.k_chunk} is for float32 results, asked for {problem['out_dtype']}: "
            "chunks of K are added in the memory of the result"
        )
    return product_numerics(problem, params.input_precision, params.k_chunk)


def cublaslt_tiles(device: Device, problem: Problem, params: Any) -> tuple[tuple[int | None, CublasLtTile], ...]:
    """The library's own algorithms; chunks of K at once where one alone has too few tiles to fill the device.

    The kernel that adds them up is Triton's. Without Triton chunks always run one after another.
    """
    n, k, chunk = problem.size("n"), problem.size("k"), params.k_chunk
    if not 0 < chunk < k or _TRITON.unmet(device, problem):
        return ((None, CublasLtTile()),)
    fitting = _MOST_PARTIAL_BYTES // (-(-k // chunk) * n * 4)
    return ((None, CublasLtTile(batch_max_m=min(max(64, _FEW_RESULTS // n), fitting))),)


def aligned_rows(device: Device, problem: Problem) -> str | None:
    """Rows of x, weight and out must be whole groups of 16 bytes.

    Measured on an H200: with N not a multiple of 8, bf16 and fp16 products of few rows differ from those of many.
    """
    multiple = 16 // ITEM_BYTES[problem.dtype]
    odd = [name for name in ("n", "k") if problem.size(name) % multiple]
    if not odd:
        return None
    asked = ", ".join(f"{name}={problem[name]}" for name in odd)
    return (
        f"needs n and k multiples of {multiple} in {problem.dtype}, asked for {asked}: "
        "for other rows cuBLASLt has algorithms that add in another order"
    )


def known_result(device: Device, problem: Problem) -> str | None:
    """cuBLASLt rounds to the operands' dtype, or gives the fp32 accumulator."""
    if problem["out_dtype"] in (problem.dtype, "float32"):
        return None
    return f"gives {problem.dtype} or float32, asked for {problem['out_dtype']}"
