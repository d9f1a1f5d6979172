"""How a remembered binary is launched: past Triton's own launcher, unless a profiler wants to be told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from bidispatch_backends.triton import launch


class Binary:
    """Stands for a compiled kernel: notes what is launched, and by which way."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.ran, self.asked = [], []

    def run(self, *arguments):
        self.ran.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self.asked.append((grid, arguments))


@pytest.fixture
def gpu(monkeypatch):
    driver = SimpleNamespace(get_current_device=lambda: 1, get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))


def test_a_binary_is_launched_on_the_current_stream_with_no_hooks(gpu):
    binary = Binary()
    launch._launcher(binary)((2, 3, 1), 4096, 7)
    assert binary.ran == [(2, 3, 1, "stream of 1", "function", "metadata", None, None, None, 4096, 7)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_is_called_as_triton_would(gpu, monkeypatch, name):
    binary = Binary()
    launched = launch._launcher(binary)
    chain = SimpleNamespace(calls=[print])
    for hook in (chain, print):
        monkeypatch.setattr(triton.knobs.runtime, name, hook)
        launched((2, 3, 1), 4096, 7)
    assert binary.asked == [((2, 3, 1), (4096, 7))] * 2
    chain.calls.clear()
    monkeypatch.setattr(triton.knobs.runtime, name, chain)
    launched((2, 3, 1), 4096, 7)
    assert len(binary.ran) == 1


class Kernel:
    """Stands for a kernel that Triton would compile: notes the grids it is launched with."""

    arg_names = ("x_ptr", "rows", "stride_x", "BLOCK")
    do_not_specialize = ("rows",)

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


def launch_of(kernel, **more):
    arguments = {"x_ptr": "*bf16", "rows": "i32", "stride_x": 64}
    return launch.Launch(kernel, arguments, {"BLOCK": 64}, {"num_warps": 4}, **more)


@pytest.mark.parametrize(
    ("offset", "stride", "wide"), [(0, 64, True), (8, 64, True), (1, 64, False), (0, 72, False), (4, 64, False)]
)
def test_operands_that_do_not_allow_copies_of_16_bytes_go_to_another_kernel(offset, stride, wide):
    fast, slow = Kernel(), Kernel()
    x = torch.empty(256, dtype=torch.bfloat16)[offset:]
    launch_of(fast, unaligned=launch_of(slow))((3,), x, 5, stride)
    assert (fast.grids, slow.grids) == (([(3,)], []) if wide else ([], [(3,)]))


def test_a_kernel_without_another_takes_all_operands():
    kernel = Kernel()
    launch_of(kernel)((3,), torch.empty(256, dtype=torch.bfloat16)[1:], 5, 72)
    assert kernel.grids == [(3,)]
