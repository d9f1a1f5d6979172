"""vLLM's attention through the plan: batches as vLLM pages them, on the processor, against the op called directly.

With vLLM installed these run against its own classes, else against stand-ins of the same signatures.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from unpacked_vllm import unpacked

import bidispatch
from bidispatch.device import ARCHS, Device
from bidispatch.errors import ArgumentError, BackendError, SelectionError, UsageError
from bidispatch.integrations.vllm import compat
from bidispatch.integrations.vllm import kernels as kernels_module
from bidispatch.integrations.vllm.backends import _PARAMETERS, choose, install
from bidispatch.integrations.vllm.cache import heads_of
from bidispatch.integrations.vllm.kernels import select, serving_plan
from bidispatch.integrations.vllm.limits import StepLimits, need_covered
from bidispatch.integrations.vllm.problems import attention_problem, latent_problem
from bidispatch.registry import Registry
from bidispatch_backends import cublaslt, deep_gemm, flash_attn, flash_mla, flashinfer, torch_cpu, triton
from bidispatch_backends.flash_attn import discovery

PAGE, HEADS, KV_HEADS, WIDTH, MODEL_LEN = 16, 4, 2, 32, 96
RANK, ROPE = 32, 16
FOUND = importlib.util.find_spec("vllm")
REAL = FOUND is not None
SOURCES = list(unpacked().values())
"""Folders `vllm`: the installed one's and those of unpacked wheels."""
if FOUND is not None and FOUND.origin:
    SOURCES.insert(0, Path(FOUND.origin).parent)


@pytest.fixture(scope="module")
def served():
    """The modules that subclass vLLM's, imported with vLLM or its stand-in; taken away again with the latter."""
    names = [] if REAL else fake_vllm.install()
    from bidispatch.integrations.vllm import attention, metadata, mla

    yield SimpleNamespace(attention=attention, mla=mla, metadata=metadata)
    if names:
        ours = [f"bidispatch.integrations.vllm.{name}" for name in ("attention", "mla", "metadata")]
        for name in [*names, *ours]:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def fresh_plans():
    serving_plan.cache_clear()
    yield
    serving_plan.cache_clear()


def config_of(**changes):
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=128, max_num_seqs=8),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8, static_forward_context={}),
        speculative_config=None,
        model_config=SimpleNamespace(max_model_len=MODEL_LEN),
        parallel_config=SimpleNamespace(),
        cache_config=SimpleNamespace(block_size=PAGE),
        attention_config=SimpleNamespace(),
        device_config=SimpleNamespace(device="cpu"),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def config(served, monkeypatch):
    """A server's configuration, current while layers are built."""
    config = config_of()
    for module in (served.attention, served.mla):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield config
    torch.set_default_dtype(before)


def layer_of(config, impl, *, scale=1.0):
    layer = SimpleNamespace(
        impl=impl,
        _k_scale=torch.tensor(scale, dtype=torch.float32),
        _v_scale=torch.tensor(2 * scale, dtype=torch.float32),
    )
    config.compilation_config.static_forward_context["layer"] = layer
    return layer


def attention_layer(served, config, **changes):
    scale = changes.pop("kv_scale", 1.0)
    named = {"num_kv_heads": KV_HEADS, **changes}
    impl = served.attention.BidispatchImpl(HEADS, WIDTH, WIDTH**-0.5, **named)
    return layer_of(config, impl, scale=scale)


def builder_of(cls, config, page_size=PAGE):
    return cls(SimpleNamespace(block_size=page_size), ["layer"], config, torch.device("cpu"))


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)


