"""What an implementation needs of a device and a problem.

A requirement answers None when it is met, else says what is required and what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Protocol

from packaging.specifiers import SpecifierSet

from bidispatch.device import Device
from bidispatch.ops.schema import DimValue, Problem

__all__ = ["AnyOf", "Check", "DimAtMost", "DimIn", "DimMultipleOf", "Package", "Requirement"]


class Requirement(Protocol):
    """Something that must hold before an implementation may serve."""

    def unmet(self, device: Device, problem: Problem) -> str | None:
        """None when met; else a sentence with what is required and the actual value."""


@lru_cache(maxsize=256)
def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None. Imports nothing of it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution must be installed, in a version the specifier allows. Assumed on a predicted device."""

    name: str
    versions: str = ""
    alternatives: tuple[str, ...] = ()
    """Other names the same package is distributed under; the first that is installed counts."""

    def unmet(self, device: Device, problem: Problem) -> str | None:
        if device.predicted:
            return None
        names = (self.name, *self.alternatives)
        installed = next(((name, found) for name in names if (found := installed_version(name)) is not None), None)
        if installed is None:
            return f"needs the package {' or '.join(names)}{self.versions}, which is not installed"
        name, version = installed
        if not SpecifierSet(self.versions).contains(version, prereleases=True):
            return f"needs {name}{self.versions}, {version} is installed"
        return None


@dataclass(frozen=True, slots=True)
class DimIn:
    """A dim must be one of the given values."""

    dim: str
    values: tuple[DimValue, ...]

    def unmet(self, device: Device, problem: Problem) -> str | None:
        if problem[self.dim] in self.values:
            return None
        return f"needs {self.dim} in {', '.join(map(str, self.values))}, asked for {problem[self.dim]}"


@dataclass(frozen=True, slots=True)
class DimMultipleOf:
    """An integer dim must be a multiple."""

    dim: str
    of: int

    def unmet(self, device: Device, problem: Problem) -> str | None:
        if problem.size(self.dim) % self.of == 0:
            return None
        return f"needs {self.dim} a multiple of {self.of}, asked for {problem[self.dim]}"


@dataclass(frozen=True, slots=True)
class DimAtMost:
    """An integer dim must not exceed a limit."""

    dim: str
    limit: int

    def unmet(self, device: Device, problem: Problem) -> str | None:
        if problem.size(self.dim) <= self.limit:
            return None
        return f"needs {self.dim} at most {self.limit}, asked for {problem[self.dim]}"


@dataclass(frozen=True, slots=True)
class Check:
    """Anything else: a function that answers as `unmet` does."""

    function: Callable[[Device, Problem], str | None]

    def unmet(self, device: Device, problem: Problem) -> str | None:
        return self.function(device, problem)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of several requirements must be met: a library that two distributions bring, say."""

    options: tuple[Requirement, ...]

    def unmet(self, device: Device, problem: Problem) -> str | None:
        reasons = [option.unmet(device, problem) for option in self.options]
        return None if None in reasons else ", or ".join(reason for reason in reasons if reason)
