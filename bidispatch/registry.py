"""The registry: which implementations exist for an op, where each comes from, and which backends failed to load.

A backend is an entry point in the group `bidispatch.backends`: `name = "module:register"`. `register` takes the
registry and adds light `Implementation` entries; it imports no GPU library. What an entry names in `load` is
imported when a kernel is bound. Built-in backends and third parties' come in the same way.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

from pydantic import BaseModel, ConfigDict

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.errors import BidispatchError, UsageError, did_you_mean
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.requirements import Requirement

__all__ = ["BackendFailure", "Implementation", "Params", "Registry", "Rung", "Tile", "default_registry"]

ENTRY_POINT_GROUP = "bidispatch.backends"


class Params(BaseModel):
    """Reduction params: everything that fixes the bits. Subclass with one field a param, each with a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Tile(BaseModel):
    """A launch shape: what may follow the batch without changing a bit. Subclass with one field a size."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a ladder: the implementation and launch shape for calls of up to `max_m` rows (None: any)."""

    implementation: Implementation
    params: Params
    tile: Tile | None
    max_m: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data of what runs; not for which M."""
        return {
            "implementation": self.implementation.name,
            "params": self.params.model_dump(),
            "tile": self.tile.model_dump() if self.tile else None,
        }

    @property
    def key(self) -> str:
        """The same as canonical JSON: equal for rungs that run the same kernel."""
        return json.dumps(self.as_json(), sort_keys=True)


def _one_tile(device: Device, problem: Problem, params: Params) -> tuple[tuple[int | None, Tile | None], ...]:
    return ((None, None),)


def _none(problem: Problem) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to do an op. Light to make: what imports a library hides behind `load`.

    name: `backend.kernel`; the part before the first dot is the entry point's name.
    load: `"module:attribute"` of `bind(context: BindContext) -> kernel`; see `bidispatch.runtime.context`.
    archs: arch names, `*` allowed (`sm*`). dtypes: the problem dtypes it takes.
    requires: what else must hold; each requirement says what is missing.
    claims: the level it claims; a claim is not a proof, `verify` makes one.
    numerics: the class label from its reduction params and the problem. Same label, same device: same bits.
    tiles: `(device, problem, params) -> ((max_m, tile), ...)`, rising, the last with max_m None: the launch shapes
        it uses when a profile names none.
    search: `"module:attribute"` of `search(device, problem, params, m) -> Iterable[Tile]`: the launch shapes that
        `tune` tries for calls of m rows. It may import the library. Empty: only what `tiles` says.
    libraries: distributions whose version can change its bits; they enter records and the fingerprint.
    chooses_inside: whether a library chooses among algorithms by M inside one rung. `verify --classes` then takes every
        M up to 512, and both sides of each edge the bound kernel names in its attribute `edges` (see `Kernel`).
    own_rounding: `(problem) -> ‖difference‖ / ‖result‖` that its class rounds away where the op's definition rounds
        nothing, as its arithmetic gives it. `verify` allows a result to be so much further from the fp64 reference.
    """

    name: str
    op: str
    load: str
    archs: tuple[str, ...]
    dtypes: tuple[str, ...]
    numerics: Callable[[Params, Problem], str]
    requires: tuple[Requirement, ...] = ()
    claims: Invariance = Invariance.SEQUENCE
    params: type[Params] = Params
    tile: type[Tile] | None = None
    tiles: Callable[[Device, Problem, Params], tuple[tuple[int | None, Tile | None], ...]] = _one_tile
    search: str = ""
    libraries: tuple[str, ...] = ()
    chooses_inside: bool = False
    own_rounding: Callable[[Problem], float] = _none
    cuda_graph: bool = True
    summary: str = ""

    @property
    def backend(self) -> str:
        return self.name.partition(".")[0]

    def covers(self, arch: str, dtype: str) -> bool:
        """Whether the (arch, dtype) key of the registry leads here."""
        return dtype in self.dtypes and any(fnmatch.fnmatchcase(arch, pattern) for pattern in self.archs)

    def unmet(self, device: Device, problem: Problem) -> tuple[str, ...]:
        """Every reason why it cannot serve this problem on this device; empty when it can."""
        reasons = []
        if not any(fnmatch.fnmatchcase(device.arch.name, pattern) for pattern in self.archs):
            reasons.append(f"needs {' or '.join(self.archs)}, the device is {device.arch.name}")
        if problem.dtype not in self.dtypes:
            reasons.append(f"takes {', '.join(self.dtypes)}, asked for {problem.dtype}")
        reasons += [why for requirement in self.requires if (why := requirement.unmet(device, problem))]
        return tuple(reasons)