class Server:
    """Pages, slots and starts as vLLM makes them: sequences of tokens whose keys are known, in steps."""

    def __init__(self, layer, builder, *, layout="0.33", dtype=torch.bfloat16, page_size=PAGE):
        self.layer, self.builder, self.page_size = layer, builder, page_size
        pages = 40
        if layout == "0.33":  # logical [pages, heads, positions, 2 d], stored with positions before heads
            cache = torch.zeros(pages, page_size, KV_HEADS, 2 * WIDTH, dtype=dtype).transpose(1, 2)
        elif layout == "0.33 by heads":
            cache = torch.zeros(pages, KV_HEADS, page_size, 2 * WIDTH, dtype=dtype)
        else:
            cache = torch.zeros(pages, 2, page_size, KV_HEADS, WIDTH, dtype=dtype)
        self.cache = cache
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(3)).tolist()
        self.tables: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def batch(self, step: dict[int, int], padding: int = 0):
        """The metadata of a step: sequence number to count of new tokens; padding rows and requests at the end."""
        lens, slots, starts = [], [], [0]
        for seq, count in step.items():
            first = self.done.get(seq, 0)
            table = self.tables.setdefault(seq, [])
            while len(table) * self.page_size < first + count:
                table.append(self.free.pop())
            slots += [
                table[p // self.page_size] * self.page_size + p % self.page_size for p in range(first, first + count)
            ]
            self.done[seq] = first + count
            lens.append(first + count)
            starts.append(starts[-1] + count)
        width = -(-MODEL_LEN // self.page_size)
        tables = torch.zeros(len(step) + padding, width, dtype=torch.int32)
        for row, seq in enumerate(step):
            tables[row, : len(self.tables[seq])] = torch.tensor(self.tables[seq], dtype=torch.int32)
        return SimpleNamespace(
            query_start_loc=torch.tensor(starts + [starts[-1]] * padding, dtype=torch.int32),
            seq_lens=torch.tensor(lens + [0] * padding, dtype=torch.int32),
            num_reqs=len(step) + padding,
            num_actual_tokens=starts[-1] + padding,
            max_query_len=max(step.values()),
            max_seq_len=max(lens),
            block_table_tensor=tables,
            slot_mapping=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
            causal=True,
        )

    def run(self, step: dict[int, int], padding: int = 0) -> dict[int, torch.Tensor]:
        """One step through cache update and forward; each sequence's new rows."""
        before = dict(self.done)
        common = self.batch(step, padding)
        metadata = self.builder.build(0, common)
        q, k, v = (
            torch.cat(
                [
                    *(
                        tokens(name, seq)[before.get(seq, 0) : before.get(seq, 0) + count]
                        for seq, count in step.items()
                    ),
                    drawn(padding, heads, WIDTH, seed=9),
                ]
            )
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        out = torch.full_like(q, float("nan"))
        impl = self.layer.impl
        impl.do_kv_cache_update(self.layer, k, v, self.cache, common.slot_mapping)
        impl.forward(self.layer, q, k, v, self.cache, metadata, out)
        assert out[common.query_start_loc[-1] :].isnan().all()
        starts = common.query_start_loc.tolist()
        return {seq: out[starts[row] : starts[row + 1]] for row, seq in enumerate(step)}


def tokens(name, seq):
    heads = HEADS if name == "q" else KV_HEADS
    return drawn(MODEL_LEN, heads, WIDTH, seed=100 * seq + "qkv".index(name))


def served_rows(served, config, steps, *, layout="0.33", padding=0, page_size=PAGE, **layer):
    cache_dtype = torch.uint8 if str(layer.get("kv_cache_dtype", "auto")).startswith("fp8") else torch.bfloat16
    built = attention_layer(served, config, **layer)
    server = Server(
        built,
        builder_of(served.metadata.StepMetadataBuilder, config, page_size),
        layout=layout,
        dtype=cache_dtype,
        page_size=page_size,
    )
    rows: dict[int, list[torch.Tensor]] = {}
    for step in steps:
        for seq, part in server.run(step, padding).items():
            rows.setdefault(seq, []).append(part)
    return {seq: torch.cat(parts) for seq, parts in rows.items()}


def direct(seq, length, *, kv_scale=1.0, sinks=None, alibi=None, page_size=PAGE, **dims):
    """The op called on a sequence alone, contiguous pages, in one prefill."""
    fp8 = dims.pop("kv_cache_dtype", "auto") != "auto"
    k, v = tokens("k", seq), tokens("v", seq)
    if fp8:
        k = (k.float() / kv_scale).to(torch.float8_e4m3fn)
        v = (v.float() / (2 * kv_scale)).to(torch.float8_e4m3fn)
        dims["kv_dtype"] = "float8_e4m3fn"
    pages = MODEL_LEN // page_size
    kernel = (
        bidispatch.plan("cpu", require="sequence")
        .select(
            "attention",
            dtype="bfloat16",
            head_dim=WIDTH,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            page_size=page_size,
            sinks=sinks is not None,
            alibi=alibi is not None,
            **dims,
        )
        .bind(max_tokens=MODEL_LEN, max_seqs=1, max_seq_len=MODEL_LEN)
    )
    of_heads = None if not fp8 else torch.full((KV_HEADS,), kv_scale, dtype=torch.float32)
    return kernel(
        tokens("q", seq)[:length].contiguous(),
        k.view(pages, page_size, KV_HEADS, WIDTH),
        v.view(pages, page_size, KV_HEADS, WIDTH),
        torch.arange(pages, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
        torch.tensor([0, length], dtype=torch.int32),
        sinks,
        alibi,
        of_heads,
        None if of_heads is None else 2 * of_heads,
    )


STEPS = {
    "a prefill": [{1: 60}],
    "prefill, then decode": [{1: 57}, {1: 1}, {1: 1}, {1: 1}],
    "chunks": [{1: 7}, {1: 30}, {1: 16}, {1: 7}],
    "mixed with others": [{2: 30}, {2: 1, 1: 20, 3: 9}, {3: 1, 2: 1, 1: 39}, {1: 1, 2: 1, 3: 1}],
}


@pytest.mark.parametrize("layout", ["0.33", "0.33 by heads", "0.25"])
@pytest.mark.parametrize("steps", STEPS)
def test_steps_have_the_bits_of_the_op_called_directly(served, config, steps, layout):
    got = served_rows(served, config, STEPS[steps], layout=layout)
    for seq, rows in got.items():
        assert torch.equal(rows, direct(seq, len(rows)))


def test_rows_and_requests_that_pad_a_graph_change_nothing(served, config):
    got = served_rows(served, config, STEPS["mixed with others"], padding=2)
    for seq, rows in got.items():
        assert torch.equal(rows, direct(seq, len(rows)))


SINKS = drawn(HEADS, seed=5)
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize(
    ("layer", "dims"),
    [
        ({"sliding_window": 8}, {"window": 8}),
        ({"logits_soft_cap": 5.0}, {"softcap": 5.0}),
        ({"sinks": SINKS}, {"sinks": SINKS.float()}),
        ({"alibi_slopes": SLOPES}, {"alibi": torch.tensor(SLOPES, dtype=torch.float32)}),
        ({"kv_cache_dtype": "fp8", "kv_scale": 0.5}, {"kv_cache_dtype": "fp8", "kv_scale": 0.5}),
    ],
    ids=["window", "soft cap", "sinks", "ALiBi", "fp8 cache"],
)
def test_what_a_layer_has_reaches_the_op(served, config, layer, dims):
    plain = served_rows(served, config, STEPS["mixed with others"])
    got = served_rows(served, config, STEPS["mixed with others"], **layer)
    for seq, rows in got.items():
        assert torch.equal(rows, direct(seq, len(rows), **dims))
        assert not torch.equal(rows, plain[seq])  # control: the layer's own is what made them equal


def test_controls_a_wrong_slot_and_a_wrong_length_are_seen(served, config):
    layer = attention_layer(served, config)
    for broken in ("slot", "length"):
        server = Server(layer, builder_of(served.metadata.StepMetadataBuilder, config))
        make = server.batch

        def wrong(step, padding=0, make=make, broken=broken):
            common = make(step, padding)
            if broken == "slot":
                common.slot_mapping[3] = common.slot_mapping[4]
            else:
                common.seq_lens -= 1
            return common

        server.batch = wrong
        assert not torch.equal(server.run({1: 20})[1], direct(1, 20))


def test_a_cache_of_another_page_size_is_bound_for_anew(served, config):
    got = served_rows(served, config, STEPS["chunks"], page_size=8)
    assert torch.equal(got[1], direct(1, 60, page_size=8))


def test_equal_layers_share_their_kernels_and_others_do_not(served, config):
    one, two = attention_layer(served, config).impl, attention_layer(served, config).impl
    other = attention_layer(served, config, sliding_window=8).impl
    assert one.kernels.of(True) is two.kernels.of(True) is not one.kernels.of(False)
    assert one.kernels.of(True) is not other.kernels.of(True)
    assert one.kernels.of(True).limits.max_query_len == 1
    assert one.kernels.of(False).limits.max_query_len == 128


def test_the_step_chooses_the_kernel_on_the_host(served, config):
    config.speculative_config = SimpleNamespace(num_speculative_tokens=3)
    builder = builder_of(served.metadata.StepMetadataBuilder, config, PAGE) if attention_layer(served, config) else None
    layer = config.compilation_config.static_forward_context["layer"]
    for queries, decode in ((1, True), (4, True), (5, False)):
        server = Server(layer, builder)
        assert builder.build(0, server.batch({1: queries})).decode_step is decode
    assert layer.impl.kernels.of(True).limits.max_query_len == 4
    assert layer.impl.kernels.of(True).limits.max_seq_len == MODEL_LEN + 3


def test_memory_is_measured_with_zeros_and_fused_output_is_refused(served, config):
    layer = attention_layer(served, config)
    q, out = drawn(3, HEADS, WIDTH), drawn(3, HEADS, WIDTH)
    assert layer.impl.forward(layer, q, q, q, torch.empty(0), None, out).eq(0).all()
    with pytest.raises(ArgumentError, match="quantised output"):
        layer.impl.forward(layer, q, q, q, torch.empty(0), None, out, output_scale=torch.ones(1))


def test_a_captured_step_has_lengths_of_its_queries(served, config):
    layer = attention_layer(served, config)
    builder = builder_of(served.metadata.StepMetadataBuilder, config)
    common = Server(layer, builder).batch({1: 3, 2: 3})
    common.seq_lens.fill_(90)
    assert builder.build_for_cudagraph_capture(common).seq_lens.tolist() == [3, 3]


@pytest.mark.parametrize("apart", [True, False])
def test_a_graph_for_steps_of_any_kind_holds_the_kernel_for_all(served, config, apart):
    # cudagraph_mode=FULL: the second model runner of 0.25.1 captures one query a sequence, and replays it for prompts.
    layer = attention_layer(served, config)
    config.compilation_config.cudagraph_mode = SimpleNamespace(separate_routine=lambda: apart)
    for kind in (served.metadata.StepMetadataBuilder, served.mla.LatentMetadataBuilder):
        builder = builder_of(kind, config)
        common = Server(layer, builder).batch({1: 1, 2: 1})
        assert builder.build(0, common).decode_step
        assert builder.build_for_cudagraph_capture(common).decode_step is apart


def test_a_cache_of_an_unknown_shape_is_refused():
    with pytest.raises(ArgumentError, match="neither"):
        heads_of(torch.zeros(4, KV_HEADS, PAGE, WIDTH), WIDTH)


# -- MLA ---------------------------------------------------------------------------------------------------------------


def mla_layer(served, config, **changes):
    named = {
        "num_heads": HEADS,
        "head_size": RANK + ROPE,
        "scale": 0.1,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "q_lora_rank": None,
        "kv_lora_rank": RANK,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": ROPE,
        "qk_head_dim": 24 + ROPE,
        "v_head_dim": 24,
        "kv_b_proj": None,
        **changes,
    }
    return layer_of(config, served.mla.BidispatchMLAImpl(**named))


def mla_rows(served, config, steps):
    layer = mla_layer(served, config)
    builder = builder_of(served.mla.LatentMetadataBuilder, config)
    server = Server(layer, builder)
    cache = torch.zeros(40, PAGE, RANK + ROPE, dtype=torch.bfloat16)
    rows: dict[int, list[torch.Tensor]] = {}
    for step in steps:
        before = dict(server.done)
        common = server.batch(step)
        metadata = builder.build(0, common)
        spans = [(seq, before.get(seq, 0), before.get(seq, 0) + count) for seq, count in step.items()]
        q = torch.cat([drawn(MODEL_LEN, HEADS, RANK + ROPE, seed=50 + seq)[a:b] for seq, a, b in spans])
        kv = torch.cat([drawn(MODEL_LEN, RANK + ROPE, seed=70 + seq)[a:b] for seq, a, b in spans])
        # vLLM's layer sends num_decode_tokens rows through forward_mqa, and reads all of these.
        assert (metadata.num_decode_tokens, metadata.num_prefills) == (len(q), 0)
        assert (metadata.num_decodes, metadata.prefill) == (len(step), None)
        assert metadata.decode is not None
        layer.impl.do_kv_cache_update(
            kv[:, :RANK], kv[:, None, RANK:], cache, common.slot_mapping, "auto", layer._k_scale
        )
        out, lse = layer.impl.forward_mqa((q[..., :RANK], q[..., RANK:]), cache, metadata, layer)
        assert lse is None
        for index, seq in enumerate(step):
            rows.setdefault(seq, []).append(out[common.query_start_loc[index] : common.query_start_loc[index + 1]])
    return {seq: torch.cat(parts) for seq, parts in rows.items()}


def mla_direct(seq, length):
    kernel = (
        bidispatch.plan("cpu", require="sequence")
        .select("attention.mla", dtype="bfloat16", num_heads=HEADS, kv_lora_rank=RANK, rope_dim=ROPE, page_size=PAGE)
        .bind(max_tokens=MODEL_LEN, max_seqs=1, max_seq_len=MODEL_LEN)
    )
    pages = MODEL_LEN // PAGE
    return kernel(
        drawn(MODEL_LEN, HEADS, RANK + ROPE, seed=50 + seq)[:length],
        drawn(MODEL_LEN, RANK + ROPE, seed=70 + seq).view(pages, PAGE, RANK + ROPE),
        torch.arange(pages, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
        torch.tensor([0, length], dtype=torch.int32),
        scale=0.1,
    )


@pytest.mark.parametrize("steps", STEPS)
def test_mla_is_absorbed_in_every_phase(served, config, steps):
    for seq, rows in mla_rows(served, config, STEPS[steps]).items():
        assert torch.equal(rows, mla_direct(seq, len(rows)))
        assert not torch.equal(rows, mla_direct(seq + 1, len(rows)))  # control


def test_mla_refuses_the_projected_form_and_what_it_does_not_serve(served, config):
    with pytest.raises(SelectionError, match="bits differ"):
        mla_layer(served, config).impl.forward_mha()
    with pytest.raises(SelectionError, match="indexer"):
        mla_layer(served, config, indexer=object())
    with pytest.raises(SelectionError, match="kv-cache-dtype fp8"):
        mla_layer(served, config, kv_cache_dtype="fp8")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ({"kv_cache_dtype": "float16"}, "float16"),
        ({"use_alibi_sqrt": True}, "use_alibi_sqrt"),
        ({"chunk_lookback": 4}, "chunk_lookback"),
    ],
)
def test_layers_that_are_not_served_are_refused_when_they_are_built(served, config, layer, reason):
    with pytest.raises(SelectionError, match=reason):
        attention_layer(served, config, **layer)


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config", "use_ubatching", True, "--enable-dbo"),
        ("cache_config", "calculate_kv_scales", True, "from the first batch"),
        ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("attention_config", "use_non_causal", True, "non-causal"),
    ],
)
def test_configurations_that_break_the_promise_are_refused(part, name, value, reason):
    config = config_of()
    need_covered(config)
    setattr(getattr(config, part), name, value)
    with pytest.raises(SelectionError, match=reason):
        need_covered(config)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("causal", False, "later positions"),
        ("causal", torch.ones(1, dtype=torch.bool), "later positions"),
        ("mm_req_doc_ranges", {0: [(0, 4)]}, "prefix model"),
        ("rswa_prefix_lens", torch.ones(1), "reference sliding window"),
        ("dcp_local_seq_lens", torch.ones(1), "context parallelism"),
    ],
)
def test_batches_with_more_than_a_plain_one_are_refused(served, config, name, value, reason):
    layer = attention_layer(served, config)
    builder = builder_of(served.metadata.StepMetadataBuilder, config)
    common = Server(layer, builder).batch({1: 2})
    setattr(common, name, value)
    with pytest.raises(SelectionError, match=reason):
        builder.build(0, common)


