"""Packed 4-bit weights: the layout, and AWQ's and GPTQ's formats against plain definitions of each."""

from __future__ import annotations

import pytest
import torch

from bidispatch import ops
from bidispatch.errors import UsageError
from bidispatch.int4 import dequantize, from_awq, from_gptq, pack, unpack

N, K, GROUP = 24, 256, 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies in nibble i of a word (AutoAWQ 0.2.9, awq/modules/linear/gemm.py, `order_map`)."""


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def awq_words(q: torch.Tensor) -> torch.Tensor:
    """[rows, columns] to [rows, columns / 8], a nibble at a time."""
    rows = [
        [signed(sum(row[8 * c + AWQ_ORDER[i]] << 4 * i for i in range(8))) for c in range(len(row) // 8)]
        for row in q.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def gptq_rows(q: torch.Tensor) -> torch.Tensor:
    """[k, n] to [k / 8, n]: word r of a column holds rows 8 r to 8 r + 7."""
    columns = [
        [signed(sum(column[8 * r + i] << 4 * i for i in range(8))) for r in range(len(column) // 8)]
        for column in q.T.tolist()
    ]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def gptq_columns(zeros: torch.Tensor) -> torch.Tensor:
    """[groups, n] to [groups, n / 8], each as it is."""
    return gptq_rows(zeros.T).T.contiguous()


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [k, n], zeros [k / group, n], scales [k / group, n], as both formats have them."""
    scales = torch.rand(K // GROUP, N, generator=torch.Generator().manual_seed(seed)).half()
    return integers(K, N, seed=seed), integers(K // GROUP, N, seed=seed + 1), scales


def weights(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[n, k], by the definition."""
    groups = torch.arange(K) // GROUP
    return ((q - zeros[groups]).half() * scales[groups]).T


def test_every_element_lies_where_the_layout_says() -> None:
    q = integers(3, 384)
    packed = pack(q)
    assert packed.shape == (3, 48)
    for element in range(384):
        block, rest = divmod(element, 128)
        j, s, h, c, p = rest // 32, rest // 16 % 2, rest // 8 % 2, rest // 2 % 4, rest % 2
        word = packed[:, 16 * block + 4 * c + j]
        assert torch.equal((word >> (16 * p + 8 * s + 4 * h)) & 15, q[:, element])


def test_unpacking_undoes_packing() -> None:
    q = integers(N, K)
    assert torch.equal(unpack(pack(q)).int(), q)


def test_slices_of_a_packed_weight_are_the_packed_slices() -> None:
    q = integers(N, K)
    assert torch.equal(pack(q)[8:16], pack(q[8:16]))
    assert torch.equal(pack(q)[:, 16:], pack(q[:, 128:]))


@pytest.mark.parametrize("q", [integers(4, 100), integers(4, 128) + 1, integers(4, 128) - 1, torch.zeros(4, 128)])
def test_what_is_no_matrix_of_nibbles_is_refused(q: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="pack takes integers"):
        pack(q)


def test_awq_is_repacked_exactly() -> None:
    q, zeros, scales = layer()
    found = from_awq(awq_words(q), awq_words(zeros), scales)
    assert found.group_size == GROUP
    assert torch.equal(unpack(found.weight).int(), q.T)
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))


@pytest.mark.parametrize("g_idx", [None, torch.arange(K, dtype=torch.int32) // GROUP])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_is_repacked_exactly(checkpoint_format: str, g_idx: torch.Tensor | None) -> None:
    q, zeros, scales = layer()
    assert (zeros == 0).any()  # stored as 15, for there is no -1
    stored = zeros if checkpoint_format == "gptq_v2" else (zeros - 1) & 15
    found = from_gptq(gptq_rows(q), gptq_columns(stored), scales, g_idx, checkpoint_format=checkpoint_format)
    assert torch.equal(unpack(found.weight).int(), q.T)
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))


def test_zeros_that_are_all_8_are_left_out() -> None:
    q, _, scales = layer()
    zeros = torch.full((K // GROUP, N), 8, dtype=torch.int32)
    found = from_gptq(gptq_rows(q), gptq_columns(zeros - 1), scales)
    assert found.zeros is None
    assert torch.equal(dequantize(*found), weights(q, zeros, scales))
    assert from_awq(awq_words(q), awq_words(zeros), scales).zeros is None


def test_one_format_is_not_taken_for_another() -> None:
    """Negative control: the checks above tell AWQ's order, GPTQ's and its two conventions of a zero point apart."""
    q, zeros, scales = layer()
    right = weights(q, zeros, scales)
    assert not torch.equal(dequantize(*from_awq(gptq_columns(q), awq_words(zeros), scales)), right)
    assert not torch.equal(dequantize(*from_gptq(gptq_rows(q), gptq_columns(zeros), scales)), right)


def test_activation_order_is_refused_with_the_reason() -> None:
    q, zeros, scales = layer()
    shuffled = torch.arange(K, dtype=torch.int32).flip(0) // GROUP
    with pytest.raises(UsageError, match="desc_act=true"):
        from_gptq(gptq_rows(q), gptq_columns(zeros), scales, shuffled)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    q, zeros, scales = layer()
    with pytest.raises(UsageError, match="unknown checkpoint_format 'gptq_v3'; known: gptq, gptq_v2"):
        from_gptq(gptq_rows(q), gptq_columns(zeros), scales, checkpoint_format="gptq_v3")
    with pytest.raises(UsageError, match=r"qweight must be torch.int32 \[256, 3\], not torch.int64"):
        from_awq(awq_words(q).long(), awq_words(zeros), scales)
    with pytest.raises(UsageError, match=r"qweight must be torch.int32 \[32, 24\], not torch.int32 \[32, 16\]"):
        from_gptq(gptq_rows(q)[:, :16], gptq_columns(zeros), scales)
    with pytest.raises(UsageError, match=r"qzeros \(unpacked\) must be .* \[4, 24\], not .* \[3, 24\]"):
        from_awq(awq_words(q), awq_words(zeros)[:3], scales)
    with pytest.raises(UsageError, match="scales must be floating point"):
        from_awq(awq_words(q), awq_words(zeros), scales.int())


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"k": 200}, "k=200 is not a multiple of 128"),
        ({"k": 384, "group_size": 256}, "group_size=256 must divide k=384"),
        ({"k": 384, "group_size": 96}, "group_size=96 must divide k=384, and divide 128 or be a multiple of it"),
    ],
)
def test_groups_that_do_not_fit_k_are_refused(dims: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ops.get("gemm.int4").problem("bfloat16", {"n": 64, **dims})


def test_the_class_of_a_weight_follows_k_and_never_n() -> None:
    """Hosts merge and shard by rows: every n has the class of every other, on every GPU."""
    import bidispatch as bid

    for arch in ("sm80", "sm90", "sm100", "sm120"):
        plan = bid.plan(arch)
        for k in (1024, 4096, 8192, 28672):
            labels = {
                plan.select("gemm.int4", dtype="bfloat16", n=n, k=k, zero_points=zero_points).numerics
                for n in (16, 1536, 8192, 8208, 57344)
                for zero_points in (False, True)
            }
            assert len(labels) == 1


def test_a_width_that_no_kernel_takes_is_refused_with_the_reason() -> None:
    import bidispatch as bid

    with pytest.raises(bid.SelectionError, match="needs n a multiple of 16, asked for 24"):
        bid.plan("sm90").select("gemm.int4", dtype="bfloat16", n=24, k=4096)
