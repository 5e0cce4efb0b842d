"""Prefix tuning in a transformers model: where the prefix goes in, and the shift of positions.

The semantics are those of Hugging Face PEFT. A prefix of P virtual tokens stands before the
sequence: its keys enter the attention as they are, without rotary embedding; the sequence's own
positions start at P, in rotary and learned position embeddings and relative position biases,
where ``position_ids`` are given (they get + P) and where the model makes them; padding never
hides the prefix. Other than in PEFT the prefix is no part of the cache and of no input: masks and
caches have the sequence's own length, so any Cache class, ``generate()`` and gradient
checkpointing work; and a sliding window does not slide past the prefix, which stays visible.

In an encoder-decoder model the prefix goes to the self-attention of the decoder. PEFT's file for
``num_transformer_submodules=2`` has the planes of L layers, which PEFT doubles and deals out four
a layer, two of them unused: layer i has the prefix of layer ``2 i mod L``. So it is here, since
the files would mean something else otherwise.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_peft.nn.base_layer import execution_device
from fused_peft.nn.prefix_encoder import PrefixEncoder

from .prefix_places import (
    PrefixPlaces,
    bias_module,
    find_places,
    head_dim,
    kv_heads,
    model_configs,
)

if TYPE_CHECKING:
    from fused_peft.nn.prompt_adapters import PromptAdapters
    from fused_peft.tuners.prompt_config import PrefixTuningConfig

_STATE = "fused_peft_prefix_hooks"


def check_prefix(model: nn.Module, config: PrefixTuningConfig) -> None:
    """Whether ``model`` can get a prefix of this config, sizes filled in; changes nothing.

    Raises:
        TypeError: it is no transformers model.
        ValueError: its attention does not go through transformers' AttentionInterface, its
            positions cannot be shifted, or layers, heads or dimensions are not the config's.
    """
    places = find_places(model)
    kind = type(model).__name__
    if config.num_layers != len(places.attention):
        raise ValueError(
            f"num_layers is {config.num_layers}; expected {len(places.attention)}, the layers of "
            f"{kind} with self-attention"
        )
    for path, module in places.attention:
        heads, dim = kv_heads(module), head_dim(module)
        if config.num_attention_heads != heads:
            raise ValueError(
                f"num_attention_heads is {config.num_attention_heads}; expected {heads}, the "
                f"key/value heads of {path!r} in {kind}"
            )
        if config.token_dim != heads * dim:
            raise ValueError(
                f"token_dim is {config.token_dim}; expected {heads * dim}, {heads} key/value heads "
                f"of {dim} in {path!r} of {kind}"
            )
    for path, module in places.positions:
        if isinstance(module, nn.Embedding) and config.num_virtual_tokens >= module.num_embeddings:
            raise ValueError(
                f"num_virtual_tokens is {config.num_virtual_tokens}; expected less than the "
                f"{module.num_embeddings} positions of {path!r} in {kind}"
            )
    _restore(_switch(model, places))


def new_prefix_encoder(
    model: nn.Module, config: PrefixTuningConfig, tokenizer: Any = None
) -> PrefixEncoder:
    """The encoder of a new adapter, started as ``config.prefix_init`` says.

    "text" runs ``config.prefix_init_text`` through the model and takes each layer's keys (rotary
    embedding included) and values: at the start the model answers as if the text stood before the
    input. A text of fewer than P tokens is repeated.

    Raises:
        TypeError, ValueError: as :func:`check_prefix`; or a text without tokenizer, without a
            token, or of more tokens than ``num_virtual_tokens``. The model is left as it was.
    """
    check_prefix(model, config)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    device = execution_device(embedding, embedding.weight)
    encoder = PrefixEncoder(config, device=device)
    if config.prefix_init != "text":
        return encoder
    text = config.prefix_init_text
    if tokenizer is None:
        raise ValueError("tokenizer is None; expected one for prefix_init='text'")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    P = config.num_virtual_tokens
    if not 0 < len(ids) <= P:
        raise ValueError(
            f"prefix_init_text {text!r} has {len(ids)} tokens; expected 1 to {P}, "
            "num_virtual_tokens"
        )
    ids = (ids * P)[:P]
    pairs = _key_values_of(model, torch.tensor([ids], device=device))
    layers = list(pairs)
    for layer in reversed(range(len(pairs))):  # of two layers with the same prefix the lower counts
        layers[_prefix_layer(layer, config)] = pairs[layer]
    encoder.start_from(layers)
    return encoder


def install(model: nn.Module, adapters: PromptAdapters) -> None:
    """Make the attention of ``model`` see the prefix in force at ``adapters``. Idempotent.

    Switches the attention implementation to "fused_peft", tells every self-attention layer where
    its prefix comes from, shifts positions, and makes the input embeddings' output require a
    gradient where reentrant gradient checkpointing would cut the prefix off otherwise.

    Args:
        model: a transformers model that :func:`check_prefix` accepts.
        adapters: its ``current`` is the adapter in force; anything but a PrefixEncoder is ignored.

    Raises:
        TypeError, ValueError: as :func:`check_prefix`. The model is left as it was.
    """
    from fused_peft.integrations import transformers as integration

    if _STATE in model.__dict__:
        return
    places = find_places(model)
    bias = bias_module(places)
    before = _switch(model, places)
    for layer, (_, module) in enumerate(places.attention):
        integration.attach_prefix(module, PrefixLink(adapters, layer, bias))
    handles = [
        module.register_forward_pre_hook(_ShiftPositions(adapters, module), with_kwargs=True)
        for _, module in places.positions
    ]
    embedding = places.stack.get_input_embeddings()  # type: ignore[operator]
    handles.append(embedding.register_forward_hook(_LetGradientsPass(adapters, model)))
    model.__dict__[_STATE] = (handles, before)


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`: hooks out, attention as it was before. Idempotent."""
    from fused_peft.integrations import transformers as integration

    if _STATE not in model.__dict__:
        return
    handles, before = model.__dict__.pop(_STATE)
    for handle in handles:
        handle.remove()
    for _, module in find_places(model).attention:
        integration.attach_prefix(module, None)
    _restore(before)


