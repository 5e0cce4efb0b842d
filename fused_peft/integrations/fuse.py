"""Fused ops for what fine-tuning leaves frozen in a transformers model.

Beside the adapted layers a training step spends its time in the attention, RMS norms, gated MLPs
and the loss. :func:`fuse_model` makes those of a model run through :mod:`fused_peft.ops`.
Parameters, submodules, hooks and state dict stay as they are: a module gets an instance attribute
``forward``, which :func:`unfuse_model` takes away again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_peft import ops
from fused_peft.integrations import transformers as attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMER = "_fused_peft_former"
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fuse_model(model: nn.Module) -> dict[str, int]:
    """Run a transformers model's frozen layers through the package's ops, in place.

    * attention: as :func:`fused_peft.use_fused_attention`, where the model allows it;
    * RMS norms: those that compute ``weight * x / sqrt(mean(x^2) + eps)``;
    * gated MLPs: ``down_proj(silu(gate_proj(x)) * up_proj(x))``, whose projections may be adapted
      before or afterwards;
    * the loss of a causal language model, where it is transformers' ForCausalLMLoss: the same
      arguments and results, without a float32 copy of the logits.

    Norms and MLPs are recognised by what they compute: each is tried on random input, and left as
    it is if the result is another one. So is a module whose ``forward`` was replaced already (by
    accelerate's hooks, for example). Results are those of the model as it was up to rounding, which
    happens less often in bfloat16 and float16. A norm whose weight is trained stays right, at the
    speed of plain torch. The ops have no second derivative, and a hook that is put on an MLP's
    ``act_fn`` after fusing does not run.

    Args:
        model: a transformers model, with adapters or without. Fusing it again changes nothing.

    Returns:
        ``{"attention": layers, "rms_norm": norms, "mlp": MLPs, "loss": 0 or 1}``, how many places
        of the model are fused now.

    Raises:
        TypeError: ``model`` is no transformers model.
        ImportError: transformers is older than 5.0.
    """
    transformers_model = _checked(model)
    counts = {"attention": _fuse_attention(transformers_model), "rms_norm": 0, "mlp": 0}
    for module in model.modules():
        if "forward" not in module.__dict__:
            if _is_rms_norm(module):
                module.forward = functools.partial(_rms_norm_forward, module)
            elif _is_gated_mlp(module):
                module.forward = functools.partial(_mlp_forward, module)
        function = _fused_function(module)
        counts["rms_norm"] += function is _rms_norm_forward
        counts["mlp"] += function is _mlp_forward
    return {**counts, "loss": _fuse_loss(transformers_model)}


def unfuse_model(model: nn.Module) -> None:
    """Undo :func:`fuse_model`. A model that is not fused stays as it is.

    The attention stays the fused one where it was before, and where prefix tuning needs it.

    Args:
        model: a transformers model.

    Raises:
        TypeError: ``model`` is no transformers model.
    """
    transformers_model = _checked(model)
    for module in model.modules():
        if _fused_function(module) is not None:
            del module.forward
    former = model.__dict__.pop(_FORMER, {})
    if model.__dict__.get("_loss_function") is causal_lm_loss:
        del transformers_model._loss_function
        if former.get("loss") is not None:
            transformers_model.loss_function = former["loss"]
    prefixed = any(attention._ATTRIBUTE in module.__dict__ for module in model.modules())
    implementation = former.get("attention")
    if implementation is not None and not prefixed and _runs_fused_attention(transformers_model):
        transformers_model.set_attn_implementation(implementation)
        model.__dict__.pop(attention._REGISTRATION, None)


def _checked(model: nn.Module) -> PreTrainedModel:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers model")
    return model


# ---- attention -----------------------------------------------------------------------------------


def _runs_fused_attention(model: PreTrainedModel) -> bool:
    return bool(model.config._attn_implementation == attention.NAME)


def _fuse_attention(model: PreTrainedModel) -> int:
    """The number of attention modules that run fused."""
    if not _runs_fused_attention(model):
        if not model._can_set_attn_implementation():
            return 0
        former = {"": model.config._attn_implementation}
        for name in getattr(model.config, "sub_configs", {}):
            part = getattr(model.config, name, None)
            if part is not None:
                former[name] = part._attn_implementation
        attention.use_fused_attention(model)
        model.__dict__.setdefault(_FORMER, {})["attention"] = former
    # BertAttention holds a BertSelfAttention: the innermost one is the layer's attention.
    return sum(
        [_is_attention(part) for part in module.modules()].count(True) == 1
        for module in model.modules()
        if _is_attention(module)
    )


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


# ---- norms and MLPs ------------------------------------------------------------------------------


def _fused_function(module: nn.Module) -> Any:
    """The function of this file that the module runs, or None."""
    forward = module.__dict__.get("forward")
    function = forward.func if isinstance(forward, functools.partial) else None
    return function if function in (_rms_norm_forward, _mlp_forward) else None


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


# The methods are partials of functions of this file, not bound methods: those cannot be pickled
# unless they are found under their name in the module's class.


def _rms_norm_forward(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    # One argument, which model classes name differently.
    (x,) = (*args, *kwargs.values())
    weight: Any = module.weight
    if x.dtype != weight.dtype:
        # Which dtype then comes out differs between model classes.
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return ops.rms_norm(x, weight, _eps(module))


def _mlp_forward(module: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype == up.dtype and gate.shape == up.shape:
        hidden = ops.swiglu(gate, up)
    else:
        hidden = module.act_fn(gate) * up
    return module.down_proj(hidden)  # type: ignore[no-any-return]


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes what :func:`_rms_norm_forward` does."""
    weight, eps = module._parameters.get("weight"), _eps(module)
    if (
        "RMSNorm" not in type(module).__name__
        or set(module._parameters) != {"weight"}
        or weight is None
        or weight.dim() != 1
        or module._buffers
        or module._modules
        or not isinstance(eps, float)
        or not eps >= 0.0
        or not _takes_one_argument(module)
    ):
        return False
    draw = _Draw()
    width = weight.shape[0]
    # Rows in which eps counts for nothing, for some and for nearly all.
    x = draw(2, 4, width) * _column(1.0, eps**0.5, 0.1 * eps**0.5, 30.0)
    probed = draw(width)
    expected = probed.double() * x.double() * (x.double().square().mean(-1, True) + eps).rsqrt()
    trial = copy.copy(module)
    trial.__dict__["_parameters"] = {"weight": nn.Parameter(probed, requires_grad=False)}
    return _gives(trial, x, expected)


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether the module computes what :func:`_mlp_forward` does."""
    act = module._modules.get("act_fn")
    if (
        set(module._modules) != _MLP_PARTS
        or act is None
        or module._parameters
        or module._buffers
        or act._parameters
        or act._forward_hooks
        or act._forward_pre_hooks
        or act._backward_hooks
        or act._backward_pre_hooks
        or not _takes_one_argument(module)
    ):
        return False
    draw = _Draw()
    x = draw(2, 4, 5) * _column(0.1, 1.0, 5.0, 30.0)  # to see limits, too
    trial = copy.copy(module)
    parts: dict[str, nn.Module] = {"act_fn": act}
    for name, (inside, outside) in {"gate": (5, 7), "up": (5, 7), "down": (7, 5)}.items():
        part = nn.Linear(inside, outside, device="meta")
        for kind, shape in (("weight", (outside, inside)), ("bias", (outside,))):
            setattr(part, kind, nn.Parameter(draw(*shape), requires_grad=False))
        parts[f"{name}_proj"] = part
    trial.__dict__["_modules"] = parts
    gate, up, down = (copy.deepcopy(parts[f"{name}_proj"]) for name in ("gate", "up", "down"))
    wide = x.double()
    expected = down.double()(F.silu(gate.double()(wide)) * up.double()(wide))
    return _gives(trial, x, expected)


class _Draw:
    """Random float32 tensors on the CPU, whatever torch's defaults are; the same at every trial."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")


def _column(*scales: float) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device="cpu")[:, None]


