"""Whole models in vLLM: stock, in its own invariant mode, and served by bidispatch; prices, and the invariance check.

    python benchmarks/vllm_serving.py [--model qwen3-8b]... [--arm ours]... [--case 8x8192]... [--startup] [--out FILE]
    python benchmarks/vllm_serving.py --merge [vllm.json] PART... --out vllm.json

(Not named vllm.py: scripts here could then not import vllm.) Models are benchmarks/models/*.json, with random weights.
Each arm is an engine in a process of its own, started once for its prices and its check; several may run side by side,
on a GPU each (CUDA_VISIBLE_DEVICES), writing parts. A decode step is the median time between two returns of the engine
while all decode; prefill is from the first step to the last first token, nothing cached. Figures, over all cases of
models; prefill of models with latent attention is reported apart:

- decode step, ours / stock: geometric mean at most 1.03, no case above 1.10; prefill: 1.10 and 1.25;
- start-up over stock: at most 30 s cold, 10 s warm (with --startup, which starts each arm once more, in empty caches);
- nothing compiled after an engine is up; workspaces at most 1 GiB; no difference in ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import HERE, best_of_run, conclude, environment, geometric_mean, peaks_of, save, used_by

from bidispatch.integrations.vllm.check import CheckOptions, spec_of
from bidispatch.integrations.vllm.check_arms import ARMS, OURS, STOCK, VLLM_INVARIANT, run_arm
from bidispatch.integrations.vllm.check_steps import Counters

MODELS = HERE / "models"
CASES = ((1, 512), (1, 32000), (8, 8192), (64, 1024))
DECODE, PREFILL = "decode", "prefill"
MEAN_LIMIT = {DECODE: 1.03, PREFILL: 1.10}
CASE_LIMIT = {DECODE: 1.10, PREFILL: 1.25}
COLD_LIMIT_S, WARM_LIMIT_S = 30.0, 10.0
WORKSPACE_LIMIT = 1 << 30
LEVEL = "sequence"
_CHECKED = ("comparisons", "comparisons_differ", "max_logprob_difference", "counters")
_RESULTS = ("start_s", "compiled_after_ready", "compiled_by_others", "workspace_bytes", "faults")
"""What an `Engine` has of its check, and of the rest of a part's result."""
CACHES = (
    "VLLM_CACHE_ROOT",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "CUDA_CACHE_PATH",
)


@dataclass(frozen=True)
class Row:
    """One case of one phase of one model: milliseconds of a step (decode) or of the whole (prefill)."""

    model: str
    layers: int
    phase: str
    case: str
    level: str
    stock_ms: float | None
    vllm_invariant_ms: float | None
    ours_ms: float | None
    ours_gpu_ms: float | None
    stock_gpu_ms: float | None
    max_logprob_difference: Mapping[str, float | None]
    comparisons: int | None
    latent: bool
    """Whether the model has latent attention."""

    @property
    def ratio(self) -> float | None:
        """Ours as a part of stock."""
        return self.ours_ms / self.stock_ms if self.ours_ms and self.stock_ms else None

    def __str__(self) -> str:
        times = (("stock", self.stock_ms), ("vLLM's mode", self.vllm_invariant_ms), ("ours", self.ours_ms))
        shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times if ms is not None)
        ratio = f" ({self.ratio:.3f} of stock)" if self.ratio else ""
        return f"{self.model} ({self.layers} layers) {self.phase} {self.case}: {shown}{ratio}"


@dataclass(frozen=True)
class Engine:
    """One arm of one model: what its start and its check gave."""

    model: str
    arm: str
    start_s: float | None
    cold_s: float | None
    warm_s: float | None
    compiled_after_ready: int | None
    """Triton kernels of bidispatch compiled, or fetched from the cache on disk, after the engine was up."""
    compiled_by_others: int | None
    """vLLM's and Inductor's."""
    workspace_bytes: int | None
    comparisons: int | None
    comparisons_differ: int | None
    max_logprob_difference: float | None
    counters: Mapping[str, int]
    did_not_happen: Sequence[str]
    faults: Sequence[str] = field(default_factory=tuple)


# --- what can be computed without a GPU -----------------------------------------------------------------------------


def model_names(words: Sequence[str]) -> list[str]:
    """The models named, all without words. Raises `ValueError` for one that is not there."""
    known = sorted(path.stem for path in MODELS.glob("*.json"))
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"no model {', '.join(unknown)}; there are {', '.join(known)}")
    return list(words) or known


