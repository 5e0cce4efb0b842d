"""Trainable rows of input embeddings: the module of prompt tuning."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapter_spec import check_rank


class PromptConfig(Protocol):
    """What :class:`PromptEmbedding` reads of a config."""

    num_virtual_tokens: int
    token_dim: Any
    num_transformer_submodules: Any


class PromptEmbedding(nn.Module):
    """A prompt of trainable embeddings.

    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021.

    Attributes:
        config: what it was made from.
        embedding: ``Embedding(rows, token_dim)``, with rows = num_virtual_tokens *
            num_transformer_submodules as in PEFT's files; the first num_virtual_tokens are used.

    Args:
        config: with the sizes of the model filled in.
        dtype: of the parameters; float32 as in PEFT, whatever the model has.
        device: of the parameters.

    Raises:
        TypeError, ValueError: a size is missing or below 1; the message names it.
    """

    def __init__(
        self,
        config: PromptConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_virtual_tokens = check_rank("num_virtual_tokens", config.num_virtual_tokens)
        self.token_dim = check_rank("token_dim", config.token_dim)
        submodules = config.num_transformer_submodules
        submodules = check_rank("num_transformer_submodules", submodules)
        rows = self.num_virtual_tokens * submodules
        self.embedding = nn.Embedding(rows, self.token_dim, dtype=dtype, device=device)

    @property
    def folded(self) -> bool:
        """Whether the embedding is the prompt itself."""
        return True

    def forward(self) -> Tensor:
        """All rows of the prompt, ``[rows, token_dim]`` in the parameters' dtype."""
        return self.embedding.weight

    def virtual_tokens(self) -> Tensor:
        """The rows that enter the model, ``[num_virtual_tokens, token_dim]``."""
        rows: Tensor = self()
        return rows[: self.num_virtual_tokens]

    def prompt_embeddings(self) -> Tensor:
        """The prompt without dropout, as PEFT saves it: detached ``[rows, token_dim]``."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                rows: Tensor = self()
                return rows.detach().clone()
        finally:
            self.train(training)

    def load_prompt_embeddings(self, embeddings: Tensor) -> None:
        """Take over what :meth:`prompt_embeddings` gave; folds the module.

        Raises:
            ValueError: the shape is another or it is no floating-point tensor. Nothing is changed.
        """
        expected = tuple(self.embedding.weight.shape)
        if tuple(embeddings.shape) != expected or not embeddings.is_floating_point():
            raise ValueError(
                f"prompt_embeddings is {embeddings.dtype} of shape {tuple(embeddings.shape)}; "
                f"expected floating point of shape {expected}, [num_virtual_tokens * "
                "num_transformer_submodules, token_dim]"
            )
        self._drop_encoder()
        with torch.no_grad():
            self.embedding.weight.copy_(embeddings)

    def encoder_state(self) -> dict[str, Tensor]:
        """What training needs beyond the prompt, detached, under PEFT's names; empty if folded."""
        if self.folded:
            return {}
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def load_encoder_state(self, state: dict[str, Tensor]) -> None:
        """Set the encoder from what :meth:`encoder_state` gave.

        Raises:
            ValueError: a name is missing or unknown, or a shape is another. Nothing is changed.
        """
        expected = self.encoder_state()
        for name in sorted(expected.keys() ^ state.keys()):
            problem = "is missing" if name in expected else "is unknown"
            raise ValueError(f"encoder state {name!r} {problem}; expected {sorted(expected)}")
        for name, tensor in expected.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"encoder state {name!r} has shape {tuple(state[name].shape)}; expected "
                    f"{tuple(tensor.shape)}"
                )
        if expected:
            self.load_state_dict(state)

    def fold_reparameterization(self) -> None:
        """Replace an encoder by the prompt that it gives. Idempotent."""
        if not self.folded:
            self.load_prompt_embeddings(self.prompt_embeddings())

    def _drop_encoder(self) -> None:
        """Leave the embedding alone."""

    def extra_repr(self) -> str:
        """The sizes."""
        return f"num_virtual_tokens={self.num_virtual_tokens}, token_dim={self.token_dim}"
