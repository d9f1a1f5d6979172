"""A whole vLLM engine on the processor, checked: `cpu_engine.py RESULT [--async] [--ours]`, in a process of its own.

vLLM's wheel for CUDA has its CPU platform, scheduler and model runner, but none of its CPU kernels: those that a Qwen3
needs are written here in torch, and attention is a loop over requests.
"""

# ruff: noqa: E402 - vLLM's platform is put in place before what looks at it is imported
from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

OURS = "--ours" in sys.argv
os.environ["VLLM_BATCH_INVARIANT"] = str(int(OURS))
os.environ.pop("BIDISPATCH_VLLM", None)
os.environ.update(
    VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_USE_V2_MODEL_RUNNER="0"
)

import torch
import torch.nn.functional as F
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform


class Platform(CpuPlatform):
    """vLLM's, with attention from here and no kernels to import."""

    @classmethod
    def get_attn_backend_cls(cls, *args, **named):
        return f"{__name__}.Backend"

    @classmethod
    def import_kernels(cls):
        pass


vllm.platforms._current_platform = vllm.platforms.current_platform = Platform()

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


def silu_and_mul(out, x):
    half = x.shape[-1] // 2
    out.copy_(F.silu(x[..., :half].float()).to(x.dtype) * x[..., half:])


def rotary_embedding(positions, query, key, head_size, cache, is_neox, *rest):
    cos, sin = (part[:, None] for part in cache[positions].float().chunk(2, -1))
    for tensor in (query, key):
        first, second = tensor.view(tensor.shape[0], -1, head_size).float().chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        tensor.copy_(turned.view(tensor.shape).to(tensor.dtype))


def rms_norm(out, x, weight, eps):
    wide = x.float()
    out.copy_((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight)


def fused_add_rms_norm(x, residual, weight, eps):
    residual.add_(x)
    rms_norm(x, residual, weight, eps)


def slot_mapping(starts, positions, pages, slots, page):
    bounds = starts.tolist()
    for request, (start, end) in enumerate(itertools.pairwise(bounds)):
        where = positions[start:end]
        slots[start:end] = pages[request][where // page].long() * page + where % page
    slots[bounds[-1] :] = -1


KERNELS = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "init_cpu_threads_env(str ids) -> str": lambda ids: "none",
    "silu_and_mul(Tensor(a!) out, Tensor x) -> ()": silu_and_mul,
    "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, Tensor cache, bool is_neox, "
    "int a=0, bool b=False) -> ()": rotary_embedding,
    "rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()": rms_norm,
    "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()": fused_add_rms_norm,
    "compute_slot_mapping_kernel_impl(Tensor start, Tensor position, Tensor pages, Tensor(a!) slots, int page) -> ()": (
        slot_mapping
    ),
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(-1),
}


def serve_layers() -> None:
    """Linear layers and norms by bidispatch: its plugin, but for the platform it asks for and attention, and without
    what vLLM's own mode sets, which is CUDA's.
    """
    from vllm.v1.worker import gpu_worker

    from bidispatch.integrations.vllm import backends, plugin

    vars(plugin)["_require_platform"] = lambda: None
    backends.install = lambda platform, uncovered: lambda: None
    name = "init_batch_invariance"
    for path in ("vllm.model_executor.determinism.batch_invariant", "vllm.model_executor.layers.batch_invariant"):
        if path in sys.modules:
            setattr(sys.modules[path], name, lambda *args: None)
    if hasattr(gpu_worker, name):
        setattr(gpu_worker, name, lambda *args: None)
    plugin.register()


def main(to: Path) -> None:
    global planted
    sys.modules.setdefault(__name__, sys.modules["__main__"])
    torch.set_num_threads(1)
    library = torch.library.Library("_C", "FRAGMENT")
    for signature, kernel in KERNELS.items():
        library.define(signature)
        library.impl(signature.partition("(")[0], kernel, "CompositeExplicitAutograd")
    register_loader()
    model = Path(tempfile.mkdtemp())
    (model / "config.json").write_text(json.dumps(CONFIG))
    spec = {
        "model": str(model),
        "load_format": LOAD_FORMAT,
        "tp": 1,
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "values": "raw_logprobs",
        "engine": {"enforce_eager": True, "async_scheduling": "--async" in sys.argv},
        "prompts": 8,
        "longest": 150,
        "new_tokens": 8,
        "seed": 0,
    }
    if OURS:
        serve_layers()
    engine = check_engine.start(check_child.engine_arguments(spec))
    kernels = check_child.require_arm(engine, "ours" if OURS else "stock")
    results = {"kernels": kernels, "clean": check_child.check_served(engine, spec)}
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
