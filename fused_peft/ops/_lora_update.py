"""The low-rank update alone, on top of a base output that somebody else computed."""

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


def update_fallback_reason(base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> str | None:
    """Why no kernel covers these operands, or None where one does.

    Args:
        base: ``[..., N]``.
        x: ``[..., K]``.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
    """
    if x.device.type != "cpu":
        return f"x is on {x.device}; kernels exist for: cpu"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}; kernels exist for float32, bfloat16 and float16"
    if base.dtype != x.dtype:
        return f"x is {x.dtype} and the base gave {base.dtype}; kernels take one dtype for both"
    if x.layout != torch.strided or base.layout != torch.strided:
        return "a sparse operand"
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if factor.dtype != x.dtype and factor.dtype != torch.float32:
            return f"{name} is {factor.dtype}; kernels take x's dtype or float32"
    if lora_a.shape[0] > MAX_RANK:
        return f"the rank is {lora_a.shape[0]}; kernels exist up to {MAX_RANK}"
    return None


def _check_operands(base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    if lora_a.dim() != 2 or lora_a.shape[0] == 0:
        raise ValueError(f"lora_a has shape {tuple(lora_a.shape)}; expected [R, K] with R >= 1")
    r, k = lora_a.shape
    if lora_b.dim() != 2 or lora_b.shape[1] != r:
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; expected [N, {r}]")
    n = lora_b.shape[0]
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., {k}] for lora_a [{r}, {k}]")
    if base.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"base has shape {tuple(base.shape)}; expected {(*x.shape[:-1], n)} for x "
            f"{tuple(x.shape)} and lora_b [{n}, {r}]"
        )
    for name, operand in (("base", base), ("lora_a", lora_a), ("lora_b", lora_b)):
        if operand.device != x.device:
            raise ValueError(f"{name} is on {operand.device}; expected {x.device}, where x is")


def lora_update(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = base + scaling * (drop(x) lora_a^T) lora_b^T`` in one pass over base.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3, where the
    product with the weight is not ours to compute: the weight is packed in 4 or 8 bits, say. base
    is left alone. Gradients exist for base (it is y's), x, lora_a and lora_b. Under autocast x is
    cast to the autocast dtype unless it is float64; lora_a and lora_b keep theirs.

    Args:
        base: ``[..., N]``, what the layer computes without the adapter.
        x: ``[..., K]``, any strides. float32, bfloat16 and float16 in base's dtype run the kernels.
        lora_a: ``[R, K]`` in x's dtype or float32.
        lora_b: ``[N, R]`` in x's dtype or float32.
        scaling: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        dropout_p: probability that an element of x is dropped before lora_a, in [0, 1).
        seed: int64 tensor with one element (:func:`.new_seed`), needed when ``dropout_p > 0``; the
            mask is that of :func:`lora_linear`.

    Returns:
        ``[..., N]`` in base's dtype.

    Raises:
        ValueError: a shape, device, dropout_p or seed does not fit.
        RuntimeError: on a second derivative, which the kernels do not have. Inside ``torch.func``
            transforms and forward-mode AD the plain torch ops run, which have them all.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = autocast(x, dtype)
    _check_operands(base, x, lora_a, lora_b)
    check_dropout(dropout_p, seed)
    if update_fallback_reason(base, x, lora_a, lora_b) is None and not differentiated_otherwise():
        return _kernels(base, x, lora_a, lora_b, scaling, dropout_p, seed)
    return reference.lora_update(
        base, x, lora_a, lora_b, scaling=scaling, dropout_p=dropout_p, seed=seed
    )


# ---- shape functions and autograd ----------------------------------------------------------------


def _fake(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    y = x.new_empty((*rows, lora_b.shape[0]))
    return y, x.new_empty((*rows, lora_a.shape[0]), dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dlora_a: bool,
    need_dlora_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        lora_a.new_empty(lora_a.shape if need_dlora_a else (0,)),
        lora_b.new_empty(lora_b.shape if need_dlora_b else (0,)),
    )


def _save(ctx: Any, operands: tuple[Any, ...], _y: Tensor, s: Tensor) -> None:
    _, x, lora_a, lora_b, scaling, dropout_p, seed = operands
    ctx.save_for_backward(x, lora_a, lora_b, s, seed)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p


def _gradients(ctx: Any, dy: Tensor, backward: Kernel) -> Gradients:
    x, lora_a, lora_b, s, seed = ctx.saved_tensors  # may run a checkpointed forward
    needs = ctx.needs_input_grad[1:4]
    if not any(needs):
        return (dy,)
    return (dy, *backward(dy, x, lora_a, lora_b, s, ctx.scaling, ctx.dropout_p, seed, *needs))


_kernels = DifferentiableOp(
    "lora_update",
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
    cuda=False,
)
