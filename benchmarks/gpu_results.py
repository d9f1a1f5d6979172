"""Everything that is measured on a GPU, in one run: the JSON files under benchmarks/results/<device>/.

    python benchmarks/gpu_results.py [--out FOLDER] [PART ...]
    python benchmarks/gpu_results.py --outdated    which files were made by other code than today's; needs no GPU

The parts: host-time, gemm-host, gemm, fp8, int4, rows, attention and moe run the scripts of these names; verify is
`bidispatch verify --all --cuda-graph`, verify-gemm, verify-fp8, verify-attention and verify-moe the same over the
shapes of sweeps/, verify-mla and verify-quantize of some ops alone, verify-batch of what serves attention at level
batch; demo is `bidispatch demo`; tests are tests/gpu; sanitizer is compute-sanitizer (memcheck and racecheck) over
every kernel on small shapes. Exits 1 if any of them does; the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from bidispatch.device import Device
from bidispatch.environment import code_digest

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = ROOT / "tests" / "gpu" / "sanitize_small.py"
SWEEPS = ROOT / "benchmarks" / "sweeps"
FEATURES = SWEEPS / "attention_features.yaml"

# What is timed comes first, alone on the machine.
PARTS = ("host-time", "gemm-host", "gemm", "fp8", "int4", "rows", "attention", "moe")
PARTS += ("verify", "verify-gemm", "verify-fp8", "verify-attention", "verify-mla", "verify-batch", "verify-quantize")
PARTS += ("verify-moe", "demo", "tests", "sanitizer")
WORKERS = max(2, min(16, (os.cpu_count() or 2) // 2))
"""Processes that share the tests, or a verification: most of their time is the compiler's and the host's."""
BIDISPATCH = (sys.executable, "-m", "bidispatch")
FINDING = 1
"""Its exit code where something was found, if only that there was nothing to compare."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--out", type=Path, help="folder for the results; by the device's name if not given")
    parser.add_argument("--outdated", action="store_true", help="name files of other code than today's, and kernels")
    arguments = parser.parse_args()
    if arguments.outdated:
        for file in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
            if modules := outdated(file):
                print(f"{file.relative_to(ROOT)}: {', '.join(modules)}")
        return 0
    slug = Device.detect().slug
    folder = arguments.out or ROOT / "benchmarks" / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    # The `verify` part compares what test_verify would, with the numbers kept.
    tests = (sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS), "tests/gpu", "-k", "not no_bit_differs")
    measure: dict[str, Callable[[], int]] = {
        "host-time": lambda: script("host_time", folder),
        "gemm-host": lambda: script("gemm_host", folder),
        "gemm": lambda: script("gemm", folder),
        "fp8": lambda: script("fp8", folder),
        "int4": lambda: script("int4", folder),
        "rows": lambda: script("rows", folder),
        "attention": lambda: script("attention", folder),
        "moe": lambda: script("moe", folder),
        "verify": lambda: verify(("--all",), folder / "verify.json"),
        "verify-gemm": lambda: first_failure(
            verify(("gemm", *dtypes, "--shapes", str(SWEEPS / f"{name}.yaml")), folder / f"verify_{name}.json")
            for name, dtypes in (("gemm", ("--dtype", "bf16", "--dtype", "fp16")), ("gemm_fp32", ("--dtype", "fp32")))
        ),
        "verify-fp8": lambda: verify(
            ("gemm.fp8_block", "--dtype", "fp8", "--shapes", str(SWEEPS / "fp8.yaml")), folder / "verify_fp8.json"
        ),
        "verify-attention": lambda: first_failure(
            verify(("attention", "--dtype", dtype, *more), folder / f"verify_{name}.json")
            for name, dtype, more in (
                ("attention", "bf16", ("--shapes", str(FEATURES))),
                ("attention_long", "bf16", ("--full",)),
                ("attention_fp16", "fp16", ()),
                ("attention_fp32", "fp32", ()),
            )
        ),
        "verify-mla": lambda: verify(("attention.mla",), folder / "verify_mla.json"),
        # What serves where a profile asks for less.
        "verify-batch": lambda: first_failure(
            verify((op, "--require", "batch", *more), folder / f"verify_{name}_batch.json")
            for op, name, more in (
                ("attention", "attention", ("--dtype", "bf16", "--shapes", str(SWEEPS / "attention.yaml"))),
                ("attention.mla", "mla", ()),
            )
        ),
        "verify-quantize": lambda: verify(
            ("quantize.fp8_token", "quantize.fp8_tensor", "moe.router"), folder / "verify_quantize.json"
        ),
        "verify-moe": lambda: verify(
            ("moe.experts", "--dtype", "bf16", "--shapes", str(SWEEPS / "moe.yaml")), folder / "verify_moe.json"
        ),
        "demo": lambda: run((*BIDISPATCH, "demo", "--json"), folder / "demo.json"),
        "tests": lambda: run((*tests, "--results", str(folder / "gpu_tests.json"))),
        "sanitizer": lambda: sanitize(folder / "sanitizer.json"),
    }
    codes = []
    for part in arguments.parts or PARTS:
        began = time.monotonic()
        codes.append(measure[part]())
        print(f"{part}: exit {codes[-1]}, {time.monotonic() - began:.0f} s", flush=True)
    return int(any(codes))


