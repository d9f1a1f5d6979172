"""The command line: one module a command, `render` for what they print, `failures` for errors and exit codes.

Exit codes: 0 fine, 1 a finding, 2 usage, 3 this machine lacks something, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. `arguments` are those of the process by default."""
    import sys

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from bidispatch.cli.app import run

        code = run(words)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        sys.stderr.write("interrupted\n")
    return code
