"""A stand-in for DeepGEMM's grouped products: checks what the library asserts, and gives rows that pad rubbish."""

from __future__ import annotations

import torch

BLOCK = 128


def whole(tensor):
    """`major_check` of csrc/utils/layout.hpp: three axes without gaps, K contiguous."""
    assert tensor.stride(-1) == 1
    assert tensor.dim() == 2 or tensor.stride(0) == tensor.shape[1] * tensor.shape[2]
    assert tensor.data_ptr() % 16 == tensor.stride(-2) * tensor.element_size() % 16 == 0


def widened(tensor, scales):
    """fp32 of a matrix, or of fp8 with a scale for so many rows and 128 columns."""
    if scales is None:
        return tensor.float()
    rows = -(-tensor.shape[0] // scales.shape[0])
    spread = scales.repeat_interleave(rows, 0)[: len(tensor)].repeat_interleave(128, 1)
    return tensor.float() * spread


def in_order(left, right):
    """left · rightᵀ in fp32, added in the order of K: a row takes no part in another."""
    total = torch.zeros(len(left), len(right))
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[None, :, k]
    return total


class GroupedDeepGemm:
    """Multiplies whole tiles of 128 rows, as the library does: it writes past a group that has no whole ones."""

    def __init__(self, alignment=BLOCK):
        self.calls = []
        self.alignment = alignment

    def get_mk_alignment_for_contiguous_layout(self):
        return self.alignment

    def _operands(self, a, b, d, fp8):
        (x, x_scales), (weight, weight_scales) = (a, b) if fp8 else ((a, None), (b, None))
        for tensor in (x, weight, d):
            whole(tensor)
        assert x.shape[:-1] == d.shape[:-1]
        assert weight.shape[1:] == (d.shape[-1], x.shape[-1])
        if fp8:
            rows, groups = x_scales.shape[-2:]
            assert x_scales.stride()[-2:] == (1, rows)
            assert rows % 4 == x_scales.data_ptr() % 16 == 0
            assert x_scales.dim() == 2 or x_scales.stride(0) == rows * groups
            assert weight_scales.is_contiguous()
        return x, x_scales, weight, weight_scales

    def _contiguous(self, a, b, d, grouped_layout, compiled_dims, fp8):
        x, x_scales, weight, weight_scales = self._operands(a, b, d, fp8)
        assert grouped_layout.shape == (len(x),)
        assert grouped_layout.dtype == torch.int32
        assert len(x) % BLOCK == 0
        self.calls.append(("contiguous", len(x), compiled_dims))
        for first in range(0, len(x), BLOCK):
            rows = slice(first, first + BLOCK)
            own = grouped_layout[rows]
            expert = int(own[0])
            if expert < 0:
                assert (own == -1).all()
                d[rows] = 0
                continue
            assert ((own == expert) | (own == -1)).all()
            weights = widened(weight[expert], None if weight_scales is None else weight_scales[expert])
            d[rows] = in_order(widened(x[rows], None if x_scales is None else x_scales[rows]), weights).to(d.dtype)

    def _masked(self, a, b, d, masked_m, expected_m, compiled_dims, fp8):
        x, x_scales, weight, weight_scales = self._operands(a, b, d, fp8)
        experts, most, _ = x.shape
        assert masked_m.shape == (experts,) == weight.shape[:1]
        assert masked_m.dtype == torch.int32
        assert int(masked_m.min()) >= 0
        assert int(masked_m.max()) <= most
        assert isinstance(expected_m, int)
        assert expected_m > 0
        self.calls.append(("masked", expected_m, compiled_dims))
        flat = d.view(-1, d.shape[-1])
        for expert in reversed(range(experts)):  # in no order that hides what one writes into another's group
            count = int(masked_m[expert])
            weights = widened(weight[expert], None if weight_scales is None else weight_scales[expert])
            for first in range(0, count, BLOCK):
                left = x[expert, first : first + BLOCK]
                scales = None if x_scales is None else x_scales[expert, first : first + BLOCK]
                flat[expert * most + first :][:BLOCK] = float("nan")
                product = in_order(widened(left, scales), weights).to(d.dtype)
                flat[expert * most + first :][: len(left)] = product

    def m_grouped_fp8_gemm_nt_contiguous(self, a, b, d, grouped_layout, compiled_dims="nk"):
        self._contiguous(a, b, d, grouped_layout, compiled_dims, fp8=True)

    def m_grouped_bf16_gemm_nt_contiguous(self, a, b, d, grouped_layout, compiled_dims="nk"):
        self._contiguous(a, b, d, grouped_layout, compiled_dims, fp8=False)

    def fp8_m_grouped_gemm_nt_masked(self, a, b, d, masked_m, expected_m, compiled_dims="nk"):
        self._masked(a, b, d, masked_m, expected_m, compiled_dims, fp8=True)

    def m_grouped_bf16_gemm_nt_masked(self, a, b, d, masked_m, expected_m, compiled_dims="nk"):
        self._masked(a, b, d, masked_m, expected_m, compiled_dims, fp8=False)
