"""The LoRA linear op: shape functions, autograd, and the choice between kernel and fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_peft import reference

from ._autograd import DifferentiableOp, Gradients, Kernel
from ._common import (
    KERNEL_DTYPES,
    MAX_RANK,
    autocast,
    autocast_dtype,
    check_dropout,
    differentiated_otherwise,
)
from ._devices import CUDA_DTYPES, CUDA_MAX_RANK, kernel_device


def fallback_reason(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> str | None:
    """Why no kernel covers these operands, or None where one does.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
    """
    device, reason = kernel_device(x)
    if device is None:
        return reason
    dtype = x.dtype
    if device == "cuda" and dtype not in CUDA_DTYPES:
        return f"x is {dtype}; CUDA kernels exist for bfloat16 and float16"
    if dtype not in KERNEL_DTYPES:
        return f"x is {dtype}; kernels exist for float32, bfloat16 and float16"
    if weight.layout != torch.strided or x.layout != torch.strided:
        return "a sparse operand"
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if factor.dtype != dtype and factor.dtype != torch.float32:
            return f"{name} is {factor.dtype}; kernels take x's dtype or float32"
    if device == "cuda" and lora_a.dtype != lora_b.dtype:
        return f"lora_a is {lora_a.dtype}, lora_b {lora_b.dtype}; CUDA kernels take both alike"
    max_rank = CUDA_MAX_RANK if device == "cuda" else MAX_RANK
    if lora_a.shape[0] > max_rank:
        return f"the rank is {lora_a.shape[0]}; kernels exist up to {max_rank}"
    return None


def _check_operands(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [N, K]")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {k}] for weight [{n}, {k}]")
    if lora_a.dim() != 2 or lora_a.shape[1] != k or lora_a.shape[0] == 0:
        raise ValueError(f"lora_a has shape {tuple(lora_a.shape)}; expected [R, {k}] with R >= 1")
    r = lora_a.shape[0]
    if lora_b.dim() != 2 or lora_b.shape[0] != n or lora_b.shape[1] != r:
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; expected [{n}, {r}]")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected [{n}]")
    device = x.device
    for name, operand in (
        ("weight", weight),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("bias", bias),
    ):
        if operand is not None and operand.device != device:
            raise ValueError(f"{name} is on {operand.device}; expected {device}, where x is")
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight is {weight.dtype}; expected the same dtype")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and bias is {bias.dtype}; expected the same dtype")
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, which this op never forms; "
            "freeze it with weight.requires_grad_(False)"
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + scaling * (drop(x) lora_a^T) lora_b^T`` in one pass over y.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3. Gradients
    exist for x, lora_a, lora_b and bias, each formed only where it is asked for. Under autocast
    x, weight and bias are cast to the autocast dtype unless they are float64; lora_a and lora_b
    keep theirs.

    Args:
        x: ``[..., K]``, any strides. float32, bfloat16 and float16 run the kernels.
        weight: ``[N, K]`` in x's dtype, frozen.
        lora_a: ``[R, K]`` in x's dtype or float32.
        lora_b: ``[N, R]`` in x's dtype or float32.
        bias: ``[N]`` in x's dtype.
        scaling: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        dropout_p: probability that an element of x is dropped before lora_a, in [0, 1).
        seed: int64 tensor with one element (:func:`.new_seed`), needed when ``dropout_p > 0``. The
            mask is a function of the seed and the element's index alone
            (:func:`fused_peft.reference.dropout_keep`).

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype, device, dropout_p or seed does not fit, or weight requires a
            gradient.
        RuntimeError: on a second derivative, which the kernels do not have. Inside ``torch.func``
            transforms and forward-mode AD the plain torch ops run, which have them all.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = autocast(x, dtype), autocast(weight, dtype)
        bias = None if bias is None else autocast(bias, dtype)
    _check_operands(x, weight, lora_a, lora_b, bias)
    check_dropout(dropout_p, seed)
    if fallback_reason(x, weight, lora_a, lora_b) is None and not differentiated_otherwise():
        return _kernels(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    return reference.lora_linear(
        x, weight, lora_a, lora_b, bias, scaling=scaling, dropout_p=dropout_p, seed=seed
    )


# ---- shape functions and autograd ----------------------------------------------------------------


def _fake(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    y = x.new_empty((*rows, weight.shape[0]))
    return y, x.new_empty((*rows, lora_a.shape[0]), dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dlora_a: bool,
    need_dlora_b: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def output(needed: bool, like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return like.new_empty(shape if needed else (0,))

    return (
        output(need_dx, x, x.shape),
        output(need_dlora_a, lora_a, lora_a.shape),
        output(need_dlora_b, lora_b, lora_b.shape),
        output(need_dbias, x, (weight.shape[0],)),
    )


def _save(ctx: Any, operands: tuple[Any, ...], _y: Tensor, s: Tensor) -> None:
    x, weight, lora_a, lora_b, _bias, scaling, dropout_p, seed = operands
    ctx.save_for_backward(x, weight, lora_a, lora_b, s, seed)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p


def _gradients(ctx: Any, dy: Tensor, backward: Kernel) -> Gradients:
    x, weight, lora_a, lora_b, s, seed = ctx.saved_tensors  # may run a checkpointed forward
    need_x, need_weight, *needs = ctx.needs_input_grad[:5]
    if need_weight:
        raise RuntimeError("fused_peft::lora_linear never forms the gradient of weight; freeze it")
    dx, *others = backward(
        dy, x, weight, lora_a, lora_b, s, ctx.scaling, ctx.dropout_p, seed, need_x, *needs
    )
    return (dx, None, *others)


_kernels = DifferentiableOp(
    "lora_linear",
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)
