"""The hyperparameters of one adapter in one layer, checked, and the checks that others share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .initializers import check_init_kind


def near_matches(name: str, known: Iterable[str]) -> str:
    """``"; near matches: a, b"``, or an empty string where nothing is near."""
    found = difflib.get_close_matches(name, sorted(set(known)), n=4, cutoff=0.6)
    return f"; near matches: {', '.join(found)}" if found else ""


def check_adapter_name(name: object) -> str:
    """``name`` if it can be a key of the layers' ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: it is no str. ValueError: it is empty, has a dot, or is an attribute of
            ``nn.ParameterDict``.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name is {name!r}; expected a str")
    if not name or "." in name or hasattr(nn.ParameterDict, name) or name in vars(nn.Module()):
        raise ValueError(
            f"adapter_name is {name!r}; expected a non-empty name without a dot that is no "
            "attribute of nn.ParameterDict"
        )
    return name


def check_rank(field: str, value: object) -> int:
    """``value`` if it is an int >= 1. Raises TypeError or ValueError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} is {value!r}; expected an int >= 1")
    if value < 1:
        raise ValueError(f"{field} is {value}; expected an int >= 1")
    return value


def check_alpha(field: str, value: object) -> float:
    """``value`` if it is a finite number > 0. Raises TypeError or ValueError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} is {value!r}; expected a number > 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{field} is {value}; expected a finite number > 0")
    return value


def check_dropout(field: str, value: object) -> float:
    """``value`` if it is a number in [0, 1). Raises TypeError or ValueError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} is {value!r}; expected a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{field} is {value}; expected a number in [0, 1)")
    return value


@dataclass(frozen=True)
class AdapterSpec:
    """Rank, scaling, dropout and start of one adapter.

    Raises:
        TypeError, ValueError: a field is out of its range; the message names it.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        object.__setattr__(self, "init_lora_weights", check_init_kind(self.init_lora_weights))

    @property
    def scaling(self) -> float:
        """Alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
