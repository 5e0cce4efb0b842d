"""``nn.Linear`` with low-rank adapters (Hu et al., "LoRA: Low-Rank Adaptation", 2021, equation 3).

What a layer computes is what PEFT's does: active adapters are summed in order, a merged layer is
its base weight alone, and a disabled layer that is merged is unmerged first, in forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .adapter_spec import AdapterSpec, check_adapter_name, near_matches
from .base_layer import check_base, is_conv1d
from .initializers import (
    changes_base_weight,
    check_init_fits,
    compute_dtype,
    full_precision,
    init_pair,
)


class LoraLinear(nn.Linear):
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

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_dropout: dict[str, float]
    use_rslora: dict[str, bool]
    init_lora_weights: dict[str, bool | str]
    lora_A: nn.ParameterDict  # noqa: N815 (PEFT's name)
    lora_B: nn.ParameterDict  # noqa: N815
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
        layer._parameters = dict(linear._parameters)
        layer._buffers = dict(linear._buffers)
        layer._modules = {}
        # What linear.compile() left would go on to run linear.
        layer.__dict__.pop("_compiled_call_impl", None)
        layer._set_up(is_conv1d(linear))
        shape = layer.weight.shape
        layer.out_features, layer.in_features = reversed(shape) if layer.fan_in_fan_out else shape
        return layer

    def _set_up(self, fan_in_fan_out: bool) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        self.r, self.lora_alpha, self.scaling, self.lora_dropout = {}, {}, {}, {}
        self.use_rslora, self.init_lora_weights = {}, {}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self._active: list[str] = []
        self._merged: list[str] = []
        self._enabled = True
        self._single: str | None = None

    def _add_first(self, name: str, spec: AdapterSpec, dtype: torch.dtype | None) -> None:
        check_init_fits(spec.init_lora_weights, spec.r, self.weight)
        pair = self._new_pair(spec, dtype)
        self._freeze_base()
        self.install(name, spec, *pair)
        self.set_adapter(name)

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

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
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        names = self._active
        if not self._enabled or self._merged or not names:
            return F.linear(x, weight, self.bias)
        lora_a = [self.lora_A[name] for name in names]
        lora_b = [self.lora_B[name] for name in names]
        scaling = [self.scaling[name] for name in names]
        dropout = [self.lora_dropout[name] if self.training else 0.0 for name in names]
        if not any(dropout) and len({a.dtype for a in lora_a}) == 1:
            return self._forward_side_by_side(x, weight, lora_a, lora_b, scaling)
        y = ops.lora_linear(
            x,
            weight,
            lora_a[0],
            lora_b[0],
            self.bias,
            scaling=scaling[0],
            dropout_p=dropout[0],
            seed=ops.new_seed(x.device) if dropout[0] else None,
        )
        out_dtype = y.dtype
        for a, b, s, p in zip(lora_a[1:], lora_b[1:], scaling[1:], dropout[1:], strict=True):
            y = y + F.linear(F.linear(F.dropout(x.to(a.dtype), p), a), b) * s
        return y.to(out_dtype)

    def _forward_side_by_side(
        self,
        x: Tensor,
        weight: Tensor,
        lora_a: list[Tensor],
        lora_b: list[Tensor],
        scaling: list[float],
    ) -> Tensor:
        """Side by side along the rank, adapters are one: sum s_i B_i A_i = [s_i B_i] [A_i]."""
        common = scaling[0]
        if any(s != common for s in scaling):
            # Scaled in float32 at least: a half lora_b times its scaling would be rounded twice.
            dtype = compute_dtype(lora_b[0].dtype)
            lora_a = [a.to(dtype) for a in lora_a]
            lora_b = [b.to(dtype) * s for b, s in zip(lora_b, scaling, strict=True)]
            common = 1.0
        return ops.lora_linear(
            x, weight, torch.cat(lora_a), torch.cat(lora_b, dim=1), self.bias, scaling=common
        )

    # ---- adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that forward adds, in order (a copy; see :meth:`set_adapter`)."""
        return list(self._active)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that the weight contains, in order (a copy)."""
        return list(self._merged)

    @property
    def merged(self) -> bool:
        """Whether the weight contains an adapter."""
        return bool(self._merged)

    @property
    def adapters_enabled(self) -> bool:
        """Whether forward adds the active adapters (see :meth:`enable_adapters`)."""
        return self._enabled

    def add_adapter(
        self,
        name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """A further adapter, neither active nor trainable until :meth:`set_adapter` names it.

        Raises:
            ValueError: ``name`` is there already, or a hyperparameter is out of its range, or
                "pissa"/"olora" on a merged layer.
        """
        spec = AdapterSpec(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.check_addable(name, spec)
        self.install(name, spec, *self._new_pair(spec, adapter_dtype))

    def check_addable(self, name: str, spec: AdapterSpec) -> None:
        """Raise what :meth:`add_adapter` would raise."""
        check_adapter_name(name)
        if name in self.r:
            raise ValueError(f"adapter_name is {name!r}; the layer has {sorted(self.r)} already")
        if self._merged and changes_base_weight(spec.init_lora_weights):
            raise ValueError(
                f"init_lora_weights is {spec.init_lora_weights!r} and adapters {self._merged} are "
                "merged into the weight that it decomposes; unmerge first"
            )
        check_init_fits(spec.init_lora_weights, spec.r, self.weight)

    def _new_pair(self, spec: AdapterSpec, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return init_pair(
            spec.init_lora_weights, spec.r, spec.scaling, weight, dtype or weight.dtype
        )

    def install(self, name: str, spec: AdapterSpec, lora_a: Tensor, lora_b: Tensor) -> None:
        """Take ``lora_a [r, K]`` and ``lora_b [N, r]`` in as adapter ``name``; checks nothing."""
        self.r[name] = spec.r
        self.lora_alpha[name] = spec.lora_alpha
        self.scaling[name] = spec.scaling
        self.lora_dropout[name] = spec.lora_dropout
        self.use_rslora[name] = spec.use_rslora
        self.init_lora_weights[name] = spec.init_lora_weights
        self.lora_A[name] = nn.Parameter(lora_a, requires_grad=False)
        self.lora_B[name] = nn.Parameter(lora_b, requires_grad=False)
        if changes_base_weight(spec.init_lora_weights):
            self._overwrite_weight(self._weight_with([name], -1.0))

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. Where it was the last active one, the first left becomes active.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        self._check_known([name])
        if name in self._merged:
            raise ValueError(f"adapter {name!r} is merged into the weight; unmerge first")
        was_trainable = self.lora_A[name].requires_grad
        for by_name in (
            self.r,
            self.lora_alpha,
            self.scaling,
            self.lora_dropout,
            self.use_rslora,
            self.init_lora_weights,
            self.lora_A,
            self.lora_B,
        ):
            del by_name[name]
        if name in self._active:
            self._active.remove(name)
            if not self._active and self.r:
                self.set_adapter(next(iter(self.r)), inference_mode=not was_trainable)
        self._refresh()

    def set_adapter(self, names: str | Sequence[str], *, inference_mode: bool = False) -> None:
        """Make ``names`` the active adapters, in this order, and only them trainable.

        Merged adapters are taken out of the weight first, with a warning.

        Args:
            names: one name, several, or none ([]: the base layer alone).
            inference_mode: do not make them trainable either.

        Raises:
            ValueError: a name is unknown or given twice. Nothing is changed then.
        """
        names = [names] if isinstance(names, str) else list(names)
        self._check_known(names)
        if len(set(names)) != len(names):
            raise ValueError(f"names is {names!r}; expected each adapter once")
        if self._merged:
            warnings.warn(f"adapters {self._merged} were merged; they are unmerged", stacklevel=2)
            self.unmerge()
        for by_name in (self.lora_A, self.lora_B):
            for name, parameter in by_name.items():
                parameter.requires_grad_(name in names and not inference_mode)
        self._active = names
        self._refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Add the active adapters in forward, or do not. Merged ones leave at the next forward."""
        self._enabled = bool(enabled)
        self._refresh()

    def _refresh(self) -> None:
        single = len(self._active) == 1 and self._enabled and not self._merged
        self._single = self._active[0] if single else None

    def _check_known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.r:
                raise ValueError(
                    f"adapter {name!r} is unknown; the layer has {sorted(self.r)}"
                    f"{near_matches(str(name), self.r)}"
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

    def reset_adapter(self, name: str) -> None:
        """Draw ``lora_A`` and ``lora_B`` of an adapter anew; "pissa" and "olora" from the weight.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        self._check_known([name])
        if name in self._merged:
            raise ValueError(f"adapter {name!r} is merged into the weight; unmerge first")
        kind, r = self.init_lora_weights[name], self.r[name]
        check_init_fits(kind, r, self.weight)
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        pair = init_pair(kind, r, self.scaling[name], weight, self.lora_A[name].dtype)
        with torch.no_grad():
            self.lora_A[name].copy_(pair[0])
            self.lora_B[name].copy_(pair[1])
        if changes_base_weight(kind):
            self._overwrite_weight(self._weight_with([name], -1.0))

    # ---- merging

    def merge(self, safe: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add ``scaling * lora_b @ lora_a`` of adapters to the weight, in place.

        Added up in float32 (float64 for a float64 weight) and rounded once to the weight's dtype.

        Args:
            safe: check that the new weight is finite before it is put in place.
            adapter_names: None means the active ones. Those already merged are left out.

        Raises:
            TypeError: ``adapter_names`` is a str. ValueError: a name is unknown, or ``safe`` and
                the result has NaN or infinity; the layer is as before then.
        """
        names = self._names_to_merge(adapter_names)
        if not names:
            return
        merged = self.check_merge(names) if safe else self._weight_with(names, 1.0)
        self._overwrite_weight(merged)
        self._merged += names
        self._refresh()

    def _names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names is {adapter_names!r}; expected a list of names")
        wanted = self._active if adapter_names is None else list(dict.fromkeys(adapter_names))
        self._check_known(wanted)
        names = [name for name in wanted if name not in self._merged]
        if wanted and not names:
            warnings.warn("all adapters are merged already, nothing to do", stacklevel=3)
        return names

    def check_merge(self, names: Sequence[str]) -> Tensor:
        """The weight with adapters ``names`` in it, as a new tensor; the layer is left alone.

        Raises:
            ValueError: it has NaN or infinity.
        """
        merged = self._weight_with(names, 1.0)
        if not torch.isfinite(merged).all():
            raise ValueError(f"merging adapters {names} would give a weight with NaN or infinity")
        return merged

    def unmerge(self) -> None:
        """Take all merged adapters out of the weight again, in place.

        The weight comes back up to the rounding of its dtype: no copy of it is kept.
        """
        if not self._merged:
            warnings.warn("no adapter is merged, nothing to do", stacklevel=2)
            return
        self._overwrite_weight(self._weight_with(self._merged, -1.0))
        self._merged = []
        self._refresh()

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

    def extra_repr(self) -> str:
        """Sizes, and every adapter's r, lora_alpha and lora_dropout; which are active or merged."""
        adapters = ", ".join(
            f"{name}: r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, "
            f"lora_dropout={self.lora_dropout[name]}"
            + (", use_rslora=True" if self.use_rslora[name] else "")
            for name in self.r
        )
        return (
            f"{super().extra_repr()}, adapters={{{adapters}}}, active={self._active}, "
            f"merged={self._merged}" + ("" if self._enabled else ", disabled")
        )
