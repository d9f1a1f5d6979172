"""From files to a resolved profile: where profiles live, `extends`, and the match with a device.

Later wins: the built-in profiles, the user's config folder, `BIDISPATCH_PROFILE`. A file of a later layer that names
no `extends` edits what the earlier layers give this machine.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidispatch.device import ARCHS, Device
from bidispatch.errors import Fault, ProfileError, SelectionError, UsageError, did_you_mean
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import parse_dtype
from bidispatch.profiles.document import Document, read_document
from bidispatch.profiles.lint import faults_of
from bidispatch.profiles.profile import Profile, ProfileCandidate, ProfileRule, Source, TunedSource
from bidispatch.profiles.schema import ProfileFile
from bidispatch.registry import Registry

__all__ = ["PROFILE_VARIABLE", "ProfileStore", "builtin_folder", "lint_file", "user_folder"]

PROFILE_VARIABLE = "BIDISPATCH_PROFILE"

_BUILTIN, _USER, _CHOSEN = 0, 1, 2
"""Layers, in the order they win."""


def builtin_folder() -> Path:
    """The folder of the built-in profiles: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "hw_profiles"
    return inside if inside.is_dir() else package.parent / "hw_profiles"


def user_folder() -> Path:
    """The user's own profiles: `$BIDISPATCH_CONFIG_DIR`, else the platform's config folder for bidispatch."""
    if chosen := os.environ.get("BIDISPATCH_CONFIG_DIR"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_config_dir("bidispatch", appauthor=False)) / "profiles"


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A profile file that has no faults."""

    document: Document
    content: ProfileFile
    path: Path
    layer: int

    @property
    def name(self) -> str:
        return self.content.name or self.path.stem

    @property
    def arch(self) -> str | None:
        """The arch it is for: by `match`, else by the name of its file."""
        if self.content.match:
            return self.content.match.arch
        return self.path.stem if self.path.stem in ARCHS else None


class ProfileStore:
    """The profiles of this machine, read and checked against a registry when they are first needed."""

    def __init__(self, registry: Registry, *, builtin: Path | None = None, user: Path | None = None) -> None:
        self._registry = registry
        self._folders = {_BUILTIN: builtin or builtin_folder(), _USER: user or user_folder()}
        self._parsed: dict[Path, _Parsed] = {}

    def names(self) -> dict[str, Path]:
        """Every profile by name; the user's hides a built-in one of the same name."""
        return {path.stem: path for layer in (_BUILTIN, _USER) for path in self._files(layer)}

    def for_device(self, device: Device) -> Profile:
        """The profile for a device. Raises `ProfileError` for faulty files, `SelectionError` when no profile fits."""
        chosen = os.environ.get(PROFILE_VARIABLE)
        if chosen:
            parsed = self._read(*self._find(chosen))
            if parsed.content.match and not _fits(parsed, device, device.arch.name):
                wanted = parsed.content.match
                raise UsageError(
                    f"{PROFILE_VARIABLE}={chosen} is for {wanted.arch} {wanted.device_name or ''}".rstrip()
                    + f", the device is {device.arch.name} ({device.name}); remove its `match` to use it anyway"
                )
            return self._resolve(parsed, device)
        return self._resolve(self._match(device, _USER), device)

    def named(self, name: str, device: Device | None = None) -> Profile:
        """The profile of that name, or in that file, resolved. `device` is what a file without `extends` edits for."""
        return self._resolve(self._read(*self._find(name)), device)

    def find(self, name: str) -> Path:
        """The file of a profile named, or given as a file. Raises `UsageError` for a name nobody has."""
        return self._find(name)[0]

    def _files(self, layer: int) -> list[Path]:
        folder = self._folders[layer]
        return sorted(folder.glob("*.yaml")) if folder.is_dir() else []

    def _find(self, name: str) -> tuple[Path, int]:
        """A name or a path, as a file and its layer."""
        if name.endswith((".yaml", ".yml")) or os.sep in name:
            path = Path(name).expanduser().resolve()
            layer = next((n for n, folder in self._folders.items() if path.parent == folder.resolve()), _CHOSEN)
            return path, layer
        for layer in (_USER, _BUILTIN):
            path = self._folders[layer] / f"{name}.yaml"
            if path.is_file():
                return path, layer
        known = sorted(self.names())
        raise UsageError(f"no profile {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")

    def _read(self, path: Path, layer: int) -> _Parsed:
        if path not in self._parsed:
            document = read_document(path, _shown(path))
            faults = [*faults_of(document, self._registry), *_tuned_faults(document, path)]
            if faults:
                raise ProfileError(faults)
            self._parsed[path] = _Parsed(document, ProfileFile.model_validate(document.data), path, layer)
        return self._parsed[path]

    def _match(self, device: Device, layer: int) -> _Parsed:
        """The best file of a layer or those under it: this arch's, the device's name before any; else the family's."""
        for arch in dict.fromkeys((device.arch.name, device.arch.family)):
            for below in range(layer, -1, -1):
                fitting = [parsed for parsed in self._of_layer(below, arch) if _fits(parsed, device, arch)]
                fitting.sort(key=lambda parsed: _names_device(parsed), reverse=True)
                if not fitting:
                    continue
                best = [parsed for parsed in fitting if _names_device(parsed) == _names_device(fitting[0])]
                if len(best) > 1:
                    raise ProfileError(
                        [p.document.fault(("match",), f"several profiles match {device.name}; keep one") for p in best]
                    )
                return best[0]
        known = sorted(name for name in self.names() if name in ARCHS)
        raise SelectionError(
            f"no profile for {device.arch.name} ({device.name}); there are profiles for {', '.join(known)}. "
            f"`bidispatch profile init {device.arch.name}` starts one"
        )

    def _of_layer(self, layer: int, arch: str) -> Iterator[_Parsed]:
        """A layer's files that are for an arch. A file for another arch may be half written and is not checked."""
        for path in self._files(layer):
            if layer == _BUILTIN and path.stem in ARCHS:
                meant_for = path.stem
            else:
                match = _mapping(_mapping(read_document(path, _shown(path)).data).get("match"))
                meant_for = str(match.get("arch", path.stem))
            if meant_for == arch:
                yield self._read(path, layer)

    def _resolve(self, parsed: _Parsed, device: Device | None) -> Profile:
        chain = self._chain(parsed, device)
        archs, note = {link.arch for link in chain}, ""
        if device and device.arch.name not in archs and device.arch.family in archs:
            note = f"no profile for {device.arch.name}: its family's, {device.arch.family}"
        return _merge(chain, note)

    def _chain(self, parsed: _Parsed, device: Device | None) -> list[_Parsed]:
        """The files from the base to `parsed`."""
        chain = [parsed]
        while (base := self._base_of(chain[-1], device)) is not None:
            if base.path in [link.path for link in chain]:
                names = " extends ".join(p.name for p in [*chain, base])
                raise ProfileError([chain[-1].document.fault(("extends",), f"`extends` goes in a circle: {names}")])
            chain.append(base)
        return chain[::-1]

    def _base_of(self, parsed: _Parsed, device: Device | None) -> _Parsed | None:
        wanted = parsed.content.extends
        if wanted is None:
            if parsed.layer == _BUILTIN or device is None:
                return None
            return self._match(device, parsed.layer - 1)
        # A built-in profile stands on built-in ones; a user's file may extend the built-in one it is named after.
        # A file from anywhere else may also extend one that lies beside it.
        places = [(self._folders[layer], layer) for layer in range(min(parsed.layer, _USER), -1, -1)]
        if parsed.layer == _CHOSEN:
            places.insert(0, (parsed.path.parent, _CHOSEN))
        for folder, layer in places:
            path = folder / f"{wanted}.yaml"
            if path.is_file() and path.resolve() != parsed.path.resolve():
                return self._read(path, layer)
        known = sorted(set(self.names()) - {parsed.name})
        message = f"extends {wanted!r}, which is not there{did_you_mean(wanted, known)}; there are {', '.join(known)}"
        if wanted == parsed.name:
            message = f"`extends` goes in a circle: {wanted} extends itself"
        raise ProfileError([parsed.document.fault(("extends",), message)])


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _fits(parsed: _Parsed, device: Device, arch: str) -> bool:
    match = parsed.content.match
    if parsed.arch != arch:
        return False
    return not (match and match.device_name) or fnmatch.fnmatch(device.name, match.device_name)


