"""What of a model is trained, and whether an optimizer trains it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..nn.lora_layer import LoraLayer

_MARK = "_fused_peft_frozen"
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_watching = False


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient: what an optimizer should be given.

    Raises:
        ValueError: there are none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError(
            f"model {type(model).__name__} has no parameter that requires a gradient; expected one "
            "with an adapter that is trained: get_peft_model, set_adapter, or load_adapter with "
            "is_trainable=True"
        )
    return found


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whether a step of ``optimizer`` trains all that ``model`` is to learn.

    A frozen parameter among the others does no harm: it has no gradient, and is passed over.

    Raises:
        TypeError: ``optimizer`` is no optimizer. ValueError: it has none of the model's trainable
            parameters, or lacks one of them; or adapters are merged into their weights, where
            nothing trains them; or the model has nothing to train.
    """
    given = {id(p) for group in _groups(optimizer) for p in group["params"]}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise ValueError(
                f"adapters {module.merged_adapters} are merged into the weight of {path!r}, where "
                "they get no gradient; call unmerge_adapter(model) before training"
            )
    trainable_parameters(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in named.items() if id(parameter) not in given]
    if len(missing) == len(named):
        raise ValueError(
            f"optimizer has {len(given)} parameters and none of the {len(named)} that are trained "
            f"({missing[0]!r} ...); was it made before the adapter? Make it afterwards: "
            "optimizer = AdamW(trainable_parameters(model))"
        )
    if missing:
        raise ValueError(
            f"optimizer lacks {len(missing)} of the {len(named)} parameters that are trained, "
            f"{missing[0]!r} among them; expected all of trainable_parameters(model)"
        )


def _groups(optimizer: object) -> list[dict[str, Any]]:
    groups: object = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch optimizer")
    return groups


def freeze(model: nn.Module) -> None:
    """Let nothing in the model require a gradient, and notice optimizers that were given it.

    An optimizer made before the adapter holds frozen parameters only: without a gradient each of
    its steps would pass over all of them, and training would do nothing, silently.
    """
    global _watching
    model.requires_grad_(False)
    for parameter in model.parameters():
        setattr(parameter, _MARK, True)
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_frozen)
        _watching = True


def _refuse_frozen(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before the first step of every optimizer: raise ValueError where all it has was frozen."""
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    given = [p for group in optimizer.param_groups for p in group["params"]]
    if given and all(getattr(p, _MARK, False) and not p.requires_grad for p in given):
        raise ValueError(
            f"all {len(given)} parameters of this {type(optimizer).__name__} are frozen: it was "
            "made before the adapter, or given the base model's parameters. Make it afterwards: "
            "optimizer = AdamW(trainable_parameters(model))"
        )
    _seen.add(optimizer)


def get_nb_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable parameters and of all parameters; shared ones count once."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print both numbers of :func:`get_nb_trainable_parameters` and their ratio, as PEFT does."""
    trainable, total = get_nb_trainable_parameters(model)
    percent = 100 * trainable / total if total else 0.0
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}"
    )
