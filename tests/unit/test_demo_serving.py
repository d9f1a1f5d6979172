"""The decoder and the engine: right against a plain implementation, and free of the batch with kernels that are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bidispatch import ops
from bidispatch.demo import compare
from bidispatch.demo.config import CPU_MODEL, Llama3Rope, ModelConfig
from bidispatch.demo.engine import Engine, make_batch
from bidispatch.demo.graphs import bucket_sizes, padded
from bidispatch.demo.kernels import BoundOp, PlanKernels, StockKernels
from bidispatch.demo.model import Decoder, rope_tables, rotate
from bidispatch.demo.problems import decoder_problems
from bidispatch.demo.scheduler import EngineLimits, PagePool, Request, Scheduler
from bidispatch.demo.weights import Weights, merge, random, tensor_shapes
from bidispatch.demo.workload import Workload, make_workload
from bidispatch.errors import SelectionError, UsageError
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import Problem
from bidispatch.planning.plan import plan
from bidispatch.planning.selection import Selection
from bidispatch.runtime.bind import load_attribute
from bidispatch.runtime.context import Limits

TINY = ModelConfig(
    model_type="qwen3",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=61,
    max_position_embeddings=128,
    rope_theta=1e4,
)
LLAMA = replace(
    TINY,
    model_type="llama",
    attention_bias=True,
    mlp_bias=True,
    rope_scaling=Llama3Rope(4.0, 1.0, 4.0, 16),
)
SLIDING = replace(TINY, num_hidden_layers=3, layer_windows=(0, 5, 5))
TIED = replace(TINY, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only wait for each other on more, and on a busy machine they wait long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class RowKernels:
    """Every op's fp64 reference, one row at a time: slow, and free of the batch by construction."""

    name = "rows"
    cuda_graphs = False

    def bind(self, problem: Problem, limits: Limits) -> BoundOp:
        op = ops.get(problem.op)
        reference = load_attribute(op.reference)
        defaults = {scalar.name: scalar.default_for(problem) for scalar in op.scalars}
        dtypes = [getattr(torch, str(problem.dims.get(o.dtype, problem.dtype))) for o in op.outputs]
        by_row = [argument.shape[0] == "m" for argument in op.arguments]

        def call(*arguments: Any, **scalars: float) -> Any:
            assert len(arguments[0]) <= limits.max_tokens
            extra = (defaults | scalars).values()
            if not len(arguments[0]):  # a step in which no request samples
                return arguments[0].new_empty(0, problem.size("n"))
            arguments += (None,) * (len(op.arguments) - len(arguments))
            rows = attention_rows(arguments) if problem.op == "attention" else plain_rows(arguments, by_row)
            results = [reference(problem, *row, *extra) for row in rows]
            outputs = tuple(torch.cat([result[i] for result in results]).to(dtype) for i, dtype in enumerate(dtypes))
            if problem.op == "attention":  # rows that no sequence owns are anything
                outputs = (padded_rows(outputs[0], len(arguments[0])),)
            return outputs[0] if len(outputs) == 1 else outputs

        return call


def plain_rows(arguments: Sequence[Any], by_row: Sequence[bool]) -> list[list[Any]]:
    count = len(arguments[0])
    return [[a[i : i + 1] if split else a for a, split in zip(arguments, by_row, strict=True)] for i in range(count)]


def attention_rows(arguments: Sequence[Any]) -> list[list[Any]]:
    """Each query as a decode of its own."""
    q, keys, values, block_table, seq_lens, starts, *per_head = arguments
    rows = []
    for b, kv_len in enumerate(seq_lens.tolist()):
        first, stop = starts[b : b + 2].tolist()
        for row in range(first, stop):
            seq_len = torch.tensor([kv_len - (stop - 1 - row)])
            alone = [q[row : row + 1], keys, values, block_table[b : b + 1], seq_len, torch.tensor([0, 1]), *per_head]
            rows.append(alone)
    return rows


