"""The search for one problem: every launch shape of every implementation of its class, timed at each M, winners proved.

Imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bidispatch.bench.operands import Operands, operands_of
from bidispatch.bench.timing import interleaved
from bidispatch.device import Device
from bidispatch.errors import SelectionError
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import Plan
from bidispatch.profiles.tiles import TunedEntry
from bidispatch.registry import Implementation, Params, Rung, Tile
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.bound import BoundKernel
from bidispatch.runtime.context import Limits
from bidispatch.tune.ladder import Choice, Step, served, winner
from bidispatch.tune.proof import Prover
from bidispatch.verify.subject import Subject

__all__ = ["Contenders", "Found", "Timer", "contenders", "gpu_timer", "search"]

_log = logging.getLogger(__name__)

Timer = Callable[[Problem, int, Mapping[str, BoundKernel], bool], Mapping[str, float]]
"""`timer(problem, m, kernels, brief)` gives the microseconds of a call of m rows for each kernel that runs; the others
are left out. Brief: a first look."""

_FINALISTS = 4
# What is slow for few rows may be the fastest for many. So it is not given up: it is left out of the next two M, then
# tried again: a third of the looks that trying it always would take.
_HOPELESS = 1.6
"""Slower than the winner by this factor: left out of the next `_REST` M."""
_REST = 2


_Pair = tuple[Implementation, Params]


@dataclass(frozen=True, slots=True)
class Contenders:
    """Who may serve a problem."""

    numerics: str
    everyone: tuple[_Pair, ...]
    """What the profile lists in the class, in its order: what a winner's bits are compared with comes from these."""
    tried: tuple[_Pair, ...]
    """Those of them that were asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """The implementations that are tried, each once."""
        return tuple(dict.fromkeys(implementation.name for implementation, _ in self.tried))


@dataclass(frozen=True, slots=True)
class Found:
    """What a search ended with."""

    numerics: str
    steps: tuple[Step, ...]
    comparisons: int
    """Rows of winners compared with the reference, all equal."""
    tried: int
    skipped: int
    """Kernels that could not be bound or run at some M."""
    refused: tuple[str, ...]
    """Kernels that were fast and gave other bits, with the smallest difference."""


def contenders(plan: Plan, problem: Problem, only: Sequence[str] = ()) -> Contenders:
    """The class that a plan gives a problem, and what the profile lists for it in that class.

    only: implementations to try; by default all. Raises `SelectionError` where nothing is to be tried.
    """
    rules = [rule for rule in plan.profile.rules.get(problem.op, ()) if rule.mismatch(problem) is None]
    numerics = (rules[0].numerics if rules else None) or plan.select_problem(problem).numerics
    found: dict[str, _Pair] = {}
    for listed in rules[0].candidates if rules else ():
        if listed.impl not in plan.registry:
            continue
        implementation = plan.registry.get(listed.impl)
        if implementation.unmet(plan.device, problem) or listed.impl in plan.profile.disable:
            continue
        if implementation.claims < plan.require:  # the plan would not use what was found
            continue
        params = implementation.params.model_validate(dict(listed.params))
        if implementation.numerics(params, problem) == numerics:
            found.setdefault(Choice(implementation, params, None).key, (implementation, params))
    everyone = tuple(found.values())
    tried = tuple(pair for pair in everyone if not only or pair[0].name in only)
    if not tried:
        raise SelectionError(f"nothing that can be tuned is in class {numerics} for {problem} on {plan.device.name}")
    return Contenders(numerics, everyone, tried)


def gpu_timer(device: Device) -> Timer:
    """Times by the protocol of `bidispatch.bench.timing`: weights rotated beyond the L2, results one set."""
    place = torch.device(device.torch_device)
    held: dict[str, Operands] = {}

    def operands(problem: Problem) -> Operands:
        if problem.key not in held:
            held.clear()
            torch.cuda.empty_cache()
            held[problem.key] = operands_of(problem, place)
        return held[problem.key]

    def timer(problem: Problem, m: int, kernels: Mapping[str, BoundKernel], brief: bool) -> Mapping[str, float]:
        with torch.cuda.device(place):  # streams, events and graphs are the current GPU's
            return times(problem, m, kernels, brief)

    def times(problem: Problem, m: int, kernels: Mapping[str, BoundKernel], brief: bool) -> Mapping[str, float]:
        calls = operands(problem).calls(m)
        estimate = operands(problem).estimate_us(m)
        shapes = Subject(problem, place, lambda *everything: None).output_shapes(calls[0])
        outputs = [torch.empty(shape, dtype=dtype, device=place) for shape, dtype, _ in shapes]

        def launch_of(kernel: BoundKernel) -> Callable[[int], None]:
            return lambda i: kernel.launch(*calls[i % len(calls)], *outputs)

        launches = {}
        for key, kernel in kernels.items():
            try:
                launch_of(kernel)(0)
                torch.cuda.synchronize()
                launches[key] = launch_of(kernel)
            except Exception as error:  # noqa: BLE001, PERF203 - a backend's code; what does not run does not win
                _log.debug("%s: %s", key, error)
        if not launches:
            return {}
        timed = interleaved(launches, operand_sets=len(calls), estimate_us=estimate, replays=2 if brief else None)
        return {key: timing.median_us for key, timing in timed.items()}

    return timer


def search(
    device: Device,
    problem: Problem,
    rivals: Contenders,
    rows: Sequence[int],
    timer: Timer,
    like: TunedEntry | None = None,
) -> Found:
    """Find the fastest kernel of each M, and prove each winner. Raises `SelectionError` where nothing can serve.

    like: the ladder of a dtype that runs alike: its kernel for an M is tried, and each implementation's own choice.
    """
    refused: dict[str, str] = {}
    while True:
        found = _attempt(device, problem, rivals, rows, timer, like, refused)
        # One that won at an M where its bits agreed and differed at another, or with a bias, is of no class and serves
        # nowhere: without it, all is found anew.
        if not any(step.choice.key in refused for step in found.steps):
            return found


def _attempt(
    device: Device,
    problem: Problem,
    rivals: Contenders,
    rows: Sequence[int],
    timer: Timer,
    like: TunedEntry | None,
    refused: dict[str, str],
) -> Found:
    """Find and prove a winner of each M. refused: keys of kernels that take no part, and why; gets those found now."""
    known = rivals.tried
    prover = Prover(device, problem, rivals.everyone, max(rows))
    resting: dict[str, int] = {}  # until the M of which index
    own = {choice.key for m in rows for choice in _own(device, problem, known, m)}
    steps: list[Step] = []
    tried: set[str] = set()
    skipped: set[str] = set()
    for index, m in enumerate(rows):
        choices = {choice.key: choice for choice in _choices(device, problem, known, m, like)}
        # What an implementation takes by itself never rests: it serves where all that is faster is refused.
        left_out = ({key for key, until in resting.items() if index < until} - own) | set(refused)
        choices = {key: choice for key, choice in choices.items() if key not in left_out}
        if steps and steps[-1].choice.key not in refused:
            choices.setdefault(steps[-1].choice.key, steps[-1].choice)
        kernels = _bound(device, problem, choices, m)
        tried |= set(kernels)
        looks = dict(timer(problem, m, kernels, True)) if kernels else {}
        skipped |= choices.keys() - looks.keys()
        while looks:
            finalists = sorted(looks, key=lambda key: looks[key])[:_FINALISTS]
            times = timer(problem, m, {key: kernels[key] for key in finalists}, False)
            lost = set(finalists) - times.keys()
            skipped |= lost
            looks = {key: us for key, us in looks.items() if key not in lost}
            if not times:
                continue
            before = steps[-1].choice.key if steps else None
            key = winner(times, [key for key in choices if key in times], before)
            low = steps[-1].m + 1 if steps else 1
            check = prover.check(choices[key], low, m)
            if check.passed:
                steps.append(Step(m, choices[key], times[key]))
                slow = [other for other, us in looks.items() if us > _HOPELESS * looks[key]]
                resting |= dict.fromkeys(slow, index + 1 + _REST)
                break
            refused[key] = str(check)
            _log.warning("%s is refused for %s: %s", choices[key], problem, check)
            del looks[key]
        else:
            raise SelectionError(
                f"nothing in class {rivals.numerics} runs {m} rows of {problem} on {device.name}; "
                f"{len(refused)} kernels were refused for other bits, {len(skipped)} could not be bound or run"
                + "".join(f"; {why}" for why in list(refused.values())[:1])
            )
    for choice, low, high in served(steps):
        if choice.key not in refused and not (check := prover.check_bias(choice, low, high)).passed:
            refused[choice.key] = f"with a bias: {check}"
            _log.warning("%s is refused for %s with a bias: %s", choice, problem, check)
    return Found(rivals.numerics, tuple(steps), prover.comparisons, len(tried), len(skipped), tuple(refused.values()))


def _choices(
    device: Device,
    problem: Problem,
    known: Sequence[_Pair],
    m: int,
    like: TunedEntry | None,
) -> Iterable[Choice]:
    yield from _own(device, problem, known, m)
    for implementation, params in known if like is None else ():
        if implementation.search:
            for tile in _tiles(device, problem, implementation, params, m):
                yield Choice(implementation, params, tile)
    if like is not None:
        rung = next(rung for rung in like.rungs if rung.max_m is None or m <= rung.max_m)
        for implementation, params in known:
            same = implementation.name == rung.impl and params == implementation.params.model_validate(rung.params)
            if same and implementation.tile is not None and rung.tile is not None:
                yield Choice(implementation, params, implementation.tile.model_validate(rung.tile))


def _own(device: Device, problem: Problem, known: Sequence[_Pair], m: int) -> Iterable[Choice]:
    """What each implementation takes for m rows by itself."""
    for implementation, params in known:
        shapes = implementation.tiles(device, problem, params)
        yield Choice(implementation, params, next(t for max_m, t in shapes if max_m is None or m <= max_m))


def _tiles(device: Device, problem: Problem, implementation: Implementation, params: Params, m: int) -> list[Tile]:
    found: list[Tile] = list(load_attribute(implementation.search)(device, problem, params, m))
    return found


def _bound(device: Device, problem: Problem, choices: Mapping[str, Choice], m: int) -> dict[str, BoundKernel]:
    """Those that can be bound for calls of m rows."""
    kernels = {}
    for key, choice in choices.items():
        rung = Rung(choice.implementation, choice.params, choice.tile)
        try:
            kernels[key] = bind(problem, device, (rung,), Limits(m, min_tokens=m))
        except Exception as error:  # noqa: BLE001 - a backend's code; what cannot be bound does not win
            _log.debug("%s: %s", key, error)
    return kernels