def _switch(model: nn.Module, places: PrefixPlaces) -> list[tuple[Any, str]]:
    """Switch to our attention; gives what was before, for :func:`_restore`."""
    from fused_peft.integrations import transformers as integration

    integration.register()
    before = [(config, config._attn_implementation_internal) for config in model_configs(model)]
    model.set_attn_implementation(integration.NAME)  # type: ignore[operator]
    for path, module in places.attention:
        used = module.config._attn_implementation  # type: ignore[union-attr]
        if used != integration.NAME:
            _restore(before)
            raise ValueError(
                f"model {type(model).__name__} cannot get a prefix: {path!r} keeps its attention "
                f"implementation, {used!r}"
            )
    return before


def _restore(implementations: list[tuple[Any, str]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def _prefix_in_force(adapters: Any) -> PrefixEncoder | None:
    current = adapters.current
    return current if isinstance(current, PrefixEncoder) else None


def _prefix_layer(layer: int, config: Any) -> int:
    """Which layer of the prefix belongs to a layer of the model; see the module."""
    return 2 * layer % config.num_layers if config.num_transformer_submodules == 2 else layer


class PrefixLink:
    """Tells one attention module its prefix. Holds the adapters without being a module."""

    def __init__(self, adapters: Any, layer: int, bias: nn.Module | None) -> None:
        self.adapters = adapters
        self.layer = layer
        self.bias = bias

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model was pickled in another process, perhaps: its config names our attention.
        from fused_peft.integrations import transformers as integration

        integration.register()
        self.__dict__.update(state)

    def key_value(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[Hkv, P, D]``, or None where no prefix is in force."""
        encoder = _prefix_in_force(self.adapters)
        if encoder is None:
            return None
        return encoder.key_value(_prefix_layer(self.layer, encoder.config))

    def position_bias(self, queries: int, start: Tensor | int) -> Tensor | None:
        """T5's bias of the prefix's keys, ``[1 or B, Hq, queries, P]``."""
        encoder = _prefix_in_force(self.adapters)
        if encoder is None or self.bias is None:
            return None
        P = encoder.num_virtual_tokens
        if isinstance(start, Tensor):  # a static cache has filled all rows alike
            start = start[0]
        compute: Any = self.bias.compute_bias
        bias: Tensor = compute(queries, P, past_seen_tokens=start + P)
        return bias


class _ShiftPositions:
    """Before a module that takes positions: adds the number of virtual tokens to them."""

    def __init__(self, adapters: Any, module: nn.Module) -> None:
        self.adapters = adapters
        # (name, place among the positional arguments), the first that is given counts.
        names = list(inspect.signature(module.forward).parameters)
        wanted = ["position_ids", "past_key_values_length"]
        self.padding: int | None = None
        if type(module).forward is nn.Embedding.forward:
            wanted = names[:1]
            # RoBERTa's table: padding has this position whatever comes before it.
            self.padding = module.padding_idx  # type: ignore[assignment]
        self.arguments = [(name, names.index(name)) for name in wanted if name in names]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        encoder = _prefix_in_force(self.adapters)
        if encoder is None:
            return None
        for name, place in self.arguments:
            if kwargs.get(name) is not None:
                return args, {**kwargs, name: self._shift(kwargs[name], encoder)}
            if place < len(args) and args[place] is not None:
                shifted = self._shift(args[place], encoder)
                return (*args[:place], shifted, *args[place + 1 :]), kwargs
        # past_key_values_length was left at its default, 0.
        return args, {**kwargs, self.arguments[-1][0]: encoder.num_virtual_tokens}

    def _shift(self, positions: Any, encoder: PrefixEncoder) -> Any:
        shifted = positions + encoder.num_virtual_tokens
        if self.padding is None:
            return shifted
        return torch.where(positions == self.padding, positions, shifted)


class _LetGradientsPass:
    """After the input embeddings: a gradient for reentrant checkpointing to start from.

    It differentiates a layer only if one of the layer's inputs requires a gradient, and with a
    frozen model none does.
    """

    def __init__(self, adapters: Any, model: nn.Module) -> None:
        self.adapters = adapters
        self.model = model

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():  # compiled checkpointing is never reentrant
            return
        if not torch.is_grad_enabled() or output.requires_grad or not self.model.training:
            return
        encoder = _prefix_in_force(self.adapters)
        if encoder is not None and _checkpoints_reentrantly(self.model):
            output.requires_grad_(True)


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


def _key_values_of(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each self-attention layer's keys and values ``[Hkv, P, D]`` for one text ``[1, P]``."""
    from fused_peft.integrations import transformers as integration

    places = find_places(model)
    adapters = getattr(model, "prompt_adapters", None)
    enabled = getattr(adapters, "enabled", True)
    before = [(config, config._attn_implementation_internal) for config in model_configs(model)]
    training = [(module, module.training) for module in model.modules()]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids
    with integration.recorded(seen) as name:
        try:
            if adapters is not None:
                adapters.enabled = False
            model.eval()
            model.set_attn_implementation(name)  # type: ignore[operator]
            with torch.no_grad():
                model(**inputs)
        finally:
            _restore(before)
            for module, mode in training:
                module.training = mode
            if adapters is not None:
                adapters.enabled = enabled
    pairs = [seen[id(module)] for _, module in places.attention]
    return [(key[0].float(), value[0].float()) for key, value in pairs]