@dataclass(frozen=True, slots=True)
class BackendFailure:
    """A backend that could not be loaded: kept and shown, fatal only when it is chosen."""

    backend: str
    origin: str
    error: BaseException

    def __str__(self) -> str:
        return f"backend {self.backend!r} ({self.origin}) failed to load: {type(self.error).__name__}: {self.error}"


@dataclass
class Registry:
    """Implementations by name. `register` refuses a second one of the same name."""

    failures: dict[str, BackendFailure] = field(default_factory=dict)
    _implementations: dict[str, Implementation] = field(default_factory=dict)
    _origins: dict[str, str] = field(default_factory=dict)
    _backends: dict[str, str] = field(default_factory=dict)
    _loading: str = ""

    def register(self, implementation: Implementation, origin: str = "") -> None:
        """Add an implementation. Raises `BidispatchError` for a name that is taken, and `UsageError` for an op nobody
        knows or a name outside its backend.

        `origin` says who registers, for messages; while an entry point loads it is the distribution.
        """
        origin = origin or self._loading or "this process"
        ops.get(implementation.op)
        if self._loading:
            backend = self._loading.partition(" ")[0]
            if implementation.backend != backend:
                raise UsageError(f"backend {backend!r} registers {implementation.name!r}; name it {backend}.<kernel>")
        if "." not in implementation.name:
            raise UsageError(f"{implementation.name!r} needs the form backend.kernel")
        if implementation.name in self._implementations:
            raise BidispatchError(
                f"{implementation.name} is registered twice, by {self._origins[implementation.name]} and by {origin}; "
                "uninstall one of them or rename its backend"
            )
        self._implementations[implementation.name] = implementation
        self._origins[implementation.name] = origin

    def load_entry_points(self) -> None:
        """Call every `register` in the group `bidispatch.backends`. A failure is kept, not raised.

        Raises `BidispatchError` when two distributions give one backend name.
        """
        for entry in sorted(
            metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)
        ):
            distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
            if entry.name in self._backends:
                if self._backends[entry.name] == distribution:
                    continue  # an editable install can list its own entry points twice
                raise BidispatchError(
                    f"two backends are named {entry.name!r}: one from {self._backends[entry.name]}, one from "
                    f"{distribution}; uninstall one, or rename its entry point"
                )
            self._backends[entry.name] = distribution
            self._load(entry, distribution)

    def _load(self, entry: metadata.EntryPoint, distribution: str) -> None:
        before = set(self._implementations)
        self._loading = f"{entry.name} from {distribution}"
        try:
            entry.load()(self)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - another package's code; kept with its cause, and shown
            for name in set(self._implementations) - before:
                del self._implementations[name], self._origins[name]
            self.failures[entry.name] = BackendFailure(entry.name, distribution, error)
        finally:
            self._loading = ""

    def __iter__(self) -> Iterator[Implementation]:
        return iter(self._implementations.values())

    def __contains__(self, name: str) -> bool:
        return name in self._implementations

    def get(self, name: str) -> Implementation:
        """Return the implementation of that name; raise `UsageError` for a name nobody registered."""
        try:
            return self._implementations[name]
        except KeyError:
            raise UsageError(
                f"unknown implementation {name!r}{did_you_mean(name, self._implementations)}; "
                "`bidispatch doctor` lists the backends"
            ) from None

    def origin(self, name: str) -> str:
        """The distribution that registered an implementation."""
        return self._origins[name]

    @property
    def backends(self) -> Mapping[str, str]:
        """Every entry point found, by name, with its distribution; failed ones included."""
        return dict(self._backends)

    def for_op(self, op: str) -> tuple[Implementation, ...]:
        """Every implementation of an op, in order of name."""
        return tuple(sorted((i for i in self if i.op == op), key=lambda i: i.name))

    def find(self, arch: str, op: str, dtype: str) -> tuple[Implementation, ...]:
        """The implementations behind the key (arch, op, dtype), in order of name."""
        return tuple(i for i in self.for_op(op) if i.covers(arch, dtype))


@lru_cache(maxsize=1)
def default_registry() -> Registry:
    """The process's registry, filled from the entry points at first use."""
    registry = Registry()
    registry.load_entry_points()
    return registry