def _takes_one_argument(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())
    return len(parameters) == 2 and parameters[1].kind is parameters[1].POSITIONAL_OR_KEYWORD


def _gives(trial: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether a stand-in computes ``expected`` up to float32 rounding."""
    try:
        with torch.no_grad(), torch.random.fork_rng([]), torch.autocast("cpu", enabled=False):
            # Not trial(x): no hooks.
            result = type(trial).forward(trial, x)
    except Exception:  # whatever it wants is not what the fused function would give it
        return False
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return False
    error = (result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool((error < 1e-5).all())


# ---- the loss ------------------------------------------------------------------------------------


def _fuse_loss(model: PreTrainedModel) -> int:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    given = model.__dict__.get("_loss_function")
    if given is causal_lm_loss:
        return 1
    # As model.loss_function, which warns where it takes the default.
    kind = getattr(model, "loss_type", None) or ""
    used = given or LOSS_MAPPING.get(kind, LOSS_MAPPING["ForCausalLM"])
    # Other classes have the attribute, too, and a loss of their own or none.
    calls = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
    if used is not ForCausalLMLoss or not calls:
        return 0
    model.__dict__.setdefault(_FORMER, {})["loss"] = given
    model.loss_function = causal_lm_loss
    return 1


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss ForCausalLMLoss of transformers through :func:`fused_peft.ops.cross_entropy`.

    Args:
        logits: ``[..., S, vocab_size]``.
        labels: int64 ``[..., S]``, the tokens at the logits' own positions.
        vocab_size: V.
        num_items_in_batch: what the summed loss is divided by; None for the mean over the labels
            that are not ignored.
        ignore_index: the label of positions that do not count.
        shift_labels: int64 ``[..., S]``, the tokens after the logits' positions, instead of labels.
        **kwargs: transformers' other arguments, which do not matter.

    Returns:
        A float32 scalar; NaN for the mean over no labels.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if logits.dtype == torch.float64:
        logits = logits.float()  # as transformers
    targets = shift_labels.reshape(-1).to(logits.device)
    total = ops.cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index).sum()
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
