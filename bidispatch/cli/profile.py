"""`bidispatch profile`: list, show, lint, diff and init. Works without torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bidispatch.cli import failures, render
from bidispatch.cli.options import JsonOption, show_help_without_command
from bidispatch.device import ARCHS, Arch, Device
from bidispatch.errors import BidispatchError, ProfileError
from bidispatch.profiles import edit
from bidispatch.profiles.document import read_document
from bidispatch.profiles.load import ProfileStore, builtin_folder, lint_file, user_folder
from bidispatch.profiles.profile import Profile
from bidispatch.registry import default_registry

__all__ = ["app"]

app = typer.Typer(
    help="List, show, check, compare and start hardware profiles.",
    rich_markup_mode=None,
)
app.callback(invoke_without_command=True)(show_help_without_command)

_Name = Annotated[str, typer.Argument(help="A profile's name or file.", metavar="NAME|FILE")]


@app.command("list")
def list_profiles(as_json: JsonOption = False) -> int:
    """List every profile, and what this machine uses.

    Example: bidispatch profile list
    """
    store = ProfileStore(default_registry())
    in_use = _in_use(store)
    entries = [_entry(name, path) for name, path in store.names().items()]
    if as_json:
        render.json_document({"profiles": entries, "in_use": list(in_use)})
        return 0
    render.table(
        ("profile", "for", "extends", "from", "file"),
        [(entry["name"], entry["arch"], entry["extends"], entry["layer"], entry["path"]) for entry in entries],
    )
    render.line()
    render.line(f"in use on this machine: {' <- '.join(in_use) or 'none'}")
    render.line(f"your own go to {user_folder()}")
    return 0


def _in_use(store: ProfileStore) -> tuple[str, ...]:
    try:
        return store.for_device(Device.detect()).chain
    except BidispatchError as error:
        render.warning(str(error))
        return ()


def _entry(name: str, path: Path) -> dict[str, str]:
    """What a file says of itself, as far as it can be read: `lint` is for what is wrong with it."""
    try:
        data = read_document(path).data
    except ProfileError:
        data = None
    content: dict[str, Any] = data if isinstance(data, dict) else {}
    match = content.get("match")
    arch = match.get("arch") if isinstance(match, dict) else None
    return {
        "name": name,
        "arch": str(arch or (name if name in ARCHS else "")),
        "extends": str(content.get("extends") or ""),
        "layer": "built in" if path.parent == builtin_folder() else "yours",
        "path": str(path),
    }


@app.command("show")
def show(
    profile: _Name,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Merge what it extends, and note where each line is from.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Print a profile, as it stands or as it resolves.

    Example: bidispatch profile show sm103 --resolved
    """
    store = ProfileStore(default_registry())
    if resolved:
        found = _resolve(store, profile)
        if as_json:
            render.json_document(edit.as_json(found))
        else:
            render.line(edit.as_yaml(found).rstrip("\n"))
        return 0
    path = store.find(profile)
    document = read_document(path)
    if as_json:
        render.json_document({"path": str(path), "content": document.data})
    else:
        render.line(path.read_text(encoding="utf-8").rstrip("\n"))
    return 0


def _resolve(store: ProfileStore, name: str) -> Profile:
    """A profile with all it stands on. One that names no `extends` edits what its arch has."""
    entry = _entry(Path(name).stem, store.find(name))
    device = Device.parse(entry["arch"]) if entry["arch"] in ARCHS else Device.detect()
    return store.named(name, device)


@app.command("lint")
def lint(
    files: Annotated[list[Path], typer.Argument(help="Profile files.", metavar="FILE...")],
    as_json: JsonOption = False,
) -> int:
    """Print every fault of profile files.

    Each as path:line:column, all of a file at once.

    Exit code 1: there is a fault.

    Example: bidispatch profile lint hw_profiles/*.yaml
    """
    registry = default_registry()
    faults = {str(path): lint_file(path, registry) for path in files}
    count = sum(map(len, faults.values()))
    if as_json:
        listed = [{"path": path, "faults": [asdict(fault) for fault in found]} for path, found in faults.items()]
        render.json_document({"faults": count, "files": listed})
    else:
        for path, found in faults.items():
            for fault in found:
                render.line(str(fault))
            if not found:
                render.line(f"{path}: no faults")
    return failures.FINDING if count else 0


@app.command("diff")
def diff(before: _Name, after: _Name, as_json: JsonOption = False) -> int:
    """Compare two profiles, rule by rule.

    As they resolve, with all that they extend.

    Example: bidispatch profile diff sm90 my.yaml
    """
    store = ProfileStore(default_registry())
    changes = edit.differences(_resolve(store, before), _resolve(store, after))
    if as_json:
        render.json_document({"before": before, "after": after, "changes": [asdict(change) for change in changes]})
        return 0
    for change in changes:
        render.line(change.where)
        if change.before:
            render.line(f"  - {change.before}{_from(change.before_source)}")
        if change.after:
            render.line(f"  + {change.after}{_from(change.after_source)}")
    if not changes:
        render.line(f"{before} and {after} come to the same")
    return 0


def _from(source: str) -> str:
    return f"  # {source}" if source else ""


@app.command("init")
def init(
    arch: Annotated[str, typer.Argument(help="The arch it is for, such as sm90.", metavar="ARCH")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write it; your own profiles' folder by default.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Write a profile to edit, over the built-in one.

    It changes nothing until one of its two lines is uncommented.

    Example: bidispatch profile init sm90 --out my.yaml
    """
    chosen = Arch.parse(arch)
    path = out or user_folder() / f"{chosen.name}.yaml"
    edit.write_new(path, edit.starter(chosen, default_registry()))
    if as_json:
        render.json_document({"path": str(path), "arch": chosen.name})
    else:
        render.line(f"wrote {path}")
    return 0
