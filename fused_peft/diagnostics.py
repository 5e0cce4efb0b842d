"""Which code runs here, and why: the report of ``python -m fused_peft`` and :func:`explain`."""

from __future__ import annotations

import platform
import sys

import torch
from torch import Tensor, nn

from fused_peft import _C, ops, simulator
from fused_peft.nn import LoraLinear, LoraWrappedLinear
from fused_peft.nn.adapter_sum import groups, joined
from fused_peft.nn.base_layer import kind_of
from fused_peft.nn.lora_layer import LoraLayer
from fused_peft.ops._common import autocast
from fused_peft.ops._devices import kernel_device


def explain(layer: nn.Module, x: Tensor) -> str:
    """Say which path ``layer(x)`` takes and why.

    Args:
        layer: a LoraLinear, a LoraWrappedLinear (its base layer runs once, on x), or a layer that
            :func:`fused_peft.integrations.peft.fuse` has fused.
        x: ``[..., K]``, an input as the layer will get it.

    Returns:
        One line, of the kernel with its instruction set or the fallback with its reason; of several
        adapters, which of them it serves.

    Raises:
        TypeError: ``layer`` is neither.
    """
    path_in_peft = getattr(layer, "_explain_path", None)
    if path_in_peft is not None:
        path = path_in_peft(x)
        if isinstance(path, str):
            return f"PEFT: its own forward, because {path}"
        return _kernel_path(x, path)
    if isinstance(layer, LoraWrappedLinear):
        return _explain_wrapped(layer, x)
    if not isinstance(layer, LoraLinear):
        raise TypeError(
            f"layer is {type(layer).__name__}; expected LoraLinear, LoraWrappedLinear, or a PEFT "
            "layer after fused_peft.integrations.peft.fuse"
        )
    if not layer.adapters_enabled:
        return "torch: F.linear on the base weight, because the adapters are disabled"
    if layer.merged:
        return f"torch: F.linear, because {layer.merged_adapters} are merged into the weight"
    if not layer.active_adapters:
        return "torch: F.linear on the base weight, because no adapter is active"
    weight = layer.weight
    dtype = ops.autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = autocast(x, dtype), autocast(weight, dtype)
    with torch.no_grad():
        first = joined(layer._addends())[0]
    reason = ops.fallback_reason(x, weight, first.lora_a, first.lora_b)
    if reason is not None:
        return f"torch: fused_peft.reference.lora_linear, because {reason}"
    return _kernel_path(x, _dropout_of(layer))


def _base_product(base: nn.Module) -> str:
    weight = base._parameters.get("weight")
    plain = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    if plain and weight is not None:
        return f"F.linear over a {type(weight).__module__}.{type(weight).__qualname__}"
    return f"{kind_of(base)} by its own forward"


def _explain_wrapped(layer: LoraWrappedLinear, x: Tensor) -> str:
    base = f"base: {_base_product(layer.base_layer)}"
    if not layer.adapters_enabled or not layer.active_adapters:
        why = "no adapter is active" if layer.adapters_enabled else "the adapters are disabled"
        return f"{base}, alone because {why}"
    with torch.no_grad():
        y = layer.base_layer(x)
    dtype = ops.autocast_dtype(x.device.type)
    x = x.to(y.device)
    if dtype is not None:
        x = autocast(x, dtype)
    with torch.no_grad():
        terms = joined(layer._addends())
    for term in terms:
        reason = ops.update_fallback_reason(y, x, term.lora_a, term.lora_b)
        if reason is not None:
            return f"{base}; update, torch: fused_peft.reference.lora_update, because {reason}"
    rows = x.numel() // max(1, x.shape[-1])
    names = _grouped(_dropout_of(layer))
    passes = "one pass" if len(names) == 1 else f"{len(names)} passes"
    return (
        f"{base}; update, kernel: cpu {_C.cpu_isa()}, {passes} over what the base gave "
        f"({rows} rows), adapters {', then '.join(map(str, names))}"
    )


def _dropout_of(layer: LoraLayer) -> dict[str, float]:
    """The dropout of each active adapter, as the layer is now."""
    return {n: layer.lora_dropout[n] if layer.training else 0.0 for n in layer.active_adapters}


def _grouped(dropout_p: dict[str, float]) -> list[list[str]]:
    names = list(dropout_p)
    return [[names[i] for i in group] for group in groups(list(dropout_p.values()))]


def _kernel_path(x: Tensor, dropout_p: dict[str, float]) -> str:
    rows = x.numel() // max(1, x.shape[-1])
    first, *others = _grouped(dropout_p)
    if kernel_device(x)[0] == "cuda":
        where = "CUDA"
    else:
        how = "dot products, the weight read once" if rows <= 16 else "register tiles"
        where = f"cpu {_C.cpu_isa()}, {how}"
    rest = [name for group in others for name in group]
    more = f"; {rest} by torch's ops, for they drop elements of their own" if rest else ""
    return f"kernel: {where} ({rows} rows), adapters {first} in one pass{more}"


def report() -> str:
    """Versions, how the package was built, and what serves each op on this machine."""
    from fused_peft import __version__

    info = _C.build_info()
    found = _C.available_cpu_isas()
    nvcc = info["nvcc"]
    architectures = ", ".join(info["cuda_architectures"]) or "none: CUDA tensors use torch's ops"
    kernels = [
        ("  cpu float32", f"{_C.cpu_isa()} kernels"),
        ("  cpu bfloat16", _half_note("avx512_bf16", "bfloat16 dot products", "float32 tiles")),
        ("  cpu float16", f"{_C.cpu_isa()} kernels, float32 tiles"),
    ]
    lines = [
        ("fused_peft", __version__),
        ("torch", f"{torch.__version__} (built against {info['torch_built_against']}, stable ABI)"),
        ("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}"),
        ("compiler", info["compiler"]),
        ("nvcc at build time", "not found" if nvcc.endswith("NOTFOUND") or not nvcc else nvcc),
        ("CUDA architectures built", architectures),
        ("CUDA simulator", "built" if simulator.is_available() else "not built"),
        ("CPU instruction sets found", ", ".join(found)),
        ("CPU instruction set chosen", f"{_C.cpu_isa()} (FUSED_PEFT_CPU_ISA overrides)"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
        ("", ""),
        ("op", "served by"),
        ("lora_linear, lora_update and their backward passes", ""),
        *kernels,
        (
            f"  lora_linear: cuda bfloat16, float16, r <= {_C.cuda_max_rank}",
            "CUDA kernels (sm_80 and newer)" if info["cuda_architectures"] else "not built",
        ),
        (f"  float64, other devices, r > {ops.MAX_RANK}", "fused_peft.reference (torch ops)"),
        ("prefix_attention, prefix_attention_backward", ""),
        *kernels,
        (
            f"  cuda bfloat16, float16, heads of multiples of 8 up to {ops.MAX_HEAD_DIM}",
            "CUDA kernels (sm_80 and newer)" if info["cuda_architectures"] else "not built",
        ),
        (
            f"  float64, other devices, heads wider than {ops.MAX_HEAD_DIM}",
            "fused_peft.reference (torch ops)",
        ),
        ("rms_norm, swiglu, cross_entropy and their backward passes", ""),
        ("  cpu float32, bfloat16, float16", f"{_C.cpu_isa()} kernels"),
        ("  float64, other devices", "fused_peft.reference (torch ops)"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)


def _half_note(needed: str, native: str, otherwise: str) -> str:
    chosen = _C.cpu_isa()
    return f"{chosen} kernels, {native if chosen == needed else otherwise}"
