"""What tests of flash_attn.* share: the stand-in's libraries as if installed, kernels bound to them, and batches."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from interpreted import CPU, scalars

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import fake_flash_attn as fake

from bidispatch.ops.reference.attention import paged_batch
from bidispatch.ops.reference.mla import latent_batch
from bidispatch.registry import Registry
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import BindContext, Limits
from bidispatch_backends.flash_attn import register
from bidispatch_backends.flash_attn.heads import heads_of

REGISTRY = Registry()
register(REGISTRY)
LIMITS = Limits(64, 8, 1024)
PARAMS = {
    "fa2_splits": {"num_splits": 3},
    "fa2_capacity_splits": {"num_splits": 4, "kv_capacity": 1024},
    "fa3_mla_splits": {"split_size": 128, "num_splits": 4},
    **{name: {"split_size": 256} for name in ("fa2_kv_split", "fa3_kv_split")},
}
BATCHES = {"attention": paged_batch, "attention.mla": latent_batch}


def install(monkeypatch, folder):
    """Both libraries, as if they were installed; vLLM's in a folder."""
    fake.register()
    (folder / "vllm_flash_attn").mkdir()
    for name in ("_vllm_fa2_C", "_vllm_fa3_C"):
        (folder / "vllm_flash_attn" / f"{name}.abi3.so").touch()
    places = {
        "vllm": SimpleNamespace(submodule_search_locations=[str(folder)]),
        "flash_attn_2_cuda": SimpleNamespace(origin=__file__),
    }
    versions = {"vllm": "0.25.1", "flash-attn": "2.8.3"}
    monkeypatch.setattr("importlib.util.find_spec", places.get)
    monkeypatch.setattr("bidispatch.requirements.installed_version", versions.get)
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", fake.package())
    fake.calls.clear()


def launch_of(name, problem, limits=LIMITS, tile=None, **params):
    """The bound kernel, which takes the scalars and the output too. tile: sizes to change."""
    found = REGISTRY.get(f"flash_attn.{name}")
    chosen = found.params(**{**PARAMS.get(name, {}), **params})
    shape = tile
    if found.tile:
        ((_, default),) = found.tiles(CPU, problem, chosen)
        shape = default.model_copy(update=tile or {})
    return load_attribute(found.load)(BindContext(CPU, problem, chosen, shape, limits))


def bind(name, problem, limits=LIMITS, tile=None, **params):
    """Arguments to a result of 7 where nobody wrote."""
    kernel = launch_of(name, problem, limits, tile, **params)

    def run(arguments):
        q = arguments[0]
        out = torch.full((*q.shape[:2], heads_of(problem).value_dim), 7.0, dtype=q.dtype)
        kernel(*arguments, *scalars(problem), out)
        return out

    return run


def batch(problem, pieces, seed=0, **options):
    """(query rows, KV length, sequence seed) each."""
    queries, lengths, seeds = zip(*pieces, strict=True)
    return BATCHES[problem.op](problem, queries, lengths, sequence_seeds=seeds, page_seed=seed, **options)


def rows_of(out, pieces):
    """The rows of each sequence."""
    return torch.split(out[: sum(piece[0] for piece in pieces)], [piece[0] for piece in pieces])
