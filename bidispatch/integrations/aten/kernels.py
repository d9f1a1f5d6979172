"""A plan's kernels, bound when a module first needs them: nobody says beforehand what an arbitrary module calls."""

from __future__ import annotations

import threading

import torch

from bidispatch.errors import ArgumentError, DeviceError
from bidispatch.planning.plan import Plan
from bidispatch.runtime.bound import BoundKernel

__all__ = ["DTYPES", "Kernels", "handle_of", "kernels_of"]

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""What the overrides serve."""

Product = tuple[str, int, int, torch.dtype, torch.dtype, bool]
Rows = tuple[str, int, torch.dtype, torch.dtype]


class _OfThread(threading.local):
    """Bound kernels own workspaces, so each thread has its own."""

    def __init__(self) -> None:
        self.products: dict[Product, BoundKernel] = {}
        self.rows: dict[Rows, BoundKernel] = {}
        # A CUDA graph may still hold the workspace of a kernel that a larger one replaced.
        self.replaced: list[BoundKernel] = []
        self.one_class: dict[Product, bool] = {}


class Kernels:
    """The bound kernels of one plan, by what was asked for: dtypes and sizes, never how many rows there are."""

    def __init__(self, plan: Plan, max_tokens: int) -> None:
        self.plan = plan
        self.max_tokens = max_tokens
        self._here = _OfThread()

    def product(
        self, op: str, rows: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, bias: bool = False
    ) -> BoundKernel:
        """The kernel of `gemm` or `bmm`, ready for this many rows."""
        key = (op, n, k, dtype, out_dtype, bias)
        kernel = self._here.products.get(key)
        if kernel is None or kernel.limits.max_tokens < rows:
            dims: dict[str, int | str | bool] = {"n": n, "k": k, "out_dtype": _name(out_dtype)}
            if op == "gemm":
                dims["bias"] = bias
            kernel = self._here.products[key] = self._bind(kernel, op, rows, dtype, dims)
        return kernel

    def one_class(self, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, bias: bool) -> bool:
        """Whether `gemm` gives the bits of `bmm`, so that a call may take either."""
        key = ("gemm", n, k, dtype, out_dtype, bias)
        known = self._here.one_class.get(key)
        if known is None:
            dims: dict[str, int | str | bool] = {"n": n, "k": k, "out_dtype": _name(out_dtype)}
            matrix = self.plan.select("bmm", dtype=_name(dtype), **dims)
            linear = self.plan.select("gemm", dtype=_name(dtype), **dims, bias=bias)
            # On a processor a label says how torch is called, which may add in another order for another layout.
            known = linear.numerics == matrix.numerics and self.plan.device.arch.vendor != "cpu"
            self._here.one_class[key] = known
        return known

    def over_rows(self, op: str, rows: int, n: int, dtype: torch.dtype, out_dtype: torch.dtype) -> BoundKernel:
        """The kernel of `softmax`, `log_softmax`, `mean` or `sum`, ready for this many rows."""
        key = (op, n, dtype, out_dtype)
        kernel = self._here.rows.get(key)
        if kernel is None or kernel.limits.max_tokens < rows:
            kernel = self._here.rows[key] = self._bind(kernel, op, rows, dtype, {"n": n, "out_dtype": _name(out_dtype)})
        return kernel

    def norm(self, rows: int, n: int, dtype: torch.dtype) -> BoundKernel:
        """The kernel of `rms_norm`, ready for this many rows."""
        key = ("rms_norm", n, dtype, dtype)
        kernel = self._here.rows.get(key)
        if kernel is None or kernel.limits.max_tokens < rows:
            kernel = self._here.rows[key] = self._bind(kernel, "rms_norm", rows, dtype, {"n": n})
        return kernel

    def _bind(
        self,
        old: BoundKernel | None,
        op: str,
        rows: int,
        dtype: torch.dtype,
        dims: dict[str, int | str | bool],
    ) -> BoundKernel:
        """Bind for the next power of two of rows, so that a growing batch binds a few times and not at every size."""
        selection = self.plan.select(op, dtype=_name(dtype), **dims)
        if self.plan.device.arch.vendor != "cpu" and torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                f"{selection.problem}: needs binding for {rows} rows while a CUDA graph is captured; call the module "
                f"once with this batch before, or enter aten_overrides(plan, max_tokens={rows})"
            )
        kernel = selection.bind(max_tokens=max(self.max_tokens, 1 << (rows - 1).bit_length()))
        if old is not None:
            self._here.replaced.append(old)
        return kernel


def _name(dtype: torch.dtype) -> str:
    return DTYPES[dtype]


_known: list[Kernels] = []
_lock = threading.Lock()


def handle_of(plan: Plan, max_tokens: int) -> int:
    """The number by which a compiled graph names the kernels of a plan. They are kept as long as the process.

    Raises `DeviceError` for a plan made for a device that is not here, `ArgumentError` for a limit below 1.
    """
    if max_tokens < 1:
        raise ArgumentError(f"aten_overrides takes max_tokens of at least 1, not {max_tokens}")
    device = plan.device
    if device.predicted:
        raise DeviceError(
            f"planned for {device.arch.name}, which this machine does not have; plan with device='auto' to run here"
        )
    with _lock:
        for handle, kernels in enumerate(_known):
            if kernels.plan is plan and kernels.max_tokens == max_tokens:
                return handle
        _known.append(Kernels(plan, max_tokens))
        return len(_known) - 1


def kernels_of(handle: int) -> Kernels:
    """What `handle_of` gave this number."""
    return _known[handle]
