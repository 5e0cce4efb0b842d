"""Trainable keys and values for every attention layer of a model: the module of prefix tuning."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter_spec import check_dropout, check_rank


@runtime_checkable
class PrefixConfig(Protocol):
    """What :class:`PrefixEncoder` reads of a config."""

    num_virtual_tokens: int
    num_layers: Any
    num_attention_heads: Any
    token_dim: Any
    prefix_projection: bool
    encoder_hidden_size: Any
    prefix_dropout: float
    prefix_init: str
    num_transformer_submodules: Any


class PrefixEncoder(nn.Module):
    """Prefix keys and values of all layers; Li and Liang, "Prefix-Tuning", 2021.

    Without projection the trainable tensors are the keys and values themselves. With it, section
    4.3 of the paper: ``MLP(E)`` with ``Embedding(P, token_dim) -> Linear(hidden) -> Tanh ->
    Linear(2 * layers * token_dim)``, of which :meth:`fold_reparameterization` keeps the result.
    A layer's part is computed from the parameters whenever that layer asks for it, and only that
    part: the tensors, and the last linear map, are kept layer by layer, since a slice of one big
    parameter would have a gradient as big as the parameter.

    Attributes:
        config: what it was made from.
        prefix: one parameter ``[2, Hkv, P, D]`` a layer, keys then values; empty while the
            prefix is reparameterised.
        embedding: ``[P, token_dim]``, None without reparameterisation.
        hidden: ``Linear(token_dim, encoder_hidden_size)``, None without reparameterisation.
        outputs: one ``Linear(encoder_hidden_size, 2 * token_dim)`` a layer; empty without.

    Args:
        config: of prefix tuning, with the sizes of the model filled in: ``num_virtual_tokens``
            P >= 1, ``num_layers``, ``num_attention_heads`` (key/value heads, Hkv), ``token_dim``
            (Hkv D), ``prefix_projection``, ``encoder_hidden_size`` (``token_dim`` if None),
            ``prefix_dropout``, ``prefix_init``: "random" is PEFT's N(0, 1), or torch's start of
            the layers of the MLP; "zero" makes keys and values 0; anything else starts as
            "random" and waits for :meth:`start_from`.
        dtype: of the parameters; float32 as in PEFT, whatever the model has.
        device: of the parameters.

    Raises:
        TypeError, ValueError: a size is missing, below 1 or does not divide; the message names it.
    """

    embedding: nn.Parameter | None
    hidden: nn.Linear | None

    def __init__(
        self,
        config: PrefixConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        P = check_rank("num_virtual_tokens", config.num_virtual_tokens)
        self.num_virtual_tokens = P
        self.num_layers = check_rank("num_layers", config.num_layers)
        self.num_heads = check_rank("num_attention_heads", config.num_attention_heads)
        self.token_dim = check_rank("token_dim", config.token_dim)
        if self.token_dim % self.num_heads:
            raise ValueError(
                f"token_dim is {self.token_dim}; expected a multiple of num_attention_heads, "
                f"{self.num_heads}"
            )
        self.head_dim = self.token_dim // self.num_heads
        self.dropout = check_dropout("prefix_dropout", config.prefix_dropout)
        self.prefix = nn.ParameterList()
        self.outputs = nn.ModuleList()
        self.embedding, self.hidden = None, None
        zero = config.prefix_init == "zero"
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        if config.prefix_projection:
            size = config.encoder_hidden_size
            size = self.token_dim if size is None else check_rank("encoder_hidden_size", size)
            self.embedding = nn.Parameter(torch.randn(P, self.token_dim, **factory))
            self.hidden = nn.Linear(self.token_dim, size, **factory)
            for _ in range(self.num_layers):
                output = nn.Linear(size, 2 * self.token_dim, **factory)
                if zero:
                    nn.init.zeros_(output.weight)
                    nn.init.zeros_(output.bias)
                self.outputs.append(output)
        else:
            make = torch.zeros if zero else torch.randn
            for _ in range(self.num_layers):
                self.prefix.append(nn.Parameter(make(self._layer_shape(), **factory)))

    @property
    def folded(self) -> bool:
        """Whether the parameters are the keys and values themselves."""
        return self.embedding is None

    def key_value(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prefix of one layer, with dropout where the module is in training mode.

        Returns:
            keys and values, each ``[Hkv, P, D]`` in the parameters' dtype.
        """
        both = self._layer(layer)
        if self.dropout > 0.0 and self.training:
            both = F.dropout(both, self.dropout)
        return both[0], both[1]

    def prompt_embeddings(self) -> Tensor:
        """The prefix without dropout, as PEFT saves it.

        Returns:
            detached ``[P, 2 * layers * token_dim]``: layer 0's keys, its values, layer 1's keys ...
        """
        with torch.no_grad():
            layers = torch.cat([self._layer(layer) for layer in range(self.num_layers)])
            return layers.permute(2, 0, 1, 3).reshape(self.num_virtual_tokens, -1).clone()

    def load_prompt_embeddings(self, embeddings: Tensor) -> None:
        """Take over keys and values in the layout of :meth:`prompt_embeddings`; folds the module.

        Raises:
            ValueError: the shape is another or it is no floating-point tensor. Nothing is changed.
        """
        self._become(self._split(embeddings, "prompt_embeddings"))

    def encoder_state(self) -> dict[str, Tensor]:
        """What the MLP is made of, detached, under the names that PEFT's encoder has for it.

        Returns:
            ``embedding.weight``, ``transform.0.weight``, ``transform.0.bias``,
            ``transform.2.weight``, ``transform.2.bias``; empty where there is no MLP.
        """
        if self.embedding is None or self.hidden is None:
            return {}
        state = {
            "embedding.weight": self.embedding,
            "transform.0.weight": self.hidden.weight,
            "transform.0.bias": self.hidden.bias,
            "transform.2.weight": torch.cat([output.weight for output in self._linears()]),
            "transform.2.bias": torch.cat([output.bias for output in self._linears()]),
        }
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_encoder_state(self, state: dict[str, Tensor]) -> None:
        """Set the MLP from what :meth:`encoder_state` gave.

        Raises:
            ValueError: a name is missing or unknown, a shape is another, or the module has no MLP
                and the state is not empty. Nothing is changed.
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
        if self.embedding is None or self.hidden is None:
            return
        with torch.no_grad():
            self.embedding.copy_(state["embedding.weight"])
            self.hidden.weight.copy_(state["transform.0.weight"])
            self.hidden.bias.copy_(state["transform.0.bias"])
            weights = state["transform.2.weight"].chunk(self.num_layers)
            biases = state["transform.2.bias"].chunk(self.num_layers)
            for output, weight, bias in zip(self._linears(), weights, biases, strict=True):
                output.weight.copy_(weight)
                output.bias.copy_(bias)

    def fold_reparameterization(self) -> None:
        """Replace the MLP by the keys and values that it gives. Idempotent."""
        if not self.folded:
            with torch.no_grad():
                self._become([self._layer(layer) for layer in range(self.num_layers)])

    def start_from(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Start at given keys and values, such as a model's own for a real text.

        With an MLP its last linear map gets the smallest change (in the Frobenius norm) that makes
        the MLP give them.

        Args:
            layers: a layer's keys and values, each ``[Hkv, P, D]``.

        Raises:
            ValueError: their number or a shape does not fit, or the MLP cannot give them since
                ``encoder_hidden_size`` is below P. Nothing is changed.
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"{len(layers)} layers of keys and values; expected {self.num_layers}")
        expected = self._layer_shape()[1:]
        for index, pair in enumerate(layers):
            for what, tensor in zip(("keys", "values"), pair, strict=True):
                if tuple(tensor.shape) != expected:
                    raise ValueError(
                        f"layer {index} has {what} of shape {tuple(tensor.shape)}; expected "
                        f"{expected}, [heads, num_virtual_tokens, head_dim]"
                    )
        targets = [torch.stack(pair).detach() for pair in layers]
        with torch.no_grad():
            if self.hidden is None:
                for parameter, target in zip(self.prefix, targets, strict=True):
                    parameter.copy_(target)
                return
            P, size = self.num_virtual_tokens, self.hidden.out_features
            if size < P:
                raise ValueError(
                    f"encoder_hidden_size is {size}; expected at least num_virtual_tokens, {P}, "
                    "to start the prefix from a text"
                )
            inverse = torch.linalg.pinv(self._activations().double())
            for layer, (output, target) in enumerate(zip(self._linears(), targets, strict=True)):
                missing = target.double() - self._layer(layer).double()
                missing = missing.permute(2, 0, 1, 3).reshape(P, -1)
                output.weight.add_((inverse @ missing).t().to(output.weight.dtype))

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"num_virtual_tokens={self.num_virtual_tokens}, num_layers={self.num_layers}, "
            f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        )

    def _layer_shape(self) -> tuple[int, int, int, int]:
        return 2, self.num_heads, self.num_virtual_tokens, self.head_dim

    def _linears(self) -> list[nn.Linear]:
        return [output for output in self.outputs if isinstance(output, nn.Linear)]

    def _activations(self) -> Tensor:
        assert self.embedding is not None
        assert self.hidden is not None
        return torch.tanh(self.hidden(self.embedding))

    def _layer(self, layer: int) -> Tensor:
        """Keys and values of a layer without dropout, ``[2, Hkv, P, D]``."""
        if self.folded:
            stored: Tensor = self.prefix[layer]
            return stored
        rows: Tensor = self.outputs[layer](self._activations())
        P = self.num_virtual_tokens
        return rows.view(P, 2, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def _split(self, embeddings: Tensor, name: str) -> list[Tensor]:
        expected = (self.num_virtual_tokens, 2 * self.num_layers * self.token_dim)
        if tuple(embeddings.shape) != expected or not embeddings.is_floating_point():
            raise ValueError(
                f"{name} is {embeddings.dtype} of shape {tuple(embeddings.shape)}; expected "
                f"floating point of shape {expected}, [num_virtual_tokens, 2 * num_layers * "
                "token_dim]"
            )
        P, H, D = self.num_virtual_tokens, self.num_heads, self.head_dim
        parts = embeddings.detach().view(P, self.num_layers, 2, H, D).permute(1, 2, 3, 0, 4)
        return list(parts.unbind())

    def _become(self, layers: list[Tensor]) -> None:
        first = next(self.parameters())
        trainable = first.requires_grad
        self.embedding, self.hidden = None, None
        self.outputs = nn.ModuleList()
        self.prefix = nn.ParameterList(
            nn.Parameter(
                layer.detach()
                .to(first.device, first.dtype)
                .clone(memory_format=torch.contiguous_format),
                requires_grad=trainable,
            )
            for layer in layers
        )
