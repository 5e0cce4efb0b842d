"""Hugging Face PEFT models on this package's kernels, in place: one line for a PEFT user.

:func:`fuse` gives the LoRA layers of a PEFT model a forward of ours and its prefix-tuned attention
the prefix unconcatenated; :func:`unfuse` takes both away; :func:`fused` does it for every PEFT
model made within. What a model has (parameters, state dict, hooks, config) and every method of
PEFT stay PEFT's: loading, saving, merging, swapping and mixing adapters go on as before.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

_Model = TypeVar("_Model", bound=nn.Module)

_in_force: ContextVar[bool] = ContextVar("fused_peft.integrations.peft.fused", default=False)
_lock = threading.Lock()
_entered = 0
_former: dict[tuple[type, str], Callable[..., Any]] = {}


def fuse(model: _Model) -> _Model:
    """Run a PEFT model's LoRA layers and prefix-tuned attention through the fused ops, in place.

    * LoRA: every ``peft.tuners.lora.Linear`` over an ``nn.Linear`` or transformers' Conv1D becomes
      an instance of a subclass whose forward is :func:`fused_peft.ops.lora_linear`. Merged and
      disabled adapters, ``adapter_names``, DoRA and other variants, and whatever the op has no
      kernel for run PEFT's own forward; :func:`fused_peft.explain` says which and why. So do other
      PEFT layers, which stay as they are. Layers that a later ``add_adapter`` makes are fused, too.
    * Prefix tuning: the attention of a decoder without sliding windows or relative position bias
      runs :func:`fused_peft.prefix_attention`, the prefix not concatenated to keys and values.

    Values and gradients are those of PEFT up to rounding, which happens less often in bfloat16 and
    float16. Dropout has the same probability and another mask. The fused ops have no second
    derivative.

    Args:
        model: from ``get_peft_model``, ``PeftModel.from_pretrained``, ``inject_adapter_in_model``
            or a transformers model's ``add_adapter``. Fusing it again changes nothing.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no PEFT model.
        ValueError: nothing in it can be fused; the message says why. It is as before then.
        ImportError: PEFT is not installed.
    """
    from fused_peft.integrations import _peft_linear, _peft_prefix

    _check(model)
    reasons = _peft_linear.unfusable_layers(model)
    prefix = "it is not prefix-tuned"
    if _peft_prefix.is_prefix_tuned(model):
        prefix = _peft_prefix.fuse_prefix(model) or ""
    if prefix and not _peft_linear.has_fusable_layer(model):
        raise ValueError(
            f"model {_name(model)} has nothing that can be fused. LoRA layers: "
            f"{reasons or 'none'}. Prefix: {prefix}"
        )
    _fuse_layers(model)
    return model


def unfuse(model: _Model) -> _Model:
    """Undo :func:`fuse` or :func:`fused`; what is not fused stays as it is.

    Args:
        model: a PEFT model.

    Returns:
        ``model``, its layers PEFT's own classes.

    Raises:
        TypeError: ``model`` is no PEFT model.
    """
    from fused_peft.integrations import _peft_linear, _peft_prefix

    _check(model)
    for module in model.modules():
        _peft_linear.unfuse_layer(module)
        injection = module.__dict__.get("inject_adapter")
        if isinstance(injection, functools.partial) and injection.func is _inject_and_fuse:
            del module.inject_adapter
        if _peft_prefix.is_fused(module):
            _peft_prefix.unfuse_prefix(module)
    return model


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """Within the context every model that gets a PEFT adapter is fused, as by :func:`fuse`.

    That is whatever ``get_peft_model``, ``PeftModel.from_pretrained``, ``add_adapter``,
    ``load_adapter`` or ``inject_adapter_in_model`` makes or adds to; a model without anything to
    fuse stays as it is. The models stay fused afterwards. The context holds for the thread or task
    that entered it; contexts may be nested.

    Raises:
        ImportError: PEFT is not installed.
    """
    _patch()
    token = _in_force.set(True)
    try:
        yield
    finally:
        _in_force.reset(token)
        _unpatch()


def _name(model: object) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _check(model: nn.Module) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    expected = "expected a model made by peft.get_peft_model or PeftModel.from_pretrained"
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {_name(model)}; {expected}")
    if isinstance(model, (PeftModel, BaseTuner)):
        return
    if not any(isinstance(module, (BaseTunerLayer, PeftModel)) for module in model.modules()):
        raise TypeError(f"model is a {_name(model)} without any PEFT layer; {expected}")


def _fuse_layers(model: nn.Module) -> None:
    """The LoRA layers that are there, and those that the model's tuners will make."""
    from peft.tuners.lora import LoraModel

    from fused_peft.integrations import _peft_linear

    for module in model.modules():
        _peft_linear.fuse_layer(module)
        if isinstance(module, LoraModel):
            _fuse_later_layers(module)


def _fuse_later_layers(tuner: Any) -> None:
    if "inject_adapter" not in tuner.__dict__:
        # A partial of a function of this file: a bound method could not be pickled.
        tuner.inject_adapter = functools.partial(_inject_and_fuse, tuner)


def _inject_and_fuse(tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    type(tuner).inject_adapter(tuner, model, *args, **kwargs)
    _fuse_layers(model)


# ---- the context manager's hold on PEFT ----------------------------------------------------------


def _patch() -> None:
    """Wrap the methods through which PEFT gives adapters to models, once for all contexts."""
    global _entered
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    with _lock:
        _entered += 1
        if _entered == 1:
            for owner, name, after in (
                (BaseTuner, "inject_adapter", _after_injection),
                (PeftModel, "add_adapter", _after_adding),
            ):
                _former[owner, name] = owner.__dict__[name]
                setattr(owner, name, _followed_by(after, owner.__dict__[name]))


def _unpatch() -> None:
    global _entered
    with _lock:
        _entered -= 1
        if _entered == 0:
            for (owner, name), former in _former.items():
                # Someone else's wrapper around ours stays: without a context ours does nothing.
                if getattr(owner.__dict__[name], "__wrapped__", None) is former:
                    setattr(owner, name, former)
            _former.clear()


def _followed_by(after: Callable[..., None], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if _in_force.get():
            after(self, *args, **kwargs)
        return result

    return wrapper


def _after_injection(tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    from peft.tuners.lora import LoraModel

    _fuse_layers(model)
    if isinstance(tuner, LoraModel):
        _fuse_later_layers(tuner)


def _after_adding(peft_model: Any, *args: Any, **kwargs: Any) -> None:
    from fused_peft.integrations import _peft_prefix

    if _peft_prefix.is_prefix_tuned(peft_model):
        _peft_prefix.fuse_prefix(peft_model)
