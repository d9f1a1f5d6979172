"""A step's metadata and its builder, for attention and MLA alike: the batch as the ops take it, nothing computed.

Interfaces: vLLM 0.25.1, 0.29.0 and 0.33.0, v1/attention/backend.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from bidispatch.errors import SelectionError
from bidispatch.integrations.vllm.left import ADVICE
from bidispatch.integrations.vllm.limits import StepLimits, need_covered

__all__ = ["StepMetadata", "StepMetadataBuilder"]


@dataclass
class StepMetadata(AttentionMetadata):  # type: ignore[misc]
    """One step of one group of layers. Tensors are vLLM's own persistent ones, so a captured graph sees each step's."""

    num_actual_tokens: int
    """Rows, those included that pad a graph: no sequence owns these."""
    max_query_len: int
    decode_step: bool
    """Whether the kernel bound for decode steps serves it."""
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):  # type: ignore[misc]
    """Binds its layers' kernels for the page size of their cache, once; then passes every batch on.

    Lengths are read on the GPU, and launches are fixed for a batch size, so any step may be captured.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **others: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **others)
        if not type(self).__module__.startswith(__package__):
            # vLLM derives builders for chunked local attention, cross attention and others, which change the batch.
            raise SelectionError(
                f"{', '.join(layer_names)}: {type(self).__name__} changes the batch that attention sees, "
                f"and bidispatch has not covered it; {ADVICE}"
            )
        need_covered(vllm_config)
        self._limits = StepLimits.of(vllm_config)
        self._compilation = vllm_config.compilation_config
        layers = self._compilation.static_forward_context
        for name in layer_names:
            layers[name].impl.prepare(kv_cache_spec.block_size)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
        """The step. A common prefix changes nothing: each sequence walks all of its positions."""
        batch = common_attn_metadata
        _need_plain(batch)
        reqs = batch.num_reqs
        return StepMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            max_query_len=batch.max_query_len,
            decode_step=self._limits.is_decode(batch.max_query_len, batch.num_actual_tokens),
            query_start_loc=batch.query_start_loc[: reqs + 1],
            seq_lens=batch.seq_lens[:reqs],
            block_table=batch.block_table_tensor[:reqs],
            slot_mapping=batch.slot_mapping,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> StepMetadata:
        """The step that is captured: lengths are its queries', so that capturing does not walk the longest context.

        Where a graph serves steps of any kind, as with `cudagraph_mode=FULL`, the kernel for all steps is captured:
        vLLM 0.25.1's second model runner captures one query a sequence and replays it for prompts
        (v1/worker/gpu/input_batch.py, `make_dummy`).
        """
        step = self.build(0, common_attn_metadata)
        mode = getattr(self._compilation, "cudagraph_mode", None)  # vLLM may still change it when builders are made
        if mode is not None and not mode.separate_routine():
            step.decode_step = False
        step.seq_lens.fill_(step.max_query_len)
        return step


def _need_plain(batch: Any) -> None:
    """Raise `SelectionError` for what only some batches have; none of it may be left out silently."""
    against = []
    if batch.causal is not True:
        against.append("queries that see later positions")
    for name, what in (
        ("mm_req_doc_ranges", "bidirectional ranges of a prefix model"),
        ("rswa_prefix_lens", "a reference sliding window"),
        ("encoder_seq_lens", "cross attention"),
        ("dcp_local_seq_lens", "decode context parallelism"),
    ):
        if getattr(batch, name, None) is not None:
            against.append(what)
    if against:
        raise SelectionError(f"bidispatch's attention in vLLM does not serve {', '.join(against)}")
