"""The peers of benchmarks/peers, for tests: other people's packages, called as servers call them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def peer(name):
    """The module `peers.<name>` of benchmarks/."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(f"peers.{name}")
    finally:
        sys.path.remove(str(BENCHMARKS))


def present(make, *arguments):
    """What a peer makes; skips with its reason where its package is not installed."""
    try:
        return make(*arguments)
    except peer("installed").AbsentError as error:
        pytest.skip(str(error))


def brings(package, pattern):
    """Whether a package is installed that has a file of such a name, at its top."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(any(Path(folder).glob(pattern)) for folder in folders)
