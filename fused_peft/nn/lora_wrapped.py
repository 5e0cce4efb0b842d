"""LoRA around a linear layer that computes its own product: 4-bit, 8-bit, packed in any way.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, equation 5.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from .adapter_spec import AdapterSpec, check_adapter_name
from .adapter_sum import joined
from .base_layer import check_wrappable, kind_of, outline_weight
from .initializers import changes_base_weight
from .lora_layer import LoraLayer


class LoraWrappedLinear(LoraLayer):
    """``y = base_layer(x) + sum over active adapters of scaling * (drop(x) lora_a^T) lora_b^T``.

    For a frozen layer whose forward is its own: bitsandbytes' Linear4bit and Linear8bitLt,
    torchao's quantised weights, transformers' packed GGUF layers, any subclass of nn.Linear with
    another forward. The update is one kernel that reads what the base gave and adds to it
    (:func:`fused_peft.ops.lora_update`); x gets its gradient through the base's own backward pass.

    The base's parameters keep their names behind ``base_layer.``, as in PEFT.

    Attributes:
        base_layer: the frozen layer.
        weight, bias: the base layer's, whatever they are there.

    Args:
        base_layer: a module with in_features and out_features that takes ``[..., K]`` and gives
            ``[..., N]``. Its parameters stop requiring grad.
        r: rank, from 1.
        lora_alpha: the update is scaled by alpha/r.
        lora_dropout: probability in [0, 1) that an element of x is dropped before lora_a while
            training.
        use_rslora: scale by alpha/sqrt(r) instead.
        init_lora_weights: True, False, "gaussian" or "orthogonal". The others decompose the weight.
        adapter_name: the first adapter's name; it is active.
        adapter_dtype: dtype of lora_A and lora_B; None means that of the base's weight where it is
            a floating one, else float32.

    Raises:
        TypeError: base_layer does not say its sizes, or has adapters already. ValueError: a
            hyperparameter is out of its range; the message names it.
    """

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        spec = AdapterSpec(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        check_adapter_name(adapter_name)
        self._set_up(base_layer)
        self._add_first(adapter_name, spec, adapter_dtype)

    @classmethod
    def around(cls, base_layer: nn.Module) -> LoraWrappedLinear:
        """A layer without adapters in place of ``base_layer``; changes nothing about that."""
        layer = cls.__new__(cls)
        layer._set_up(base_layer)
        return layer

    def _set_up(self, base_layer: nn.Module) -> None:
        if isinstance(base_layer, LoraLayer):
            raise TypeError(
                f"base_layer is a {type(base_layer).__name__} already; use its add_adapter"
            )
        features = check_wrappable(base_layer)
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self.training = base_layer.training
        self._set_up_adapters()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, packed as it may be."""
        weight: Any = self.base_layer.weight
        return cast(Tensor, weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias: Any = self.base_layer.bias
        return cast("Tensor | None", bias)

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]`` in the dtype that the base layer gives."""
        y: object = self.base_layer(x)
        if not self._enabled or not self._active:
            return y  # type: ignore[return-value]
        if not isinstance(y, Tensor):
            raise TypeError(
                f"base_layer, a {kind_of(self.base_layer)}, gave a {type(y).__name__}; expected a "
                "tensor [..., N]: leave this layer out by exclude_modules"
            )
        if x.device != y.device:  # the base layer of a dispatched model takes x where it computes
            x = x.to(y.device)
        for term in joined(self._addends()):
            y = ops.lora_update(
                y,
                x,
                term.lora_a,
                term.lora_b,
                scaling=term.scaling,
                dropout_p=term.dropout_p,
                seed=ops.new_seed(x.device) if term.dropout_p else None,
            )
        return y

    # ---- the base weight

    def base_weight(self) -> Tensor:
        """``[N, K]`` without values: the shape of the base's weight, and what adapters go by."""
        return outline_weight(self.base_layer)

    def freeze_base(self) -> None:
        """Let no parameter of the base layer require a gradient."""
        self.base_layer.requires_grad_(False)

    def freeze_weight(self) -> None:
        """Let no parameter of the base layer but its bias require a gradient."""
        for name, parameter in self.base_layer.named_parameters():
            if name != "bias":
                parameter.requires_grad_(False)

    def check_start(self, kind: bool | str, r: int) -> None:
        """Raise ValueError where an adapter cannot start as ``kind`` at this rank."""
        if changes_base_weight(kind):
            raise ValueError(
                f"init_lora_weights is {kind!r}, which decomposes the weight, and "
                f"{kind_of(self.base_layer)} keeps its own to itself; expected True, False, "
                "'gaussian' or 'orthogonal'"
            )
        super().check_start(kind, r)

    def check_mergeable(self) -> None:
        """Raise TypeError: nothing can be merged into a weight that only its layer reads."""
        raise TypeError(
            f"adapters cannot be merged into a {kind_of(self.base_layer)}: its weight is its own, "
            "and rounding it to few bits again would lose most of the update; dequantise the model "
            "(model.dequantize() of transformers), or load the base unquantised, and load the "
            "adapter onto that"
        )
