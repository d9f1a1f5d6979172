"""How much memory is free where a model is to be built, so that one that is too big is refused before it is made."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bidispatch.errors import UsageError

__all__ = ["free_bytes", "require_memory"]

_GIB = 2**30


def free_bytes(device: str, *, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on `cpu`, `cuda` or `cuda:N`; None where the system does not say.

    `root` is where the system's own files are looked for.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [free for free in (_of_the_machine(root), _of_the_container(root)) if free is not None]
    return min(known, default=None)


def require_memory(needed: int, device: str, what: str, instead: str) -> None:
    """Raise `UsageError` when `needed` bytes are more than are free on a device.

    what: what needs them. instead: what to do about it.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UsageError(
            f"{what} needs {needed / _GIB:.1f} GiB on {device}, {free / _GIB:.1f} GiB are free there; {instead}"
        )


def _of_the_machine(root: Path) -> int | None:
    """Linux counts what it would give back (MemAvailable); elsewhere pages that nothing uses, where they are known."""
    try:
        entries = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(entry.split()[1]) * 1024 for entry in entries if entry.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass  # not Linux, or one older than 3.14
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_the_container(root: Path) -> int | None:
    """What a cgroup (v2) leaves: its limit is met by the kernel's out-of-memory killer, not by an exception."""
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    given_back = sum(int(entry.split()[1]) for entry in stat if entry.startswith("inactive_file "))
    return max(0, int(limit) - used + given_back)
