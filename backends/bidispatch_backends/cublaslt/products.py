"""What cuBLASLt is asked for: one product in all but M. Imports no torch and no library."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bidispatch.ops.schema import Problem
from bidispatch_backends.cublaslt.params import ITEM_BYTES, CublasLtParams

__all__ = ["Chunks", "Product", "buckets", "chunks_of", "whole_of"]

_TOPS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Product:
    """out [m, n] = x [m, k] @ weight [n, k].T + bias [n], or several such along K.

    Of a batch, product i reads x and weight from element i * k of their rows on, and its [m, n] follows that of
    product i - 1.
    """

    n: int
    k: int
    dtype: str
    out_dtype: str
    row: int
    """Elements from one row of x, and of the weight, to the next, where these are contiguous."""
    bias: bool = False
    """Of out's dtype; added to the fp32 accumulator."""
    batch: int = 1

    def __str__(self) -> str:
        chunks = f" x {self.batch}" if self.batch > 1 else ""
        bias = ", bias" if self.bias else ""
        return f"gemm n={self.n} k={self.k}{chunks}, {self.dtype} to {self.out_dtype}{bias}"

    @property
    def item_bytes(self) -> int:
        """Bytes of an element of x and the weight."""
        return ITEM_BYTES[self.dtype]

    @property
    def is_fp32(self) -> bool:
        return self.dtype == "float32"


@dataclass(frozen=True, slots=True)
class Chunks:
    """A product whose K is walked in chunks."""

    single: Product
    """One whole chunk."""
    batch: Product
    """All whole chunks at once."""
    rest: Product | None
    """What is left of K."""

    @property
    def whole(self) -> int:
        """How many whole chunks there are."""
        return self.batch.batch

    @property
    def parts(self) -> int:
        return self.whole + (self.rest is not None)


def whole_of(problem: Problem, params: CublasLtParams) -> Product:
    """All of K in one product."""
    return Product(
        n=problem.size("n"),
        k=problem.size("k"),
        dtype=problem.dtype,
        out_dtype=str(problem["out_dtype"]),
        row=problem.size("k"),
        bias=problem.flag("bias"),
    )


def chunks_of(problem: Problem, params: CublasLtParams) -> Chunks | None:
    """K in chunks, the bias left for whoever adds them; None where K is walked whole."""
    whole, chunk = whole_of(problem, params), params.k_chunk
    if not 0 < chunk < whole.k:
        return None
    count, left = divmod(whole.k, chunk)
    single = replace(whole, k=chunk, bias=False, out_dtype="float32")
    return Chunks(single, replace(single, batch=count), replace(single, k=left) if left else None)


def buckets(limit: int, first: int = 1) -> list[tuple[int, int]]:
    """The ranges of M, (lowest, largest), from that of `first` to that of `limit`: cut in the same places for all."""
    tops = [*_TOPS]
    while tops[-1] < limit:
        tops.append(2 * tops[-1])
    lows = [1, *(top + 1 for top in tops)]
    return [(low, top) for low, top in zip(lows, tops, strict=False) if low <= limit and top >= first]
