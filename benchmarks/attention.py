"""Paged attention against FlashAttention, FlashInfer, vLLM's Triton kernel and FlashMLA, on this machine's GPU.

    python benchmarks/attention.py [--phase decode]... [--batch 1]... [--context 32768]... [--shape "32/8"]...
                                   [--quick] [--peer fa3_auto]... [--libraries FOLDER]... [--out FILE]
    python benchmarks/attention.py --try [--phase prefill]... [--batch 1]... [--context 32768]... [--shape "32/8"]...

Heads come from sweeps/attention.yaml, those of the latent form from sweeps/attention_mla.yaml. Decode graphs are
captured once a batch size, at 131072 positions with block tables for as many, and replayed for every context; peers
likewise, with what their servers do on the host between steps done there. KV is cold, rivals take turns, medians. A
prefill is one whole prompt. `--libraries` names folders that hold vLLM's FlashAttention and FlashMLA libraries where
vllm is not installed.

Prints the figures of attention_judge.py last, and exits 1 if one is missed. `--try` times launch shapes of
triton.paged_attention, or of triton.mla for its phases, of one class of bits, in decode if no phase is named, over
the cells of `--quick`; it judges nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_calls import MAX_CONTEXT, Call, Pool, Shape, floor_us
from attention_judge import (
    FA2_ONE,
    FA3_AUTO,
    FA3_LATENT,
    FA3_ONE,
    FA3_PROJECTED,
    FLASH_MLA,
    FLASHINFER,
    LEVELS,
    PHASES,
    PREFILLS,
    VLLM_TRITON,
    Row,
    summary,
)
from harness import HERE, best_of_run, environment, peaks_of, save, text_of, used_by
from peers import flash_attention, flash_mla, flashinfer_attention, vllm_triton
from peers.installed import AbsentError, Peer
from triton.errors import TritonError

import bidispatch as bid
from bidispatch import ops
from bidispatch.bench.timing import Captures, copies_beyond_cache, launches_for
from bidispatch.errors import SelectionError
from bidispatch.ops.schema import Problem
from bidispatch.ops.shapes import Shape as Named
from bidispatch.ops.shapes import read_shapes
from bidispatch.planning.selection import Selection
from bidispatch.registry import Rung, Tile, default_registry
from bidispatch.requirements import installed_version
from bidispatch.runtime.bind import bind, load_attribute
from bidispatch.runtime.context import Limits

SWEEPS = {
    "decode": HERE / "sweeps" / "attention.yaml",
    "prefill": HERE / "sweeps" / "attention.yaml",
    "mla": HERE / "sweeps" / "attention_mla.yaml",
    "mla_prefill": HERE / "sweeps" / "attention_mla.yaml",
}
OPS = {"decode": "attention", "prefill": "attention", "mla": "attention.mla", "mla_prefill": "attention.mla"}
TRIED = {"attention": "triton.paged_attention", "attention.mla": "triton.mla"}
DTYPE = "bfloat16"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, MAX_CONTEXT)
PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768)
QUICK_BATCHES, QUICK_CONTEXTS, QUICK_PROMPTS = (1, 16, 64), (1024, 8192, 32768), (1024, 8192)
MOST_KV_BYTES = 32 << 30
MOST_SETS = 80
"""Of block tables: what one sequence of 1024 positions needs to exceed three times the L2."""
LAUNCHES = (1, 4, 12, 24, MOST_SETS)
"""Of a graph: few where one takes long. A graph is captured for each of these that a batch size needs."""
SLOWER = 3.0
"""About how long a call of all rivals takes, beside its bound: the slowest without splits, the others little more."""
TRIED_REPLAYS = 4

PEERS = (FA3_AUTO, FA3_ONE, FA2_ONE, FLASHINFER, VLLM_TRITON, FLASH_MLA, FA3_PROJECTED, FA3_LATENT)

Say = Callable[[str], None]
Binder = Callable[[Call], Peer]
Peaks = tuple[Mapping[str, float], float]


# --- what can be computed without a GPU -----------------------------------------------------------------------------


def shapes_of(phase: str, words: Sequence[str]) -> list[Named]:
    """The shapes of a phase with a name that holds one of these words; all without words."""
    shapes = read_shapes(SWEEPS[phase])
    return [shape for shape in shapes if not words or any(word in name for word in words for name in shape.names)]


def decode_cells(
    shape: Shape, batches: Sequence[int], contexts: Sequence[int], most_bytes: int = MOST_KV_BYTES
) -> dict[int, list[int]]:
    """The contexts of each batch size, longest first, whose KV is not too large."""
    cells = {
        batch: sorted((context for context in contexts if shape.kv_bytes(batch, context) <= most_bytes), reverse=True)
        for batch in batches
    }
    return {batch: fitting for batch, fitting in cells.items() if fitting}


def graph_launches(sets: int, estimate_us: float) -> int:
    """How many launches the graph for a cell has: the first of `LAUNCHES` that is enough, or the last."""
    enough = launches_for(sets, estimate_us)
    return next((launches for launches in LAUNCHES if launches >= enough), LAUNCHES[-1])


def candidates(shown: Sequence[tuple[int | None, Tile | None]]) -> Iterator[Tile]:
    """Launch shapes around those of a ladder: each size halved and doubled, as far as the tile's type takes it."""
    seen: set[str] = set()
    for tile in (tile for _, tile in shown if tile is not None):
        fields = tile.model_dump()
        changed = [
            fields | {name: other}
            for name, value in fields.items()
            if type(value) is int
            for other in (value // 2, value * 2)
        ]
        for sizes in (fields, *changed):
            made = _tile_of(type(tile), sizes)
            if made is not None and str(made) not in seen:
                seen.add(str(made))
                yield made


def _tile_of(kind: type[Tile], sizes: Mapping[str, Any]) -> Tile | None:
    try:
        return kind(**sizes)
    except ValueError:  # pydantic's: a size that the kernel does not take
        return None


def differing(tile: Tile, base: Tile) -> str:
    """What a tile has other than another one, in short."""
    ours, theirs = tile.model_dump(), base.model_dump()
    return " ".join(f"{name}={value}" for name, value in ours.items() if value != theirs.get(name)) or "as it is"


# --- what needs the GPU ---------------------------------------------------------------------------------------------


def peers_of(phase: str, folders: tuple[Path, ...]) -> dict[str, Binder]:
    """How to make each peer of a phase."""

    def latent(call: Call) -> Peer:
        return flash_attention.fa3(call, folders, num_splits=0)

    if phase == "mla":
        return {FLASH_MLA: lambda call: flash_mla.decode(call, folders), FA3_LATENT: latent}
    if phase == "mla_prefill":
        return {FA3_PROJECTED: lambda call: flash_attention.fa3_projected(call, folders), FA3_LATENT: latent}
    peers: dict[str, Binder] = {
        FA3_AUTO: lambda call: flash_attention.fa3(call, folders, num_splits=0),
        FA3_ONE: lambda call: flash_attention.fa3(call, folders, num_splits=1),
        FA2_ONE: lambda call: flash_attention.fa2(call, folders),
        VLLM_TRITON: vllm_triton.attention,
    }
    # Its prefill on Hopper is FA3's too, and takes minutes to compile.
    return peers | ({FLASHINFER: flashinfer_attention.decode} if phase == "decode" else {})


class Bench:
    """What is the same for every cell: plans, peaks, peers, and why a peer is not there."""

    def __init__(
        self,
        plans: Mapping[str, bid.Plan],
        peaks: Peaks,
        folders: tuple[Path, ...],
        say: Say,
        only: Sequence[str] = (),
    ) -> None:
        self.plans, self.peaks, self.folders, self.say, self.only = plans, peaks, folders, say, only
        self.device = torch.device(next(iter(plans.values())).device.torch_device)
        self.absent: dict[str, str] = {}
        self._proved: set[str] = set()

    def peers(self, phase: str, call: Call) -> dict[str, Peer]:
        """Those that can be made and run here. One that cannot is left out from then on, with its reason said once."""
        made = {}
        for name, binder in peers_of(phase, self.folders).items():
            known = f"{phase} {name}"
            if known in self.absent or (self.only and name not in self.only):
                continue
            try:
                made[name] = self._proved_peer(known, binder, call)
            except (AbsentError, RuntimeError, ValueError, TypeError, OSError, TritonError) as error:
                self.absent[known] = f"{type(error).__name__}: {error}"
                self.say(f"{known} is left out: {error}")
        return made

    def _proved_peer(self, known: str, binder: Binder, call: Call) -> Peer:
        """The first time, also captured, so that one that cannot be is found out before the others' graphs are made."""
        peer = binder(call)
        peer.prepare()
        peer.launch(0)
        self._wait()
        if known not in self._proved:
            Captures({known: peer.launch}).capture(LAUNCHES[0])
            self._proved.add(known)
        return peer

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def kernels(self, problem: Problem, limits: Limits) -> tuple[dict[str, Selection], dict[str, Callable[..., None]]]:
        """What each level selects, and one kernel for those that select the same."""
        chosen: dict[str, Selection] = {}
        kernels: dict[str, Callable[..., None]] = {}
        for level, plan in self.plans.items():
            try:
                selection = plan.select_problem(problem)
            except SelectionError as error:
                self.say(f"{problem} at level {level} is left out: {error}")
                continue
            chosen[level] = selection
            if key_of(selection) not in kernels:
                kernels[key_of(selection)] = bind(problem, plan.device, selection.rungs, limits).launch
        return chosen, kernels

    def sets(self, shape: Shape, batch: int, context: int) -> int:
        """How many block tables a cell needs so that its KV is cold."""
        return copies_beyond_cache(shape.kv_bytes(batch, context), self.device, most=MOST_SETS)

    def measure(self, phase: str, problem: Problem, cells: Mapping[int, Sequence[int]]) -> Iterator[Row]:
        """Every cell of one problem. cells: the contexts of each batch size."""
        shape = Shape.of(problem)
        largest = max(batch * context for batch, contexts in cells.items() for context in contexts)
        smallest = min(batch * min(contexts) for batch, contexts in cells.items())
        pool = Pool(shape, max(largest, smallest * self.sets(shape, 1, smallest)), self.device)
        for batch, contexts in cells.items():
            if phase in PREFILLS:
                for context in contexts:
                    yield from self._prefill(phase, pool, batch, context)
            else:
                yield from self._decode(phase, pool, batch, contexts)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # graphs keep memory of their own

    def _decode(self, phase: str, pool: Pool, batch: int, contexts: Sequence[int]) -> Iterator[Row]:
        """One batch size: bound and captured for the longest context there may be, replayed for each."""
        call = Call(pool, batch, 1, self.sets(pool.shape, batch, min(contexts)))
        call.set_context(MAX_CONTEXT)
        chosen, kernels = self.kernels(call.problem, Limits(batch, batch, MAX_CONTEXT, 1))
        peers = self.peers(phase, call)
        captures = Captures(rivals_of(call, kernels, peers))
        estimates = {context: SLOWER * self.floor(pool.shape, phase, batch, context) for context in contexts}
        launches = {
            context: graph_launches(self.sets(pool.shape, batch, context), estimates[context]) for context in contexts
        }
        for number in sorted(set(launches.values())):
            captures.capture(number)
        for context in contexts:
            call.set_context(context)
            yield from self._rows(phase, call, chosen, peers, captures, launches[context])

    def _prefill(self, phase: str, pool: Pool, batch: int, context: int) -> Iterator[Row]:
        call = Call(pool, batch, context, self.sets(pool.shape, batch, context))
        call.set_context(context)
        chosen, kernels = self.kernels(call.problem, Limits(call.tokens, batch, MAX_CONTEXT, context))
        peers = self.peers(phase, call)
        captures = Captures(rivals_of(call, kernels, peers))
        estimate = SLOWER * self.floor(pool.shape, phase, batch, context)
        yield from self._rows(phase, call, chosen, peers, captures, graph_launches(call.sets, estimate))

    def floor(self, shape: Shape, phase: str, batch: int, context: int) -> float:
        return floor_us(shape, phase, batch, context, *self.peaks)

    def _rows(
        self,
        phase: str,
        call: Call,
        chosen: Mapping[str, Selection],
        peers: Mapping[str, Peer],
        captures: Captures,
        launches: int,
    ) -> Iterator[Row]:
        if not chosen:
            return
        for peer in peers.values():
            peer.prepare()
        self._wait()
        times = {name: round(timing.median_us, 3) for name, timing in captures.timed(launches).items()}
        shape = call.pool.shape
        for level, selection in chosen.items():
            yield Row(
                op=call.problem.op,
                phase=phase,
                dtype=call.problem.dtype,
                batch=call.batch,
                context=call.context,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                page_size=shape.page_size,
                floor_us=round(self.floor(shape, phase, call.batch, call.context), 3),
                ours_us=times[key_of(selection)],
                impl=" -> ".join(dict.fromkeys(text_of(rung) for rung in selection.rungs)),
                level=level,
                peers={name: times[name] for name in peers},
            )


def key_of(selection: Selection) -> str:
    """Equal for selections that run the same kernels."""
    return " ".join(f"{rung.max_m}:{rung.key}" for rung in selection.rungs)


def rivals_of(
    call: Call, kernels: Mapping[str, Callable[..., None]], peers: Mapping[str, Peer]
) -> dict[str, Callable[[int], Any]]:
    """Every rival by name, ours by what they run."""
    ours = {key: _launch_of(call, launch) for key, launch in kernels.items()}
    return {**ours, **{name: peer.launch for name, peer in peers.items()}}


# --- trying launch shapes -------------------------------------------------------------------------------------------


def try_shapes(
    plan: bid.Plan, phase: str, problem: Problem, cells: Mapping[int, Sequence[int]], say: Say, peaks: Peaks
) -> list[tuple[int, int, str, float]]:
    """Time the op's Triton kernel with every launch shape of its search, or around its ladder's where it has none: one
    set of params, so one class of bits. Returns (batch, context, the best, its time over the ladder's own).
    """
    bench = Bench({LEVELS[-1]: plan}, peaks, (), say)
    shape = Shape.of(problem)
    pool = Pool(shape, max(batch * context for batch, contexts in cells.items() for context in contexts), bench.device)
    best = []
    for batch, contexts in cells.items():
        groups = [[context] for context in contexts] if phase in PREFILLS else [contexts]
        for together in groups:
            query = together[0] if phase in PREFILLS else 1
            call = Call(pool, batch, query, bench.sets(shape, batch, min(together)))
            call.set_context(query if phase in PREFILLS else MAX_CONTEXT)
            captures = Captures(_tried(plan, call, say))
            for context in together:
                call.set_context(context)
                estimate = SLOWER * bench.floor(shape, phase, batch, context)
                launches = graph_launches(bench.sets(shape, batch, context), estimate)
                timed = captures.timed(launches, replays=TRIED_REPLAYS)
                times = {name: timing.median_us for name, timing in timed.items()}
                ranked = sorted(times, key=lambda name: times[name])
                best.append((batch, context, ranked[0], times[ranked[0]] / times["ladder"]))
                say(f"{phase} {problem} batch {batch} context {context}: ladder {times['ladder']:.2f} µs")
                for name in ranked:
                    say(f"    {times[name]:9.2f}  {name}")
    return best


def _tried(plan: bid.Plan, call: Call, say: Say) -> dict[str, Callable[[int], Any]]:
    """The ladder and every other launch shape that compiles."""
    found = default_registry().get(TRIED[call.problem.op])
    params = found.params()
    problem, limits = call.problem, Limits(call.tokens, call.batch, MAX_CONTEXT, call.query)
    ladder = found.tiles(plan.device, problem, params)
    rungs = tuple(Rung(found, params, tile, most) for most, tile in ladder)
    tiles: Iterator[Tile] = (
        iter(load_attribute(found.search)(plan.device, problem, params, call.tokens))
        if found.search
        else candidates(ladder)
    )
    rivals = {"ladder": _launch_of(call, bind(problem, plan.device, rungs, limits).launch)}
    base = next(tile for most, tile in ladder if tile is not None and (most is None or call.tokens <= most))
    for tile in tiles:
        name = differing(tile, base)
        if name in rivals:
            continue
        try:
            launch = _launch_of(call, bind(problem, plan.device, (Rung(found, params, tile),), limits).launch)
            launch(0)
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, TritonError) as error:  # too much shared memory, or registers
            say(f"    {name} does not run: {type(error).__name__}")
            continue
        rivals[name] = launch
    return rivals


