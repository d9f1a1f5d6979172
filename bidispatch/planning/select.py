"""Selection: a problem, a device, a profile and the registry become a ladder of rungs, with every decision kept.

Nothing here sees a batch. What a rung may depend on is the problem and the device; M only chooses among rungs that
were fixed before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from pydantic import ValidationError

from bidispatch.device import Device
from bidispatch.errors import BackendError, SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.decisions import CHOSEN, REJECTED, SPARE, UNLISTED, Decision
from bidispatch.planning.overrides import forced_choice
from bidispatch.planning.selection import Selection, explain_command, rung_ranges, verify_command
from bidispatch.profiles.profile import Profile, ProfileCandidate, ProfileRule, Source
from bidispatch.profiles.tiles import read_tuned
from bidispatch.records import Record, Refutation
from bidispatch.registry import Implementation, Params, Registry, Rung, Tile

__all__ = ["FindRecord", "FindRefutations", "select", "tuned_elsewhere"]

_NO_ROWS: tuple[int, int | None] | None = None

FindRecord = Callable[[Selection], Record | None]
"""Answers with a record that proves a selection on this machine, or None."""

FindRefutations = Callable[[Problem, Sequence[Rung]], Sequence[Refutation]]
"""Answers with what `verify` found on this machine against any of these rungs, for a problem."""


@dataclass(slots=True)
class _Candidate:
    """A candidate on its way to a decision."""

    listed: ProfileCandidate
    implementation: Implementation | None = None
    params: Params | None = None
    shapes: tuple[tuple[int | None, Tile | None], ...] = ()
    """Launch shapes by rising max_m, the last open; less those that were refuted."""
    numerics: str = ""
    reasons: tuple[str, ...] = ()
    refuted: list[str] = field(default_factory=list)
    """Why some of its launch shapes are not used, though others are."""

    @property
    def max_m(self) -> int | None:
        """The most rows it may serve."""
        return _lower(self.shapes[-1][0] if self.shapes else None, self.listed.max_m)


def select(
    problem: Problem,
    device: Device,
    profile: Profile,
    registry: Registry,
    require: Invariance,
    find_record: FindRecord,
    find_refutations: FindRefutations,
    *,
    cuda_graph: bool = False,
) -> Selection:
    """Return the ladder for a problem. cuda_graph: whether every rung must be one that a CUDA graph can hold.

    Raises `SelectionError`, with every decision, when nothing fits or a forced choice does not; `BackendError` when a
    forced choice's backend did not load.
    """
    registered = registry.for_op(problem.op)
    forced = forced_choice(problem.op)
    if forced:
        candidates, wanted = [_forced(problem, forced, profile, registry)], None
    elif not registered and not _failed_backends(problem, profile, registry):
        raise SelectionError(f"{problem.op} is unsupported: no backend implements it yet")
    else:
        rule = _rule(problem, profile, registered)
        candidates, wanted = _listed(problem, rule, profile, device, registry), rule.numerics
    examined = [
        _examine(candidate, problem, device, profile, registry, require, cuda_graph) for candidate in candidates
    ]
    for candidate in examined:
        _drop_refuted(candidate, problem, find_refutations)
    fitting = [candidate for candidate in examined if not candidate.reasons]
    # What a user prefers leads with its own class; a rule's is that of what the rule lists.
    preferred = {name for name, _ in profile.prefer}
    leading = next((c.numerics for c in fitting if c.listed.impl in preferred), wanted)
    numerics = leading or next((c.numerics for c in fitting), "")
    rungs, decisions = _climb(examined, numerics)
    decisions += _unlisted(registered, examined, problem, device)
    asked = None if require == profile.require else require
    if not rungs or rungs[-1].max_m is not None:
        _fail(problem, device, asked, forced, rungs, decisions)
    level = min(rung.implementation.claims for rung in rungs)
    selection = Selection(problem, device, tuple(rungs), numerics, level, tuple(decisions), asked=asked)
    record = find_record(selection)
    if record is None and profile.trust == "verified":
        raise SelectionError(
            f"{problem} on {device.name}: {profile.name} trusts only what is verified, and no record of this device, "
            f"these versions and this ladder proves it; `{verify_command(problem, asked)}` makes one",
            decisions,
        )
    return replace(selection, evidence=record)


def _forced(problem: Problem, forced: tuple[str, Source], profile: Profile, registry: Registry) -> ProfileCandidate:
    name, source = forced
    if name not in registry:
        failure = registry.failures.get(name.partition(".")[0])
        if failure:
            raise BackendError(f"{name} was forced by {source}, but its {failure}") from failure.error
    implementation = registry.get(name)
    if implementation.op != problem.op:
        raise UsageError(f"{source} forces {name} for {problem.op}, but it implements {implementation.op}")
    return _as_everything(name, source, _find_listed(name, problem, profile))


def _find_listed(name: str, problem: Problem, profile: Profile) -> ProfileCandidate | None:
    """Where the profile lists an implementation for this problem, so that a forced choice keeps its params."""
    rules = [rule for rule in profile.rules.get(problem.op, ()) if rule.mismatch(problem) is None]
    listed = [candidate for rule in rules for candidate in rule.candidates if candidate.impl == name]
    return listed[0] if listed else None


def _as_everything(name: str, source: Source, listed: ProfileCandidate | None) -> ProfileCandidate:
    """A candidate for every M: a forced or preferred one. It keeps the params the profile gives it."""
    return ProfileCandidate(name, source, None, listed.params if listed else {}, listed.tile if listed else None)


def _failed_backends(problem: Problem, profile: Profile, registry: Registry) -> list[str]:
    """Backends of this op's candidates that did not load: then it is not unsupported, it is broken."""
    listed = [c.impl for rule in profile.rules.get(problem.op, ()) for c in rule.candidates]
    return [name for name in listed if name.partition(".")[0] in registry.failures]


