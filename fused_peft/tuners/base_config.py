"""What the configs of all methods share: fields checked when made, PEFT's file read and judged."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Iterator, Mapping, Set
from typing import Any, ClassVar

from ..errors import AdapterError
from ..nn.adapter_spec import near_matches

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


class AdapterConfig:
    """Base of the methods' dataclasses; no field is its own."""

    #: PEFT's name of the method, in its files.
    peft_type: ClassVar[str] = ""
    #: PEFT's fields that change what an adapter computes, and that this package does not compute.
    _unsupported: ClassVar[frozenset[str]] = frozenset()
    #: PEFT's fields that an adapter once trained does not depend on.
    _irrelevant: ClassVar[frozenset[str]] = frozenset(
        {"auto_mapping", "peft_version", "runtime_config"}
    )

    task_type: str | None

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """Refuse unknown keywords, with near matches."""
        # Before __init__, whose own TypeError for a wrong keyword does not say what is near.
        known = cls._field_names()
        for name in kwargs:
            if name in cls._unsupported or name in cls._irrelevant:
                raise TypeError(f"{name} is a field of PEFT's config, not supported here")
            if name not in known:
                raise TypeError(f"{cls.__name__} has no field {name!r}{near_matches(name, known)}")
        return super().__new__(cls)

    @classmethod
    def _field_names(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    def _check_task_type(self) -> None:
        given: object = self.task_type
        if isinstance(given, enum.Enum):  # PEFT's own TaskType
            self.task_type = str(given.value)
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(
                f"task_type is {self.task_type!r}; expected None or one of {', '.join(TASK_TYPES)}"
            )

    def _check_strings(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a str or None")

    def _check_bools(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a bool")

    @classmethod
    def _fields_in(cls, content: object) -> dict[str, Any]:
        """The fields that an ``adapter_config.json`` of this method gives.

        Warns of keys that PEFT 0.21 does not know either.

        Raises:
            AdapterError: it is another kind of adapter, or has a key that is not supported.
        """
        if not isinstance(content, Mapping):
            raise AdapterError(f"the adapter's config is {content!r}; expected a JSON object")
        if content.get("peft_type") != cls.peft_type:
            raise AdapterError(
                f"peft_type is {content.get('peft_type')!r}; expected {cls.peft_type!r}"
            )
        refused = {k: content[k] for k in sorted(cls._unsupported & content.keys()) if content[k]}
        if refused:
            listed = ", ".join(f"{name} = {value!r}" for name, value in refused.items())
            raise AdapterError(f"the adapter's config has {listed}; this is not supported")
        known = cls._field_names()
        unknown = content.keys() - known - cls._unsupported - cls._irrelevant - {"peft_type"}
        if unknown:
            warnings.warn(
                f"unexpected keys {sorted(unknown)} in the adapter's config are ignored; a later "
                "version of PEFT may have written it",
                stacklevel=3,
            )
        # PEFT writes null for a field that was set to None, where None means the default.
        return {k: content[k] for k in known & content.keys() if content[k] is not None}


def name_list(field: str, value: object) -> list[str]:
    """``value`` without repetitions, if it is a collection of non-empty str.

    Raises:
        TypeError: it is something else, a str for one; the message names ``field``.
    """
    if not isinstance(value, (list, tuple, Set, Mapping, Iterator)):
        raise TypeError(f"{field} is {value!r}; expected a list of str")
    names = list(value)
    for entry in names:
        if not isinstance(entry, str) or not entry:
            raise TypeError(f"{field} has the entry {entry!r}; expected non-empty str")
    return list(dict.fromkeys(names))