def test_a_builder_that_vllm_derives_is_refused(served, config):
    attention_layer(served, config)
    derived = type("ChunkedLocalAttentionBuilder", (served.metadata.StepMetadataBuilder,), {"__module__": "vllm.x"})
    with pytest.raises(SelectionError, match="ChunkedLocalAttentionBuilder changes the batch"):
        builder_of(derived, config)


def test_speculative_drafts_beyond_a_decode_step_have_one_kernel():
    limits = StepLimits.of(config_of(speculative_config=SimpleNamespace(num_speculative_tokens=16)))
    assert limits.decode_query_len == 0
    assert not limits.is_decode(1, 1)
    parallel = SimpleNamespace(num_speculative_tokens=3, parallel_drafting=True)
    assert StepLimits.of(config_of(speculative_config=parallel)).decode_query_len == 7


# -- selection ---------------------------------------------------------------------------------------------------------

QWEN = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}


@pytest.mark.parametrize("arch", ["sm90", "sm100", "gfx942"])
def test_what_serves_on_a_faked_gpu(arch):
    plan = serving_plan(arch)
    assert select(plan, attention_problem("bfloat16", **QWEN)).implementations == ("triton.paged_attention",)
    oss = attention_problem("bfloat16", **{**QWEN, "head_dim": 64}, window=128, sinks=True)
    assert select(plan, oss).implementations == ("triton.paged_attention",)
    latent = latent_problem("bfloat16", num_heads=16, kv_lora_rank=512, rope_dim=64, page_size=64)
    assert select(plan, latent).implementations == ("triton.mla",)


