"""Weights: random ones repeat, a safetensors folder round-trips, and what does not fit is listed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from bidispatch.demo import memory
from bidispatch.demo import weights as weights_module
from bidispatch.demo.config import ModelConfig
from bidispatch.demo.weights import has_safetensors, load, merge, random, tensor_shapes
from bidispatch.errors import DeviceError, UsageError

safetensors_torch = pytest.importorskip("safetensors.torch")

TINY = ModelConfig(
    model_type="qwen3",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=64,
    max_position_embeddings=128,
)
BIASED = replace(TINY, model_type="llama", attention_bias=True, mlp_bias=True)


def draw(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensor_shapes(config).items()}


def save(folder, tensors, shards: int = 1) -> None:
    names = sorted(tensors)
    if shards == 1:
        safetensors_torch.save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors_torch.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def flat(weights) -> list[torch.Tensor]:
    layers = [getattr(layer, name) for layer in weights.layers for name in layer.__dataclass_fields__]
    return [t for t in (weights.embedding, *layers, weights.norm, weights.lm_head) if t is not None]


def assert_same_bits(left, right) -> None:
    assert len(flat(left)) == len(flat(right))
    for a, b in zip(flat(left), flat(right), strict=True):
        assert a.dtype == b.dtype
        as_int = torch.int32 if a.dtype is torch.float32 else torch.int16
        assert torch.equal(a.view(as_int), b.view(as_int))


def test_a_seed_means_the_same_weights():
    assert_same_bits(random(TINY, dtype="float32", seed=1), random(TINY, dtype="float32", seed=1))
    with pytest.raises(AssertionError):
        assert_same_bits(random(TINY, dtype="float32", seed=1), random(TINY, dtype="float32", seed=2))


def test_another_dtype_rounds_the_same_draw():
    wide, narrow = random(TINY, dtype="float32"), random(TINY, dtype="bfloat16")
    assert narrow.dtype == "bfloat16"
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(flat(wide), flat(narrow), strict=True))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [TINY, BIASED, replace(TINY, tie_word_embeddings=True)])
def test_safetensors_round_trip(tmp_path, config, shards):
    tensors = draw(config)
    save(tmp_path, tensors, shards)
    assert has_safetensors(tmp_path)
    assert_same_bits(load(tmp_path, config, dtype="float32"), merge(config, tensors.__getitem__, ""))


def test_a_tied_head_is_the_embedding(tmp_path):
    config = replace(TINY, tie_word_embeddings=True)
    tensors = draw(config)
    save(tmp_path, tensors | {"lm_head.weight": torch.ones(64, 32)})  # some exports keep a copy nobody reads
    loaded = load(tmp_path, config, dtype="float32")
    assert loaded.lm_head is loaded.embedding
    assert torch.equal(loaded.embedding, tensors["model.embed_tokens.weight"])


def test_the_dtype_is_converted(tmp_path):
    save(tmp_path, draw(TINY, torch.bfloat16))
    loaded = load(tmp_path, TINY, dtype="float32")
    assert loaded.dtype == "float32"
    assert torch.equal(loaded.norm, draw(TINY, torch.bfloat16)["model.norm.weight"].float())


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = draw(TINY)
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.norm.weight"] = torch.ones(33)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save(tmp_path, tensors)
    with pytest.raises(UsageError) as caught:
        load(tmp_path, TINY, dtype="float32")
    message = str(caught.value)
    assert "missing model.layers.1.self_attn.q_norm.weight [8]" in message
    assert "model.norm.weight is [33], the config needs [32]" in message
    assert "extra model.layers.0.self_attn.q_proj.bias [32]" in message
    assert "inv_freq" not in message
    assert message.count("\n") == 3


def test_a_broken_file_is_named(tmp_path):
    save(tmp_path, draw(TINY))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be read"):
        load(tmp_path, TINY, dtype="float32")


def test_an_index_without_its_shards_or_without_a_map_is_named(tmp_path):
    save(tmp_path, draw(TINY), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="names files that are not there: model-00002-of-00002"):
        load(tmp_path, TINY, dtype="float32")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="is no safetensors index"):
        load(tmp_path, TINY, dtype="float32")


def test_a_folder_without_weights_is_seen(tmp_path):
    assert not has_safetensors(tmp_path)
    with pytest.raises(UsageError, match=r"holds no \*\.safetensors"):
        load(tmp_path, TINY, dtype="float32")


def test_a_missing_safetensors_package_says_what_to_install(tmp_path, monkeypatch):
    save(tmp_path, draw(TINY))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(DeviceError, match="pip install safetensors"):
        load(tmp_path, TINY, dtype="float32")


def test_a_model_s_tensors_are_asked_for_once_each(monkeypatch):
    asked = []
    tensors = draw(BIASED)
    merge(BIASED, lambda name: asked.append(name) or tensors[name], "")
    assert sorted(asked) == sorted(weights_module.tensor_shapes(BIASED))


def test_random_weights_need_the_room_of_all_and_of_the_biggest_as_it_is_drawn(monkeypatch):
    shapes = [torch.Size(shape).numel() for shape in tensor_shapes(TINY).values()]
    needed = 2 * sum(shapes) + 4 * max(shapes)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    assert random(TINY, dtype="bfloat16").dtype == "bfloat16"
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UsageError, match="2 layers of random weights in bfloat16 needs"):
        random(TINY, dtype="bfloat16")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # the system does not say
    random(TINY, dtype="bfloat16")


def test_free_memory_is_what_machine_and_container_leave(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemAvailable:   1000 kB\n")
    assert memory.free_bytes("cpu", root=tmp_path) == 1000 * 1024
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.current").write_text("5000\n")
    (folder / "memory.stat").write_text("anon 7\ninactive_file 300\n")
    for limit, free in (("max", 1000 * 1024), ("9000", 4300), ("100", 0)):
        (folder / "memory.max").write_text(f"{limit}\n")
        assert memory.free_bytes("cpu", root=tmp_path) == free
    assert memory.free_bytes("cpu") > 2**20
