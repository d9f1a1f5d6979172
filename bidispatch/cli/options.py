"""Options that several commands share, and the reading of `--dim`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from bidispatch.errors import UsageError

__all__ = [
    "DeviceOption",
    "DimOption",
    "JsonOption",
    "ProfileOption",
    "RequireOption",
    "parse_dims",
    "show_help_without_command",
]

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda:0, or an arch such as sm103, which need not be here.", metavar="DEVICE"
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", help="A profile's name or file, instead of the device's own.", metavar="NAME|FILE"),
]
RequireOption = Annotated[
    str | None,
    typer.Option("--require", help="run, batch, sequence or topology, instead of the profile's.", metavar="LEVEL"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
DimOption = Annotated[
    list[str] | None, typer.Option("--dim", help="A dim of the op; may be given several times.", metavar="NAME=VALUE")
]


def show_help_without_command(context: typer.Context) -> None:
    """Print the help of a group that was called without a command, which is a usage error."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def parse_dims(given: Sequence[str] | None) -> dict[str, str]:
    """Read `name=value` words. Raises `UsageError` for another form or a dim given twice."""
    dims: dict[str, str] = {}
    for word in given or ():
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"--dim {word!r} is not NAME=VALUE, for example --dim k=4096")
        if name in dims:
            raise UsageError(f"dim {name!r} is given twice, as {dims[name]} and as {value}; keep one")
        dims[name] = value
    return dims
