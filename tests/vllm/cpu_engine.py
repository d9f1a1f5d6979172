"""A whole vLLM engine on the processor, checked: `cpu_engine.py RESULT OPTIONS`, in a process of its own.

vLLM's wheel for CUDA has its CPU platform, scheduler and model runner, but none of its CPU kernels: those that a Qwen3
needs are in `cpu_kernels`. Attention is a loop over requests; with `ours` it is bidispatch's, as its layers are.

OPTIONS is JSON: `ours`, `prices`, and `engine`, `model` and `check`, which change what those are.
"""

# ruff: noqa: E402 - vLLM's platform is put in place before what looks at it is imported
from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

OPTIONS = json.loads(sys.argv[2])
OURS = bool(OPTIONS.get("ours"))
os.environ["VLLM_BATCH_INVARIANT"] = str(int(OURS))
os.environ.pop("BIDISPATCH_VLLM", None)
os.environ.update(
    VLLM_PLUGINS="",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_USE_V2_MODEL_RUNNER="0",
    NUMBA_NUM_THREADS="1",  # else the n-gram drafter's threads wait for each other, and take most of the time
)

import cpu_kernels
import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum


class Platform(CpuPlatform):
    """vLLM's, with attention from here and no kernels to import."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        return f"{__name__}.Backend"

    @classmethod
    def import_kernels(cls):
        pass


vllm.platforms._current_platform = vllm.platforms.current_platform = Platform()
# Where the processor has AMX, vLLM packs weights by a kernel that its wheel for CUDA has not either.
torch.cpu._is_amx_tile_supported = torch._C._cpu._is_amx_tile_supported = lambda: False

import vllm.utils.torch_utils

for module in list(sys.modules.values()):
    if hasattr(module, "PIN_MEMORY"):
        module.PIN_MEMORY = False

from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder

from bidispatch.integrations.vllm import check_child, check_engine
from bidispatch.integrations.vllm.check_steps import Steps
from bidispatch.integrations.vllm.loader import LOAD_FORMAT, register_loader

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

planted = False


class Builder(AttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return common_attn_metadata


class Attention(AttentionImpl):
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, *args, **named):
        self.heads, self.size, self.scale, self.kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype = "auto"

    def forward(self, layer, query, key, value, kv_cache, metadata, output, output_scale=None, output_block_scale=None):
        if metadata is None:
            return output.fill_(0)
        if kv_cache.dim() == 5:
            keys, values = kv_cache.unbind(1)
        else:
            keys, values = kv_cache.transpose(1, 2).split(self.size, dim=-1)
        page = keys.shape[1]
        count = metadata.num_actual_tokens
        slots = metadata.slot_mapping[:count]
        here = slots >= 0
        for cache, new in ((keys, key), (values, value)):
            cache[slots[here] // page, slots[here] % page] = new[:count][here].view(-1, self.kv_heads, self.size)
        queries, outputs = (tensor.view(-1, self.heads, self.size) for tensor in (query, output))
        starts = metadata.query_start_loc_cpu.tolist()
        for request in range(metadata.num_reqs):
            self._one(metadata, request, starts[request : request + 2], keys, values, queries, outputs)
        if planted and metadata.num_reqs > 2:
            output[:1] *= 1.0625
        return output

    def _one(self, metadata, request, span, keys, values, queries, outputs):
        length = int(metadata.seq_lens[request])
        pages = metadata.block_table_tensor[request, : -(-length // keys.shape[1])].long()
        k, v = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(self.heads // self.kv_heads, 1).double()
            for cache in (keys, values)
        )
        for row in range(*span):
            end = length - (span[1] - row) + 1
            scores = torch.einsum("hd,khd->hk", queries[row].double(), k[:end]) * self.scale
            outputs[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[:end]).to(outputs.dtype)


class Backend(AttentionBackend):
    @classmethod
    def supports_batch_invariance(cls):
        return True

    @staticmethod
    def get_name():
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return Attention

    @staticmethod
    def get_builder_cls():
        return Builder

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        return (num_blocks, 2, block_size, num_kv_heads, head_size)


def serve_layers() -> None:
    """Layers, norms and attention by bidispatch: its plugin, but for the platform that it asks for, and without what
    vLLM's own mode sets, which is CUDA's.
    """
    from vllm.v1.worker import gpu_worker

    from bidispatch.integrations.vllm import backends, plugin

    vars(plugin)["_require_platform"] = lambda: None
    install = backends.install

    def install_here(platform, uncovered):
        platform._enum = PlatformEnum.CUDA
        try:
            return install(platform, uncovered=uncovered)
        finally:
            platform._enum = PlatformEnum.CPU

    backends.install = install_here
    name = "init_batch_invariance"
    for path in ("vllm.model_executor.determinism.batch_invariant", "vllm.model_executor.layers.batch_invariant"):
        if path in sys.modules:
            setattr(sys.modules[path], name, lambda *args: None)
    if hasattr(gpu_worker, name):
        setattr(gpu_worker, name, lambda *args: None)
    plugin.register()


def watch_attention() -> dict[str, int]:
    """Steps of a layer by its problem and by what serves it; `drafts` are those of several queries a sequence that the
    kernel for decode steps had. The fault is planted here.
    """
    from bidispatch.integrations.vllm.attention import BidispatchImpl

    seen: dict[str, int] = {}
    original = BidispatchImpl.forward

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *others, **named):
        result = original(self, layer, query, key, value, kv_cache, metadata, output, *others, **named)
        if metadata is None:
            return result
        names = [str(self.kernels.selection.problem), *self.kernels.selection.implementations]
        if metadata.decode_step and metadata.max_query_len > 1:
            names.append("drafts")
        for name in names:
            seen[name] = seen.get(name, 0) + 1
        if planted and len(metadata.seq_lens) > 2:
            output[:1] *= 1.0625
        return result

    BidispatchImpl.forward = forward
    return seen


def main(to: Path) -> None:
    global planted
    sys.modules.setdefault(__name__, sys.modules["__main__"])
    torch.set_num_threads(1)
    library = cpu_kernels.define()
    register_loader()
    model = Path(tempfile.mkdtemp())
    (model / "config.json").write_text(json.dumps(CONFIG | OPTIONS.get("model", {})))
    spec = {
        "model": str(model),
        "load_format": LOAD_FORMAT,
        "tp": 1,
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "values": "raw_logprobs",
        "engine": {"enforce_eager": True, "async_scheduling": False, **OPTIONS.get("engine", {})},
        "prompts": 8,
        "longest": 150,
        "new_tokens": 8,
        "seed": 0,
        **OPTIONS.get("check", {}),
    }
    attention = {}
    if OURS:
        serve_layers()
        attention = watch_attention()
    engine = check_engine.start(check_child.engine_arguments(spec))
    kernels = check_child.require_arm(engine, "ours" if OURS else "stock")
    results = {"kernels": kernels, "clean": check_child.check_served(engine, spec)}
    results["attention"], results["drafted"] = dict(attention), list(cpu_kernels.drafted)
    if OPTIONS.get("prices"):
        sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
        from vllm_prices import Prices

        faults = []
        prices = Prices(engine, repeats=2, steps=8)
        cases = [(1, 40), (4, 30), (9, 20)]  # more than may run at once
        results["prices"] = [vars(price) for case in cases for price in prices.attempt(*case, faults)]
        results["faults"] = faults
    engine.steps = Steps()
    planted = True
    results["planted"] = check_child.check_served(engine, spec)
    to.write_text(json.dumps(results))
    del library


if __name__ == "__main__":
    main(Path(sys.argv[1]))
