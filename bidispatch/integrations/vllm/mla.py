"""vLLM's attention backend `CUSTOM` for MLA models: the op `attention.mla`, the absorbed form in every phase.

vLLM's layer (model_executor/layers/attention/mla_attention.py, `forward_impl`, 0.25.1 and 0.33.0) sends the first
`num_decode_tokens` rows through `forward_mqa`, absorbed, and the others through `forward_mha`, projected up, whose bits
differ. Here all rows are the first. The products with W_UK and W_UV around it are in `mla_products`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, MLAAttentionImpl

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm.attention import layer_dtype, plan_of
from bidispatch.integrations.vllm.cache import write_latent
from bidispatch.integrations.vllm.kernels import StepKernels, select
from bidispatch.integrations.vllm.limits import StepLimits, need_covered
from bidispatch.integrations.vllm.metadata import StepMetadata, StepMetadataBuilder
from bidispatch.integrations.vllm.problems import latent_problem

__all__ = ["BidispatchMLABackend", "BidispatchMLAImpl", "FlashMLABackend"]


@dataclass
class LatentMetadata(StepMetadata):
    """A step with what vLLM's MLA layer reads beside it: every row is a decode's to it."""

    num_reqs: int = 0
    max_seq_len: int = 0
    num_prefills: int = 0
    prefill: None = None
    causal: bool = True

    @property
    def num_decodes(self) -> int:
        """All sequences."""
        return self.num_reqs

    @property
    def num_decode_tokens(self) -> int:
        """All rows."""
        return self.num_actual_tokens

    @property
    def decode(self) -> StepMetadata:
        """The step itself."""
        return self


class LatentMetadataBuilder(StepMetadataBuilder):
    """Adds what vLLM's MLA layer reads."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """The step."""
        step = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return LatentMetadata(
            **vars(step), num_reqs=common_attn_metadata.num_reqs, max_seq_len=common_attn_metadata.max_seq_len
        )


class BidispatchMLAImpl(MLAAttentionImpl[LatentMetadata]):  # type: ignore[misc]
    """One layer. Selected and bound when the model is built; bound again if its cache has another page size."""

    implementations: ClassVar[tuple[str, ...]] = ()
    supports_pcp = False
    supports_dcp = False
    supports_quant_query_input = False
    supports_dense_mha_prefill = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        *,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        indexer: object | None = None,
        **others: Any,
    ) -> None:
        """Raises `SelectionError`, with every reason, for a layer that nothing serves."""
        vllm_config = get_current_vllm_config()
        need_covered(vllm_config)
        given = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "a soft cap": logits_soft_cap,
            "a cache shared between layers": kv_sharing_target_layer_name,
            "an indexer of sparse attention": indexer,
            f"attention of type {attn_type}": None if attn_type == "decoder" else attn_type,
        }
        against = [what for what, value in given.items() if value]
        if against:
            raise SelectionError(f"bidispatch's MLA in vLLM does not serve {', '.join(against)}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self._plan = plan_of(vllm_config)
        self._dtype = layer_dtype()
        self._limits = StepLimits.of(vllm_config)
        self.prepare(vllm_config.cache_config.block_size or 64)

    def prepare(self, page_size: int) -> None:
        """Bind for a cache of this page size. Raises `SelectionError` where nothing serves it."""
        problem = latent_problem(
            self._dtype,
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
            page_size=page_size,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        self.kernels = StepKernels(select(self._plan, problem, self.implementations), self._limits)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Absorbed queries [tokens, num_heads, kv_lora_rank + rope] to [tokens, num_heads, kv_lora_rank].

        Rows that no sequence owns are 0.
        """
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        out = q.new_zeros((q.shape[0], self.num_heads, self.kv_lora_rank))
        self.kernels.of(attn_metadata.decode_step)(
            q,
            kv_c_and_k_pe_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            scale=self.scale,
            out=out,
        )
        return out, None

    def forward_mha(self, *arguments: Any, **named: Any) -> NoReturn:
        """Never: projected keys and values have other bits than the absorbed form (docs/latent-attention.md)."""
        raise SelectionError(
            "an MLA step was split into decode and prefill, whose bits differ; its builder was replaced"
        )

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *others: Any,
        **named: Any,
    ) -> None:
        """Put kv_c_normed [tokens, kv_lora_rank] and k_pe [tokens, 1, rope] into the cache."""
        if kv_cache.numel() == 0:
            return
        if kv_cache.is_cuda:
            super().do_kv_cache_update(
                kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, *others, **named
            )
        else:
            write_latent(kv_c_normed, k_pe.squeeze(1), kv_cache, slot_mapping.flatten())


class BidispatchMLABackend(AttentionBackend):  # type: ignore[misc]
    """`CUSTOM` for MLA models."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enum, as vLLM wants it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[BidispatchMLAImpl]:
        """The layer."""
        return BidispatchMLAImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """The builder."""
        return LatentMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Yes: nothing else is selected."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: whether a cache from elsewhere has the same bits and the same layout has not been looked at."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: which kernel serves a step is decided from the lengths that the host knows."""
        return False

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """The cache in vLLM 0.25.1."""
        return (num_blocks, block_size, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Its order in memory in vLLM 0.25.1: as it is; no layer between the pages."""
        if include_num_layers_dimension:
            raise NotImplementedError("layers lie apart")
        return (0, 1, 2)


class FlashMLAImpl(BidispatchMLAImpl):
    """A layer that was given to FlashMLA by name."""

    implementations = ("flash_mla.decode",)


class FlashMLABackend(BidispatchMLABackend):
    """`--attention-backend FLASHMLA`: its kernels with the registry's pins, or an error with the reasons."""

    @staticmethod
    def get_impl_cls() -> type[BidispatchMLAImpl]:
        """The layer."""
        return FlashMLAImpl
