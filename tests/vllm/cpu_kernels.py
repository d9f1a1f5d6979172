"""What vLLM's CPU platform calls that its wheel for CUDA does not have, in torch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

__all__ = ["define", "drafted"]

drafted: list[tuple[int, int]] = []
"""Of each request in each step with drafts: how many there were, and how many were right."""


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


def rejection_greedy_sample(out, ends, drafts, targets, bonus, greedy, most):
    start = 0
    for row, end in enumerate(ends.tolist()):
        kept = 0
        while kept < end - start and drafts[start + kept] == targets[start + kept]:
            out[row, kept] = targets[start + kept]
            kept += 1
        out[row, kept] = bonus.view(-1)[row] if kept == end - start else targets[start + kept]
        drafted.append((end - start, kept))
        start = end


def expand(out, given, ends, old, new):
    start = 0
    for value, end in zip(given.tolist(), ends.tolist(), strict=True):
        out[start:end] = new if value == old else value
        start = end


def nothing_sampled(out, *others):
    out.zero_()


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
    "rejection_greedy_sample_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor targets, Tensor bonus, "
    "Tensor? greedy, int most) -> ()": rejection_greedy_sample,
    "expand_kernel_impl(Tensor(a!) out, Tensor given, Tensor ends, int old, int new) -> ()": expand,
    # Of requests that are sampled, which only a dry run of 0.25.1 has here.
    "sample_recovered_tokens_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor? draft_probs, "
    "Tensor target_probs, Tensor noise, int vocabulary, bool without) -> ()": nothing_sampled,
    "rejection_random_sample_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor? draft_probs, "
    "Tensor target_probs, Tensor bonus, Tensor recovered, Tensor uniform, Tensor? greedy, int most, int vocabulary, "
    "bool without) -> ()": nothing_sampled,
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(-1),
}


def define() -> torch.library.Library:
    """Register them, for as long as what is returned lives."""
    library = torch.library.Library("_C", "FRAGMENT")
    for signature, kernel in KERNELS.items():
        library.define(signature)
        library.impl(signature.partition("(")[0], kernel, "CompositeExplicitAutograd")
    return library
