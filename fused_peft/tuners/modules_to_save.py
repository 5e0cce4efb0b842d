"""Modules that are trained and saved whole beside the adapters, such as a new classifier head."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModulesToSaveWrapper(nn.Module):
    """Stands in a model for a module of which every adapter has a trainable copy of its own.

    Forward runs the active adapter's copy, or the original where no adapter with a copy is active
    or adapters are disabled. Other attributes (``weight``, ``out_features`` ...) are those of the
    module that forward runs. Names and state-dict keys are PEFT's.

    Attributes:
        original_module: the model's own module, frozen.
        modules_to_save: ModuleDict from adapter name to that adapter's copy.

    Args:
        module: what to wrap. It is run as before until an adapter is added and set.
    """

    original_module: nn.Module
    modules_to_save: nn.ModuleDict

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active: str | None = None
        self._enabled = True
        self.training = module.training

    @property
    def active_adapter(self) -> str | None:
        """The adapter whose copy forward runs, or None for the original."""
        return self._active

    @property
    def adapters_enabled(self) -> bool:
        """Whether forward runs the active adapter's copy."""
        return self._enabled

    def add_adapter(self, name: str, copied: nn.Module) -> None:
        """Give an adapter its copy of the original, neither active nor trainable.

        Raises:
            ValueError: the adapter has one already.
        """
        if name in self.modules_to_save:
            raise ValueError(f"adapter_name is {name!r}; it has a copy of this module already")
        self.original_module.requires_grad_(False)
        self.modules_to_save[name] = copied.requires_grad_(False)

    def set_adapter(self, name: str | None, *, inference_mode: bool = False) -> None:
        """Run the copy of adapter ``name``, and train only it; None runs the original.

        Raises:
            ValueError: that adapter has no copy.
        """
        if name is not None and name not in self.modules_to_save:
            raise ValueError(
                f"adapter {name!r} has no copy; there are {list(self.modules_to_save)}"
            )
        for other, module in self.modules_to_save.items():
            module.requires_grad_(other == name and not inference_mode)
        self._active = name

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter's copy; the original is run where it was active.

        Raises:
            ValueError: that adapter has no copy.
        """
        if name not in self.modules_to_save:
            raise ValueError(
                f"adapter {name!r} has no copy; there are {list(self.modules_to_save)}"
            )
        del self.modules_to_save[name]
        if self._active == name:
            self._active = None

    def enable_adapters(self, enabled: bool) -> None:
        """Run the active adapter's copy, or the original."""
        self._enabled = bool(enabled)

    def current_module(self) -> nn.Module:
        """The module that forward runs."""
        if self._active is None or not self._enabled:
            return self.original_module
        return self.modules_to_save[self._active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What :meth:`current_module` gives."""
        return self.current_module()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ (copying, unpickling) there is nothing to look in.
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.current_module(), name)