def _names_device(parsed: _Parsed) -> bool:
    return bool(parsed.content.match and parsed.content.match.device_name)


def _tuned_faults(document: Document, path: Path) -> Iterator[Fault]:
    """Files of tuned ladders that are not there, or that a rule names twice. Data of any shape; what is in them is read
    when it is needed.
    """
    for op, rules in _mapping(_mapping(document.data).get("ops")).items():
        for i, rule in enumerate(rules if isinstance(rules, list) else ()):
            names = _mapping(rule).get("tuned")
            seen: dict[Path, str] = {}
            for j, name in enumerate(names if isinstance(names, list) else ()):
                if not isinstance(name, str):
                    continue
                file, where = (path.parent / name).resolve(), ("ops", op, i, "tuned", j)
                if not file.is_file():
                    message = f"{name!r} is not there, beside {path.name}; `bidispatch tune` writes such files"
                    yield document.fault(where, message)
                elif file in seen:
                    yield document.fault(where, f"{name!r} is the file {seen[file]!r} again; take one of them out")
                seen.setdefault(file, name)


def _shown(path: Path) -> str:
    """A built-in file as hw_profiles/NAME, which is where a reader finds it; another as it is."""
    folder = builtin_folder()
    if folder in path.parents:
        return f"hw_profiles/{path.relative_to(folder).as_posix()}"
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _merge(chain: list[_Parsed], note: str) -> Profile:
    require, trust = Invariance.BATCH, "claimed"
    rules: dict[str, tuple[ProfileRule, ...]] = {}
    prefer: tuple[tuple[str, Source], ...] = ()
    disable: dict[str, tuple[str, Source]] = {}
    for parsed in chain:
        content, document = parsed.content, parsed.document
        if content.invariance.require:
            require = Invariance.parse(content.invariance.require)
        if content.invariance.trust:
            trust = content.invariance.trust
        for op in content.ops:
            rules[op] = tuple(_rule(parsed, op, i) for i in range(len(content.ops[op])))
        if content.prefer is not None:
            prefer = tuple((name, _source(document, ("prefer", i))) for i, name in enumerate(content.prefer))
        for name, reason in content.disable.items():
            disable[name] = (reason, _source(document, ("disable", name)))
    match = chain[-1].content.match
    return Profile(
        name=chain[-1].name,
        chain=tuple(parsed.document.path for parsed in chain),
        require=require,
        trust=trust,
        rules=rules,
        prefer=prefer,
        disable=disable,
        note=note,
        match={"arch": match.arch, "device_name": match.device_name} if match else None,
    )


