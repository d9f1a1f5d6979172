"""Everything that is measured on a GPU, in one run: the JSON files under benchmarks/results/<device>/.

    python benchmarks/gpu_results.py [--out FOLDER] [verify demo tests host-time gemm rows sanitizer]

Runs `bidispatch verify --all --cuda-graph`, `bidispatch demo`, tests/gpu, host_time.py, gemm.py, rows.py, and
compute-sanitizer (memcheck and racecheck) over every kernel on small shapes, or only the parts named. Exits 1 if any of
them does; the others still run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bidispatch.device import Device

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = ROOT / "tests" / "gpu" / "sanitize_small.py"


PARTS = ("verify", "demo", "tests", "host-time", "gemm", "rows", "sanitizer")
WORKERS = 6
"""Processes that share the tests: most of their time is Triton's compiler's."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--out", type=Path, help="folder for the results; by the device's name if not given")
    arguments = parser.parse_args()
    slug = Device.detect().slug
    folder = arguments.out or ROOT / "benchmarks" / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    bidispatch = (sys.executable, "-m", "bidispatch")
    tests = (sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS), "tests/gpu", "--results")
    measure: dict[str, Callable[[], int]] = {
        "verify": lambda: run((*bidispatch, "verify", "--all", "--cuda-graph", "--json"), folder / "verify.json"),
        "demo": lambda: run((*bidispatch, "demo", "--json"), folder / "demo.json"),
        "tests": lambda: run((*tests, str(folder / "gpu_tests.json"))),
        "host-time": lambda: script("host_time", folder),
        "gemm": lambda: script("gemm", folder),
        "rows": lambda: script("rows", folder),
        "sanitizer": lambda: sanitize(folder / "sanitizer.json"),
    }
    codes = []
    for part in arguments.parts or PARTS:
        began = time.monotonic()
        codes.append(measure[part]())
        print(f"{part}: exit {codes[-1]}, {time.monotonic() - began:.0f} s", flush=True)
    return int(any(codes))


def run(command: Sequence[str], to: Path | None = None) -> int:
    """Run a command from the checkout; keep what it prints in a file if one is given."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE if to else None, text=True, check=False)
    if to:
        to.write_text(done.stdout)
    return done.returncode


def script(name: str, folder: Path) -> int:
    """One of the scripts beside this one, with its result in the folder."""
    return run((sys.executable, f"benchmarks/{name}.py", "--out", str(folder / f"{name}.json")))


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
    return max(process.returncode for process in started.values())


if __name__ == "__main__":
    sys.exit(main())
