"""Random weights for a model that vLLM built: on modules named as vLLM's are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bidispatch.errors import UsageError
from bidispatch.integrations.vllm.random_weights import fill, fp8_matrix

E4M3 = torch.float8_e4m3fn


class ColumnParallelLinear(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype), requires_grad=False)


class VocabParallelEmbedding(ColumnParallelLinear):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.bfloat16), requires_grad=False)


class GemmaRMSNorm(RMSNorm):
    pass


class Fp8Linear(ColumnParallelLinear):
    def __init__(self, rows: int, columns: int, scale: tuple[int, ...], name: str = "weight_scale_inv") -> None:
        super().__init__(rows, columns, E4M3)
        self.register_parameter(name, nn.Parameter(torch.full(scale, -1.0), requires_grad=False))


class RoutedExperts(nn.Module):
    weight_block_size = (128, 128)

    def __init__(self, experts: int = 3, *, fp8: bool = False) -> None:
        super().__init__()
        dtype = E4M3 if fp8 else torch.bfloat16
        self.w13_weight = nn.Parameter(torch.zeros(experts, 512, 256, dtype=dtype), requires_grad=False)
        self.w13_bias = nn.Parameter(torch.zeros(experts, 512), requires_grad=False)
        if fp8:
            self.w13_weight_scale_inv = nn.Parameter(torch.full((experts, 4, 2), -1.0), requires_grad=False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_scale = nn.Parameter(torch.tensor(-1.0), requires_grad=False)
        self.register_buffer("cos", torch.full((4,), 7.0))


def model(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


def test_each_kind_has_its_spread() -> None:
    made = model(
        embed=VocabParallelEmbedding(500, 256),
        head=ParallelLMHead(500, 256),
        linear=ColumnParallelLinear(512, 1024, bias=True),
        norm=RMSNorm(4096),
        gemma=GemmaRMSNorm(4096),
        experts=RoutedExperts(),
        attention=Attention(),
    )
    assert fill(made) == sum(each.numel() for each in made.parameters())

    def spread(tensor: torch.Tensor) -> float:
        return tensor.float().std().item()

    assert spread(made["embed"].weight) == pytest.approx(1, rel=0.05)
    assert spread(made["head"].weight) == pytest.approx(256**-0.5, rel=0.05)
    assert spread(made["linear"].weight) == pytest.approx(1024**-0.5, rel=0.05)
    assert 0 < spread(made["linear"].bias) < 0.03
    assert made["norm"].weight.float().mean() == pytest.approx(1, abs=0.02)
    assert spread(made["norm"].weight) == pytest.approx(0.1, rel=0.1)
    assert made["gemma"].weight.float().mean() == pytest.approx(0, abs=0.02)
    assert spread(made["experts"].w13_weight) == pytest.approx(256**-0.5, rel=0.05)
    assert not torch.equal(made["experts"].w13_weight[0], made["experts"].w13_weight[1])
    assert 0 < spread(made["experts"].w13_bias) < 0.03
    assert made["attention"].k_scale == -1
    assert made["attention"].cos.eq(7).all()


def test_an_embedding_that_is_the_head_too_has_the_heads_spread() -> None:
    made = model(embed=VocabParallelEmbedding(500, 256))
    fill(made, tied=True)
    assert made["embed"].weight.float().std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_seeds_names_and_ranks() -> None:
    def filled(**options: int) -> dict[str, torch.Tensor]:
        made = model(one=ColumnParallelLinear(64, 64), two=ColumnParallelLinear(64, 64), norm=RMSNorm(64))
        fill(made, **options)
        return dict(made.named_parameters())

    first, again, seed, rank = filled(), filled(), filled(seed=1), filled(rank=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["one.weight"], first["two.weight"])
    assert not any(torch.equal(first[name], seed[name]) for name in first)
    assert not torch.equal(first["one.weight"], rank["one.weight"])
    assert torch.equal(first["norm.weight"], rank["norm.weight"])


@pytest.mark.parametrize("shape", [(256, 384), (320, 256), (64, 200)])
def test_fp8_blocks_are_a_normal_matrix(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = torch.zeros(shape, dtype=E4M3)
    scale = torch.full((-(-rows // 128), -(-columns // 128)), -1.0)
    fp8_matrix(weight, scale, (128, 128), "x")
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    values = weight.float() * spread
    assert values.isfinite().all()
    assert values.std().item() == pytest.approx(columns**-0.5, rel=0.05)
    assert weight.float().abs().amax() == 448
    assert (scale > 0).all()


def test_fp8_of_linear_layers_and_experts() -> None:
    made = model(
        block=Fp8Linear(256, 256, (2, 2)),
        channel=Fp8Linear(256, 256, (256, 1), "weight_scale"),
        tensor=Fp8Linear(256, 256, (3,), "weight_scale"),
        experts=RoutedExperts(fp8=True),
    )
    fill(made)
    for name in ("channel", "tensor"):
        scale = made[name].weight_scale
        assert (scale == scale.flatten()[0]).all()
        values = made[name].weight.float() * scale.flatten()[0]
        assert values.std().item() == pytest.approx(1 / 16, rel=0.05)
    experts = made["experts"]
    assert (experts.w13_weight_scale_inv > 0).all()
    assert not torch.equal(experts.w13_weight[0].view(torch.uint8), experts.w13_weight[1].view(torch.uint8))


def test_slices_are_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bidispatch.integrations.vllm.random_weights._SLICE", 128 * 256)
    weight, scale = torch.zeros(512, 256, dtype=E4M3), torch.full((4, 2), -1.0)
    fp8_matrix(weight, scale, (128, 128), "x")
    assert (scale > 0).all()
    assert all(weight[at : at + 128].float().std() > 50 for at in range(0, 512, 128))


def test_what_is_not_known_is_named_and_nothing_is_filled() -> None:
    packed = nn.Module()
    packed.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
    lone = nn.Module()
    lone.weight = nn.Parameter(torch.zeros(4, 4, dtype=E4M3), requires_grad=False)
    meta = nn.Module()
    meta.weight = nn.Parameter(torch.zeros(4, 4, device="meta"), requires_grad=False)
    made = model(linear=ColumnParallelLinear(8, 8), packed=packed, lone=lone, meta=meta)
    with pytest.raises(UsageError, match=r"packed\.qweight.*int32.*lone\.weight.*no scale.*meta\.weight.*no memory"):
        fill(made)
    assert not made["linear"].weight.any()


def test_scales_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        fp8_matrix(torch.zeros(256, 256, dtype=E4M3), torch.zeros(2, 1), (128, 128), "layer")
