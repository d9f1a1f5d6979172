"""What Triton's interpreter does again and again to no effect, done once: about half of this folder's time.

Seen in Triton 3.6 to 3.9 (`triton/runtime/interpreter.py`); what a kernel computes is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def make_quick() -> None:
    """Change the interpreter of this process."""
    # Each integer operation is done again in 64 bits and compared with its limits, to assert it only under `debug`.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    # A table of all dtypes is made for each look into it.
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _looked_up_once(get_np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def get(of: Any) -> Any:
        element = of.scalar
        if element.name not in known:
            known[element.name] = get_np_dtype(element)
        return known[element.name]

    return get


def _once_a_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The language is patched for a launch, which restores it at its end, and searched for what to patch in every
    call of a device function besides. Those need it once for each of the modules that the language may be seen by.
    """
    patched: set[tuple[bool, bool]] = set()

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    launch = Launch()

    def patch(fn: Any) -> Any:
        seen = _seen_by(fn)
        if seen not in patched:
            # What a device function patches lasts as long as the launch it is called in.
            launch._changes += patch_lang(fn)._changes
            patched.add(seen)
        return launch

    return patch


@cache
def _seen_by(fn: Any) -> tuple[bool, bool]:
    modules = list(map(id, fn.__globals__.values()))
    return id(tl) in modules, id(tl.core) in modules
