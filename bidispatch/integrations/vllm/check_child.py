"""One arm of a check, in a process of its own: `python -m bidispatch.integrations.vllm.check_child SPEC RESULT`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from bidispatch.errors import BackendError
from bidispatch.integrations.vllm import check_engine, plugin
from bidispatch.integrations.vllm.check_arms import OURS
from bidispatch.integrations.vllm.check_compare import totals
from bidispatch.integrations.vllm.check_rounds import draw, run
from bidispatch.integrations.vllm.loader import register_loader

__all__ = ["check_served", "close", "end_with_parent", "engine_arguments", "load_plugin", "require_arm", "say"]


def say(text: str) -> None:
    """Tell the process that asked."""
    sys.stdout.write(f"check: {text}\n")
    sys.stdout.flush()


def end_with_parent(every_s: float = 2.0) -> None:
    """End this process when the one that started it is gone, so that no GPU is held for nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def close(engine: check_engine.ServedEngine | None) -> None:
    """End an engine's processes. What that raises is shown and changes nothing: the result is written."""
    try:
        if engine is not None:
            engine.close()
    except Exception:  # noqa: BLE001 - vLLM's own
        traceback.print_exc()


def load_plugin(tensor_parallel: int) -> None:
    """See to it that the plugin is there: as an installed entry point, else called here, for one rank.

    Raises `BackendError` where ranks of their own processes would go without it.
    """
    if not entry_points(group="vllm.general_plugins", name="bidispatch"):
        if tensor_parallel > 1:
            raise BackendError(
                "bidispatch is not installed as a package here, so that vLLM's workers would not load its plugin; "
                "pip install it, or check with --tp 1"
            )
        say("bidispatch is not installed as a package here: a server would not load its plugin; called it directly")
    plugin.register()
    register_loader()


def engine_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs for a check; those that were given come last."""
    made = {
        "model": spec["model"],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "load_format": spec["load_format"],
        "tensor_parallel_size": spec["tp"],
        "max_model_len": spec["max_model_len"],
        "max_num_batched_tokens": spec["max_num_batched_tokens"],
        "max_num_seqs": spec["max_num_seqs"],
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "logprobs_mode": spec["values"],
        "max_logprobs": check_engine.TOP,
        "disable_log_stats": True,
        "seed": 0,
    }
    return {**made, **spec["engine"]}


def require_arm(engine: check_engine.ServedEngine, arm: str) -> list[str]:
    """The kernels that bidispatch bound, of an engine that is what its arm says.

    Raises `BackendError` where ours has none, so that another engine would be checked in its name, or another has some.
    """
    kernels = list(engine.kernels())
    if arm == OURS and not kernels:
        raise BackendError(
            "no layer of this model is served by bidispatch: its plugin was not loaded (see VLLM_PLUGINS), or the "
            "table in the log says why; this would be a check of vLLM's own mode, which is --arm vllm_invariant"
        )
    if arm != OURS and kernels:
        raise BackendError(f"arm {arm} has layers served by bidispatch: {', '.join(kernels[:3])}")
    return kernels


def check_served(engine: check_engine.ServedEngine, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Check an engine that is up: rounds, totals, counters, and what did not happen."""
    model = engine.config.model_config
    work = draw(
        model.get_vocab_size(),
        prompts=spec["prompts"],
        longest=spec["longest"],
        new_tokens=spec["new_tokens"],
        page=int(engine.config.cache_config.block_size or 16),
        seed=spec["seed"],
    )
    began = time.monotonic()
    rounds = run(engine, work, most=spec["max_num_seqs"], say=say)
    engine.count_graphs()
    total = totals(rounds)
    return {
        **total.as_json(),
        "rounds": [each.as_json() for each in rounds],
        "counters": engine.steps.counters.as_json(),
        "happened": engine.steps.counters.happened(),
        "seconds": time.monotonic() - began,
    }


def main(words: list[str]) -> int:
    spec = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    to = Path(words[1])
    result: dict[str, Any]
    engine: check_engine.ServedEngine | None = None
    end_with_parent()
    began = time.perf_counter()
    try:
        load_plugin(spec["tp"])
        engine = check_engine.start(engine_arguments(spec))
        seconds = time.perf_counter() - began
        say(f"engine is up after {seconds:.0f} s")
        config = engine.config
        result = {
            "kernels": require_arm(engine, spec["arm"]),
            "vllm": version("vllm"),
            "start_s": seconds,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
            **check_served(engine, spec),
        }
    except Exception as error:  # noqa: BLE001 - becomes the result, whatever it is
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    to.write_text(json.dumps(result), encoding="utf-8")
    close(engine)
    return 0 if "error" not in result else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
