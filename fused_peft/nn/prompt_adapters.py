"""The prompt adapters of one model and which of them is in force."""

from __future__ import annotations

from torch import nn


class PromptAdapters(nn.Module):
    """``model.prompt_adapters``: prefixes and prompts by name, of which one at most is active.

    Attributes:
        adapters: ModuleDict from adapter name to its PrefixEncoder, PromptEmbedding or
            PromptEncoder.
        active: name of the active one or None.
        enabled: False while adapters are disabled.
    """

    adapters: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True

    @property
    def current(self) -> nn.Module | None:
        """The adapter in force, or None."""
        if self.active is None or not self.enabled:
            return None
        return self.adapters[self.active]

    def add(self, name: str, adapter: nn.Module) -> None:
        """Take an adapter in, neither active nor trainable.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.adapters:
            raise ValueError(f"adapter_name is {name!r}; there is a prompt of that name already")
        self.adapters[name] = adapter.requires_grad_(False)

    def set_adapter(self, name: str | None, *, inference_mode: bool = False) -> None:
        """Make one the active one and train only it; None: none.

        Raises:
            ValueError: the name is unknown.
        """
        if name is not None and name not in self.adapters:
            raise ValueError(f"adapter {name!r} is unknown; there are {list(self.adapters)}")
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name and not inference_mode)
        self.active = name

    def delete(self, name: str) -> None:
        """Drop an adapter; none is active where it was.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in self.adapters:
            raise ValueError(f"adapter {name!r} is unknown; there are {list(self.adapters)}")
        del self.adapters[name]
        if self.active == name:
            self.active = None
