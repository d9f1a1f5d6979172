"""Which FlashAttention library is installed, and where. Imports neither torch nor the libraries.

FA2 comes from the `flash-attn` package or from vLLM, FA3 from vLLM alone. vLLM's are shared objects that register torch
operators; they load without vLLM, whose import takes seconds, so its folder is looked for and nothing else.

Where both bring FA2, the package is used if the page size allows it, so which one serves follows from what is
installed and the problem alone. Both distributions are in an implementation's `libraries`: a record is tied to it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.specifiers import SpecifierSet

from bidispatch import requirements
from bidispatch.device import Device
from bidispatch.ops.schema import Problem

__all__ = ["FA2", "FA2_PACKAGE", "FA2_VLLM", "FA3", "FLASH_ATTN", "VLLM_FA2", "VLLM_FA3", "Libraries", "Source"]


def _spec(name: str) -> ModuleSpec | None:
    """Where a module would be imported from; None for one that is not there, or was put into `sys.modules` by hand."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Source:
    """One library: the distribution that brings it, the versions it was read in, and what it needs of a page."""

    distribution: str
    versions: str
    library: str
    """The name of its module or shared object, without suffix."""
    page_multiple: int
    install: str

    def file(self) -> Path | None:
        """Where the library is, or None."""
        if self.distribution == "vllm":
            spec = _spec("vllm")
            folders = (spec.submodule_search_locations or ()) if spec else ()
            patterns = (Path(folder) / "vllm_flash_attn" for folder in folders)
            return next((file for folder in patterns for file in sorted(folder.glob(f"{self.library}*.so"))), None)
        spec = _spec(self.library)
        return Path(spec.origin) if spec and spec.origin else None

    def unmet(self, device: Device, problem: Problem) -> str | None:
        """None where it can serve; else what is missing, and what to install. Assumed on a predicted device."""
        if problem.size("page_size") % self.page_multiple:
            return (
                f"{self.distribution} needs page_size a multiple of {self.page_multiple}, "
                f"asked for {problem['page_size']}"
            )
        return None if device.predicted else self.missing()

    def missing(self) -> str | None:
        """None where it is installed; else what is missing, and what to install."""
        version = requirements.installed_version(self.distribution)
        if version is None:
            return f"{self.distribution}{self.versions} is not installed (`{self.install}`)"
        if not SpecifierSet(self.versions).contains(version, prereleases=True):
            return f"needs {self.distribution}{self.versions}, {version} is installed (`{self.install}`)"
        if self.file() is None:
            return f"{self.distribution} {version} is installed without {self.library} (`{self.install}`)"
        return None


@dataclass(frozen=True, slots=True)
class Libraries:
    """A requirement that one of several sources can serve; the first that can is the one that does."""

    what: str
    sources: tuple[Source, ...]

    def unmet(self, device: Device, problem: Problem) -> str | None:
        reasons = [source.unmet(device, problem) for source in self.sources]
        if None in reasons:
            return None
        return f"needs {self.what}: " + ", and ".join(reason for reason in reasons if reason)

    def installed(self, problem: Problem) -> str:
        """`vllm-0.25.1`: the library and version that serves a problem on this machine; "none" where none is."""
        for source in self.sources:
            if problem.size("page_size") % source.page_multiple == 0 and source.missing() is None:
                return f"{source.distribution}-{requirements.installed_version(source.distribution)}"
        return "none"

    def choose(self, device: Device, problem: Problem) -> Source | None:
        """The source that serves a problem on a device, or None."""
        return next((source for source in self.sources if source.unmet(device, problem) is None), None)


# csrc/flash_attn/flash_api.cpp: flash-attn 2.8.3 takes pages of multiples of 256, vllm-project/flash-attention of 16.
FLASH_ATTN = Source(
    "flash-attn",
    ">=2.8.3,<2.8.4",
    "flash_attn_2_cuda",
    256,
    "pip install --no-build-isolation 'bidispatch[flash-attn]'",
)
_VLLM_INSTALL = "pip install 'vllm>=0.20,<0.34'"
VLLM_FA2 = Source("vllm", ">=0.20,<0.34", "_vllm_fa2_C", 16, _VLLM_INSTALL)
VLLM_FA3 = Source("vllm", ">=0.20,<0.34", "_vllm_fa3_C", 16, _VLLM_INSTALL)

FA2 = Libraries("an FA2 library", (FLASH_ATTN, VLLM_FA2))
FA2_PACKAGE = Libraries("FA2 of the flash-attn package, whose splits have fixed ends", (FLASH_ATTN,))
FA2_VLLM = Libraries("FA2 of vLLM, whose splits follow a sequence's own length", (VLLM_FA2,))
FA3 = Libraries("FA3 of vLLM", (VLLM_FA3,))