def _launch_of(call: Call, launch: Callable[..., None]) -> Callable[[int], None]:
    return lambda i: launch(*call.arguments(i))


# --- the command ----------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    arguments, parser = _arguments(words)
    phases = arguments.phase or list(PHASES)
    named = [(phase, shape) for phase in phases for shape in shapes_of(phase, arguments.shape)]
    if not named:
        known = ", ".join(
            dict.fromkeys(name for phase in phases for shape in shapes_of(phase, []) for name in shape.names)
        )
        parser.error(f"no shape to measure is named like {', '.join(arguments.shape)}; the names are {known}")
    plans = {level: bid.plan("cuda", require=level, cuda_graph=True) for level in LEVELS}
    plan = plans[LEVELS[-1]]
    torch.set_grad_enabled(False)

    def say(line: str) -> None:
        print(line, flush=True)

    began = time.monotonic()
    best = best_of_run(torch.device(plan.device.torch_device))
    peaks = peaks_of(plan.device.name) or best
    if arguments.attempt:
        arguments.quick = True
        return _try(arguments, plan, peaks, say)
    bench = Bench(plans, peaks, tuple(arguments.libraries), say, arguments.peer)
    rows: list[Row] = []
    for phase, shape in named:
        if not ops.get(OPS[phase]).arguments:
            say(f"{phase} {shape.names[0]}: the op {OPS[phase]} has no kernel yet; skipped")
            continue
        problem = ops.get(OPS[phase]).problem(DTYPE, shape.dims)
        cells = cells_of(phase, Shape.of(problem), arguments)
        if not cells:
            continue
        mine = []
        for row in bench.measure(phase, problem, cells):
            mine.append(row)
            say(str(row))
        rows += mine
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"{phase} {shape.names[0]}: {len(mine)} rows, {time.monotonic() - began:.0f} s so far")
    if not rows:
        parser.error("nothing was measured: no cell is within the memory, or no kernel can be captured")
    _write(arguments, plans, peaks, best, bench, rows)
    lines, missed = summary(rows)
    for line in lines:
        print(line)
    for name, reason in bench.absent.items():
        print(f"not there: {name}: {reason}")
    print(f"{len(rows)} rows on {plan.device.name} in {time.monotonic() - began:.0f} s; {len(missed)} figures missed")
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def cells_of(phase: str, shape: Shape, arguments: argparse.Namespace) -> dict[int, list[int]]:
    """The cells of a phase by the command's filters."""
    if phase in PREFILLS:
        lengths = arguments.context or (QUICK_PROMPTS if arguments.quick else PROMPTS)
        return decode_cells(shape, arguments.batch or (1,), [length for length in lengths if length <= PROMPTS[-1]])
    batches = arguments.batch or (QUICK_BATCHES if arguments.quick else BATCHES)
    contexts = arguments.context or (QUICK_CONTEXTS if arguments.quick else CONTEXTS)
    return decode_cells(shape, batches, contexts)


