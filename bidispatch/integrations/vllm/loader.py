"""`--load-format bidispatch_random`: vLLM's model built from a config, with seeded random weights.

Registered by the plugin in every process, whatever the mode, so that a stock engine can be given the same weights.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from bidispatch.integrations.vllm.random_weights import fill

__all__ = ["LOAD_FORMAT", "register_loader"]

LOAD_FORMAT = "bidispatch_random"

_log = logging.getLogger("vllm.bidispatch")


def register_loader() -> None:
    """Tell vLLM of the loader; a second call does nothing. Imports vLLM's loaders, and touches no device.

    Read in 0.25.1, 0.29.0 and 0.33.0: `BaseModelLoader.load_model` builds the model on its device, calls
    `load_weights`, then `process_weights_after_loading` of every layer.
    """
    from vllm.model_executor import model_loader

    if LOAD_FORMAT in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return

    class RandomModelLoader(model_loader.BaseModelLoader):  # type: ignore[misc]
        """Fills a model with seeded random weights. `model_loader_extra_config` takes `seed`."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            extra = dict(load_config.model_loader_extra_config or {})
            self.seed = int(extra.pop("seed", 0))
            if extra:
                raise ValueError(f"{LOAD_FORMAT} takes seed, not {', '.join(extra)}, in model_loader_extra_config")

        def download_model(self, model_config: Any) -> None:
            """Nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Fill the model's parameters."""
            from vllm.distributed import get_tensor_model_parallel_rank

            began = time.perf_counter()
            tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
            count = fill(model, seed=self.seed, rank=get_tensor_model_parallel_rank(), tied=tied)
            _log.info("%.2f G random weights of seed %d in %.1f s", count / 1e9, self.seed, time.perf_counter() - began)

    model_loader.register_model_loader(LOAD_FORMAT)(RandomModelLoader)
