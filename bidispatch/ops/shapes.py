"""Files of shapes: which dims of an op models have, by name. `tune`, `verify` and the benchmarks read the same ones.

A file is a YAML list; each entry has a `name`, and every other key is a dim: `{name: Qwen3-8B qkv, n: 6144, k: 4096}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidispatch.errors import UsageError
from bidispatch.ops.schema import DimValue

__all__ = ["Shape", "read_shapes"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Dims that one or more layers of models share."""

    names: tuple[str, ...]
    """Every name in the file with these dims, in order."""
    dims: Mapping[str, DimValue]
    """As written; `Op.problem` checks them."""


def read_shapes(path: str | Path) -> list[Shape]:
    """Read a file of shapes; entries of equal dims become one, with all their names.

    Raises `UsageError` for a file that cannot be read or is not such a list, and for a name that is there twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path} is not a list of shapes; write one a line: - {{name: x qkv, n: 6144, k: 4096}}")
    names: dict[tuple[tuple[str, DimValue], ...], list[str]] = {}
    for number, entry in enumerate(content, start=1):
        name, dims = _entry(path, number, entry)
        if any(name in known for known in names.values()):
            raise UsageError(f"{path} has the name {name!r} twice; give each entry one of its own")
        names.setdefault(tuple(sorted(dims.items())), []).append(name)
    return [Shape(tuple(known), dict(dims)) for dims, known in names.items()]


def _entry(path: str | Path, number: int, entry: Any) -> tuple[str, dict[str, DimValue]]:
    if not isinstance(entry, dict):
        raise UsageError(f"entry {number} of {path} is {entry!r}, not a mapping such as {{name: x, n: 6144, k: 4096}}")
    dims = {str(key): value for key, value in entry.items()}
    name = dims.pop("name", None)
    if not isinstance(name, str) or not name:
        raise UsageError(f"entry {number} of {path} has no name: {entry!r}; add `name: <model and layer>`")
    wrong = [key for key, value in dims.items() if type(value) not in (int, float, str, bool)]
    if wrong or not dims:
        raise UsageError(f"{name!r} in {path} needs dims with plain values, such as n: 6144; it has {dims!r}")
    return name, dims
