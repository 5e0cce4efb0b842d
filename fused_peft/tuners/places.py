"""Puts new modules in the place of old ones, and knows which modules share a weight."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .modules_to_save import ModulesToSaveWrapper

Places = dict[int, list[tuple[nn.Module, str]]]


class Sharing:
    """Which modules of a model hold the same weight."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[tuple[str, int], list[tuple[str, nn.Module]]] = {}
        for path, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._holders.setdefault(self._key(parameter), []).append((path, module))

    @staticmethod
    def _key(parameter: Tensor) -> tuple[str, int]:
        # By memory, since two Parameters can share one. Tensor subclasses and meta tensors have
        # none that can be asked for.
        if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel():
            return str(parameter.device), parameter.data_ptr()
        return "object", id(parameter)

    def refuse(self, path: str, module: nn.Module, what: str) -> None:
        """Raise ValueError where another module would change along with ``module``."""
        weight = module._parameters["weight"]
        assert weight is not None
        others = [p for p, m in self._holders[self._key(weight)] if m is not module]
        if others:
            raise ValueError(
                f"{what} would change the weight of {path!r}, which {', '.join(map(repr, others))} "
                "shares; expected a weight that only one module has"
            )


def refuse_wrapped(model: nn.Module, what: str, *, replicated: bool = True) -> None:
    """Raise ValueError where ``what`` comes too late, for the model is distributed already.

    Args:
        model: which is looked through.
        what: in words, for the message.
        replicated: DistributedDataParallel is refused, too, not only FSDP.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for path, module in model.named_modules():
        name = repr(path) if path else "the model"
        if replicated and isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"{name} is wrapped by DistributedDataParallel; {what} comes before")
        if isinstance(module, sharded):
            raise ValueError(f"{name} is sharded by FSDP; {what} comes before")


def save_modules(
    name: str,
    saved: dict[str, nn.Module],
    copies: dict[str, nn.Module],
    places: Places,
) -> None:
    """Give adapter ``name`` its copy of each module in ``saved``, wrapping those not wrapped."""
    for path, module in saved.items():
        if isinstance(module, ModulesToSaveWrapper):
            wrapper = module
        else:
            wrapper = ModulesToSaveWrapper(module)
        wrapper.add_adapter(name, copies[path])
        put_module(places, module, wrapper)


def original_module(module: nn.Module) -> nn.Module:
    """What a wrapper stands for, or the module itself."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def find_places(model: nn.Module) -> Places:
    """By a module's id, every parent that holds it and the name there: modules can be shared."""
    places: Places = {}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, child_name))
    return places


def put_module(places: Places, old: nn.Module, new: nn.Module) -> None:
    """Let every parent of ``old`` hold ``new`` in its place."""
    if new is old:
        return
    for parent, child_name in places[id(old)]:
        setattr(parent, child_name, new)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its inference fast path reads the weights past the layers, unless one has a hook.
            new.register_forward_hook(_stay_in_view)


def _stay_in_view(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing."""
