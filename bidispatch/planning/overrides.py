"""Forced choices: `BIDISPATCH_IMPL="attention=flash_attn.fa2"` and `with bid.override("gemm=triton.gemm")`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from bidispatch import ops
from bidispatch.errors import UsageError
from bidispatch.profiles.profile import Source

__all__ = ["IMPL_VARIABLE", "forced_choice", "override"]

IMPL_VARIABLE = "BIDISPATCH_IMPL"

_in_context: ContextVar[Mapping[str, str] | None] = ContextVar("bidispatch_override", default=None)


def parse_choices(text: str) -> dict[str, str]:
    """Read `op=implementation,op=implementation`; raise `UsageError` for another form or an unknown op."""
    choices = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        op, equals, implementation = (word.strip() for word in part.partition("="))
        if not equals or not implementation:
            raise UsageError(f"{part!r} is not op=implementation, for example attention=triton.paged_attention")
        choices[ops.get(op).name] = implementation
    return choices


@contextmanager
def override(choices: str) -> Iterator[None]:
    """Force implementations inside a `with` block: `"op=implementation,op=implementation"`.

    A forced choice that does not fit raises `SelectionError`; nothing else is tried. Nests; the inner one wins.
    """
    token = _in_context.set({**(_in_context.get() or {}), **parse_choices(choices)})
    try:
        yield
    finally:
        _in_context.reset(token)


def forced_choice(op: str) -> tuple[str, Source] | None:
    """The implementation forced for an op, and by what; None when there is none."""
    if op in (in_context := _in_context.get() or {}):
        return in_context[op], Source("bid.override")
    from_environment = os.environ.get(IMPL_VARIABLE)
    if from_environment and op in (choices := parse_choices(from_environment)):
        return choices[op], Source(IMPL_VARIABLE)
    return None
