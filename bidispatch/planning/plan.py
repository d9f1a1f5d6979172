"""The plan: a device, its profile and the registry, resolved once and asked by every layer at init."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence

from bidispatch import ops
from bidispatch.device import Device
from bidispatch.environment import describe, hard_part
from bidispatch.errors import PlanFrozenError, RecordError, SelectionError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import DimValue, Problem
from bidispatch.planning.overrides import forced_choice
from bidispatch.planning.select import select
from bidispatch.planning.selection import Selection
from bidispatch.profiles.load import ProfileStore
from bidispatch.profiles.profile import Profile
from bidispatch.records import Record, RecordStore, Refutation
from bidispatch.registry import Implementation, Registry, Rung, default_registry

__all__ = ["Plan", "plan"]

_log = logging.getLogger(__name__)


class Plan:
    """What serves each problem on a device. Ask it when layers are built; freeze it before graphs are captured."""

    def __init__(
        self,
        device: Device,
        profile: Profile,
        registry: Registry,
        records: RecordStore,
        require: Invariance,
        *,
        use_refuted: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """cuda_graph: whether everything selected must be something that a CUDA graph can hold.
        use_refuted: whether rungs that `verify` found to differ may serve all the same, so that it can try again.
        """
        self.device = device
        self.profile = profile
        self.registry = registry
        self.require = require
        self.cuda_graph = cuda_graph
        self._records = records
        self._use_refuted = use_refuted
        self._selections: dict[tuple[Problem, str | None], Selection] = {}
        self._frozen = False
        self._warned_of_records = False

    def select(self, op: str, *, dtype: str, **dims: DimValue) -> Selection:
        """Return what serves an op with these dims.

        Raises `UsageError` for an op, dtype or dim that does not exist, `SelectionError` when nothing fits,
        `PlanFrozenError` when the plan is frozen and was never asked this.
        """
        return self.select_problem(ops.get(op).problem(dtype, dims))

    def select_problem(self, problem: Problem) -> Selection:
        """`select` for a problem made by `Op.problem`."""
        key = _key(problem)
        if key not in self._selections:
            if self._frozen:
                raise PlanFrozenError(
                    f"the plan is frozen and was never asked for {problem}; select it before freeze(), "
                    "which comes before CUDA graphs are captured"
                )
            self._selections[key] = self._decide(problem)
        return self._selections[key]

    def supported(self) -> list[tuple[Problem, Selection | SelectionError]]:
        """Every op of the catalogue in each of its dtypes at typical dims: what serves it, or why nothing does.

        Asking is not selecting: neither `selections` nor the fingerprint changes.
        """
        results: list[tuple[Problem, Selection | SelectionError]] = []
        for op in ops.CATALOGUE.values():
            for dtype in op.dtypes:
                problem = op.typical(dtype)
                try:
                    results.append((problem, self._look_up(problem)))
                except SelectionError as error:
                    results.append((problem, error))
        return results

    @property
    def selections(self) -> tuple[Selection, ...]:
        """Everything selected so far, in order."""
        return tuple(self._selections.values())

    def freeze(self) -> None:
        """Refuse selections that were not made before."""
        self._frozen = True

    def implementations(self, problems: Iterable[Problem] | None = None) -> frozenset[Implementation]:
        """What serves these problems (those selected so far, when none are given)."""
        chosen = self.selections if problems is None else [self._look_up(problem) for problem in problems]
        return frozenset(rung.implementation for selection in chosen for rung in selection.rungs)

    def fingerprint(self, problems: Iterable[Problem] | None = None) -> str:
        """A short text, equal in two processes that promise the same bits for these problems.

        It covers the class of each problem (those selected so far, when none are given), the level, the device's
        name and the versions that matter; never the names of implementations. One made for a device that is not
        here starts with `predicted` and equals no real one.
        """
        chosen = self.selections if problems is None else [self._look_up(problem) for problem in problems]
        used = self.implementations(selection.problem for selection in chosen)
        environment = hard_part(describe(self.device, used))
        del environment["code"]  # names packages; records, which hold for exact code, keep it
        content = {
            "classes": dict(sorted((selection.problem.key, selection.numerics) for selection in chosen)),
            "level": self.require.label,
            "environment": environment,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        prefix = "predicted-" if self.device.predicted else ""
        return f"{prefix}{self.device.arch.name}-{self.require.label}-{digest}"

    def _look_up(self, problem: Problem) -> Selection:
        """What was selected for a problem, or what would be."""
        return self._selections.get(_key(problem)) or self._decide(problem)

    def _decide(self, problem: Problem) -> Selection:
        return select(
            problem,
            self.device,
            self.profile,
            self.registry,
            self.require,
            self._find_record,
            self._find_refutations,
            cuda_graph=self.cuda_graph,
        )

    def _find_record(self, selection: Selection) -> Record | None:
        """Evidence for a selection."""
        try:
            return self._records.find(selection)
        except RecordError as error:
            self._take_broken(error)
            return None

    def _find_refutations(self, problem: Problem, rungs: Sequence[Rung]) -> Sequence[Refutation]:
        """What was found against rungs."""
        if self._use_refuted or self.device.predicted:
            return ()
        try:
            return self._records.refutations(problem, rungs)
        except RecordError as error:
            self._take_broken(error)
            return ()

    def _take_broken(self, error: RecordError) -> None:
        """A broken record file is an error only where records are what is trusted."""
        if self.profile.trust == "verified":
            raise error
        if not self._warned_of_records:
            self._warned_of_records = True
            _log.warning("%s", error)


def _key(problem: Problem) -> tuple[Problem, str | None]:
    """A forced choice is part of what was asked."""
    forced = forced_choice(problem.op)
    return problem, forced[0] if forced else None


def plan(
    device: str | Device = "auto",
    *,
    profile: str | None = None,
    require: str | None = None,
    registry: Registry | None = None,
    cuda_graph: bool = False,
) -> Plan:
    """Make the plan for a device.

    device: `auto`, `cpu`, `cuda:0`, or an arch such as `sm103`, which needs no such GPU and no torch.
    profile: a profile's name or file, instead of the one that matches the device.
    require: the invariance level, instead of the profile's.
    registry: where implementations come from; by default every installed backend.
    cuda_graph: whether to select only what can be captured in a CUDA graph: for a server that captures its steps.

    Raises `UsageError`, `ProfileError`, `DeviceError`, or `SelectionError` when no profile fits the device.
    """
    chosen = device if isinstance(device, Device) else Device.parse(device)
    known = default_registry() if registry is None else registry
    store = ProfileStore(known)
    resolved = store.named(profile, chosen) if profile else store.for_device(chosen)
    level = Invariance.parse(require) if require else resolved.require
    return Plan(chosen, resolved, known, RecordStore(chosen), level, cuda_graph=cuda_graph)
