"""The peers' kernel of the benchmarks compiles for Hopper, in every dtype and for the wide outputs of a router."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bidispatch.device import ARCHS
from bidispatch_backends.triton.compile import Variant, compile_variant, target_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peers import one_tile

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@pytest.mark.parametrize("out", [None, torch.float32], ids=["same", "wide"])
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_it_compiles_and_fits(dtype: torch.dtype, out: torch.dtype | None) -> None:
    constants = one_tile.constants(dtype, out or dtype, 132)
    sizes = ("n", "k", "stride_x", "stride_weight", "stride_out")
    signature = {
        "x_ptr": POINTERS[dtype],
        "weight_ptr": POINTERS[dtype],
        "out_ptr": POINTERS[out or dtype],
        **dict.fromkeys(("m", *sizes), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: signature[name] for name in one_tile.one_tile_kernel.arg_names}
    aligned = frozenset(("x_ptr", "weight_ptr", "out_ptr", *sizes))
    variant = Variant(one_tile.one_tile_kernel, signature, constants, aligned, one_tile.OPTIONS)
    compiled = compile_variant(variant, target_of(ARCHS["sm90"]))
    assert compiled.metadata.shared <= ARCHS["sm90"].shared_memory
    assert ("wgmma" in compiled.asm["ptx"]) == (dtype is not torch.float32)
    assert "tf32" not in compiled.asm["ptx"]
