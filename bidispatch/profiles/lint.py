"""Every fault of a profile file at once: its shape, then the names and values that only the registry knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from bidispatch import ops
from bidispatch.device import ARCHS
from bidispatch.errors import Fault, UsageError, did_you_mean
from bidispatch.ops.schema import DTYPES, Dim, Op, parse_dtype
from bidispatch.profiles.document import Document, Location
from bidispatch.profiles.schema import Candidate, Condition, InvarianceSection, Match, ProfileFile, Rule
from bidispatch.registry import Implementation, Registry

__all__ = ["faults_of"]

_TOP_SECTIONS: dict[str, type[BaseModel]] = {"match": Match, "invariance": InvarianceSection}
_KINDS = {dict: "a mapping", list: "a list", str: "text", bool: "a bool", int: "an int", float: "a float"}
_MEMBERS = {"Condition": "conditions", **{kind.__name__: name for kind, name in _KINDS.items()}}


def faults_of(document: Document, registry: Registry) -> list[Fault]:
    """All faults of a document, in file order. Takes data of any shape; never raises."""
    faults = [*document.faults, *_shape_faults(document)]
    if isinstance(document.data, dict):
        faults += _name_faults(document, document.data, registry)
    unique = dict.fromkeys(faults)
    return sorted(unique, key=lambda fault: (fault.line, fault.column))


def _shape_faults(document: Document) -> Iterator[Fault]:
    if not isinstance(document.data, dict):
        yield document.fault((), f"a profile is a mapping, this is {_kind(document.data)}")
        return
    try:
        ProfileFile.model_validate(document.data)
    except ValidationError as error:
        found: dict[Location, list[Any]] = {}
        for detail in error.errors():
            found.setdefault(_data_location(document, detail["loc"]), []).append(detail)
        for where, details in found.items():
            if details[0]["type"] == "extra_forbidden":
                yield document.fault(where, _unknown_key(str(where[-1]), details[0]["loc"]), at_key=True)
            elif len(details) == 1 or details[0]["type"] == "missing":
                yield from (document.fault(where, _wanted(detail)) for detail in details)
            elif not any(other[: len(where)] == where for other in found if other != where):
                yield document.fault(where, _wanted_of_union(details))


def _data_location(document: Document, loc: Location) -> Location:
    """Pydantic's location without the names of union members, which are not in the file."""
    where: Location = ()
    for step in loc:
        if (*where, step) in document.values or (*where, step) in document.keys:
            where = (*where, step)
    return where if where or not loc else tuple(loc[:1])


def _unknown_key(key: str, loc: Location) -> str:
    names = [str(step) for step in loc if isinstance(step, str)]
    nested: tuple[tuple[str, type[BaseModel]], ...] = (
        ("Condition", Condition),
        ("candidates", Candidate),
        ("ops", Rule),
    )
    section = next(
        (model for name, model in nested if name in names[:-1]),
        _TOP_SECTIONS.get(names[0], ProfileFile) if names[1:] else ProfileFile,
    )
    known = [field.alias or name for name, field in section.model_fields.items()]
    return f"unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}"


def _wanted(detail: Any) -> str:
    given = detail.get("input")
    if detail["type"] == "missing":
        return f"{detail['loc'][-1]!r} is missing"
    if detail["type"] == "value_error":  # a validator's own sentence
        return str(detail["msg"]).removeprefix("Value error, ")
    return f"{str(detail['msg']).removeprefix('Input ').rstrip('.')} here, not {_shown(given)}"


def _wanted_of_union(details: list[Any]) -> str:
    """A union gives one detail a member, each located under the member's name."""
    members = [_MEMBERS.get(str(detail["loc"][-1]), str(detail["loc"][-1])) for detail in details]
    return f"should be {', '.join(members[:-1])} or {members[-1]} here, not {_shown(details[0].get('input'))}"


def _shown(value: object) -> str:
    return _kind(value) if value is None or isinstance(value, dict | list) else f"{value!r} ({_kind(value)})"


def _kind(value: object) -> str:
    return "nothing" if value is None else _KINDS.get(type(value), type(value).__name__)


def _name_faults(document: Document, data: Mapping[str, Any], registry: Registry) -> Iterator[Fault]:
    arch = data["match"].get("arch") if isinstance(data.get("match"), dict) else None
    if isinstance(arch, str) and arch not in ARCHS:
        known = f"{did_you_mean(arch, ARCHS)}; known: {', '.join(ARCHS)}"
        yield document.fault(("match", "arch"), f"unknown arch {arch!r}{known}")
    for i, name in _items(data.get("prefer")):
        yield from _unknown_implementation(document, ("prefer", i), name, registry)
    for name in _mapping(data.get("disable")):
        yield from _unknown_implementation(document, ("disable", name), name, registry, at_key=True)
    for name, rules in _mapping(data.get("ops")).items():
        if name not in ops.CATALOGUE:
            known = f"{did_you_mean(name, ops.CATALOGUE)}; known: {', '.join(ops.CATALOGUE)}"
            yield document.fault(("ops", name), f"unknown op {name!r}{known}", at_key=True)
            continue
        for i, rule in _items(rules):
            if isinstance(rule, dict):
                yield from _rule_faults(document, ("ops", name, i), ops.get(name), rule, registry)


