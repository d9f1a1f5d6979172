"""cuBLASLt's C API, as nvmath-python binds it: handles, descriptors, one launch. Imports the library.

cuBLASLt counts columns first. What we call out [m, n] in rows is n x m in columns, so it is asked for
out.T = weight @ x.T: its A is the weight, transposed, its B is x.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import numpy as np
import torch
from nvmath.bindings import cublasLt

from bidispatch.errors import BackendError
from bidispatch_backends.aligned import ALIGNMENT
from bidispatch_backends.cublaslt.products import Product

__all__ = [
    "ONE",
    "ZERO",
    "Descriptors",
    "compute_type",
    "cublasLt",
    "current_stream",
    "data_type",
    "handle_of",
    "on_device",
    "run",
    "set_attribute",
    "workspace",
]

# cudaDataType_t and cublasComputeType_t, which nvmath-python takes as numbers.
_DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
_COMPUTE_32F = 68

# The enumeration of each kind of owner. Its functions in nvmath-python are named after the kind.
_ATTRIBUTES = {
    "matmul_desc": "MatmulDescAttribute",
    "matrix_layout": "MatrixLayoutAttribute",
    "matmul_preference": "MatmulPreferenceAttribute",
    "matmul_algo_config": "MatmulAlgoConfigAttribute",
}

_scalars = np.array([0, 1], np.float32)
ZERO, ONE = _scalars.ctypes.data, _scalars.ctypes.data + _scalars.itemsize
"""Addresses of alpha and beta, on the host."""


def data_type(dtype: str) -> int:
    """The number CUDA gives a dtype."""
    return _DATA_TYPES[dtype]


def compute_type() -> int:
    """fp32 accumulation of operands as they are."""
    return _COMPUTE_32F


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: cuBLASLt's handles and choices are for that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=64)
def handle_of(device: torch.device) -> int:
    """The process's handle for a device. It holds no state that a call could change, so everything shares it.

    Raises `BackendError` where nvmath-python cannot load or start the library.
    """
    try:
        with on_device(device):
            return int(cublasLt.create())
    except Exception as error:  # its loader raises RuntimeErrors of its own
        raise BackendError(
            f"nvmath-python cannot start cuBLASLt: {error}; `bidispatch doctor` says which one it finds"
        ) from error


def current_stream(device: torch.device) -> Callable[[int], int]:
    """A function from a GPU's index to the address of its current stream; the cheapest torch has."""
    if device.type != "cuda":
        return lambda index: 0
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda index: int(torch.cuda.current_stream(index).cuda_stream))


def set_attribute(owner_kind: str, owner: int, name: str, value: int) -> None:
    """Set one attribute of a descriptor, in the width the library reads. `owner_kind` is a key of `_ATTRIBUTES`."""
    attribute = int(getattr(getattr(cublasLt, _ATTRIBUTES[owner_kind]), name))
    buffer = np.array([value], getattr(cublasLt, f"get_{owner_kind}_attribute_dtype")(attribute))
    getattr(cublasLt, f"{owner_kind}_set_attribute")(owner, attribute, buffer.ctypes.data, buffer.nbytes)


class Descriptors:
    """What cuBLASLt is told of a product: the operation, and the layouts made for it so far.

    They are the library's memory, and given back with this object: layouts follow M, so there may be thousands.
    """

    def __init__(self, product: Product) -> None:
        self.product = product
        self.operation: int = cublasLt.matmul_desc_create(compute_type(), data_type("float32"))
        self._layouts: list[int] = []
        end = weakref.finalize(self, _destroy, self.operation, self._layouts)
        end.atexit = False  # the process takes its memory along; the library may be gone by then
        self._set("TRANSA", 1)
        if product.bias:
            self._set("EPILOGUE", int(cublasLt.Epilogue.BIAS))
            self._set("BIAS_DATA_TYPE", data_type(product.out_dtype))
            self.point_bias(ALIGNMENT)  # nothing reads it before a launch, but a choice wants to see its alignment

    def _set(self, name: str, value: int) -> None:
        set_attribute("matmul_desc", self.operation, name, value)

    def point_bias(self, pointer: int) -> None:
        """Set the address of the bias of the launches to come."""
        self._set("BIAS_POINTER", pointer)

    def layouts(self, m: int, x_row: int, weight_row: int, out_row: int) -> tuple[int, int, int]:
        """Layouts of weight, x and out for calls of m rows; rows are so many elements apart."""
        product = self.product
        kind, out_kind = data_type(product.dtype), data_type(product.out_dtype)
        return (
            self._layout(kind, product.k, product.n, weight_row, product.k),
            self._layout(kind, product.k, m, x_row, product.k),
            self._layout(out_kind, product.n, m, out_row, m * product.n),
        )

    def _layout(self, kind: int, rows: int, columns: int, leading: int, apart: int) -> int:
        layout: int = cublasLt.matrix_layout_create(kind, rows, columns, leading)
        self._layouts.append(layout)
        if self.product.batch > 1:
            set_attribute("matrix_layout", layout, "BATCH_COUNT", self.product.batch)
            set_attribute("matrix_layout", layout, "STRIDED_BATCH_OFFSET", apart)
        return layout

    def forget_layouts(self) -> None:
        """Give every layout back. A launch has read its own by the time it returns."""
        while self._layouts:
            cublasLt.matrix_layout_destroy(self._layouts.pop())


def _destroy(operation: int, layouts: list[int]) -> None:
    for layout in layouts:
        cublasLt.matrix_layout_destroy(layout)
    cublasLt.matmul_desc_destroy(operation)


def run(
    device: torch.device,
    descriptors: Descriptors,
    layouts: tuple[int, int, int],
    algorithm: int,
    pointers: tuple[int, int, int],
) -> None:
    """Launch once, out not read before it is written: `pointers` to x, weight and out, that of the algorithm apart."""
    weight_layout, x_layout, out_layout = layouts
    x, weight, out = pointers
    cublasLt.matmul(
        *(handle_of(device), descriptors.operation, ONE, weight, weight_layout, x, x_layout),
        *(ZERO, out, out_layout, out, out_layout, algorithm, 0, 0, current_stream(device)(device.index or 0)),
    )


def workspace(count: int, device: torch.device) -> torch.Tensor:
    """fp32 memory of a bound kernel. What is made in inference mode could not be written outside of it."""
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.float32, device=device)
