"""A prompt that an MLP or an LSTM computes: the module of P-tuning."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapter_spec import check_rank
from .prompt_embedding import PromptConfig, PromptEmbedding


class PromptEncoderSizes(PromptConfig, Protocol):
    """What :class:`PromptEncoder` reads of a config."""

    encoder_reparameterization_type: str
    encoder_hidden_size: Any
    encoder_num_layers: int
    encoder_dropout: float


class PromptEncoder(PromptEmbedding):
    """The prompt encoder of P-tuning; Liu et al., "GPT Understands, Too", 2021, section 3.2.

    The layers, and so the names of ``encoder_state()``, are those of PEFT (and NeMo): for "MLP"
    ``Linear(in, h) ReLU Linear(h, h) ReLU Linear(h, out)``, for "LSTM" a bidirectional LSTM of
    ``encoder_num_layers`` and ``Linear(2h, 2h) ReLU Linear(2h, out)``, applied to the embedding.

    Attributes:
        embedding: the encoder's input, or the prompt itself once it is folded.
        lstm_head: None for "MLP" or once it is folded.
        mlp_head: None once it is folded.

    Args:
        config: with the sizes of the model filled in; encoder_hidden_size None is token_dim.
        dtype: of the parameters.
        device: of the parameters.
    """

    lstm_head: nn.LSTM | None
    mlp_head: nn.Sequential | None

    def __init__(
        self,
        config: PromptEncoderSizes,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, dtype=dtype, device=device)
        size, given = self.token_dim, config.encoder_hidden_size
        hidden = size if given is None else check_rank("encoder_hidden_size", given)
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.lstm_head = None
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                size,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
                **factory,
            )
            self.mlp_head = nn.Sequential(
                nn.Linear(2 * hidden, 2 * hidden, **factory),
                nn.ReLU(),
                nn.Linear(2 * hidden, size, **factory),
            )
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(size, hidden, **factory),
                nn.ReLU(),
                nn.Linear(hidden, hidden, **factory),
                nn.ReLU(),
                nn.Linear(hidden, size, **factory),
            )

    @property
    def folded(self) -> bool:
        """Whether the embedding is the prompt itself."""
        return self.mlp_head is None

    def forward(self) -> Tensor:
        """All rows of the prompt, ``[rows, token_dim]`` in the parameters' dtype."""
        rows: Tensor = self.embedding.weight
        if self.mlp_head is None:
            return rows
        if self.lstm_head is not None:
            rows = self.lstm_head(rows[None])[0][0]
        result: Tensor = self.mlp_head(rows)
        return result

    def _drop_encoder(self) -> None:
        self.lstm_head, self.mlp_head = None, None