def cases_of(words: Sequence[str]) -> list[tuple[int, int]]:
    """Cases written as BATCHxTOKENS. Raises `ValueError` for another form."""
    found = []
    for word in words:
        batch, cross, tokens = word.partition("x")
        if not (cross and batch.strip().isdigit() and tokens.strip().isdigit()):
            raise ValueError(f"{word!r} is not BATCHxTOKENS, for example 8x8192")
        found.append((int(batch), int(tokens)))
    return found or list(CASES)


def text_of_case(price: Mapping[str, Any]) -> str:
    return f"{price['batch']} x {price['tokens']}"


def joined(parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One part for each model and arm, where one run timed start-up and another prices and the check: the later one's
    values where it has any. What went wrong in prices is gone with them.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        known = found.setdefault((part["model"], part["arm"]), {"result": {}})
        old, new = known["result"], part["result"]
        if new.get("prices"):
            old = {name: value for name, value in old.items() if name not in ("error", "faults")}
        result = {**new, **old, **{name: value for name, value in new.items() if value not in (None, [])}}
        known |= {**part, "result": result}
    return list(found.values())


def parts_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run; of a whole, those that it was put together from, as far as it holds them."""
    if "parts" in document:
        return list(document["parts"])
    prices: dict[tuple[str, str], list[dict[str, Any]]] = {}
    models: dict[str, dict[str, Any]] = {}
    for row in document["rows"]:
        models[row["model"]] = {"layers": row["layers"], "latent": row["latent"]}
        batch, tokens = (int(number) for number in row["case"].split(" x "))
        for arm in ARMS:
            if row[f"{arm}_ms"] is not None:
                price = {"phase": row["phase"], "batch": batch, "tokens": tokens, "ms": row[f"{arm}_ms"]}
                prices.setdefault((row["model"], arm), []).append(price | {"gpu_ms": row.get(f"{arm}_gpu_ms")})
    found = []
    for engine in document["environment"]["engines"]:
        known = models.get(engine["model"], {"layers": 0, "latent": False})
        checked = {name: engine[name] for name in _CHECKED}
        result = {name: engine[name] for name in _RESULTS} | {
            "layers": known["layers"],
            "prices": prices.get((engine["model"], engine["arm"]), []),
            "check": checked if engine["comparisons"] is not None else None,
        }
        starts = {name: engine[name] for name in ("cold_s", "warm_s") if engine[name] is not None}
        named = {"model": engine["model"], "arm": engine["arm"], "latent": known["latent"]}
        found.append(named | starts | {"result": result})
    return found


def rows_of(parts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of all arms that were run; a time that is missing is None."""
    rows = []
    for model in dict.fromkeys(part["model"] for part in parts):
        arms = {part["arm"]: part["result"] for part in parts if part["model"] == model}
        latent = next(part["latent"] for part in parts if part["model"] == model)
        times: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
        for arm, result in arms.items():
            for price in result.get("prices", ()):
                times.setdefault((price["phase"], text_of_case(price)), {})[arm] = price
        checks = {arm: result.get("check") for arm, result in arms.items()}
        differences = {arm: _of(checks.get(arm), "max_logprob_difference") for arm in ARMS}
        layers = next((result["layers"] for result in arms.values() if "layers" in result), 0)
        for (phase, case), by_arm in times.items():
            rows.append(
                Row(
                    model=model,
                    layers=layers,
                    phase=phase,
                    case=case,
                    level=LEVEL,
                    stock_ms=_of(by_arm.get(STOCK), "ms"),
                    vllm_invariant_ms=_of(by_arm.get(VLLM_INVARIANT), "ms"),
                    ours_ms=_of(by_arm.get(OURS), "ms"),
                    ours_gpu_ms=_of(by_arm.get(OURS), "gpu_ms"),
                    stock_gpu_ms=_of(by_arm.get(STOCK), "gpu_ms"),
                    max_logprob_difference=differences,
                    comparisons=_of(checks.get(OURS), "comparisons"),
                    latent=latent,
                )
            )
    return rows


def engines_of(parts: Sequence[Mapping[str, Any]]) -> list[Engine]:
    """Starts and checks of all arms that were run."""
    found = []
    for part in parts:
        result = part["result"]
        check = result.get("check") or {}
        counters = check.get("counters") or {}
        error = [result["error"]] if result.get("error") else []
        found.append(
            Engine(
                model=part["model"],
                arm=part["arm"],
                start_s=result.get("start_s"),
                cold_s=part.get("cold_s"),
                warm_s=part.get("warm_s"),
                compiled_after_ready=result.get("compiled_after_ready"),
                compiled_by_others=result.get("compiled_by_others"),
                workspace_bytes=result.get("workspace_bytes"),
                comparisons=check.get("comparisons"),
                comparisons_differ=check.get("comparisons_differ"),
                max_logprob_difference=check.get("max_logprob_difference"),
                counters=counters,
                did_not_happen=tuple(Counters(**counters).missing()) if counters else (),
                faults=(*error, *result.get("faults", ())),
            )
        )
    return found


def summary(rows: Sequence[Row], engines: Sequence[Engine]) -> tuple[list[str], list[str]]:
    """Lines to print, and the figures that are missed."""
    lines = [str(row) for row in rows]
    missed: list[str] = []
    for phase in (DECODE, PREFILL):
        for latent in (False, True) if phase == PREFILL else (None,):
            cells = [row for row in rows if row.phase == phase and row.ratio and latent in (None, row.latent)]
            if cells:
                _judge(phase, latent, cells, lines, missed)
    for engine in engines:
        _judge_engine(engine, lines, missed)
    for model in dict.fromkeys(engine.model for engine in engines):
        arms = {engine.arm: engine for engine in engines if engine.model == model}
        if STOCK in arms and OURS in arms:
            for name, limit in (("cold_s", COLD_LIMIT_S), ("warm_s", WARM_LIMIT_S)):
                ours, stock = getattr(arms[OURS], name), getattr(arms[STOCK], name)
                if ours is not None and stock is not None:
                    lines.append(
                        f"{model}: start-up {name[:-2]} {ours:.1f} s, stock {stock:.1f} s (at most {limit} over)"
                    )
                    if ours - stock > limit:
                        missed.append(lines[-1])
    return lines, missed


def _judge(phase: str, latent: bool | None, cells: Sequence[Row], lines: list[str], missed: list[str]) -> None:
    what = phase if not latent else f"{phase} of models with latent attention"
    mean = geometric_mean(row.ratio for row in cells if row.ratio)
    lines.append(f"{what}: ours / stock, geometric mean of {len(cells)}: {mean:.3f} (at most {MEAN_LIMIT[phase]})")
    over = [f"{row}, at most {CASE_LIMIT[phase]}" for row in cells if row.ratio and row.ratio > CASE_LIMIT[phase]]
    if latent:
        lines += over
        return
    if mean > MEAN_LIMIT[phase]:
        missed.append(lines[-1])
    missed += over


def _judge_engine(engine: Engine, lines: list[str], missed: list[str]) -> None:
    name = f"{engine.model}, {engine.arm}"
    missed += [f"{name}: {fault}" for fault in engine.faults]
    if engine.comparisons is not None:
        lines.append(
            f"{name}: {engine.comparisons_differ} of {engine.comparisons} comparisons differ, "
            f"by up to {engine.max_logprob_difference:.6g}"
        )
        if engine.arm == OURS and (engine.comparisons_differ or not engine.comparisons):
            missed.append(lines[-1])
        if engine.arm == OURS and engine.did_not_happen:
            missed.append(f"{name}: did not happen: {', '.join(engine.did_not_happen)}")
        if engine.arm == STOCK and not engine.comparisons_differ:
            lines.append(f"{name}: no difference, so that the check of this model is no proof")
    if engine.arm != OURS:
        return
    if engine.workspace_bytes is not None:
        lines.append(f"{name}: workspaces of {engine.workspace_bytes / 2**20:.0f} MiB (at most 1024)")
        if engine.workspace_bytes > WORKSPACE_LIMIT:
            missed.append(lines[-1])
    if engine.compiled_after_ready is not None:
        lines.append(
            f"{name}: {engine.compiled_after_ready} kernels of bidispatch made ready after it was up (at most 0)"
        )
        if engine.compiled_after_ready:
            missed.append(lines[-1])


def _of(holder: Mapping[str, Any] | None, key: str) -> Any:
    return None if holder is None else holder.get(key)


# --- what needs the GPU ---------------------------------------------------------------------------------------------


def run_model(name: str, arms: Sequence[str], arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The arms of one model, one after the other: parts."""
    config = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix=f"bidispatch-{name}-") as folder:
        if arguments.layers:
            config["num_hidden_layers"] = arguments.layers
            if "layer_types" in config:
                config["layer_types"] = config["layer_types"][: arguments.layers]
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for arm in arms:
            part: dict[str, Any] = {"model": name, "arm": arm, "latent": bool(config.get("kv_lora_rank"))}
            spec = _spec(Path(folder), arm, arguments)
            if arguments.startup:
                with tempfile.TemporaryDirectory(prefix="bidispatch-caches-") as caches:
                    present = {cache: os.environ.get(cache) for cache in CACHES}
                    os.environ.update({cache: f"{caches}/{cache.lower()}" for cache in CACHES})
                    try:
                        part["cold_s"] = _start(arm, {**spec, "only_start": True}).get("start_s")
                        part["result"] = _start(arm, spec)
                        part["warm_s"] = part["result"].get("start_s")
                    finally:
                        for cache, value in present.items():
                            if value is None:
                                os.environ.pop(cache, None)
                            else:
                                os.environ[cache] = value
            else:
                part["result"] = _start(arm, spec)
            if error := part["result"].get("error"):
                print(f"{name}, {arm}: {error}; its log is {part['result'].get('log')}", flush=True)
                print("\n".join(part["result"].get("tail", ())), flush=True)
            yield part


def _start(arm: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "vllm_prices.py")]
    return run_arm(arm, command, spec, say=lambda text: print(f"[{arm}] {text}", flush=True))


def _spec(model: Path, arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    cases = cases_of(arguments.case)
    options = CheckOptions(
        model=model,
        load_format=arguments.load_format,
        tensor_parallel=arguments.tp,
        arms=(arm,),
        prompts=arguments.prompts,
        longest=arguments.longest,
        max_num_seqs=max(64, *(batch for batch, _ in cases)),
        max_model_len=max(4096, max(tokens for _, tokens in cases) + 256),
        # Of an H100's 80 GiB, 30B parameters in bf16 leave little for the cache of 64 x 1024 and 8 x 8192.
        engine=("gpu_memory_utilization=0.93", *arguments.engine_arg),
    )
    return {
        **spec_of(options, arm),
        "cases": [] if arguments.no_prices else cases,
        "check": not arguments.no_check,
        "repeats": arguments.repeats,
        "steps": arguments.steps,
        "only_start": False,
    }


def described() -> dict[str, Any]:
    """The environment of a run, as of the other benchmarks; measured when no engine runs."""
    import torch

    import bidispatch as bid
    from bidispatch.requirements import installed_version

    plan = bid.plan("cuda", require=LEVEL, cuda_graph=True)
    best = best_of_run(torch.device(plan.device.torch_device))
    found = environment(plan, used_by([plan]), peaks_of(plan.device.name) or best, best)
    found["libraries"]["vllm"] = installed_version("vllm")
    return found


def main(words: Sequence[str] | None = None) -> int:
    arguments, parser = _arguments(words)
    began = time.monotonic()
    if arguments.merge:
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.merge]
        parts = joined(part for document in documents for part in parts_of(document))
        environment_of_run = documents[0]["environment"]
        return _finish(parts, environment_of_run, arguments.out, began)
    try:
        models = model_names(arguments.model)
        cases_of(arguments.case)
    except ValueError as error:
        parser.error(str(error))
    parts = []
    for model in models:
        for part in run_model(model, arguments.arm or list(ARMS), arguments):
            parts.append(part)
            if arguments.out:  # what is there so far, should a later one take the machine down
                _write(arguments.out, {"environment": {}, "parts": parts})
    environment_of_run = described()
    if arguments.out:
        _write(arguments.out, {"environment": environment_of_run, "parts": parts})
    return _finish(parts, environment_of_run, None, began)


def _finish(parts: Sequence[Mapping[str, Any]], about: Mapping[str, Any], to: Path | None, began: float) -> int:
    rows, engines = rows_of(parts), engines_of(parts)
    if to:
        save(to, {**about, "engines": [vars(engine) for engine in engines]}, rows)
    lines, missed = summary(rows, engines)
    return conclude(lines, missed, len(rows), str(about.get("device", "this device")), began)


def _write(to: Path, content: Mapping[str, Any]) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="of benchmarks/models; all if not given")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="all if not given")
    parser.add_argument(
        "--case", action="append", default=[], help="BATCHxTOKENS; the four of the figures if not given"
    )
    parser.add_argument("--layers", type=int, default=0, help="so many layers of each model, instead of its own")
    parser.add_argument("--tp", type=int, default=1, help="ranks")
    parser.add_argument("--load-format", default="bidispatch_random", help="as vLLM's")
    parser.add_argument("--engine-arg", action="append", default=[], help="NAME=VALUE or ARM:NAME=VALUE, of EngineArgs")
    parser.add_argument("--repeats", type=int, default=3, help="prefills timed, at least")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed")
    parser.add_argument("--prompts", type=int, default=64, help="requests of the check")
    parser.add_argument("--longest", type=int, default=3000, help="tokens of the check's longest prompt")
    parser.add_argument("--no-check", action="store_true", help="prices only")
    parser.add_argument("--no-prices", action="store_true", help="the check only")
    parser.add_argument("--startup", action="store_true", help="start each arm once more, in empty caches")
    parser.add_argument("--out", type=Path, help="JSON: a part, or with --merge the whole")
    parser.add_argument("--merge", type=Path, nargs="+", help="parts, or a whole with parts to put in, to put together")
    return parser.parse_args(words), parser


if __name__ == "__main__":
    sys.exit(main())