def _rule(problem: Problem, profile: Profile, registered: tuple[Implementation, ...]) -> ProfileRule:
    rules = profile.rules.get(problem.op, ())
    mismatches = []
    for rule in rules:
        why = rule.mismatch(problem)
        if why is None:
            return rule
        mismatches.append(f"the rule at {rule.source} does not match: {why}")
    reasons = tuple(mismatches) or (f"profile {profile.name} has no rule for {problem.op}",)
    raise SelectionError(
        f"no rule of profile {profile.name} ({', '.join(profile.chain)}) matches {problem}; "
        f"add one under `ops: {problem.op}:`",
        [Decision(implementation.name, UNLISTED, reasons) for implementation in registered],
    )


def _listed(
    problem: Problem, rule: ProfileRule, profile: Profile, device: Device, registry: Registry
) -> list[ProfileCandidate]:
    """A rule's candidates behind its tuned ladder, after `prefer`. A preferred one whose backend did not load is shown,
    whatever its op is.
    """
    listed = [*_tuned(problem, rule, device), *rule.candidates]
    preferred = []
    for name, source in profile.prefer:
        if name not in registry or registry.get(name).op == problem.op:
            inherited = next((c for c in rule.candidates if c.impl == name), None)
            preferred.append(_as_everything(name, source, inherited))
            listed = [c for c in listed if c.impl != name]
    return preferred + listed


def _tuned(problem: Problem, rule: ProfileRule, device: Device) -> list[ProfileCandidate]:
    """The rungs that `tune` found for this problem on a GPU of this arch, in the first file that has some."""
    for tuned in rule.tuned:
        file = read_tuned(tuned.path)
        entry = file.find(problem) if file.arch == device.arch.name else None
        if entry is not None:
            sizes = " ".join(f"{name}={value}" for name, value in entry.dims.items() if type(value) is int)
            source = Source(f"{tuned.shown} ({sizes})")
            return [ProfileCandidate(r.impl, source, r.max_m, r.params, r.tile) for r in entry.rungs]
    return []


