"""Files that tools write, records and tuned ladders: whole or not at all, in a folder known to take them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["prepare_folder", "write_whole"]


def prepare_folder(folder: Path) -> None:
    """Make a folder, and a file in it that goes again. Raises `OSError` where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Write beside the file and move over it, so that a reader never sees half of it. Raises `OSError`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
