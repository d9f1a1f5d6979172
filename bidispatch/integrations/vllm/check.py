"""Whether a request's logprobs move in a whole engine of vLLM: `bidispatch vllm check`. Imports no vLLM.

Each arm is an engine in a process of its own: the one that is checked, and stock vLLM as a negative control.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bidispatch.errors import BackendError, UsageError, did_you_mean
from bidispatch.integrations.vllm import compat
from bidispatch.integrations.vllm.check_arms import ARMS, OURS, STOCK, arguments_for, child_command, run_arm
from bidispatch.integrations.vllm.check_rounds import need_sizes
from bidispatch.integrations.vllm.check_steps import HAPPENINGS, Counters

__all__ = ["VALUES", "CheckOptions", "check", "faults", "lines", "need_vllm", "spec_of"]

VALUES = ("raw_logprobs", "raw_logits")


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What to check. Raises `UsageError` for what cannot be."""

    model: Path
    load_format: str = "auto"
    tensor_parallel: int = 1
    arms: tuple[str, ...] = (OURS, STOCK)
    prompts: int = 64
    longest: int = 3000
    new_tokens: int = 24
    seed: int = 0
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 64
    max_model_len: int = 0
    """0: what the longest request needs."""
    values: str = VALUES[0]
    excused: tuple[str, ...] = ()
    """Of `HAPPENINGS`, what need not happen."""
    require_control: bool = False
    """Whether a stock engine that shows no difference is a fault."""
    engine: tuple[str, ...] = field(default=())
    """`NAME=VALUE` or `ARM:NAME=VALUE`, for vLLM's EngineArgs."""

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise UsageError(f"{self.model} has no config.json; --model takes a Hugging Face folder")
        for given, known, option in (
            (self.arms, ARMS, "--arm"),
            (self.excused, HAPPENINGS, "--without"),
            ((self.values,), VALUES, "--values"),
        ):
            for word in given:
                if word not in known:
                    raise UsageError(f"{option} {word!r} is none of {', '.join(known)}{did_you_mean(word, known)}")
        need_sizes(self.prompts, self.longest, self.new_tokens)
        if not self.arms:
            raise UsageError(f"nothing to check: --arm takes {', '.join(ARMS)}")
        for arm in self.arms:
            arguments_for(arm, self.engine)


def need_vllm() -> None:
    """Raise `BackendError` where there is no vLLM to check, and for one whose engine cannot be watched."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise BackendError("vllm is not installed in this environment; `pip install vllm`, then check again")
    wrong = compat.faults(Path(found.origin).parent, compat.SUPPORTED[0], compat.ENGINE)  # the same in all
    if wrong:
        raise BackendError(
            f"the engine of this vLLM is not as it was read, so what it did cannot be seen: {'; '.join(wrong)}"
        )


def spec_of(options: CheckOptions, arm: str) -> dict[str, Any]:
    """What an arm's process is told."""
    return {
        "model": str(options.model.resolve()),
        "load_format": options.load_format,
        "tp": options.tensor_parallel,
        "prompts": options.prompts,
        "longest": options.longest,
        "new_tokens": options.new_tokens,
        "seed": options.seed,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_num_seqs": options.max_num_seqs,
        "max_model_len": options.max_model_len or options.longest + options.new_tokens + 128,
        "values": options.values,
        "engine": arguments_for(arm, options.engine),
    }


def check(
    options: CheckOptions,
    *,
    say: Callable[[str, str], None] = lambda arm, text: None,
    run: Callable[..., dict[str, Any]] = run_arm,
) -> dict[str, Any]:
    """Run the arms one after the other; what came of each. say: told of (arm, text) as it goes."""
    results = {}
    for arm in options.arms:
        results[arm] = run(arm, child_command(), spec_of(options, arm), say=lambda text, arm=arm: say(arm, text))
        if not results[arm].get("error"):
            counters = Counters(**results[arm]["counters"])
            results[arm]["missing"] = counters.missing(frozenset(options.excused))
    return {"model": str(options.model), "values": options.values, "arms": results}


def faults(report: Mapping[str, Any], *, require_control: bool = False) -> list[str]:
    """Why a check failed; empty where it did not.

    An arm other than stock fails by an error, a difference, or something that did not happen. Stock is the control:
    its differences are what is expected of it.
    """
    found = []
    for arm, result in report["arms"].items():
        if error := result.get("error"):
            found.append(f"{arm}: {error}; its log is {result.get('log')}")
        elif arm == STOCK:
            if require_control and not _moved(result):
                found.append(f"{arm}: no difference, so this check cannot tell an invariant engine from another")
        else:
            if _moved(result):
                found.append(
                    f"{arm}: {result['comparisons_differ']} of {result['comparisons']} comparisons differ, by up to "
                    f"{result['max_logprob_difference']:.6g}; first: {result['first']}"
                )
            if not result["comparisons"]:
                found.append(f"{arm}: nothing was compared")
            found += [f"{arm}: {text}" for text in result["missing"].values()]
    return found


def lines(report: Mapping[str, Any]) -> list[str]:
    """A report for people."""
    what = "Logprob" if report["values"] == "raw_logprobs" else "Logit"
    shown = []
    for arm, result in report["arms"].items():
        if error := result.get("error"):
            shown += [f"{arm} ({ARMS[arm]}): {error}", *(f"    {line}" for line in result.get("tail", ()))]
            continue
        counters = result["counters"]
        shown += [
            f"{arm} ({ARMS[arm]}, {result['vllm']}, model runner {result['runner']}, {result['dtype']}, "
            f"up in {result['start_s']:.0f} s)",
            f"  {what} difference: {result['max_logprob_difference']:.10f}",
            f"  comparisons: {result['comparisons']} new tokens of {result['requests']} requests in "
            f"{len(result['rounds'])} rounds, {result['values']} values",
            f"  differing: {result['comparisons_differ']} comparisons, {result['values_differ']} values, "
            f"{result['tokens_differ']} tokens",
            *(
                f"    {each['name']}: {each['comparisons_differ']} of {each['comparisons']}, by up to "
                f"{each['max_logprob_difference']:.6g}; first: {each['first']}"
                for each in result["rounds"]
                if _moved(each)
            ),
            f"  {result['seconds']:.0f} s, {counters['steps']} steps of up to {counters['most_requests']} requests: "
            f"{counters['chunks']} chunks, {counters['cut_elsewhere']} prompts cut elsewhere than alone, "
            f"{counters['prefix_hits']} prefix hits ({counters['prefix_tokens']} tokens), "
            f"{counters['mixed_steps']} mixed steps, {counters['preemptions']} preemptions, "
            f"{counters['graph_replays']} graph replays ({counters['full_graph_steps']} steps full, "
            f"{counters['piecewise_graph_steps']} piecewise)",
        ]
    stock = report["arms"].get(STOCK)
    if stock and not stock.get("error") and not _moved(stock):
        shown.append(
            "the stock engine shows no difference either: this check is no proof; try more --prompts, or random "
            "weights (--load-format bidispatch_random)"
        )
    return shown


def _moved(result: Mapping[str, Any]) -> bool:
    return bool(result["comparisons_differ"] or result["tokens_differ"])


def known_arms(words: Sequence[str], *, stock: bool) -> tuple[str, ...]:
    """The arms that were named, or ours, and stock if it is wanted."""
    named = tuple(dict.fromkeys(words)) or (OURS,)
    return named if not stock or STOCK in named else (*named, STOCK)
