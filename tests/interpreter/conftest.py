"""Sets Triton's interpreter, which is read when triton is imported: this folder needs a process of its own."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit(
        "triton was imported without TRITON_INTERPRET=1 before tests/interpreter was collected; "
        "run it in a process of its own: pytest tests/interpreter",
        returncode=4,
    )
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from packaging.version import Version
from quick import make_quick

# Until Triton 3.7.1 the interpreter's range() turns arrays of one element into scalars, which numpy 2.4 refuses.
_BROKEN = Version(triton.__version__) < Version("3.7.1") and Version(np.__version__) >= Version("2.4")


make_quick()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this pair of versions cannot run, and say so."""
    if _BROKEN:
        reason = f"Triton {triton.__version__}'s interpreter fails with numpy {np.__version__}; use numpy < 2.4"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _numbers(operand: Any) -> Any:
    """What an operand holds: the interpreter keeps fp8 as bytes."""
    if operand.dtype.scalar != tl.float8e4nv:
        return operand.data
    return torch.from_numpy(operand.data.view(np.uint8).copy()).view(torch.float8_e4m3fn).float().numpy()


@pytest.fixture(autouse=True)
def _fp8_to_the_nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own conversion drops the carry of a mantissa that rounds up to 2. By torch's, which hardware's
    is, but for what is too large: that saturates here as there.
    """
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.float8e4nv:
            return original(self, src, dst_type, rounding_mode)
        converted = torch.from_numpy(np.clip(src.data, -448, 448)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(converted.view(torch.uint8).numpy(), dst_type.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)


@pytest.fixture(autouse=True)
def _products_in_the_order_of_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies by numpy's BLAS, whose sums follow M on some processors. Add in the order of K here,
    as a matrix unit does for every tile, so that what differs here differs by the kernel's own doing.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = np.array(d.data, copy=True)
        left, right = (_numbers(operand).astype(total.dtype) for operand in (a, b))
        term = np.empty_like(total)
        for k in range(left.shape[-1]):
            np.multiply(left[..., k, None], right[..., k, None, :], out=term)
            total += term
        return interpreter.TensorHandle(total, d.dtype.scalar)

    original = interpreter.InterpreterBuilder.create_dot

    def by_dtype(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return (original if tl.bfloat16 in (a.dtype, b.dtype) else create_dot)(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", by_dtype)


@pytest.fixture(autouse=True)
def _two_splits_in_a_turn_of_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU loads eight, most of which are not there for sequences as short as these; each takes its time here.
    That the number does not enter the bits is a test of its own.
    """
    from bidispatch_backends.triton import attention_kernels

    monkeypatch.setattr(attention_kernels, "_AT_ONCE", tl.constexpr(2))


@pytest.fixture(autouse=True)
def _infinities_are_data() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU just gives inf or NaN."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
        yield
