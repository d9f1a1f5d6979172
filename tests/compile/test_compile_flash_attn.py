"""The kernels around FlashAttention's compile for every arch it runs on, and take no shared memory to speak of."""

from __future__ import annotations

from typing import Any

import pytest

from bidispatch import ops
from bidispatch.device import ARCHS
from bidispatch_backends.flash_attn import kernels
from bidispatch_backends.triton.compile import _variant, compile_variant, target_of

NVIDIA = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120")
SHAPES: tuple[dict[str, Any], ...] = (
    {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    {"num_heads": 7, "num_kv_heads": 7, "head_dim": 80},
    {"num_heads": 128, "num_kv_heads": 1, "head_dim": 256, "page_size": 256},
)


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("dims", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("entries", "extent", "copies_pages"), [(0, 0, False), (1, 131072, True), (1, 131072, False), (128, 1024, True)]
)
def test_every_launch_compiles(arch: str, dims: dict[str, Any], entries: int, extent: int, copies_pages: bool) -> None:
    for dtype in ("bfloat16", "float16") if arch == "sm90" else ("bfloat16",):
        problem = ops.get("attention").problem(dtype, dims)
        made = kernels.launches(problem, ARCHS[arch], entries, extent, copies_pages=copies_pages)
        launches = [made.lengths, made.spoil, *(launch for launch in (made.prepare, made.merge) if launch)]
        assert len(launches) == (4 if entries else 2)
        for launch in launches:
            compiled = compile_variant(_variant(launch), target_of(ARCHS[arch]))
            assert compiled.metadata.shared <= 4096


@pytest.mark.parametrize("num_heads", [1, 16, 128])
@pytest.mark.parametrize(("entries", "extent"), [(0, 0), (1, 131072)])
def test_every_launch_for_latents_compiles(num_heads: int, entries: int, extent: int) -> None:
    """Rows of q of 576 elements, of the result of 512."""
    for dtype in ("bfloat16", "float16"):
        problem = ops.get("attention.mla").problem(dtype, {"num_heads": num_heads})
        cut = (512, 256, 4, 32) if entries else None
        made = kernels.launches(problem, ARCHS["sm90"], entries, extent, copies_pages=False, scheduled=cut)
        copies = [launch for launch in (made.prepare, made.merge) if launch]
        assert bool(made.schedule) == bool(entries)
        for launch in (made.lengths, made.spoil, made.admit, *copies, *([made.schedule] if made.schedule else [])):
            compiled = compile_variant(_variant(launch), target_of(ARCHS["sm90"]))
            assert compiled.metadata.shared <= 4096
