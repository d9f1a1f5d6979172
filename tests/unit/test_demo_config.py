"""Reading a Hugging Face config.json: what is understood, and what is refused with which words."""

from __future__ import annotations

import json

import pytest

from bidispatch.demo.config import CPU_MODEL, GPU_MODEL, Llama3Rope, ModelConfig
from bidispatch.demo.problems import decoder_problems
from bidispatch.errors import UsageError

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def test_qwen3_as_published_is_read():
    config = ModelConfig.parse(QWEN3)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (8, 128, 1e6)
    assert config.qk_norm
    assert config.tie_word_embeddings
    assert config.rope_scaling is None
    assert [config.window(layer) for layer in (0, 27)] == [0, 0]


def test_llama_takes_its_head_dim_from_its_hidden_size_and_its_scaling_from_rope_scaling():
    config = ModelConfig.parse(LLAMA)
    assert config.head_dim == 128
    assert not config.qk_norm
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)


def test_rope_parameters_replace_theta_and_scaling():
    raw = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    config = ModelConfig.parse(raw | {"rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": 1234.0}})
    assert config.rope_theta == 1234.0
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 26}, [0] * 26 + [64] * 2),
        (
            {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 28},
            [64] * 28,
        ),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}, [0] * 28),
    ],
)
def test_qwen3_slides_where_its_config_says(change, windows):
    config = ModelConfig.parse(QWEN3 | change)
    assert [config.window(layer) for layer in range(28)] == windows
    attention = {
        problem["window"] for problem in decoder_problems(config, "bf16", 16).values() if problem.op == "attention"
    }
    assert attention == set(windows)


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (
            QWEN3,
            {"model_type": "qwen3_moe"},
            "model_type is 'qwen3_moe'; this demo runs dense models of type qwen3 or llama",
        ),
        (QWEN3, {"model_type": None}, "model_type is None"),
        (QWEN3, {"hidden_size": None}, "hidden_size is missing"),
        (QWEN3, {"hidden_size": "2048"}, "hidden_size is '2048', it must be a whole number"),
        (QWEN3, {"hidden_size": True}, "hidden_size is True"),
        (QWEN3, {"vocab_size": 0}, "vocab_size is 0"),
        (QWEN3, {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        (QWEN3, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, it must be true or false"),
        (QWEN3, {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, 3"),
        (QWEN3, {"head_dim": 127}, "head_dim is 127, rotary embedding needs it even"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act is 'gelu', this demo runs silu"),
        (QWEN3, {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": -1}, "sliding_window is -1"),
        (
            QWEN3,
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            "layer_types must name full_attention or sliding_attention for each of 28 layers",
        ),
        (LLAMA, {"sliding_window": 4096}, "sliding_window is set, Llama has none"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn', this demo runs default and llama3",
        ),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        (LLAMA, {"rope_scaling": [1]}, "rope_scaling is [1], it must be an object"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_the_key_at_fault(base, change, said):
    with pytest.raises(UsageError) as caught:
        ModelConfig.parse(base | change, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert said in str(caught.value)


def test_every_fault_is_in_one_message():
    with pytest.raises(UsageError) as caught:
        ModelConfig.parse({"model_type": "llama", "hidden_act": "relu", "vocab_size": -5})
    for word in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "hidden_act",
    ):
        assert word in str(caught.value)


def test_a_file_is_read_like_its_content(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert ModelConfig.read(tmp_path) == ModelConfig.parse(QWEN3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; --model takes a Hugging Face folder"),
        (b'{"model_type": "qwen3",', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object, it holds a list"),
    ],
)
def test_a_file_that_is_missing_or_broken_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        ModelConfig.read(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert said in str(caught.value)


def test_a_config_that_is_a_folder_cannot_be_read(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UsageError, match=r"config\.json cannot be read: "):
        ModelConfig.read(tmp_path)


def test_a_config_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_text", refuse)
    with pytest.raises(UsageError, match=r"config\.json cannot be read: Permission denied"):
        ModelConfig.read(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    with pytest.raises(UsageError, match="--model takes a Hugging Face folder"):
        ModelConfig.read(tmp_path / "config.json")


@pytest.mark.parametrize(("config", "dtype"), [(CPU_MODEL, "fp32"), (GPU_MODEL, "bf16")])
def test_the_built_in_models_ask_for_fp32_logits_and_log_probabilities(config, dtype):
    problems = decoder_problems(config, dtype, 16)
    assert problems["lm_head"]["out_dtype"] == "float32"
    assert problems["log_softmax"].dtype == "float32"
    assert problems["attention"]["num_kv_heads"] < problems["attention"]["num_heads"]