def tuned_elsewhere(problem: Problem, profile: Profile, device: Device) -> list[str]:
    """A line for each file of tuned ladders in the rule in use that was made on another arch, and so is not used, or
    that serves this problem from another device of this arch.
    """
    rule = next((rule for rule in profile.rules.get(problem.op, ()) if rule.mismatch(problem) is None), None)
    if rule is None or forced_choice(problem.op):
        return []
    lines = []
    served = False
    for tuned in rule.tuned:
        file = read_tuned(tuned.path)
        places = f"{tuned.shown}: made on {file.place}, here {device.name} ({device.arch.name})"
        if file.arch != device.arch.name:
            lines.append(f"{places}, not used")
        elif not served and file.find(problem) is not None:
            served = True
            if file.device != device.name and not device.predicted:
                lines.append(f"{places}, used: launch shapes never change bits, but others may be faster here")
    return lines


def _examine(
    listed: ProfileCandidate,
    problem: Problem,
    device: Device,
    profile: Profile,
    registry: Registry,
    require: Invariance,
    cuda_graph: bool,
) -> _Candidate:
    """Everything that speaks against a candidate, but for its class, which depends on the others."""
    candidate = _Candidate(listed)
    reasons = []
    if listed.impl in profile.disable:
        reason, source = profile.disable[listed.impl]
        reasons.append(f"disabled: {reason} [{source}]")
    failure = registry.failures.get(listed.impl.partition(".")[0])
    if listed.impl not in registry and failure:
        candidate.reasons = (*reasons, str(failure))
        return candidate
    if listed.impl not in registry and not listed.source.line:  # a tuned rung of a backend that is not here
        candidate.reasons = (*reasons, f"no installed backend has {listed.impl}")
        return candidate
    implementation = registry.get(listed.impl)
    candidate.implementation = implementation
    if implementation.claims < require:
        reasons.append(f"claims level {implementation.claims.label}, the plan requires {require.label}")
    if cuda_graph and not implementation.cuda_graph:
        reasons.append("cannot be captured in a CUDA graph, which the plan requires")
    try:
        reasons += implementation.unmet(device, problem)
        candidate.params = implementation.params.model_validate(dict(listed.params))
        candidate.numerics = implementation.numerics(candidate.params, problem)
        candidate.shapes = _shapes(listed, implementation, candidate.params, device, problem)
    except ValidationError as error:
        refused = "params are" if candidate.params is None else "tile is"
        reasons.append(f"its {refused} refused: {error.errors()[0]['msg']}")
    except Exception as error:  # noqa: BLE001 - a backend's own functions; a candidate that fails is rejected, not fatal
        reasons.append(f"its backend raised {type(error).__name__}: {error}")
    candidate.reasons = tuple(reasons)
    return candidate


def _drop_refuted(candidate: _Candidate, problem: Problem, find_refutations: FindRefutations) -> None:
    """Take out the launch shapes whose bits were found to differ; without any left, the candidate is rejected."""
    implementation, params = candidate.implementation, candidate.params
    if candidate.reasons or implementation is None or params is None:
        return
    rungs = [Rung(implementation, params, tile, max_m) for max_m, tile in candidate.shapes]
    against = {refutation.rung: refutation for refutation in find_refutations(problem, rungs)}
    if not against:
        return
    candidate.shapes = tuple((rung.max_m, rung.tile) for rung in rungs if rung.key not in against)
    reasons = [_why_refuted(against[rung.key], rung) for rung in rungs if rung.key in against]
    if candidate.shapes:
        candidate.refuted = reasons
    else:
        candidate.reasons = tuple(dict.fromkeys(reasons))


def _why_refuted(refutation: Refutation, rung: Rung) -> str:
    what = f"with {rung.tile} its" if rung.tile else "its"
    return (
        f"{what} bits differed from the ladder's on {refutation.made[:10]} ({refutation.found}); "
        f"`{refutation.retry}` tries again"
    )


