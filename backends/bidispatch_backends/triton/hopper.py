"""What the Gluon kernels for Hopper share: names that changed between Triton versions, and the hand-over of copies."""

# Kernel arguments are Triton values, which no annotation describes.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

__all__ = ["WARPS", "async_load", "barrier", "publish"]

WARPS = 4
"""Warps of a role, with which kernels of several are launched: Gluon adds the others'. One warpgroup."""

# The names they had in Triton 3.6, and those since.
async_load = getattr(hopper.async_copy, "async_load", None) or hopper.async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def publish(step, ready, BUFFERS: gl.constexpr):
    """Hand a step's buffers to the warps that wait for `ready`, once every thread's copies of it are there.

    Each thread fences what it wrote, which the matrix unit reads past the order of ordinary loads and stores.
    """
    hopper.fence_async_shared()
    barrier()
    hopper.mbarrier.arrive(ready.index(step % BUFFERS))
