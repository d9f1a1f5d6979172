"""Errors on the command line: what is printed, and the exit code of each kind."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import asdict
from typing import Any

from bidispatch.cli import render
from bidispatch.errors import (
    ArgumentError,
    BackendError,
    BidispatchError,
    DeviceError,
    InvarianceError,
    ProfileError,
    RecordError,
    SelectionError,
    UsageError,
)

__all__ = ["FINDING", "INTERRUPTED", "LACKING", "USAGE", "as_json_error", "reader_gone", "report", "report_usage"]

FINDING = 1
USAGE = 2
LACKING = 3
INTERRUPTED = 130

_CODES: tuple[tuple[type[BidispatchError], int], ...] = (
    (SelectionError, FINDING),
    (RecordError, FINDING),
    (InvarianceError, FINDING),
    (UsageError, USAGE),
    (ProfileError, USAGE),
    (ArgumentError, USAGE),
    (DeviceError, LACKING),
    (BackendError, LACKING),
    (BidispatchError, LACKING),  # what is left: installed backends that contradict each other
)


def report(error: BidispatchError, *, as_json: bool, debug: bool) -> int:
    """Print an error, as a JSON document on stdout or as text on stderr, and return its exit code."""
    if debug:
        traceback.print_exception(error)
    if as_json:
        render.json_document({"error": as_json_error(error)})
    else:
        render.error_line(f"error: {error}")
    return next(code for kind, code in _CODES if isinstance(error, kind))


def report_usage(error: Exception, *, as_json: bool) -> int:
    """Print a command line that could not be read, as typer describes it."""
    format_message = getattr(error, "format_message", None)
    message = format_message() if format_message else str(error)
    if as_json:
        render.json_document({"error": {"type": "UsageError", "message": message, "faults": []}})
    else:
        context = getattr(error, "ctx", None)
        render.error_line(f"error: {message}")
        render.error_line(f"`{context.command_path if context else 'bidispatch'} --help` shows what it takes")
    return USAGE


def as_json_error(error: BidispatchError) -> dict[str, Any]:
    """An error as plain data: its type, its message, and the faults of a profile."""
    faults = error.faults if isinstance(error, ProfileError) else ()
    return {"type": type(error).__name__, "message": str(error), "faults": [asdict(fault) for fault in faults]}


def reader_gone() -> int:
    """Whoever read our output has left (`| head`): say nothing more, and let the interpreter flush into nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FINDING
