"""What the peers that are other people's packages share: finding their libraries, calling their torch ops."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["AbsentError", "Peer", "call_op", "load_op"]


class AbsentError(Exception):
    """A peer is not installed, or not in a form that can be called; says why."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Peer:
    """`launch(i)` runs it once on the i-th block table. `prepare` is called after the lengths have changed and before
    graphs are replayed: what a server does on the host, or outside its graph, at every step.
    """

    launch: Callable[[int], Any]
    prepare: Callable[[], None] = _nothing


def load_op(namespace: str, name: str, pattern: str, folders: tuple[Path, ...]) -> Any:
    """`torch.ops.<namespace>.<name>`, from a library of this file name under the installed vllm or in a folder.

    Raises `AbsentError` where there is none, or it does not load.
    """
    if not hasattr(getattr(torch.ops, namespace), name):
        path = _find(pattern, folders)
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise AbsentError(f"{path.name} does not load: {error}") from error
    try:
        return getattr(getattr(torch.ops, namespace), name).default
    except AttributeError:
        raise AbsentError(f"{pattern} has no {namespace}::{name}") from None


def _find(pattern: str, folders: tuple[Path, ...]) -> Path:
    """Looks for files: importing vllm to ask it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    installed = [Path(folder) for folder in (spec.submodule_search_locations or ()) if spec] if spec else []
    for folder in (*folders, *installed):
        for path in sorted(folder.glob(f"**/{pattern}")):
            return path
    raise AbsentError(f"no {pattern}: install vllm, or name a folder that holds it with --libraries")


def call_op(op: Any, values: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of a torch op by its arguments' names, which versions add to.

    What `values` lacks is the argument's default, None where it may be that, -1 for a side of the window (none), False
    for a switch. Raises `AbsentError` for any other argument.
    """
    filled: dict[str, Any] = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.name in values:
            filled[argument.name] = values[argument.name]
        elif argument.has_default_value():
            continue
        elif kind.startswith("Optional"):
            filled[argument.name] = None
        elif kind == "int" and "window" in argument.name:
            filled[argument.name] = -1
        elif kind == "bool":
            filled[argument.name] = False
        else:
            raise AbsentError(f"{op} wants {kind} {argument.name}, which nobody here knows")
    return lambda: op(**filled)
