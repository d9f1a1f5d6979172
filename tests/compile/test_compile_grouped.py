"""The kernels around DeepGEMM's grouped products compile for Hopper, in both layouts, with and without fp8."""

from __future__ import annotations

from typing import Any

import pytest

from bidispatch import ops
from bidispatch.device import ARCHS
from bidispatch.runtime.context import Limits
from bidispatch_backends.deep_gemm.moe_params import BLOCK_ROWS
from bidispatch_backends.triton.compile import _variant, compile_variant, target_of
from bidispatch_backends.triton.expert_rows import row_launches

SHAPES: tuple[dict[str, Any], ...] = (
    {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    {"experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 360, "activation": "swiglu_clamped", "shared": True},
    {
        "experts": 32, "top_k": 8, "hidden": 7168, "intermediate": 2048, "weight_dtype": "float8_e4m3fn",
        "expert_map": True, "global_experts": 256,
    },
    {
        "experts": 2047, "top_k": 64, "hidden": 128, "intermediate": 128, "weight_dtype": "float8_e4m3fn",
        "scale_format": "ue8m0", "activation": "gelu",
    },
)  # fmt: skip


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 8192])
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_every_launch_compiles(dims: dict[str, Any], tokens: int, masked: bool) -> None:
    problem = ops.get("moe.experts").problem("bfloat16", dims)
    for launch in row_launches(problem, ARCHS["sm90"], Limits(tokens), masked=masked, block_rows=BLOCK_ROWS):
        compiled = compile_variant(_variant(launch), target_of(ARCHS["sm90"]))
        assert compiled.metadata.shared <= ARCHS["sm90"].shared_memory
        assert "red.global" not in compiled.asm["ptx"]
        assert "atom.global" not in compiled.asm["ptx"]
