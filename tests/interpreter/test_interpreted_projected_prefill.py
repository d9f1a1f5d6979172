"""A prefill of DeepSeek's with projected keys and values, by the op `attention`: free of chunks and of what is cached.

Not the bits of the absorbed form, which `attention.mla` has: see docs/latent-attention.md.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from interpreted import bind, relative_error, same_bits, tiles

from bidispatch import ops
from bidispatch.runtime.context import Kernel, Limits
from bidispatch_backends.triton.attention_params import AttentionParams
from bidispatch_backends.triton.mla_params import MlaParams

HEADS, RANK, ROPE, NOPE, VALUE, PAGE = 2, 32, 16, 32, 32, 16  # of DeepSeek-V3: 128, 512, 64, 128, 128
LENGTH = 100
LIMITS = Limits(max_tokens=128, max_seqs=2, max_seq_len=128)
SCALE = (NOPE + ROPE) ** -0.5
SPLITS = {"kv_split": "48/64@48", "block_n": 16}


class Prompt:
    """What a layer has of one: its queries, the latents and rotary keys of its positions, and the two projections."""

    def __init__(self) -> None:
        numbers = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=numbers).half()

        self.q, self.q_rope = normal(LENGTH, HEADS, NOPE), normal(LENGTH, HEADS, ROPE)
        self.latent, self.k_rope = normal(LENGTH, RANK), normal(LENGTH, ROPE)
        self.w_uk, self.w_uv = normal(HEADS, NOPE, RANK) / RANK**0.5, normal(HEADS, RANK, VALUE) / RANK**0.5
        # Once, for a plan's product gives a position the same bits in every chunk; values padded to the keys' width.
        keys = torch.einsum("pr,hnr->phn", self.latent.double(), self.w_uk.double()).half()
        values = torch.einsum("pr,hrv->phv", self.latent.double(), self.w_uv.double()).half()
        self.keys = torch.cat([keys, self.k_rope[:, None].expand(LENGTH, HEADS, ROPE)], -1)
        self.values = torch.nn.functional.pad(values, (0, self.keys.shape[-1] - VALUE))

    def projected(self, end: int) -> list[torch.Tensor]:
        """Keys and values of the first positions, as a cache of consecutive pages; nothing is known of later ones."""
        slack = (0, 0, 0, 0, 0, -end % PAGE)
        return [
            torch.nn.functional.pad(tensor[:end], slack, value=float("nan")).view(-1, PAGE, *tensor.shape[1:])
            for tensor in (self.keys, self.values)
        ]


def paging(begin: int, end: int) -> list[torch.Tensor]:
    """Block table, KV length and query starts of one sequence whose positions from `begin` on are asked about."""
    table = torch.arange(-(-LENGTH // PAGE), dtype=torch.int32)[None].clamp(max=-(-end // PAGE) - 1)
    return [table, torch.tensor([end], dtype=torch.int32), torch.tensor([0, end - begin], dtype=torch.int32)]


def bound(op: str, params: AttentionParams | MlaParams, **dims: int) -> Kernel:
    """In tiles of 16 rows: numpy's own order follows the number of rows."""
    problem = ops.get(op).problem("float16", {"num_heads": HEADS, "page_size": PAGE, **dims})
    (tile,) = tiles(problem, params)
    tile = tile.model_copy(update={"decode_block_m": 16, "prefill_block_m": 16})
    return bind(problem, params=params, tile=tile, limits=LIMITS)


def by_projection(prompt: Prompt, cuts: list[int]) -> torch.Tensor:
    """The result of a prompt that is served in chunks, each of which attends to its whole context."""
    kernel = bound("attention", AttentionParams(**SPLITS), num_kv_heads=HEADS, head_dim=NOPE + ROPE)
    parts = []
    for begin, end in pairwise(cuts):
        q = torch.cat([prompt.q[begin:end], prompt.q_rope[begin:end]], -1)
        out = torch.full_like(q, float("nan"))
        kernel(q, *prompt.projected(end), *paging(begin, end), None, None, None, None, SCALE, out)
        parts.append(out[..., :VALUE])
    return torch.cat(parts)


def absorbed(prompt: Prompt) -> torch.Tensor:
    """The same by `attention.mla`."""
    kernel = bound("attention.mla", MlaParams(**SPLITS), kv_lora_rank=RANK, rope_dim=ROPE)
    q = torch.einsum("thn,hnr->thr", prompt.q.double(), prompt.w_uk.double()).half()
    cache = torch.nn.functional.pad(torch.cat([prompt.latent, prompt.k_rope], -1), (0, 0, 0, -LENGTH % PAGE))
    out = torch.full((LENGTH, HEADS, RANK), float("nan"), dtype=torch.float16)
    kernel(torch.cat([q, prompt.q_rope], -1), cache.view(-1, PAGE, RANK + ROPE), *paging(0, LENGTH), SCALE, out)
    return torch.einsum("thr,hrv->thv", out.double(), prompt.w_uv.double()).half()


def exact(prompt: Prompt) -> torch.Tensor:
    """In fp64, nothing rounded on the way."""
    keys = torch.einsum("pr,hnr->phn", prompt.latent.double(), prompt.w_uk.double())
    keys = torch.cat([keys, prompt.k_rope.double()[:, None].expand(LENGTH, HEADS, ROPE)], -1)
    q = torch.cat([prompt.q, prompt.q_rope], -1).double()
    scores = torch.einsum("thd,phd->htp", q, keys) * SCALE
    weights = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf")).softmax(-1)
    return torch.einsum("htp,pr,hrv->thv", weights, prompt.latent.double(), prompt.w_uv.double())


def test_chunks_and_a_cached_prefix_change_no_bit() -> None:
    """Decode steps of this form neither: what it is not is the absorbed form's decode."""
    prompt = Prompt()
    whole = by_projection(prompt, [0, LENGTH])
    assert relative_error(whole, exact(prompt)) < 2e-3
    for cuts in ([0, 7, 8, 50, 64, LENGTH], [0, 1, 99, LENGTH], [0, 48, LENGTH]):
        assert same_bits(whole, by_projection(prompt, cuts)), cuts
    cached = by_projection(prompt, [64, LENGTH])  # the 64 before them were computed by another request
    assert same_bits(whole[64:], cached)


def test_it_is_not_the_absorbed_form() -> None:
    """Why a plan of level `sequence` serves `attention.mla` alone: the same to rounding, and other bits."""
    prompt = Prompt()
    projected, other = by_projection(prompt, [0, LENGTH]), absorbed(prompt)
    assert relative_error(other, exact(prompt)) < 2e-3
    assert not same_bits(projected, other)
    assert (projected != other).any(-1).any(-1).sum() > LENGTH / 2