def _shapes(
    listed: ProfileCandidate, implementation: Implementation, params: Params, device: Device, problem: Problem
) -> tuple[tuple[int | None, Tile | None], ...]:
    """The profile's tile for every M, else the implementation's own. Raises `UsageError` if those are no ladder."""
    if listed.tile is not None and implementation.tile is not None:
        return ((None, implementation.tile.model_validate(dict(listed.tile))),)
    shapes = tuple(implementation.tiles(device, problem, params))
    bounds = [max_m for max_m, _ in shapes]
    closed = [bound for bound in bounds[:-1] if bound is not None]
    if not bounds or bounds[-1] is not None or closed != bounds[:-1] or closed != sorted(set(closed)):
        raise UsageError(f"tiles() must give rising max_m and end with None, not {bounds}")
    return shapes


def _climb(examined: list[_Candidate], numerics: str) -> tuple[list[Rung], list[Decision]]:
    """Build the ladder from the bottom: each candidate that fits serves from where the last one ended."""
    rungs: list[Rung] = []
    decisions: list[Decision] = []
    reached = 0
    for candidate in examined:
        listed, reasons = candidate.listed, list(candidate.reasons)
        if numerics and candidate.numerics and candidate.numerics != numerics:
            reasons.append(f"its class is {candidate.numerics}, the ladder's is {numerics}")
        verdict, rows = REJECTED, _NO_ROWS
        if not reasons:
            verdict = SPARE
            full = bool(rungs) and rungs[-1].max_m is None
            if not full and (candidate.max_m is None or candidate.max_m > reached):
                rungs += _rungs_of(candidate, reached)
                verdict, rows = CHOSEN, (reached + 1, candidate.max_m)
                reached = candidate.max_m or 0
            reasons += candidate.refuted
        decisions.append(Decision(listed.impl, verdict, tuple(reasons), str(listed.source), candidate.numerics, rows))
    return rungs, decisions


def _rungs_of(candidate: _Candidate, reached: int) -> list[Rung]:
    """A candidate's launch shapes, cut to the rows it serves: above `reached`, up to its max_m."""
    implementation, params, listed = candidate.implementation, candidate.params, candidate.listed
    if implementation is None or params is None:
        raise RuntimeError(f"{listed.impl} was chosen without having been examined")
    rungs = []
    for tile_max, tile in candidate.shapes:
        if tile_max is not None and tile_max <= reached:
            continue
        top = _lower(tile_max, candidate.max_m)
        rungs.append(Rung(implementation, params, tile, top))
        if top == candidate.max_m:
            break
    return rungs


def _lower(one: int | None, other: int | None) -> int | None:
    bounds = [bound for bound in (one, other) if bound is not None]
    return min(bounds) if bounds else None


def _unlisted(
    registered: tuple[Implementation, ...], examined: list[_Candidate], problem: Problem, device: Device
) -> list[Decision]:
    """Implementations of the op that no candidate names: shown, so that nobody wonders where they are."""
    seen = {candidate.listed.impl for candidate in examined}
    return [
        Decision(
            implementation.name,
            UNLISTED,
            ("the rule in use does not list it", *implementation.unmet(device, problem)),
        )
        for implementation in registered
        if implementation.name not in seen
    ]


def _fail(
    problem: Problem,
    device: Device,
    asked: Invariance | None,
    forced: tuple[str, Source] | None,
    rungs: list[Rung],
    decisions: list[Decision],
) -> NoReturn:
    if forced:
        raise SelectionError(
            f"{forced[1]} forces {forced[0]} for {problem}, which does not fit on {device.name}; "
            "nothing else is tried for a forced choice",
            decisions,
        )
    if rungs:
        top = rung_ranges([rung.max_m for rung in rungs])[-1][1]
        raise SelectionError(
            f"{problem} on {device.name}: nothing serves M > {top}; add a candidate without max_m", decisions
        )
    raise SelectionError(
        f"nothing fits {problem} on {device.name}; `{explain_command(problem, device, asked)}` shows every reason",
        decisions,
    )
