"""Whether a race checker can judge kernels whose warpgroups hand over through mbarriers: two handovers to tell apart.

::

    compute-sanitizer --tool racecheck python tests/gpu/race_control.py ordered
    compute-sanitizer --tool racecheck python tests/gpu/race_control.py unordered

In both, one warpgroup of a Gluon kernel stores to shared memory and another loads that. In the first the load waits for
an mbarrier that the other arrives at once its stores are done (PTX ISA, mbarrier: arrive releases, wait acquires); in
the second it waits for nothing. A checker that reports the first as well knows no mbarriers, and what it reports of
`attention_hopper` and `mla_hopper` says nothing.
"""

# Kernel arguments are Triton values, which no annotation describes.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from bidispatch_backends.triton.hopper import barrier

_SIZE, _TURNS = gl.constexpr(128), gl.constexpr(8)
_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _take(place, ready, free, out_ptr, ORDERED: gl.constexpr):
    lanes = gl.arange(0, _SIZE, layout=_LINE)
    for turn in range(_TURNS):
        if ORDERED:
            hopper.mbarrier.wait(ready, turn % 2)
        gl.store(out_ptr + turn * _SIZE + lanes, place.load(_LINE))
        barrier()
        hopper.mbarrier.arrive(free)


@gluon.jit
def _give(place, ready, free, ORDERED: gl.constexpr):
    lanes = gl.arange(0, _SIZE, layout=_LINE)
    for turn in range(_TURNS):
        if ORDERED:
            hopper.mbarrier.wait(free, (turn + 1) % 2)
        place.store(lanes + turn)
        barrier()
        hopper.mbarrier.arrive(ready)


@gluon.jit
def handover_kernel(out_ptr, ORDERED: gl.constexpr):
    """Eight turns of 128 numbers from one warpgroup to the other."""
    place = gl.allocate_shared_memory(gl.int32, (_SIZE,), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, (1,), hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, (1,), hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(ready, count=1)
    hopper.mbarrier.init(free, count=1)
    hopper.fence_async_shared()
    barrier()
    gl.warp_specialize(
        [(_take, (place, ready, free, out_ptr, ORDERED)), (_give, (place, ready, free, ORDERED))], [4], [64]
    )


def main() -> int:
    """Run one of them; return 1 where what is ordered did not arrive."""
    ordered = sys.argv[1:] != ["unordered"]
    out = torch.empty(_TURNS.value, _SIZE.value, dtype=torch.int32, device="cuda")
    handover_kernel[(1,)](out, ORDERED=ordered, num_warps=4)
    wanted = torch.arange(_SIZE.value, device="cuda") + torch.arange(_TURNS.value, device="cuda")[:, None]
    arrived = bool(torch.equal(out, wanted.to(torch.int32)))
    print(f"{'ordered' if ordered else 'unordered'}: all arrived: {arrived}")  # noqa: T201 - a script
    return 1 if ordered and not arrived else 0


if __name__ == "__main__":
    sys.exit(main())