def padded_rows(out: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat((out, out.new_full((count - len(out), *out.shape[1:]), math.nan)))


class VariantKernels(RowKernels):
    """Made variant on purpose: the head's product follows the number of its rows by a hair, or by more."""

    name = "variant"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def bind(self, problem: Problem, limits: Limits) -> BoundOp:
        bound = super().bind(problem, limits)
        if problem.op != "gemm" or problem["out_dtype"] != "float32" or problem["n"] != TINY.vocab_size:
            return bound

        def call(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            out: torch.Tensor = bound(x, *rest)
            wobble = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(len(x)))
            return out if len(x) == 1 else out + self.scale * wobble

        return call


def draw(config: ModelConfig, seed: int = 0) -> tuple[dict[str, torch.Tensor], Weights]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "norm" in name else noise * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
    return tensors, merge(config, tensors.__getitem__, "drawn")


def naive_log_probabilities(config: ModelConfig, tensors: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """The model as its paper has it, in fp64, over the whole sequence at once and without a cache: [tokens, vocab]."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    length, d = len(tokens), config.head_dim

    def norm(x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.rms_norm_eps) * t[name + ".weight"]

    def linear(x, name):
        return x @ t[name + ".weight"].T + t.get(name + ".bias", torch.zeros(1))

    def angle(position, pair):
        frequency = config.rope_theta ** (-2 * pair / d)
        if scaling := config.rope_scaling:
            wavelength = 2 * math.pi / frequency
            low = scaling.original_max_position_embeddings / scaling.low_freq_factor
            high = scaling.original_max_position_embeddings / scaling.high_freq_factor
            if wavelength > low:
                frequency /= scaling.factor
            elif wavelength > high:
                turns = scaling.original_max_position_embeddings / wavelength
                smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        return position * frequency

    angles = torch.tensor([[angle(p, i) for i in range(d // 2)] for p in range(length)], dtype=torch.float64)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def rope(x):
        return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

    x = t["model.embed_tokens.weight"][tokens]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{n}_proj").view(length, -1, d) for n in "qkv")
        if config.model_type == "qwen3":
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = rope(q), rope(k)
        group = config.num_attention_heads // config.num_key_value_heads
        ago = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        hidden = ago < 0
        if config.layer_windows and config.layer_windows[index]:
            hidden |= ago >= config.layer_windows[index]
        heads = []
        for head in range(config.num_attention_heads):
            scores = q[:, head] @ k[:, head // group].T / math.sqrt(d)
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, head // group])
        x = x + linear(torch.cat(heads, -1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return (norm(x, "model.norm") @ head.T).log_softmax(-1)


def small_workload(config: ModelConfig = TINY, requests: int = 5, **more: Any) -> Workload:
    sizes = {"longest_prompt": 25, "new_tokens": (3, 6), "max_tokens": 8, "max_seqs": 3} | more
    return make_workload(config, requests=requests, **sizes)


def serve(engine: Engine, requests: Sequence[Request]) -> tuple[dict[int, list[int]], dict[int, torch.Tensor]]:
    tokens: dict[int, list[int]] = {}
    rows: dict[int, list[torch.Tensor]] = {}

    def observe(request: int, index: int, token: int, logprobs: torch.Tensor) -> None:
        assert index == len(tokens.setdefault(request, []))
        tokens[request].append(token)
        rows.setdefault(request, []).append(logprobs)

    engine.run(requests, observe)
    return tokens, {request: torch.stack(kept) for request, kept in rows.items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("kernels", [StockKernels(), RowKernels()], ids=["stock", "rows"])
@pytest.mark.parametrize("config", [TINY, LLAMA, SLIDING, TIED], ids=["qwen3", "llama", "sliding", "tied"])
def test_the_engine_generates_what_a_plain_model_would(config, kernels):
    tensors, weights = draw(config)
    workload = small_workload(config, requests=3)
    tokens, logprobs = serve(Engine(config, weights, kernels, workload.limits), workload.requests)
    for request in workload.requests:
        whole = [*request.prompt, *tokens[request.id]]
        expected = naive_log_probabilities(config, tensors, whole)[len(request.prompt) - 1 : -1]
        assert logprobs[request.id].dtype is torch.float32
        error = (logprobs[request.id] - expected).norm() / expected.norm()
        assert error < 1e-6
        assert tokens[request.id] == expected.argmax(-1).tolist()


def test_a_wrong_model_would_be_seen():
    """The negative control of the test above: without its sliding window the model gives other logprobs."""
    tensors, weights = draw(SLIDING)
    workload = small_workload(SLIDING, requests=3)
    engine = Engine(replace(SLIDING, layer_windows=()), weights, StockKernels(), workload.limits)
    tokens, logprobs = serve(engine, workload.requests)
    request = max(workload.requests, key=lambda request: len(request.prompt))
    expected = naive_log_probabilities(SLIDING, tensors, [*request.prompt, *tokens[request.id]])
    expected = expected[len(request.prompt) - 1 : -1]
    assert (logprobs[request.id] - expected).norm() / expected.norm() > 1e-3


def test_matches_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors.torch").save_file(draw(TINY)[0], tmp_path / "model.safetensors")
    fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    del fields["layer_windows"], fields["rope_scaling"]
    config = transformers.Qwen3Config(**fields)
    config.save_pretrained(tmp_path)
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    workload = small_workload()
    engine = Engine(ModelConfig.read(tmp_path), draw(TINY)[1], StockKernels(), workload.limits)
    tokens, logprobs = serve(engine, workload.requests)
    for request in workload.requests:
        whole = torch.tensor([[*request.prompt, *tokens[request.id]]])
        with torch.no_grad():
            expected = model(whole).logits.log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        assert (logprobs[request.id] - expected).norm() / expected.norm() < 1e-5


def test_nothing_moves_with_kernels_that_do_not_see_the_batch():
    _, weights = draw(TINY)
    result = compare.run(TINY, weights, RowKernels(), small_workload())
    assert result.identical
    assert (result.max_logprob_difference, result.values_differ, result.tokens_differ) == (0.0, 0, 0)
    assert result.values_compared == result.tokens_compared * TINY.vocab_size
    assert result.tokens_compared == small_workload().new_tokens
    assert result.together.mixed_steps > 0
    assert result.together.partial_prefills > 0
    assert result.together.most_requests == 3
    assert result.alone.most_requests == 1
    assert result.alone.mixed_steps == 0


def test_a_kernel_that_follows_the_batch_by_a_hair_is_caught():
    _, weights = draw(TINY)
    result = compare.run(TINY, weights, VariantKernels(1e-6), small_workload())
    assert not result.identical
    assert 0 < result.max_logprob_difference < 1e-4
    assert 0 < result.values_differ <= result.values_compared
    assert result.tokens_differ == 0


def test_where_tokens_differ_the_rest_is_compared_teacher_forced():
    _, weights = draw(TINY)
    workload = small_workload()
    phases: dict[str, list[tuple[int, int]]] = {}

    def progress(phase: str, done: int, total: int) -> None:
        phases.setdefault(phase, []).append((done, total))

    result = compare.run(TINY, weights, VariantKernels(1.0), workload, progress=progress)
    assert result.tokens_differ > 0
    assert result.values_compared == workload.new_tokens * TINY.vocab_size, "every position once"
    assert list(phases) == ["alone", "together", "teacher-forced"]
    assert all(seen == [(i, workload.new_tokens) for i in range(workload.new_tokens + 1)] for seen in phases.values())


def test_stock_torch_moves_on_a_cpu_in_fp32():
    config = replace(CPU_MODEL, num_hidden_layers=2, vocab_size=1024)
    workload = small_workload(config, requests=6, max_seqs=6, max_tokens=32)
    result = compare.run(config, random(config, dtype="float32"), StockKernels(), workload)
    assert result.values_compared > 0
    if not result.values_differ:
        pytest.skip("this processor's stock torch does not follow the batch here")
    assert 0 < result.max_logprob_difference < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, LLAMA, SLIDING], ids=["qwen3", "llama", "sliding"])
def test_nothing_moves_under_the_plan(config, dtype):
    tensors, _ = draw(config)
    weights = merge(config, lambda name: tensors[name].to(getattr(torch, dtype)), "drawn")
    kernels = PlanKernels(plan("cpu"))
    workload = small_workload(config)
    result = compare.run(config, weights, kernels, workload)
    assert result.identical
    assert result.values_compared == workload.new_tokens * config.vocab_size
    assert set(kernels.selections) == set(decoder_problems(config, dtype, workload.limits.page_size).values())
    assert {selection.level for selection in kernels.selections.values()} == {Invariance.SEQUENCE}


def test_the_plan_generates_what_a_plain_model_would():
    tensors, weights = draw(SLIDING)
    workload = small_workload(SLIDING, requests=3)
    engine = Engine(SLIDING, weights, PlanKernels(plan("cpu")), workload.limits)
    tokens, logprobs = serve(engine, workload.requests)
    for request in workload.requests:
        whole = [*request.prompt, *tokens[request.id]]
        expected = naive_log_probabilities(SLIDING, tensors, whole)[len(request.prompt) - 1 : -1]
        assert (logprobs[request.id] - expected).norm() / expected.norm() < 1e-6


def test_the_plan_through_torch_ops_gives_the_same_bits():
    _, weights = draw(TINY)
    workload = small_workload()
    direct = serve(Engine(TINY, weights, PlanKernels(plan("cpu")), workload.limits), workload.requests)
    kernels = PlanKernels(plan("cpu"), torch_ops=True)
    through = serve(Engine(TINY, weights, kernels, workload.limits), workload.requests)
    assert direct[0] == through[0]
    assert all(same_bits(direct[1][request], through[1][request]) for request in direct[1])


def test_a_plan_below_sequence_level_is_refused():
    class BatchPlan:
        def select_problem(self, problem: Problem) -> Selection:
            return replace(plan("cpu").select_problem(problem), level=Invariance.BATCH)

    _, weights = draw(TINY)
    with pytest.raises(SelectionError, match="needs level sequence: plan with require='sequence'"):
        Engine(TINY, weights, PlanKernels(BatchPlan()), small_workload().limits)


def test_each_problem_is_bound_once_for_each_size():
    kernels = PlanKernels(plan("cpu"))
    problem = decoder_problems(TINY, "float32", 16)["qkv"]
    assert kernels.bind(problem, Limits(8)) is kernels.bind(problem, Limits(8))
    assert kernels.bind(problem, Limits(8)) is not kernels.bind(problem, Limits(9))


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"model_type": "llama"}])
def test_greedy_decoding_of_random_weights_is_not_degenerate(change):
    config = replace(CPU_MODEL, vocab_size=2048, **change)
    workload = small_workload(config, requests=3, new_tokens=(20, 20), max_seqs=3, max_tokens=32)
    tokens, logprobs = serve(
        Engine(config, random(config, dtype="float32"), StockKernels(), workload.limits), workload.requests
    )
    for request, generated in tokens.items():
        assert len(set(generated)) >= 10, "it circles around a few words"
        favourite = logprobs[request].max(-1).values.exp()
        assert 0.01 < favourite.mean() < 0.95, "it is flat, or knows only one word"


def test_pages_used_before_and_in_another_order_change_nothing():
    _, weights = draw(TINY)
    workload = small_workload()
    engine = Engine(TINY, weights, RowKernels(), workload.limits)
    first_tokens, first = serve(engine, workload.requests)
    assert engine.free_pages == workload.limits.pages
    again_tokens, again = serve(engine, list(reversed(workload.requests)))
    assert first_tokens == again_tokens
    assert all(same_bits(first[request], again[request]) for request in first)


def test_forced_tokens_are_fed_and_what_would_have_been_decoded_is_shown():
    _, weights = draw(TINY)
    workload = small_workload(requests=1)
    engine = Engine(TINY, weights, RowKernels(), workload.limits)
    (request,) = workload.requests
    tokens, free = serve(engine, [request])
    same_tokens, same = serve(engine, [replace(request, forced_tokens=tuple(tokens[0]))])
    assert same_tokens == tokens
    assert same_bits(free[0], same[0])
    other = (tokens[0][0] + 1) % TINY.vocab_size
    shown, forced = serve(engine, [replace(request, forced_tokens=(other, *tokens[0][1:]))])
    assert shown[0][0] == tokens[0][0]
    assert same_bits(forced[0][:1], free[0][:1])
    assert not same_bits(forced[0][1:2], free[0][1:2])


def test_a_request_that_does_not_fit_is_refused_before_any_token():
    _, weights = draw(TINY)
    limits = EngineLimits(max_tokens=8, max_seqs=2, max_seq_len=64, page_size=4, pages=3)
    engine = Engine(TINY, weights, StockKernels(), limits)
    seen: list[int] = []
    with pytest.raises(UsageError, match="request 1 needs 5 pages of 4 positions, the pool has 3"):
        engine.run([Request(0, (1,), 2), Request(1, (1,) * 18, 2)], lambda request, *_: seen.append(request))
    assert not seen
    assert engine.free_pages == 3


def test_an_engine_longer_than_the_model_is_refused():
    _, weights = draw(TINY)
    limits = EngineLimits(max_tokens=8, max_seqs=2, max_seq_len=129, page_size=4, pages=40)
    with pytest.raises(UsageError, match="up to 129 positions, the model has 128"):
        Engine(TINY, weights, StockKernels(), limits)


def test_log_probabilities_that_would_not_fit_in_memory_are_refused():
    config = replace(TINY, vocab_size=151936)
    _, weights = draw(TINY)
    workload = small_workload(config, requests=200, new_tokens=(80, 80), max_tokens=256, max_seqs=64)
    with pytest.raises(UsageError, match="at most 8 are allowed; ask for fewer"):
        compare.run(config, weights, RowKernels(), workload)


def test_the_cache_is_poisoned_and_what_it_gives_is_not():
    _, weights = draw(TINY)
    workload = small_workload()
    decoder = Decoder(TINY, weights, RowKernels(), Limits(8, 3, 64, 8), 16)
    assert all(keys.isnan().all() for keys in decoder.new_cache(2).keys)
    _, logprobs = serve(Engine(TINY, weights, RowKernels(), workload.limits), workload.requests)
    assert not any(rows.isnan().any() for rows in logprobs.values())


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_padding_a_decode_step_as_graphs_do_changes_no_request(size):
    _, weights = draw(TINY)
    limits = EngineLimits(max_tokens=8, max_seqs=8, max_seq_len=64, page_size=4, pages=12)
    decoder = Decoder(TINY, weights, RowKernels(), Limits(8, 8, 64, 8), limits.page_size)
    cache = decoder.new_cache(limits.pages + 1)
    scheduler = Scheduler(limits, [Request(0, (3, 1, 4), 3), Request(1, (1, 5), 3)], PagePool(limits.pages))
    with torch.inference_mode():
        prefill = scheduler.schedule()
        decoder(make_batch(prefill, limits), cache)
        scheduler.commit(prefill, {0: 7, 1: 9})
        batch = make_batch(scheduler.schedule(), limits)
        scratch = limits.pages * limits.page_size
        wide = padded(batch, size, scratch)
        assert wide.query_start_loc.tolist() == [0, 1, 2] + [2] * (size - 2)
        assert wide.seq_lens.tolist() == [4, 3] + [0] * (size - 2)
        assert wide.slots.tolist()[2:] == [scratch] * (size - 2)
        plain = decoder(batch, cache)
        widened = decoder(wide, cache)
        assert widened.shape == (size, TINY.vocab_size)
        assert same_bits(plain, widened[:2])


@pytest.mark.parametrize(
    ("max_seqs", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_graphs_are_captured_for_powers_of_two_and_never_beyond_the_engine(max_seqs, sizes):
    assert bucket_sizes(max_seqs) == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads_and_dim", [(4, 64), (3, 10), (1, 2)])
def test_rotation_gives_a_row_the_same_bits_in_any_batch(dtype, heads_and_dim):
    heads, head_dim = heads_and_dim
    config = replace(TINY, head_dim=head_dim, rope_theta=1e6)
    cos, sin = rope_tables(config, 300)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, heads, head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 300, (37,), generator=generator)
    as_int = torch.int32 if dtype is torch.float32 else torch.int16
    together = rotate(x, cos[positions][:, None], sin[positions][:, None]).view(as_int)
    for row in range(37):
        for stop in {row + 1, min(row + 3, 37)}:
            at = positions[row:stop]
            alone = rotate(x[row:stop], cos[at][:, None], sin[at][:, None]).view(as_int)
            assert torch.equal(alone[0], together[row])
    # And exactly what the formula gives when each product and sum is rounded to fp32 by itself.
    wide, c, s = x.float().double(), cos[positions][:, None].double(), sin[positions][:, None].double()
    a, b = wide.chunk(2, -1)
    first = ((a * c).float().double() - (b * s).float().double()).float()
    assert torch.equal(together.view(dtype)[..., : head_dim // 2], first.to(dtype))


def test_a_position_s_rotation_does_not_depend_on_the_table_s_length():
    short, long = rope_tables(LLAMA, 37), rope_tables(LLAMA, 128)
    assert all(torch.allclose(a, b[:37], rtol=0, atol=1e-7) for a, b in zip(short, long, strict=True))
