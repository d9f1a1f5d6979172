"""Runs of splits of latent attention compile for every arch; on Hopper no loop over KV tiles touches local memory.

Nor does one of the walk, whose roles are those of the runs.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton

from bidispatch import ops
from bidispatch.device import ARCHS, Device
from bidispatch.registry import Registry
from bidispatch_backends.triton import register
from bidispatch_backends.triton.compile import compile_variant, target_of, variants

ARCH_NAMES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")


def compiled(arch: str, heads: int, kernel: str, dtype: str = "bfloat16", **sizes: Any) -> Any:
    """The binary of a kernel for segments, with the default tile but for `sizes`."""
    registry = Registry()
    register(registry)
    found = registry.get("triton.mla")
    problem = ops.get("attention.mla").problem(dtype, {"num_heads": heads})
    params = found.params()
    ((_, tile),) = found.tiles(Device(ARCHS[arch], arch, predicted=True), problem, params)
    tile = tile.model_copy(update={"segment_programs": 1} | sizes)
    made = variants(found.name, problem, params, tile, ARCHS[arch])
    variant = next(v for v in made if v.kernel.fn.__name__ == kernel)
    return compile_variant(variant, target_of(ARCHS[arch]))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("arch", ARCH_NAMES)
def test_segments_compile_and_fit(arch: str, heads: int) -> None:
    binary = compiled(arch, heads, "latent_segment_kernel")
    assert binary.metadata.shared <= ARCHS[arch].shared_memory


def instructions(cubin: bytes, folder: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """A binary's instructions, and its loops: the first and the last instruction of each."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = triton.knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, "-c", str(file)], check=True, capture_output=True, text=True).stdout
    found: list[str] = []
    labels = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif one := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(one[1])
    loops = []
    for place, one in enumerate(found):
        branch = re.search(r"\bBRA\b.*\((\.L_\w+)\)", one)
        if branch and labels[branch[1]] <= place:
            loops.append((labels[branch[1]], place))
    return found, loops


def tile_loops(found: list[str], loops: list[tuple[int, int]]) -> list[list[str]]:
    """The loops that multiply and have no such loop inside: those over KV tiles. A wait's branches back are no loop."""
    products = {place for place, one in enumerate(found) if "HGMMA" in one}
    multiplying = [(a, b) for a, b in loops if len(products & set(range(a, b + 1))) >= 40]
    inner = [(a, b) for a, b in multiplying if not any((c, d) != (a, b) and a <= c and d <= b for c, d in multiplying)]
    return [found[a : b + 1] for a, b in inner if b - a < 1200]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["seesaw_split_kernel", "seesaw_segment_kernel", "seesaw_walk_kernel"])
def test_loops_over_kv_tiles_touch_no_local_memory_and_wait_for_no_single_product(
    kernel: str, dtype: str, tmp_path: Path
) -> None:
    """Both sides' loops. Where registers are short, ptxas waits for each product behind it (C7512)."""
    binary = compiled("sm90", 128, kernel, dtype)
    assert binary.metadata.shared <= ARCHS["sm90"].shared_memory
    found, loops = instructions(binary.asm["cubin"], tmp_path)
    over_tiles = tile_loops(found, loops)
    assert len(over_tiles) == 2
    for body in over_tiles:
        assert sum("HGMMA" in one for one in body) in (40, 44)
        assert not [one for one in body if re.search(r"\b(LDL|STL)\b", one)]
        assert len(body) < 900
    products = sum("HGMMA" in one for one in found)
    assert sum("WARPGROUP.DEPBAR" in one for one in found) * 8 < products


def test_a_state_moves_to_memory_in_16_bytes_a_thread() -> None:
    """The pieces lie in memory as threads have them, so that no shared memory and no narrow access is between."""
    text = compiled("sm90", 128, "seesaw_segment_kernel").asm["ptx"]
    assert text.count("ld.global.cg.v4.b32") + text.count("ld.global.cg.v4.u32") >= 2 * 2 * 8 * 4
    assert "ld.global.cg.b32" not in text


def test_no_product_and_sum_are_contracted_but_those_written_as_one(tmp_path: Path) -> None:
    """As in the kernels whose bits these are to have."""
    binary = compiled("sm90", 128, "seesaw_segment_kernel")
    found, _ = instructions(binary.asm["cubin"], tmp_path)
    written = binary.asm["ptx"].count("fma.rn.f32")
    assert written >= 2 * 3 * 128
    assert sum("FFMA" in one for one in found) == written