def _rule_faults(
    document: Document, where: Location, op: Op, rule: Mapping[str, Any], registry: Registry
) -> Iterator[Fault]:
    for i, dtype in _items(rule.get("dtypes")):
        if isinstance(dtype, str):
            try:
                parse_dtype(dtype)
            except UsageError as error:
                yield document.fault((*where, "dtypes", i), str(error))
    dims = {dim.name: dim for dim in op.dims}
    for dim, condition in _mapping(rule.get("when")).items():
        if dim not in dims:
            known = f"{did_you_mean(dim, dims)}; it has {', '.join(dims)}"
            yield document.fault((*where, "when", dim), f"{op.name} has no dim {dim!r}{known}", at_key=True)
        else:
            yield from _condition_faults(document, (*where, "when", dim), dims[dim], condition)
    reached = 0
    for i, candidate in _items(rule.get("candidates")):
        if not isinstance(candidate, dict):
            continue
        here = (*where, "candidates", i)
        max_m = candidate.get("max_m")
        if isinstance(max_m, int) and not isinstance(max_m, bool):
            if 0 < max_m <= reached:
                yield document.fault((*here, "max_m"), f"max_m must rise: {max_m} comes after {reached}")
            reached = max(reached, max_m)
        name = candidate.get("impl")
        if isinstance(name, str):
            yield from _unknown_implementation(document, (*here, "impl"), name, registry)
            if name in registry:
                yield from _candidate_faults(document, here, op, candidate, registry.get(name))


def _condition_faults(document: Document, where: Location, dim: Dim, condition: object) -> Iterator[Fault]:
    """Conditions a dim of this type can never meet, or not even be asked about."""
    if not isinstance(condition, dict):
        yield from _never_equal(document, where, dim, condition)
        return
    for key in ("multiple_of", "min", "max"):
        if key in condition and dim.type not in (int, float):
            message = f"{dim.name} is a {dim.type.__name__}, which has no {key!r}; use `in`"
            yield document.fault((*where, key), message, at_key=True)
    for i, value in _items(condition.get("in")):
        yield from _never_equal(document, (*where, "in", i), dim, value)


def _never_equal(document: Document, where: Location, dim: Dim, value: object) -> Iterator[Fault]:
    if type(value) not in _KINDS or isinstance(value, dict | list):
        return  # its shape is a fault already
    if type(value) is not dim.type and not (dim.type is float and type(value) is int):
        yield document.fault(where, f"{dim.name} is {_KINDS[dim.type]}, never {_shown(value)}")
    elif dim.holds_dtype and value not in DTYPES:
        yield document.fault(where, f"{dim.name} is one of {', '.join(DTYPES)}, never {_shown(value)}")


def _candidate_faults(
    document: Document,
    where: Location,
    op: Op,
    candidate: Mapping[str, Any],
    implementation: Implementation,
) -> Iterator[Fault]:
    name = implementation.name
    if implementation.op != op.name:
        yield document.fault((*where, "impl"), f"{name} implements {implementation.op}, not {op.name}")
        return
    params, tile = set(implementation.params.model_fields), set(_tile_fields(implementation))
    for key in _mapping(candidate.get("tile")):
        if key in params and key not in tile:
            yield document.fault(
                (*where, "tile", key),
                f"{key!r} is a reduction param of {name}: it fixes the bits, so it belongs in `params`",
                at_key=True,
            )
        elif key not in tile:
            yield document.fault((*where, "tile", key), _no_such("tile size", key, tile, name), at_key=True)
    for key in _mapping(candidate.get("params")):
        if key in tile and key not in params:
            yield document.fault(
                (*where, "params", key), f"{key!r} is a tile size of {name}: it belongs in `tile`", at_key=True
            )
        elif key not in params:
            yield document.fault((*where, "params", key), _no_such("param", key, params, name), at_key=True)
    yield from _value_faults(document, (*where, "params"), implementation.params, candidate.get("params"), params)
    if implementation.tile is not None:
        yield from _value_faults(document, (*where, "tile"), implementation.tile, candidate.get("tile"), tile)


def _value_faults(
    document: Document, where: Location, model: type[BaseModel], values: Any, known: set[str]
) -> Iterator[Fault]:
    if not isinstance(values, dict):
        return
    given = {key: value for key, value in values.items() if key in known and not isinstance(value, dict | list)}
    try:
        model.model_validate(given)
    except ValidationError as error:
        for detail in error.errors():
            yield document.fault((*where, *detail["loc"]), _wanted(detail))


def _tile_fields(implementation: Implementation) -> tuple[str, ...]:
    return tuple(implementation.tile.model_fields) if implementation.tile else ()


def _no_such(what: str, key: str, known: set[str], name: str) -> str:
    return f"{name} has no {what} {key!r}{did_you_mean(key, known)}; it has {', '.join(sorted(known)) or 'none'}"


def _unknown_implementation(
    document: Document, where: Location, name: Any, registry: Registry, *, at_key: bool = False
) -> Iterator[Fault]:
    if not isinstance(name, str) or name in registry or name.partition(".")[0] in registry.failures:
        return
    known = [implementation.name for implementation in registry]
    yield document.fault(
        where,
        f"unknown implementation {name!r}{did_you_mean(name, known)}; `bidispatch doctor` lists them",
        at_key=at_key,
    )


def _items(value: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(value) if isinstance(value, list) else iter(())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