def plan_with_libraries(arch):
    """A plan whose registry has the backends of libraries, whatever is installed."""
    registry = Registry()
    for module in (cublaslt, deep_gemm, flash_attn, flash_mla, flashinfer, torch_cpu, triton):
        module.register(registry)
    return bidispatch.plan(arch, require="sequence", registry=registry, cuda_graph=True)


def test_a_plan_below_sequence_is_refused():
    below = bidispatch.plan("sm90", require="batch")
    with pytest.raises(SelectionError, match="level sequence"):
        select(below, attention_problem("bfloat16", **QWEN))


@pytest.mark.parametrize("arch", ["sm90", "sm100", "gfx942"])
def test_named_kernels_that_are_below_the_level_are_refused_with_reasons(arch):
    plan = plan_with_libraries(arch)
    with pytest.raises(SelectionError) as refused:
        select(plan, attention_problem("bfloat16", **QWEN), ("flashinfer.paged",))
    assert "claims level batch, the plan requires sequence" in str(refused.value)
    latent = latent_problem("bfloat16", num_heads=16, kv_lora_rank=512, rope_dim=64, page_size=64)
    with pytest.raises(SelectionError, match="claims level batch"):
        select(plan, latent, ("flash_mla.decode",))


def test_a_named_backend_is_asked_in_order_and_keeps_its_pins(monkeypatch):
    plan = plan_with_libraries("sm90")
    problem = attention_problem("bfloat16", **QWEN)
    monkeypatch.setattr(discovery.Libraries, "unmet", lambda self, device, problem: None)
    monkeypatch.setattr("bidispatch.requirements.Package.unmet", lambda self, device, problem: None)
    chosen = select(plan, problem, ("flash_attn.fa3", "flash_attn.fa2"))
    assert chosen.implementations == ("flash_attn.fa3",)
    windowed = attention_problem("bfloat16", **QWEN, window=64)
    with pytest.raises(SelectionError) as refused:
        select(plan, windowed, ("flash_attn.fa3", "flash_attn.fa2"))
    assert {decision.implementation for decision in refused.value.decisions} == {"flash_attn.fa3", "flash_attn.fa2"}


