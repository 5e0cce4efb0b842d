"""The ops of layers that have nothing to train: RMS norm, gated SiLU, cross-entropy.

A fine-tuning step runs through them between the adapted layers; each is one pass over memory, with
gradients of the activations only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_peft import reference

from ._autograd import refuse_second_derivative
from ._common import KERNEL_DTYPES, differentiated_otherwise


def _covered(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in KERNEL_DTYPES
        and x.layout == torch.strided
        and not differentiated_otherwise()
    )


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape or tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected "
            f"{other_name}'s {other.dtype} {tuple(other.shape)} on {other.device}"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4. A weight that
    requires a gradient takes plain torch operations, which form it.

    Args:
        x: ``[..., H]``; float32, bfloat16 and float16 run the kernel.
        weight: ``[H]`` in x's dtype or float32.
        eps: added to the mean square, at least 0.

    Returns:
        ``[..., H]`` in x's dtype.

    Raises:
        ValueError: weight is not ``[H]`` on x's device, or eps is negative.
    """
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected x's last dimension, of "
            f"{tuple(x.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; expected {x.device}, where x is")
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}; expected at least 0")
    frozen = not (weight.requires_grad and torch.is_grad_enabled())
    if frozen and weight.dtype in (x.dtype, torch.float32) and _covered(x):
        y, _ = torch.ops.fused_peft.rms_norm.default(x, weight, eps)
        return y  # type: ignore[no-any-return]
    return reference.rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.

    Args:
        gate: any shape; float32, bfloat16 and float16 run the kernel.
        up: gate's shape and dtype.

    Returns:
        gate's shape and dtype, rounded once.

    Raises:
        ValueError: up differs from gate in shape, dtype or device.
    """
    _check_alike("up", up, "gate", gate)
    if _covered(gate):
        return torch.ops.fused_peft.swiglu.default(gate, up)  # type: ignore[no-any-return]
    return reference.swiglu(gate, up)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """``-log softmax(logits)[label]`` of each row, without a float32 copy of the logits.

    Args:
        logits: ``[M, V]``; float32, bfloat16 and float16 run the kernel.
        labels: int64 ``[M]``, each in ``[0, V)`` or ``ignore_index``.
        ignore_index: the label of rows that do not count.

    Returns:
        float32 ``[M]`` (float64 for float64 logits), 0 where the label is ``ignore_index``.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: a label is out of range.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [M, V]")
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; expected int64 of shape "
            f"[{logits.shape[0]}]"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}; expected {logits.device}")
    if _covered(logits):
        loss, _ = torch.ops.fused_peft.cross_entropy.default(logits, labels, ignore_index)
        return loss  # type: ignore[no-any-return]
    return reference.cross_entropy(logits, labels, ignore_index)


# ---- shape functions and autograd ----------------------------------------------------------------


def _contiguous(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _contiguous(x), x.new_empty(x.shape[:-1], dtype=torch.float64)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_backward(
    ctx: Any, dy: Tensor | None, _drstd: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if dy is None:
        return None, None, None
    if ctx.needs_input_grad[1]:
        raise RuntimeError("fused_peft::rms_norm never forms the gradient of weight; freeze it")
    return torch.ops.fused_peft.rms_norm_backward.default(dy, *ctx.saved_tensors), None, None


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fused_peft.swiglu_backward.default(  # type: ignore[no-any-return]
        dy, *ctx.saved_tensors
    )


def _cross_entropy_fake(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float64),
    )


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, lse)


def _cross_entropy_backward(
    ctx: Any, dloss: Tensor | None, _dlse: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if dloss is None:
        return None, None, None
    dlogits = torch.ops.fused_peft.cross_entropy_backward.default(
        dloss, *ctx.saved_tensors, ctx.ignore_index
    )
    return dlogits, None, None


_library = torch.library
_library.register_fake("fused_peft::rms_norm", _rms_norm_fake)
_library.register_fake("fused_peft::rms_norm_backward", lambda dy, x, weight, rstd: _contiguous(x))
_library.register_fake("fused_peft::swiglu", lambda gate, up: _contiguous(gate))
_library.register_fake(
    "fused_peft::swiglu_backward", lambda dy, gate, up: (_contiguous(gate), _contiguous(gate))
)
_library.register_fake("fused_peft::cross_entropy", _cross_entropy_fake)
_library.register_fake(
    "fused_peft::cross_entropy_backward",
    lambda dloss, logits, labels, lse, ignore_index: _contiguous(logits),
)
_library.register_autograd(
    "fused_peft::rms_norm", _rms_norm_backward, setup_context=_rms_norm_setup
)
_library.register_autograd("fused_peft::swiglu", _swiglu_backward, setup_context=_swiglu_setup)
_library.register_autograd(
    "fused_peft::cross_entropy", _cross_entropy_backward, setup_context=_cross_entropy_setup
)
for _name in ("rms_norm", "swiglu", "cross_entropy"):
    refuse_second_derivative(_name)
