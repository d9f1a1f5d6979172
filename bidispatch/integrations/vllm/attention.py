"""vLLM's attention backend `CUSTOM`: the op `attention` for decode, prefill, chunks and batches that mix them.

Interfaces: vLLM 0.25.1, 0.29.0 and 0.33.0, v1/attention/backend.py. What 0.25.1 asks for and later versions do not
(`get_kv_cache_shape`, `get_kv_cache_stride_order`) is here for all; nobody else calls it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf

from bidispatch.errors import ArgumentError, SelectionError
from bidispatch.integrations.vllm.cache import heads_of, write_heads
from bidispatch.integrations.vllm.kernels import StepKernels, select, serving_plan
from bidispatch.integrations.vllm.limits import StepLimits, need_covered
from bidispatch.integrations.vllm.metadata import StepMetadata, StepMetadataBuilder
from bidispatch.integrations.vllm.problems import attention_problem
from bidispatch.ops.attention import FP8
from bidispatch.planning.plan import Plan

__all__ = ["BidispatchBackend", "BidispatchImpl", "FlashAttnBackend", "FlashInferBackend", "layer_dtype", "plan_of"]


class BidispatchImpl(AttentionImpl[StepMetadata]):  # type: ignore[misc]
    """One layer. Selected and bound when the model is built; bound again if its cache has another page size."""

    implementations: ClassVar[tuple[str, ...]] = ()
    """What may serve it; empty asks the plan."""
    supports_pcp = False
    supports_dcp = False
    supports_quant_query_input = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        """Raises `SelectionError`, with every reason, for a layer that nothing serves."""
        vllm_config = get_current_vllm_config()
        need_covered(vllm_config)
        unknown = [name for name, value in others.items() if value not in (None, False, -1)]
        if attn_type != "decoder" or unknown:
            what = ", ".join([f"attention of type {attn_type}", *unknown] if attn_type != "decoder" else unknown)
            raise SelectionError(f"bidispatch's attention in vLLM does not serve {what}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._plan = plan_of(vllm_config)
        self.alibi_slopes = None
        if alibi_slopes is not None:
            self.alibi_slopes = torch.tensor(alibi_slopes, dtype=torch.float32, device=self._plan.device.torch_device)
        self._dtype = layer_dtype()
        self._limits = StepLimits.of(vllm_config)
        # Its workspaces are there when vLLM measures what memory is left for the cache.
        self.prepare(vllm_config.cache_config.block_size or 16)

    def prepare(self, page_size: int) -> None:
        """Bind for a cache of this page size. Raises `SelectionError` where nothing serves it."""
        problem = attention_problem(
            self._dtype,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            page_size=page_size,
            window=self.sliding_window,
            softcap=self.logits_soft_cap,
            sinks=self.sinks is not None,
            alibi=self.alibi_slopes is not None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        self._fp8 = problem["kv_dtype"] == FP8
        if self._fp8 and self._plan.device.arch.vendor == "amd":
            raise SelectionError(
                f"{problem}: vLLM's fp8 cache on {self._plan.device.name} is float8_e4m3fnuz; use --kv-cache-dtype auto"
            )
        self.kernels = StepKernels(select(self._plan, problem, self.implementations), self._limits)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [tokens, num_heads, head_size] to output of that shape; keys and values are in the cache already."""
        if output_scale is not None or output_block_scale is not None:
            raise ArgumentError("bidispatch's attention writes no quantised output; leave vLLM's attention fusion off")
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        rows = attn_metadata.num_actual_tokens
        k_cache, v_cache = heads_of(kv_cache, self.head_size)
        k_scale = v_scale = None
        if self._fp8:
            k_cache, v_cache = k_cache.view(torch.float8_e4m3fn), v_cache.view(torch.float8_e4m3fn)
            k_scale, v_scale = self._scale_of(layer._k_scale), self._scale_of(layer._v_scale)
        # Read at every step: weights may be loaded again. Widening is exact.
        sinks = None if self.sinks is None else self.sinks.detach().float()
        self.kernels.of(attn_metadata.decode_step)(
            query[:rows],
            k_cache,
            v_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            sinks,
            self.alibi_slopes,
            k_scale,
            v_scale,
            scale=self.scale,
            out=output[:rows],
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Put a step's keys and values [tokens, num_kv_heads, head_size] into the cache."""
        write_heads(key, value, kv_cache, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale)

    def _scale_of(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale a KV head, of one for all or of one each."""
        return scale.reshape(-1).expand(self.num_kv_heads)


def plan_of(vllm_config: Any) -> Plan:
    """The plan of the device this worker runs on."""
    kind = torch.device(vllm_config.device_config.device).type
    return serving_plan("cpu" if kind == "cpu" else f"{kind}:{torch.cuda.current_device()}")


def layer_dtype() -> str:
    """The dtype of the model that is being built: vLLM sets it as torch's default meanwhile."""
    return str(torch.get_default_dtype()).removeprefix("torch.")


class BidispatchBackend(AttentionBackend):  # type: ignore[misc]
    """`--attention-backend CUSTOM`. Conditions that depend on the layer are the plan's, when the layer is built."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enum, as vLLM wants it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[BidispatchImpl]:
        """The layer."""
        return BidispatchImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """The builder."""
        return StepMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Yes: nothing else is selected."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Yes, as an argument of the op."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes, as a dim of the op."""
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
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Page sizes, as vLLM's own backends have them: before 0.33 a layer with a window gets the smallest
        (`_largest_kernel_block_within`), which would be pages of one position.

        kv_cache_spec: what 0.33 passes; it changes nothing.
        """
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """The cache in vLLM 0.25.1."""
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Its order in memory in vLLM 0.25.1: as it is; no layer between the pages."""
        if include_num_layers_dimension:
            raise NotImplementedError("layers lie apart")
        return (0, 1, 2, 3, 4)


class FlashAttnImpl(BidispatchImpl):
    """A layer that was given to FlashAttention by name."""

    implementations = ("flash_attn.fa3", "flash_attn.fa2")


class FlashAttnBackend(BidispatchBackend):
    """`--attention-backend FLASH_ATTN`: its kernels with the registry's pins, or an error with the reasons."""

    @staticmethod
    def get_impl_cls() -> type[BidispatchImpl]:
        """The layer."""
        return FlashAttnImpl


class FlashInferImpl(BidispatchImpl):
    """A layer that was given to FlashInfer by name."""

    implementations = ("flashinfer.paged",)


class FlashInferBackend(BidispatchBackend):
    """`--attention-backend FLASHINFER`: its kernels with the registry's pins, or an error with the reasons."""

    @staticmethod
    def get_impl_cls() -> type[BidispatchImpl]:
        """The layer."""
        return FlashInferImpl
