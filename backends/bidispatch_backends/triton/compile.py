"""Ahead-of-time compilation of what a launch would compile, for any arch and without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from bidispatch.device import Arch
from bidispatch.errors import UsageError, did_you_mean
from bidispatch.ops.schema import Problem
from bidispatch_backends.triton import (
    activation,
    attention,
    fp8_gemm,
    gemm,
    int4,
    mla,
    moe,
    moe_router,
    norm,
    quantize,
    quantize_whole,
    reduction,
    softmax,
    split_gemm,
)
from bidispatch_backends.triton.launch import Constant, Launch

__all__ = ["Variant", "compile_variant", "target_of", "variants"]

_LAUNCHES: Mapping[str, Callable[..., tuple[Launch, ...]]] = {
    "triton.gemm": gemm.launches,
    "triton.bmm": gemm.launches,
    "triton.gemm_split_k": split_gemm.launches,
    "triton.fp8_block": fp8_gemm.launches,
    "triton.fp8": fp8_gemm.launches,
    "triton.quantize_fp8_group": quantize.elementwise_launches,
    "triton.quantize_fp8_token": quantize_whole.launches,
    "triton.quantize_fp8_tensor": quantize_whole.launches,
    "triton.silu_and_mul_fp8_group": quantize.elementwise_launches,
    "triton.rms_norm_fp8_group": quantize.row_launches,
    "triton.fused_add_rms_norm_fp8_group": quantize.row_launches,
    "triton.int4": int4.launches,
    "triton.int4_split_k": int4.split_launches,
    "triton.rms_norm": norm.launches,
    "triton.fused_add_rms_norm": norm.launches,
    "triton.qk_norm": norm.launches,
    "triton.softmax": softmax.launches,
    "triton.log_softmax": softmax.launches,
    "triton.token_logprob": softmax.launches,
    "triton.mean": reduction.launches,
    "triton.sum": reduction.launches,
    "triton.silu_and_mul": activation.launches,
    "triton.gelu_tanh_and_mul": activation.launches,
    "triton.paged_attention": attention.launches,
    "triton.mla": mla.launches,
    "triton.moe": moe.launches,
    "triton.moe_fp8_block": moe.launches,
    "triton.moe_router": moe_router.launches,
}


@dataclass(frozen=True)
class Variant:
    """One binary: a kernel with the types, constants and options that the compiler sees."""

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Constant | None]
    aligned: frozenset[str]
    """Arguments the compiler may take for multiples of 16."""
    options: Mapping[str, int | bool]

    @cached_property
    def key(self) -> str:
        """Equal for variants that compile to the same binary on one arch."""
        parts = (self.signature, self.constants, dict.fromkeys(self.aligned, True), self.options)
        return repr((self.kernel.fn.__name__, *(sorted(part.items()) for part in parts)))

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.constants.items() if value is not None)
        return f"{self.kernel.fn.__name__} {self.signature} {blocks} {dict(self.options)}"


def variants(implementation: str, problem: Problem, params: Any, tile: Any, arch: Arch) -> tuple[Variant, ...]:
    """What a kernel bound for this problem compiles on its first call with contiguous, aligned tensors.

    Made from the launches that binding makes. Raises `UsageError` for an implementation of another backend.
    """
    if implementation not in _LAUNCHES:
        raise UsageError(
            f"{implementation!r} is not a Triton kernel of this backend; it has {', '.join(_LAUNCHES)}"
            + did_you_mean(implementation, _LAUNCHES)
        )
    launches = _LAUNCHES[implementation](problem, params, tile, arch)
    return tuple(_variant(each) for launch in launches for each in (launch, launch.unaligned) if each is not None)


def _variant(launch: Launch) -> Variant:
    """Specialise the arguments as Triton's launcher does: 1 is a constant, a multiple of 16 is known to be one."""
    signature: dict[str, str] = {}
    constants: dict[str, Constant | None] = dict(launch.constants)
    aligned = set()
    for name, value in launch.arguments.items():
        if value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, str):
            signature[name] = value
            if value.startswith("*"):
                aligned.add(name)
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.add(name)
    signature |= dict.fromkeys(launch.constants, "constexpr")
    in_order = {name: signature[name] for name in launch.kernel.arg_names}
    return Variant(launch.kernel, in_order, constants, frozenset(aligned), launch.options)


def target_of(arch: Arch) -> GPUTarget:
    """Triton's target for an arch."""
    if arch.vendor == "nvidia":
        return GPUTarget("cuda", arch.order, 32)
    if arch.vendor == "amd":
        return GPUTarget("hip", arch.name, 64)
    raise UsageError(f"Triton compiles for GPUs, not for {arch.name}; name one, such as sm90")


def compile_variant(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Compile for a target; needs no GPU and no driver. `metadata.shared` is the shared memory it takes, in bytes."""
    names = list(variant.signature)
    language = GluonASTSource if variant.kernel.is_gluon() else ASTSource
    source = language(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(variant.aligned)},
    )
    return triton.compile(source, target=target, options=dict(variant.options))