def test_a_named_backend_that_is_not_installed_is_a_reason():
    with pytest.raises(SelectionError, match="no installed backend has it"):
        select(serving_plan("sm90"), attention_problem("bfloat16", **QWEN), ("another.kernel",))


def test_names_of_backends():
    assert choose(None, use_mla=False) == choose("CUSTOM", use_mla=False) != choose(None, use_mla=True)
    assert choose("FLASH_ATTN", use_mla=False).endswith("FlashAttnBackend")
    assert choose("FLASHINFER", use_mla=False).endswith("FlashInferBackend")
    assert choose("FLASHMLA", use_mla=True).endswith("FlashMLABackend")
    for name, use_mla, reason in (
        ("TRITON_ATTN", False, "KV tile"),
        ("TRITON_MLA", True, "projects keys up"),
        ("FLASH_ATTN", True, "no implementation of it for an MLA model"),
        ("FLEX_ATTENTION", False, "no implementation"),
    ):
        with pytest.raises(SelectionError, match=reason):
            choose(name, use_mla=use_mla)


# -- the seam ----------------------------------------------------------------------------------------------------------


def platform_of(kind="CUDA"):
    class Platform:
        _enum = SimpleNamespace(name=kind)

        @classmethod
        def get_device_capability(cls):
            return (9, 0)

        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            return "vllm's own"

    return Platform