def _try(arguments: argparse.Namespace, plan: bid.Plan, peaks: Peaks, say: Say) -> int:
    for phase in arguments.phase or ("decode",):
        for shape in shapes_of(phase, arguments.shape):
            problem = ops.get(OPS[phase]).problem(DTYPE, shape.dims)
            cells = cells_of(phase, Shape.of(problem), arguments)
            if not cells:
                continue
            for batch, context, name, ratio in try_shapes(plan, phase, problem, cells, say, peaks):
                where = f"{phase} {shape.names[0]} batch {batch} context {context}"
                say(f"best for {where}: {name}, {ratio:.3f} of the ladder's time")
            if plan.device.arch.vendor != "cpu":
                torch.cuda.empty_cache()
    return 0


def _write(
    arguments: argparse.Namespace,
    plans: Mapping[str, bid.Plan],
    peaks: Peaks,
    best: Peaks,
    bench: Bench,
    rows: Sequence[Row],
) -> None:
    """The JSON of a whole run, or of any that names a file."""
    part = any(getattr(arguments, name) for name in ("quick", "phase", "batch", "context", "shape", "peer"))
    plan = plans[LEVELS[-1]]
    to = arguments.out or (None if part else HERE / "results" / plan.device.slug / "attention.json")
    if to is None:
        return
    described = {
        **environment(plan, used_by(plans.values()), peaks, best),
        "launches_of_a_graph": f"{', '.join(map(str, LAUNCHES))}: the first that suffices",
        "captured_at": MAX_CONTEXT,
        "peers": {name: installed_version(name) for name in ("vllm", "flashinfer-python")},
        "absent": bench.absent,
    }
    save(to, described, rows)


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_CONTEXT:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and {MAX_CONTEXT}")
    return value


def _arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", action="append", choices=list(PHASES), help="all if not given")
    parser.add_argument("--batch", action="append", type=_positive, help="sequences; nine sizes to 256 if not given")
    parser.add_argument("--context", action="append", type=_positive, help="positions; 1k to 131k if not given")
    parser.add_argument("--shape", action="append", default=[], help="shapes whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="three batch sizes and three contexts")
    parser.add_argument("--peer", action="append", default=[], choices=list(PEERS), help="all if not given")
    parser.add_argument("--libraries", action="append", type=Path, default=[], help="a folder with peers' libraries")
    parser.add_argument("--try", action="store_true", dest="attempt", help="time launch shapes instead")
    parser.add_argument("--out", type=Path, help="JSON; results/<device>/attention.json for a whole run")
    return parser.parse_args(words), parser


if __name__ == "__main__":
    sys.exit(main())
