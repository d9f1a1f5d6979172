"""Refuses Triton's interpreter: these tests need the compiler, and a process has one or the other."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.exit(
        "TRITON_INTERPRET=1 is set, and tests/compile compiles; run it in a process of its own: pytest tests/compile",
        returncode=4,
    )