def selector_config(**changes):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    wanted = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "use_batch_invariant": True}
    if "block_size" in AttentionSelectorConfig._fields:
        wanted["block_size"] = None
    return AttentionSelectorConfig(**wanted, **changes)


def test_the_seam_applies_and_undoes(served):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform = platform_of()
    before = vars(platform)["get_attn_backend_cls"]
    undo = install(platform)
    try:
        assert platform.get_attn_backend_cls(None, selector_config()).endswith("attention.BidispatchBackend")
        assert platform.get_attn_backend_cls(None, selector_config(use_mla=True)).endswith("BidispatchMLABackend")
        named = platform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, selector_config())
        assert named.endswith("FlashAttnBackend")
        assert AttentionBackendEnum.CUSTOM.get_path().endswith("BidispatchBackend")
        with pytest.raises(SelectionError, match="dtype not supported"):
            platform.get_attn_backend_cls(None, selector_config()._replace(dtype=torch.float32))
        with pytest.raises((UsageError, BackendError), match=r"already|another"):
            install(platform)
    finally:
        undo()
    assert vars(platform)["get_attn_backend_cls"] is before
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    assert platform.get_attn_backend_cls(None, selector_config()) == "vllm's own"


def test_caches_of_others_and_lengths_only_the_gpu_knows_are_not_claimed(served):
    for backend in (served.attention.BidispatchBackend, served.mla.BidispatchMLABackend):
        assert backend.supports_batch_invariance()
        assert not backend.supports_kv_connector()
        assert not backend.supports_device_cpu_query_lens_mismatch()