def outdated(file: Path) -> list[str]:
    """The modules that a file of results was made with, of which a line has changed since, maybe a comment."""
    made = json.loads(file.read_text(encoding="utf-8"))["environment"].get("code", {})
    return sorted(module for module, digest in made.items() if code_digest(module) != digest)


def run(command: Sequence[str], to: Path | None = None) -> int:
    """Run a command from the checkout; keep what it prints in a file if one is given."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE if to else None, text=True, check=False)
    if to:
        to.write_text(done.stdout)
    return done.returncode


def script(name: str, folder: Path) -> int:
    """One of the scripts beside this one, with its result in the folder."""
    return run((sys.executable, f"benchmarks/{name}.py", "--out", str(folder / f"{name}.json")))


def verify(what: Sequence[str], to: Path) -> int:
    """A verification shared by several processes, as one document."""
    command = (*BIDISPATCH, "verify", *what, "--cuda-graph", "--json", "--part")
    started = [
        subprocess.Popen((*command, f"{number}/{WORKERS}"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in range(1, WORKERS + 1)
    ]
    printed = [process.communicate()[0] for process in started]
    codes = [process.returncode for process in started]
    for number, (text, code) in enumerate(zip(printed, codes, strict=True), start=1):
        if not text:  # it died, of a signal where the code is negative
            again = " ".join(("bidispatch", *command[len(BIDISPATCH) :], f"{number}/{WORKERS}"))
            print(f"exit {code} and nothing said, so that {to.name} is not written: {again}", flush=True)
    if not all(printed):
        return first_failure(codes)
    parts = [json.loads(text) for text in printed]
    document = merged(parts)
    to.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{' '.join(what)}: {document['comparisons']} rows compared, {document['differing']} differ", flush=True)
    return first_failure(code for code in codes if code != FINDING or not document["passed"])


def counting(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that had a problem: where there are fewer than processes, the others found that nothing was compared."""
    return [part for part in parts if part["problems"]] or list(parts)


def united(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What they have in common, with the libraries and the code of all: each part is served by others."""
    every = {name: {} for name in ("libraries", "code")}
    for environment in environments:
        for name, found in every.items():
            found |= environment[name]
    return {**environments[0], **{name: dict(sorted(found.items())) for name, found in every.items()}}


def first_failure(codes: Iterable[int]) -> int:
    """0 if all are, else the first other. Of a process that a signal ended it is negative: a maximum would hide it."""
    every = list(codes)  # what gives them runs whatever fails before it
    return next((code for code in every if code), 0)


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of the parts of a verification, with the problems in their order."""
    in_turn = {
        key: [each for each in chain(*zip_longest(*(part[key] for part in parts))) if each is not None]
        for key in ("problems", "skipped")
    }
    counted = counting(parts)
    return {
        **{key: value for key, value in parts[0].items() if key != "records"},  # a path on the machine of the run
        "environment": united([part["environment"] for part in counted]),
        "passed": all(part["passed"] for part in counted),
        "seconds": max(part["seconds"] for part in counted),
        **{key: sum(part[key] for part in parts) for key in ("comparisons", "differing")},
        # A part runs the controls of what it verifies.
        "controls": list({control["name"]: control for part in parts for control in part["controls"]}.values()),
        "faults": list(dict.fromkeys(fault for part in counted for fault in part["faults"])),
        **in_turn,
    }


def sanitize(to: Path) -> int:
    """Both checkers over every kernel, at the same time; what each says last."""
    started = {}
    for tool in ("memcheck", "racecheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, str(SANITIZED))
        started[tool] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    results = {}
    for tool, process in started.items():
        lines = process.communicate()[0].splitlines()
        results[tool] = {"exit": process.returncode, "said": lines[-3:]}
        print(f"{tool}: exit {process.returncode}, {lines[-1:]}", flush=True)
    device = Device.detect()
    to.write_text(json.dumps({"device": device.name, "driver": device.driver, **results}, indent=1) + "\n")
    return first_failure(process.returncode for process in started.values())


if __name__ == "__main__":
    sys.exit(main())
