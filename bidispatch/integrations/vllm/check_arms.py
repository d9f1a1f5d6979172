"""The engines of a check, each in a process of its own: its environment, its command, what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bidispatch.errors import UsageError, did_you_mean
from bidispatch.integrations.vllm.mode import MODE_VARIABLE, SWITCH

__all__ = ["ARMS", "OURS", "STOCK", "VLLM_INVARIANT", "arguments_for", "environment_of", "run_arm"]

OURS, STOCK, VLLM_INVARIANT = "ours", "stock", "vllm_invariant"
ARMS: Mapping[str, str] = {
    STOCK: "vLLM as it is",
    VLLM_INVARIANT: "vLLM's own batch-invariant mode",
    OURS: "vLLM served by bidispatch",
}
_LAST_LINES = 60


def environment_of(arm: str, present: Mapping[str, str]) -> dict[str, str]:
    """The variables of an arm's process: what is present, with the switches set as the arm needs them."""
    if arm not in ARMS:
        raise UsageError(f"there is no arm {arm!r}{did_you_mean(arm, ARMS)}; there are {', '.join(ARMS)}")
    made = dict(present)
    given = made.pop(MODE_VARIABLE, None)
    made.pop(SWITCH, None)
    if arm != STOCK:
        made[SWITCH] = "1"
    if arm == VLLM_INVARIANT:
        made[MODE_VARIABLE] = "off"
    elif arm == OURS and given is not None and given.lower() != "off":
        made[MODE_VARIABLE] = given
    # The scheduler is then in the process that asks, and its counters can be read.
    made["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    made.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    made.setdefault("VLLM_NO_USAGE_STATS", "1")
    return made


def arguments_for(arm: str, words: Sequence[str]) -> dict[str, Any]:
    """Engine arguments given as `NAME=VALUE` for all arms or `ARM:NAME=VALUE` for one; values are JSON, else text."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        only, colon, rest = name.partition(":")
        if colon and only not in ARMS:
            raise UsageError(f"--engine-arg {word!r}: there is no arm {only!r}{did_you_mean(only, ARMS)}")
        key = (rest if colon else name).strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--engine-arg {word!r} is not NAME=VALUE or ARM:NAME=VALUE, for example enforce_eager=true"
            )
        if colon and only != arm:
            continue
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def run_arm(
    arm: str, command: Sequence[str], spec: Mapping[str, Any], *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run a command that takes two files, what to do and where to write what came of it; that, or its error.

    The process's output goes to a file, whose last lines are part of the error; lines of it that begin with `check: `
    are said as they come.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"bidispatch-check-{arm}-"))
    wanted, given, log = folder / "spec.json", folder / "result.json", folder / "log.txt"
    say(f"all that it prints is in {log}")
    wanted.write_text(json.dumps({**spec, "arm": arm}), encoding="utf-8")
    with (
        log.open("w", encoding="utf-8") as to,
        subprocess.Popen(
            [*command, str(wanted), str(given)],
            env=environment_of(arm, os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            to.write(line)
            to.flush()
            if line.startswith("check: "):
                say(line.removeprefix("check: ").rstrip())
        code = process.wait()
    if given.exists():
        result: dict[str, Any] = json.loads(given.read_text(encoding="utf-8"))
        return {**result, "log": str(log), **({"tail": _tail(log)} if result.get("error") else {})}
    tail = _tail(log)
    return {"error": f"the process ended with code {code} and no result", "log": str(log), "tail": tail}


def _tail(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]


def child_command() -> list[str]:
    """The command of a check's process."""
    return [sys.executable, "-m", "bidispatch.integrations.vllm.check_child"]