def test_an_fp8_cache_on_an_mi300_is_refused_by_its_layer(served, config, monkeypatch):
    plan = bidispatch.plan(Device(ARCHS["gfx942"], "AMD Instinct MI300X"), require="sequence")
    monkeypatch.setattr(served.attention, "plan_of", lambda _: plan)
    with pytest.raises(SelectionError, match="on AMD Instinct MI300X is float8_e4m3fnuz"):
        attention_layer(served, config, kv_cache_dtype="fp8")


def test_pages_are_no_smaller_than_those_of_vllms_own_backends(served):
    (size,) = served.attention.BidispatchBackend.get_supported_kernel_block_sizes()
    assert size.base == 16


def test_an_uncovered_layer_keeps_vllms_choice_only_where_somebody_is_told(served):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    told = []
    platform = platform_of()
    undo = install(platform, uncovered=lambda config, reason: told.append((config.attn_type, reason)))
    try:
        encoder = selector_config(attn_type="encoder_only")
        assert platform.get_attn_backend_cls(None, encoder) == "vllm's own"
        assert told == [("encoder_only", "attention backend CUSTOM: attention type encoder_only not supported")]
        with pytest.raises(SelectionError, match="encoder_only"):
            platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, encoder)
    finally:
        undo()


def test_a_platform_that_is_not_as_it_was_read_is_refused_unchanged(served):
    for kind in ("CPU", "XPU"):
        with pytest.raises(BackendError, match=kind):
            install(platform_of(kind))
    moved = platform_of()
    moved.get_attn_backend_cls = classmethod(lambda cls, selected_backend, config: "")
    before = vars(moved)["get_attn_backend_cls"]
    with pytest.raises(BackendError, match="takes selected_backend, config"):
        install(moved)
    gone = type("Gone", (), {"_enum": SimpleNamespace(name="CUDA")})
    with pytest.raises(BackendError, match="no class method"):
        install(gone)
    assert vars(moved)["get_attn_backend_cls"] is before


