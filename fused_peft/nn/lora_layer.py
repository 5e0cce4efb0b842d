"""What every layer with low-rank adapters keeps and does, whatever computes its base product."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .adapter_spec import AdapterSpec, check_adapter_name, near_matches
from .adapter_sum import Adapter
from .initializers import changes_base_weight, check_init_fits, init_pair


class LoraLayer(nn.Module):
    """The adapters of one linear layer: their tensors, which are active, which are merged.

    A subclass computes the base product and the update, and says what the base weight is: see
    :class:`fused_peft.LoraLinear` and :class:`fused_peft.LoraWrappedLinear`. What a layer computes
    is what PEFT's does: active adapters are summed in order, a merged layer is its base alone, and
    a disabled layer that is merged is unmerged first, in forward.

    Attributes:
        in_features: K.
        out_features: N.
        fan_in_fan_out: whether the base weight is stored ``[K, N]``.
        lora_A, lora_B: ParameterDict by adapter name, ``[r, K]`` and ``[N, r]``.
        r, lora_alpha, scaling, lora_dropout, use_rslora, init_lora_weights: dict by adapter name.
    """

    in_features: int
    out_features: int
    fan_in_fan_out: bool = False
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_dropout: dict[str, float]
    use_rslora: dict[str, bool]
    init_lora_weights: dict[str, bool | str]
    lora_A: nn.ParameterDict  # noqa: N815 (PEFT's name)
    lora_B: nn.ParameterDict  # noqa: N815
    _active: list[str]
    _merged: list[str]
    _enabled: bool
    _single: str | None

    def _set_up_adapters(self) -> None:
        self.r, self.lora_alpha, self.scaling, self.lora_dropout = {}, {}, {}, {}
        self.use_rslora, self.init_lora_weights = {}, {}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self._active = []
        self._merged = []
        self._enabled = True
        self._single = None

    def _add_first(self, name: str, spec: AdapterSpec, dtype: torch.dtype | None) -> None:
        self.check_start(spec.init_lora_weights, spec.r)
        pair = self.new_pair(spec, dtype)
        self.freeze_base()
        self.install(name, spec, *pair)
        self.set_adapter(name)

    # ---- what a subclass has to say about its base

    def base_weight(self) -> Tensor:
        """``[N, K]``: its shape, dtype and device are those of the base, its values if it can."""
        raise NotImplementedError

    def freeze_base(self) -> None:
        """Let nothing of the base require a gradient."""
        raise NotImplementedError

    def freeze_weight(self) -> None:
        """The same but for a bias, which another adapter may train."""
        raise NotImplementedError

    def _weight_with(self, names: Sequence[str], sign: float) -> Tensor:
        """``weight + sign * sum of scaling * lora_b @ lora_a``, as the base stores it, new."""
        raise NotImplementedError

    def _overwrite_weight(self, value: Tensor) -> None:
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise TypeError or ValueError where the base's weight cannot take an update in."""
        raise NotImplementedError

    def check_start(self, kind: bool | str, r: int) -> None:
        """Raise ValueError where an adapter cannot start as ``kind`` at this rank."""
        check_init_fits(kind, r, self.base_weight())

    def new_pair(self, spec: AdapterSpec, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """A fresh ``lora_a [r, K]`` and ``lora_b [N, r]``; ``dtype`` None means the base's."""
        weight = self.base_weight()
        return init_pair(
            spec.init_lora_weights, spec.r, spec.scaling, weight, dtype or weight.dtype
        )

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``lora_a`` and ``lora_b`` of an adapter as forward multiplies by them."""
        return self.lora_A[name], self.lora_B[name]

    def _addends(self) -> list[Adapter]:
        """What forward adds to the base product: the active adapters, in order."""
        return [
            Adapter(
                *self._factors(name),
                self.scaling[name],
                self.lora_dropout[name] if self.training else 0.0,
            )
            for name in self._active
        ]

    def _spec(self, name: str) -> AdapterSpec:
        return AdapterSpec(
            self.r[name],
            self.lora_alpha[name],
            self.lora_dropout[name],
            self.use_rslora[name],
            self.init_lora_weights[name],
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
        self.install(name, spec, *self.new_pair(spec, adapter_dtype))

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
        self.check_start(spec.init_lora_weights, spec.r)

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

    def reset_adapter(self, name: str) -> None:
        """Draw ``lora_A`` and ``lora_B`` of an adapter anew; "pissa" and "olora" from the weight.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        self._check_known([name])
        if name in self._merged:
            raise ValueError(f"adapter {name!r} is merged into the weight; unmerge first")
        kind, spec = self.init_lora_weights[name], self._spec(name)
        self.check_start(kind, spec.r)
        pair = self.new_pair(spec, self.lora_A[name].dtype)
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
            TypeError: ``adapter_names`` is a str, or the base is one that takes no update in.
            ValueError: a name is unknown, or ``safe`` and the result has NaN or infinity; the layer
                is as before then.
        """
        names = self._names_to_merge(adapter_names)
        if not names:
            return
        self.check_mergeable()
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
            TypeError, ValueError: the base takes no update in, or would have NaN or infinity.
        """
        self.check_mergeable()
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

    def extra_repr(self) -> str:
        """Sizes, and every adapter's r, lora_alpha and lora_dropout; which are active or merged."""
        adapters = ", ".join(
            f"{name}: r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, "
            f"lora_dropout={self.lora_dropout[name]}"
            + (", use_rslora=True" if self.use_rslora[name] else "")
            for name in self.r
        )
        sizes = super().extra_repr()
        return (
            f"{sizes}{', ' if sizes else ''}adapters={{{adapters}}}, active={self._active}, "
            f"merged={self._merged}" + ("" if self._enabled else ", disabled")
        )
