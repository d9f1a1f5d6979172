"""Reading one YAML file (YAML 1.2) into plain data that remembers where every key and value stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bidispatch.errors import Fault, ProfileError

__all__ = ["Document", "Location", "Place", "read_document"]

Place = tuple[int, int]
"""Line and column, counted from 1."""
Location = tuple[str | int, ...]
"""A path into the data: keys and list indices."""

_MERGE_TAG = "tag:yaml.org,2002:merge"
_COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass
class Document:
    """Plain data, and the place of each key and value in it. `faults` are those of the YAML itself."""

    path: str
    data: Any = None
    keys: dict[Location, Place] = field(default_factory=dict)
    values: dict[Location, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def fault(self, location: Sequence[str | int], message: str, *, at_key: bool = False) -> Fault:
        """A fault at a location, or at the nearest thing above it that has a place."""
        place = self.place(location, at_key=at_key)
        return Fault(self.path, *place, message)

    def place(self, location: Sequence[str | int], *, at_key: bool = False) -> Place:
        """Where the value (or key) at a location stands; the nearest one above it if it has no place."""
        where = tuple(location)
        while True:
            places = (self.keys, self.values) if at_key else (self.values, self.keys)
            for known in places:
                if where in known:
                    return known[where]
            if not where:
                return (1, 1)
            where = where[:-1]


def read_document(path: Path, shown: str | None = None) -> Document:
    """Read a YAML file. Raises `ProfileError` for a file that is not there, or not YAML at all.

    Duplicate keys and merge keys are faults of the document, so that they are reported with all the others.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    document = Document(shown or str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError([Fault(document.path, 0, 0, f"cannot be read: {error}")]) from error
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise ProfileError([Fault(document.path, line, column, f"not valid YAML: {error.problem}")]) from error
    except YAMLError as error:
        raise ProfileError([Fault(document.path, 0, 0, f"not valid YAML: {error}")]) from error
    except RecursionError as error:
        raise ProfileError([Fault(document.path, 0, 0, "nested too deeply to be read")]) from error
    if root is not None:
        document.data = _construct(document, yaml.constructor, root, (), ())
    return document


def _construct(document: Document, constructor: Any, node: Any, where: Location, above: tuple[Any, ...]) -> Any:
    from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

    document.values.setdefault(where, _place(node))
    if isinstance(node, ScalarNode):
        return _scalar(document, constructor, node)
    if any(node is ancestor for ancestor in above):
        document.faults.append(Fault(document.path, *_place(node), "an alias (*) stands inside its own anchor (&)"))
        return None
    if node.tag not in _COLLECTION_TAGS:
        document.faults.append(Fault(document.path, *_place(node), f"tags are not supported: {node.tag}"))
    above = (*above, node)
    if isinstance(node, SequenceNode):
        return [_construct(document, constructor, item, (*where, i), above) for i, item in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        raise TypeError(f"ruamel.yaml gave a node of an unknown kind: {type(node).__name__}")
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node)
        if not isinstance(key_node, ScalarNode):
            document.faults.append(Fault(document.path, *place, "a key is text here, not a list or a mapping"))
            continue
        if key_node.tag == _MERGE_TAG or (key_node.value == "<<" and key_node.style is None):
            document.faults.append(Fault(document.path, *place, "merge keys (<<) are not supported; use `extends`"))
            continue
        key = str(key_node.value)
        if key in result:
            first = document.keys[(*where, key)]
            document.faults.append(Fault(document.path, *place, f"duplicate key {key!r}, first on line {first[0]}"))
            continue
        document.keys[(*where, key)] = place
        result[key] = _construct(document, constructor, value_node, (*where, key), above)
    return result


def _scalar(document: Document, constructor: Any, node: Any) -> Any:
    """The value of a scalar; its text, and a fault, where its tag or form says something that cannot be read."""
    from ruamel.yaml.error import YAMLError

    try:
        return constructor.construct_object(node)
    except (YAMLError, ValueError):
        document.faults.append(Fault(document.path, *_place(node), f"{node.value!r} cannot be read as {node.tag}"))
        return node.value


def _place(node: Any) -> Place:
    return node.start_mark.line + 1, node.start_mark.column + 1