def _rule(parsed: _Parsed, op: str, index: int) -> ProfileRule:
    rule, where = parsed.content.ops[op][index], ("ops", op, index)
    return ProfileRule(
        dtypes=tuple(parse_dtype(dtype) for dtype in rule.dtypes),
        when=rule.when,
        numerics=rule.numerics,
        candidates=tuple(
            ProfileCandidate(
                impl=candidate.impl,
                source=_source(parsed.document, (*where, "candidates", i)),
                max_m=candidate.max_m,
                params=candidate.params,
                tile=candidate.tile,
            )
            for i, candidate in enumerate(rule.candidates)
        ),
        source=_source(parsed.document, where),
        tuned=tuple(
            TunedSource(
                parsed.path.parent / name,
                _shown(parsed.path.parent / name),
                _source(parsed.document, (*where, "tuned", i)),
            )
            for i, name in enumerate(rule.tuned)
        ),
    )


def _source(document: Document, where: tuple[str | int, ...]) -> Source:
    return Source(document.path, document.place(where)[0])


def lint_file(path: Path, registry: Registry) -> list[Fault]:
    """All faults of a file, `extends` included: missing or in a circle."""
    try:
        document = read_document(path, _shown(path))
        faults = [*faults_of(document, registry), *_tuned_faults(document, path)]
    except ProfileError as error:
        return list(error.faults)
    store = ProfileStore(registry)
    extends = document.data.get("extends") if isinstance(document.data, dict) else None
    if isinstance(extends, str):
        faults += _extends_faults(store, document, path, extends, registry)
    return sorted(dict.fromkeys(faults), key=lambda fault: (fault.path != document.path, fault.line, fault.column))


def _extends_faults(
    store: ProfileStore, document: Document, path: Path, extends: str, registry: Registry
) -> list[Fault]:
    # The rest of the file may be faulty, so follow `extends` from a stand-in that has nothing else.
    layer = next((n for n, folder in store._folders.items() if path.parent.resolve() == folder.resolve()), _CHOSEN)
    stand_in = _Parsed(document, ProfileFile(schema_version=1, extends=extends, name=path.stem), path, layer)
    try:
        store._chain(stand_in, None)
    except ProfileError as error:
        return list(error.faults)
    return []
