"""Sets Triton's interpreter, which is read when triton is imported: this folder needs a process of its own."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit(
        "triton was imported without TRITON_INTERPRET=1 before tests/interpreter was collected; "
        "run it in a process of its own: pytest tests/interpreter",
        returncode=4,
    )
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
from packaging.version import Version

# Until Triton 3.7.1 the interpreter's range() turns arrays of one element into scalars, which numpy 2.4 refuses.
_BROKEN = Version(triton.__version__) < Version("3.7.1") and Version(np.__version__) >= Version("2.4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this pair of versions cannot run, and say so."""
    if _BROKEN:
        reason = f"Triton {triton.__version__}'s interpreter fails with numpy {np.__version__}; use numpy < 2.4"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _infinities_are_data() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU just gives inf or NaN."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
        yield
