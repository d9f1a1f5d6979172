"""The shapes of models beyond those in `test_tune`: experts, no latent queries, few key heads; broken configs."""

from __future__ import annotations

import json

import pytest

from bidispatch.errors import UsageError
from bidispatch.tune.models import model_shapes

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "vocab_size": 32000,
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
}


QWEN2_57B_A14B = {
    "model_type": "qwen2_moe",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
    "num_experts": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}


@pytest.fixture
def shapes(tmp_path):
    """The (n, k) of a config's products, by what the name says of the layer."""

    def read(config, ranks=1):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = {}
        for shape in model_shapes(tmp_path / "config.json", ranks):
            for name in shape.names:
                found[name.partition(" ")[2]] = (shape.dims["n"], shape.dims["k"])
        return found

    return read


def test_experts_leave_attention_the_router_and_the_vocabulary(shapes):
    assert shapes(QWEN3_30B_A3B) == {
        "qkv": (5120, 2048),
        "o": (2048, 4096),
        "router": (128, 2048),
        "lm_head": (151936, 2048),
    }
    assert set(shapes(MIXTRAL)) == {"qkv", "o", "router", "lm_head"}


def test_a_shared_expert_of_a_size_of_its_own_is_divided_and_its_gate_is_not(shapes):
    assert shapes(QWEN2_57B_A14B, 4) == {
        "qkv": ((7 + 2) * 128, 3584),
        "o": (3584, 7 * 128),
        "router": (64, 3584),
        "shared_gate_up": (2 * 5120, 3584),
        "shared_down": (3584, 5120),
        "shared_expert_gate": (1, 3584),
        "lm_head": (37984, 3584),
    }
    assert "shared_down" not in shapes({**QWEN2_57B_A14B, "shared_expert_intermediate_size": 0})
    with pytest.raises(UsageError, match="shared_intermediate size=20480 is not divided"):
        shapes({**QWEN2_57B_A14B, "num_attention_heads": 28, "num_key_value_heads": 7}, 7)


def test_a_model_whose_every_second_layer_has_experts_has_dense_ones(shapes):
    assert shapes({**QWEN2_57B_A14B, "decoder_sparse_step": 2})["gate_up"] == (37888, 3584)


def test_without_latent_queries_q_and_the_latent_are_two_weights(shapes):
    assert shapes(DEEPSEEK_V2_LITE) == {
        "q": (3072, 2048),
        "kv_a": (576, 2048),
        "kv_b": (4096, 512),
        "o": (2048, 2048),
        "router": (64, 2048),
        "shared_gate_up": (5632, 2048),
        "shared_down": (2048, 2816),
        "gate_up": (21888, 2048),
        "down": (2048, 10944),
        "lm_head": (102400, 2048),
    }


def test_ranks_divide_columns_of_some_and_rows_of_others_and_copy_few_key_heads(shapes):
    found = shapes(QWEN3_30B_A3B, 8)
    assert found["qkv"] == ((4 + 2) * 128, 2048)  # half a key head each: a copy of one
    assert found["o"] == (2048, 512)
    assert found["router"] == (128, 2048)  # every rank routes
    assert found["lm_head"] == (18992, 2048)


def test_a_vocabulary_is_padded_before_it_is_divided(shapes):
    assert shapes({**MIXTRAL, "vocab_size": 32001}, 2)["lm_head"] == (16032, 4096)


def test_a_model_with_more_than_text_is_read_inside(shapes):
    assert shapes({"model_type": "x", "text_config": MIXTRAL}) == shapes(MIXTRAL)


@pytest.mark.parametrize(
    ("changes", "ranks", "says"),
    [
        ({"num_key_value_heads": 3}, 4, "num_key_value_heads=3 does not divide"),
        ({"num_local_experts": "many"}, 1, "num_local_experts is 'many'"),
        ({"vocab_size": None}, 1, "vocab_size is missing"),
        ({"text_config": "none", "hidden_size": True}, 1, "hidden_size is True"),
    ],
)
def test_what_cannot_be_is_said(shapes, changes, ranks, says):
    with pytest.raises(UsageError, match=says):
        shapes({**MIXTRAL, **changes}, ranks)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_is_no_config_is_said(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        model_shapes(tmp_path)
