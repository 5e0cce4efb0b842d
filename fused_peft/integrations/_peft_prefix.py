"""Fused attention for a prefix-tuned PEFT model.

PEFT makes the keys and values of the prefix, one copy for every sequence of the batch, and hands
them to the model as a cache that is P tokens long already; each layer then concatenates its own
keys to them. Here PEFT makes them for one sequence, and the cache (:class:`PrefixCacheLayer`) says
that it is P tokens long while it gives back the sequence's own keys alone: positions, masks and
``generate()`` go on as before, and the attention takes the prefix from beside the keys.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from fused_peft.integrations import transformers as attention
from fused_peft.tuners.prefix import _restore, _switch
from fused_peft.tuners.prefix_places import bias_module, find_places

_STATE = "_fused_peft_prefix_state"
_handed_over = threading.local()


class PrefixCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's cache behind a prefix that is no part of its keys and values.

    Args:
        prefix_k: ``[Hkv, P, D]``.
        prefix_v: ``[Hkv, P, D]``.
    """

    def __init__(self, prefix_k: Tensor, prefix_v: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix_k, self.prefix_v = prefix_k, prefix_v

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The sequence's own keys and values; the attention that follows gets the prefix."""
        own: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        _handed_over.prefix = (self.prefix_k, self.prefix_v)
        return own

    def get_seq_length(self) -> int:
        """The tokens before the next one, the prefix among them."""
        own: int = super().get_seq_length()
        return self.prefix_k.shape[-2] + own

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of the keys that :meth:`update` gives back, and the position of the first."""
        prefix = self.prefix_k.shape[-2]
        return self.get_seq_length() - prefix + query_length, prefix

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; a positive number is how many are left."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Other sequences of the batch in these places; all have the same prefix."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences."""
        if self.is_initialized:
            super().batch_select_indices(indices)


class _FromCache:
    """The prefix that the cache has handed over to the attention that runs next."""

    def key_value(self) -> tuple[Tensor, Tensor] | None:
        prefix: tuple[Tensor, Tensor] | None = getattr(_handed_over, "prefix", None)
        _handed_over.prefix = None
        return prefix

    def position_bias(self, queries: int, start: Tensor | int) -> Tensor | None:
        return None

    def __reduce__(self) -> str:
        return "_FROM_CACHE"


_FROM_CACHE = _FromCache()


def _forget(module: nn.Module, args: Any) -> None:
    """Before an attention module: a prefix that a forward pass was broken off with is not its."""
    _handed_over.prefix = None


def _hide_prefix(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before an encoder's attention: a mask without the prefix.

    Encoders make their masks as long as the attention mask that PEFT gives, whatever the cache.
    """
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    layers: Any = getattr(cache, "layers", ())
    index: Any = module.layer_idx
    if mask is None or mask.shape[-1] == 1 or index >= len(layers):
        return None
    if not isinstance(layers[index], PrefixCacheLayer):
        return None
    return args, {**kwargs, "attention_mask": mask[..., layers[index].prefix_k.shape[-2] :]}


def is_prefix_tuned(model: nn.Module) -> bool:
    """Whether the model is PEFT's, with prefix tuning."""
    return isinstance(model, PeftModel) and any(
        config.peft_type == PeftType.PREFIX_TUNING for config in model.peft_config.values()
    )


def is_fused(model: nn.Module) -> bool:
    """Whether :func:`fuse_prefix` was here."""
    return _STATE in model.__dict__


def fuse_prefix(model: Any) -> str | None:
    """Let a prefix-tuned model's attention take the prefix unconcatenated, in place. Idempotent.

    Returns:
        None, or why the model stays as it was.
    """
    if is_fused(model):
        return None
    base = model.get_base_model()
    try:
        places = find_places(base)
        reason = _reason(base, places)
        if reason is not None:
            return reason
        before = _switch(base, places)
    except (ImportError, TypeError, ValueError) as error:
        return str(error)
    handles = []
    for _, module in places.attention:
        attention.attach_prefix(module, _FROM_CACHE)
        handles.append(module.register_forward_pre_hook(_forget))
        if not getattr(module, "is_causal", True):
            handles.append(module.register_forward_pre_hook(_hide_prefix, with_kwargs=True))
    model.get_prompt = functools.partial(_get_prompt, model)
    model.__dict__[_STATE] = (before, handles)
    return None


def unfuse_prefix(model: Any) -> None:
    """Undo :func:`fuse_prefix`. Idempotent."""
    if not is_fused(model):
        return
    before, handles = model.__dict__.pop(_STATE)
    for handle in handles:
        handle.remove()
    del model.get_prompt
    for _, module in find_places(model.get_base_model()).attention:
        attention.attach_prefix(module, None)
    _restore(before)


def _reason(base: nn.Module, places: Any) -> str | None:
    """What of the model needs the prefix among the keys."""
    config: Any = base.config
    text = config.get_text_config()
    if bias_module(places) is not None:
        return "its relative position bias is computed over the keys, of which the prefix is one"
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(text, name, None) is not None:
            return f"{name} is {getattr(text, name)}, and PEFT's prefix slides out of the window"
    if any(attention._ATTRIBUTE in module.__dict__ for _, module in places.attention):
        return "it has a prefix of fused_peft already"
    return None


def _get_prompt(model: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    """PeftModel.get_prompt, whose cache keeps the prefix apart where prefix tuning is active."""
    get_prompt = type(model).get_prompt
    active = model.active_peft_config.peft_type == PeftType.PREFIX_TUNING
    if not active or model.get_base_model().config._attn_implementation != attention.NAME:
        return get_prompt(model, batch_size, *args, **kwargs)
    cache = get_prompt(model, 1, *args, **kwargs)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layers = getattr(own, "layers", [None])
    if any(type(layer) is not DynamicLayer for layer in layers):
        return get_prompt(model, batch_size, *args, **kwargs)
    own.layers = [PrefixCacheLayer(layer.keys[0], layer.values[0]) for layer in layers]
    return cache