def test_methods_take_what_vllm_passes(served):
    """By `compat`, whose signatures are compared with vLLM's sources."""
    seams = {seam.name: seam for seam in compat.READ}
    for ours, name in (
        (served.attention.BidispatchImpl.forward, "attention_forward"),
        (served.mla.BidispatchMLAImpl.forward_mqa, "mla_forward"),
        (served.metadata.StepMetadataBuilder.build, "attention_build"),
        (served.metadata.StepMetadataBuilder.build_for_cudagraph_capture, "attention_capture"),
    ):
        assert list(inspect.signature(ours).parameters) == seams[name].parameters.split()
    for ours, name in (
        (served.attention.BidispatchImpl, "attention_layer"),
        (served.metadata.StepMetadataBuilder, "attention_builder"),
    ):
        taken = seams[name].parameters.split()
        assert list(inspect.signature(ours.__init__).parameters)[: len(taken)] == taken
    assert seams["attention_choice"].parameters.split() == ["cls", *_PARAMETERS]
    assert kernels_module.LEVEL == "sequence"


@pytest.mark.skipif(not REAL, reason="runs an installed vLLM's MLA layer")
def test_the_layer_of_the_installed_vllm_sends_every_row_through_the_absorbed_form(served, config):
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    layer = mla_layer(served, config)
    builder = builder_of(served.mla.LatentMetadataBuilder, config)
    common = Server(layer, builder).batch({1: 5, 2: 1})
    nope, values = 24, 24
    up, down = drawn(HEADS, nope, RANK, seed=1), drawn(HEADS, RANK, values, seed=2)

    def project(x, out):
        out.copy_(torch.bmm(x.transpose(0, 1), down).transpose(0, 1).reshape(out.shape))

    itself = SimpleNamespace(
        **vars(layer),
        num_heads=HEADS,
        v_head_dim=values,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=ROPE,
        kv_lora_rank=RANK,
        kv_cache_dtype="auto",
        prefill_backend=None,
        q_pad_num_heads=None,
        use_pcp=False,
        is_aiter_triton_fp4_bmm_enabled=False,
        is_aiter_triton_fp8_bmm_enabled=False,
        is_amx_bmm_enabled=False,
        W_UK_T=up,
        dcp_manager=None,
        _v_up_proj=project,
    )
    q, kv = drawn(6, HEADS, nope + ROPE, seed=3), drawn(6, RANK + ROPE, seed=4)
    cache = torch.zeros(40, PAGE, RANK + ROPE, dtype=torch.bfloat16)
    layer.impl.do_kv_cache_update(kv[:, :RANK], kv[:, None, RANK:], cache, common.slot_mapping, "auto", layer._k_scale)
    out = torch.full((6, HEADS * values), float("nan"), dtype=torch.bfloat16)
    step = builder.build(0, common)
    MLAAttention.forward_impl(itself, q, kv[:, :RANK], kv[:, None, RANK:], cache, step, output=out)
    absorbed = torch.bmm(q[..., :nope].transpose(0, 1), up).transpose(0, 1)
    wanted, _ = layer.impl.forward_mqa((absorbed, q[..., nope:]), cache, step, layer)
    projected = torch.empty_like(out)
    project(wanted, projected)
    assert torch.equal(out, projected)


@pytest.mark.parametrize("folder", SOURCES, ids=str)
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_the_platforms_of_vllm_have_the_seam(folder, name):
    """Read, not imported: they want a driver."""
    tree = ast.parse((folder / "platforms" / f"{name}.py").read_text())
    [method] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "get_attn_backend_cls"
    ]
    assert [argument.arg for argument in method.args.args] == ["cls", *_PARAMETERS]
    assert "classmethod" in {ast.unparse(decorator) for decorator in method.decorator_list}


@pytest.mark.parametrize("folder", SOURCES, ids=str)
def test_the_choice_of_a_backend_is_cached_by_vllm(folder):
    """`install` empties that cache."""
    tree = ast.parse((folder / "v1" / "attention" / "selector.py").read_text())
    [cached] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_cached_get_attn_backend"
    ]
    assert "cache" in {ast.unparse(decorator) for decorator in cached.decorator_list}
