"""``nn.Linear`` with low-rank adapters: Hu et al., "LoRA", 2021, equation 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .adapter_spec import AdapterSpec, check_adapter_name
from .adapter_sum import linear_with_adapters
from .base_layer import (
    accelerate_hook,
    check_base,
    is_conv1d,
    is_offloaded,
    move_hook,
    on_execution_device,
)
from .initializers import check_init_fits, compute_dtype, full_precision
from .lora_layer import LoraLayer


class LoraLinear(LoraLayer, nn.Linear):
    """``y = x W^T + bias + sum over active adapters of scaling * (drop(x) lora_a^T) lora_b^T``.

    Weight and bias do not require grad. A plain nn.Linear's state dict loads with
    ``strict=False``: only ``lora_A.*`` and ``lora_B.*`` are missing. The keys ``lora_A.<adapter>``
    and ``lora_B.<adapter>`` are PEFT's ``lora_A.<adapter>.weight`` without the last part.

    Attributes:
        weight: ``[N, K]`` (``[K, N]`` where ``fan_in_fan_out``).
        bias: ``[N]`` or None.
        lora_A, lora_B: ParameterDict by adapter name, ``[r, K]`` and ``[N, r]``.
        r, lora_alpha, scaling, lora_dropout, use_rslora, init_lora_weights: dict by adapter name.
        fan_in_fan_out: the weight is stored transposed, as transformers' Conv1D does.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        r: rank, from 1.
        lora_alpha: the update is scaled by alpha/r.
        lora_dropout: probability in [0, 1) that an element of x is dropped before lora_a while
            training.
        use_rslora: scale by alpha/sqrt(r) instead (Kalajdzievski 2023).
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<n>" or
            "olora"; see :func:`fused_peft.nn.initializers.init_pair`.
        device: of all parameters.
        dtype: of the weight.
        adapter_name: the first adapter's name; it is active.
        adapter_dtype: dtype of lora_A and lora_B; None means the weight's.

    Raises:
        TypeError, ValueError: a hyperparameter is out of its range; the message names it.
    """

    fan_in_fan_out: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        spec = AdapterSpec(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        check_adapter_name(adapter_name)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(fan_in_fan_out=False)
        self._add_first(adapter_name, spec, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
    ) -> LoraLinear:
        """A LoraLinear over the same weight and bias Parameters: shared, not copied.

        The shared parameters stop requiring grad. "pissa" and "olora" change the shared weight in
        place. Hooks and other attributes of ``linear`` come along.

        Args:
            linear: nn.Linear or transformers' Conv1D.
            r: as for the class.
            lora_alpha: as for the class.
            lora_dropout: as for the class.
            use_rslora: as for the class.
            init_lora_weights: as for the class.
            adapter_name: as for the class.
            adapter_dtype: as for the class.

        Raises:
            TypeError: ``linear`` is something else. ValueError: a hyperparameter is out of range.
        """
        spec = AdapterSpec(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        check_adapter_name(adapter_name)
        if isinstance(linear, LoraLinear):
            raise TypeError("linear is a LoraLinear already; use its add_adapter")
        check_init_fits(spec.init_lora_weights, spec.r, check_base(linear))
        layer = cls.around(linear)
        layer._add_first(adapter_name, spec, adapter_dtype)
        return layer

    @classmethod
    def around(cls, linear: nn.Module) -> LoraLinear:
        """A layer without adapters in place of ``linear``; changes nothing about the parameters."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # All of it: hooks (shared, so that their handles still remove them), training, and what
        # libraries hang on modules.
        layer.__dict__.update(linear.__dict__)
        hook = accelerate_hook(linear)
        if hook is not None:  # what accelerate hung over forward runs linear's
            for name in ("forward", "_old_forward", "_hf_hook"):
                del layer.__dict__[name]
        layer._parameters = dict(linear._parameters)
        layer._buffers = dict(linear._buffers)
        layer._modules = {}
        # What linear.compile() left would go on to run linear.
        layer.__dict__.pop("_compiled_call_impl", None)
        layer._set_up(is_conv1d(linear))
        shape = layer.weight.shape
        layer.out_features, layer.in_features = reversed(shape) if layer.fan_in_fan_out else shape
        if hook is not None:
            move_hook(hook, layer)
        return layer

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's.

        Raises:
            TypeError: ``param`` is split over processes and the one it replaces is not: what
                torch's ColwiseParallel and RowwiseParallel do, which know nothing of the adapters.
        """
        current = self.__dict__.get("_parameters", {}).get(name)
        splits = any(placement.is_shard() for placement in getattr(param, "placements", ()))
        if splits and current is not None and not hasattr(current, "placements"):
            raise TypeError(
                f"{name} would be split over processes, and lora_A and lora_B would not; use "
                "fused_peft.distributed.ColwiseLoraParallel or RowwiseLoraParallel in the plan of "
                "parallelize_module"
            )
        super().register_parameter(name, param)

    def _set_up(self, fan_in_fan_out: bool) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        self._set_up_adapters()

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]`` in x's dtype."""
        # Reads the module dictionaries: each `self.weight` would cost a failed look-up and a call
        # of nn.Module.__getattr__, several times over on a path of a few microseconds. Whoever
        # keeps parameters elsewhere (FSDP, DataParallel) is served by _forward_general.
        name = self._single
        parameters = self._parameters
        weight = parameters.get("weight")
        if name is None or weight is None:
            return self._forward_general(x)
        modules = self._modules
        dropout_p = self.lora_dropout[name] if self.training else 0.0
        return ops.lora_linear(
            x,
            weight.t() if self.fan_in_fan_out else weight,
            modules["lora_A"]._parameters[name],  # type: ignore[union-attr, arg-type]
            modules["lora_B"]._parameters[name],  # type: ignore[union-attr, arg-type]
            parameters["bias"],
            scaling=self.scaling[name],
            dropout_p=dropout_p,
            seed=ops.new_seed(x.device) if dropout_p else None,
        )

    def _forward_general(self, x: Tensor) -> Tensor:
        if not self._enabled and self._merged:
            self.unmerge()
        weight, bias = self._base()
        if not self._enabled or self._merged or not self._active:
            return F.linear(x, weight, bias)
        return linear_with_adapters(x, weight, bias, self._addends(), self._new_seed, self._dropped)

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """The weight ``[N, K]`` and the bias as forward uses them."""
        return self.base_weight(), self.bias

    def _new_seed(self, x: Tensor) -> Tensor:
        return ops.new_seed(x.device)

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

    # ---- the base weight

    def base_weight(self) -> Tensor:
        """The weight as ``[N, K]``, whichever way it is stored."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return on_execution_device(self, weight) if weight.is_meta else weight

    def check_start(self, kind: bool | str, r: int) -> None:
        """Raise ValueError where an adapter cannot start as ``kind`` at this rank."""
        check_init_fits(kind, r, self.weight)  # itself: an offloaded one has no values

    def freeze_base(self) -> None:
        """Let weight and bias not require a gradient."""
        self.freeze_weight()
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def freeze_weight(self) -> None:
        """Let the weight not require a gradient."""
        self.weight.requires_grad_(False)

    def check_mergeable(self) -> None:
        """Raise ValueError where the weight is sharded over processes, or offloaded."""
        if self.weight.is_meta and is_offloaded(self):
            raise ValueError(
                "the weight is offloaded by accelerate, so that nothing can be merged into it; "
                "load the base model without offloading and the adapter onto that"
            )
        if hasattr(self.weight, "placements"):
            raise ValueError(
                "the weight is sharded over processes; save the adapter, load it into the model in "
                "one process, and merge there"
            )

    def reset_parameters(self) -> None:
        """Draw weight and bias anew as nn.Linear does, and every adapter as its init says."""
        if getattr(self, "fan_in_fan_out", False):
            nn.init.normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        else:
            super().reset_parameters()
        for name in getattr(self, "r", {}):
            self.reset_adapter(name)

    def _weight_with(self, names: Sequence[str], sign: float) -> Tensor:
        """``weight + sign * sum of scaling * lora_b @ lora_a``, new, in the weight's dtype."""
        dtype = compute_dtype(self.weight.dtype)
        with full_precision(self.weight.device):
            total = self.weight.detach().to(dtype)
            for name in names:
                a, b = self.lora_A[name].to(dtype), self.lora_B[name].to(dtype)
                pair = (a.t(), b.t()) if self.fan_in_fan_out else (b, a)
                total = torch.addmm(total, *pair, alpha=sign * self.scaling[name])
            return total.to(self.weight.dtype)

    def _overwrite_weight(self, value: Tensor) -> None:
        # In place, so that the Parameter stays the same object and its version counter moves on.
        with torch.no_grad():
            self.weight.copy_(value)
