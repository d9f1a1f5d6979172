"""`gemm` by DeepGEMM's `bf16_gemm_nt`. Imports the library when a kernel is bound.

It compiles a kernel, for seconds, when a call first needs its tile: a warm-up over the M that will be served, such as a
server's capture of CUDA graphs, takes that out of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bidispatch.runtime.context import BindContext, Kernel
from bidispatch_backends.aligned import is_aligned, on_aligned
from bidispatch_backends.deep_gemm.library import edges, library

__all__ = ["bind_gemm"]


def bind_gemm(context: BindContext) -> Kernel:
    """Return `kernel(x, weight, bias, out)`; see the op `gemm`; bias is always None. Its `edges` are every M at which
    DeepGEMM's heuristic may change its tile.
    """
    product = _product(library())

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        if is_aligned(x) and is_aligned(weight) and is_aligned(out):
            product(x, weight, out)
        else:
            on_aligned(gemm, x, weight, bias, out=out)

    gemm.edges = edges(context.limits)  # type: ignore[attr-defined]
    return gemm


def _product(deep_gemm: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """`bf16_gemm_nt` by DeepGEMM's own kernel.

    Newer versions hand bf16 to cuBLASLt, which may split K, unless they are told to be deterministic. That switch is
    the whole process's, and the host's other kernels have theirs: so it is on for the call alone, and then as it was.
    Without a way to ask how it was, it stays on: the other way round a host that had it on would lose it.

    compiled_dims="" compiles a kernel for every N and K, not one for each.
    """
    gemm: Callable[..., None] = deep_gemm.bf16_gemm_nt
    switch: Callable[[bool], None] | None = getattr(deep_gemm, "use_deterministic_algorithms", None)
    is_on: Callable[[], bool] | None = getattr(deep_gemm, "get_deterministic_algorithms", None)
    if switch is None:
        return lambda x, weight, out: gemm(x, weight, out, compiled_dims="")

    def deterministic(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        before = is_on() if is_on else True
        switch(True)
        try:
            gemm(x, weight, out, compiled_dims="")
        finally:
            switch(before)

    return deterministic
