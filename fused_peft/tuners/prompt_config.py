"""Configs of the three prompt methods: PEFT's field names, defaults and file, checked when made."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..errors import AdapterError
from ..nn.adapter_spec import check_dropout, check_rank
from .base_config import AdapterConfig, name_list

_ConfigT = TypeVar("_ConfigT", bound="PromptLearningConfig")

_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS")
_ENCODERS = ("MLP", "LSTM")
_PREFIX_INITS = ("random", "zero", "text")


@dataclass(kw_only=True)
class PromptLearningConfig(AdapterConfig):
    """What the three methods share. Sizes that are None are filled in from the model.

    Args:
        num_virtual_tokens: length of the prompt, from 1.
        token_dim: of the input embeddings; of a layer's keys for prefix tuning.
        num_transformer_submodules: 2 for SEQ_2_SEQ_LM, otherwise 1.
        num_attention_heads: of the model; its key/value heads for prefix tuning.
        num_layers: of the model.
        task_type: one of PEFT's task types; the classification ones and QUESTION_ANS add the
            model's head to modules_to_save.
        modules_to_save: ends of names of modules to train and save whole.
        base_model_name_or_path: noted in the adapter's file.
        revision: noted in the adapter's file.
        inference_mode: put the adapter in without making it trainable.

    Raises:
        TypeError, ValueError: a field is unknown or its value out of range; the message names it.
    """

    #: Fields that PEFT's file does not know.
    _own: ClassVar[frozenset[str]] = frozenset()

    num_virtual_tokens: int
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    task_type: str | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        check_rank("num_virtual_tokens", self.num_virtual_tokens)
        for name in ("token_dim", "num_attention_heads", "num_layers"):
            self._check_optional_size(name)
        submodules: object = self.num_transformer_submodules
        if submodules is not None and (type(submodules) is not int or submodules not in (1, 2)):
            raise ValueError(
                f"num_transformer_submodules is {self.num_transformer_submodules!r}; expected None,"
                " 1 or 2"
            )
        self._check_task_type()
        self._check_strings("base_model_name_or_path", "revision")
        self._check_bools("inference_mode")
        if self.modules_to_save is not None:
            self.modules_to_save = name_list("modules_to_save", self.modules_to_save)

    def _check_optional_size(self, name: str) -> None:
        if getattr(self, name) is not None:
            check_rank(name, getattr(self, name))

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if isinstance(value, enum.Enum):  # PEFT's own
            value = value.value
            setattr(self, name, value)
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's ``adapter_config.json``, ready for ``json.dumps``."""
        content: dict[str, Any] = {"peft_type": self.peft_type, "auto_mapping": None}
        for f in dataclasses.fields(self):
            if f.name not in self._own:
                value = getattr(self, f.name)
                content[f.name] = value.copy() if isinstance(value, (list, dict)) else value
        return content

    def extra_fields(self) -> dict[str, Any]:
        """The fields that PEFT does not have, where they are not at their default; for JSON."""
        extra: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in self._own and value != f.default:
                extra[f.name] = list(value) if isinstance(value, (list, tuple)) else value
        return extra

    @classmethod
    def from_dict(
        cls: type[_ConfigT], content: Mapping[str, Any], extra: Mapping[str, Any] | None = None
    ) -> _ConfigT:
        """The config in an ``adapter_config.json`` that PEFT or :meth:`to_dict` wrote.

        Keys that PEFT 0.21 does not know either are dropped with a warning, as PEFT does.

        Args:
            content: what ``json.load`` gave.
            extra: what :meth:`extra_fields` gave, if anything.

        Raises:
            AdapterError: it is another kind of adapter, or a value is out of range.
        """
        values = cls._fields_in(content)
        if "num_virtual_tokens" not in values:
            raise AdapterError("the adapter's config has no num_virtual_tokens")
        try:
            return cls(**{**values, **(extra or {})})
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the adapter's config: {error}") from error


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Trainable keys and values before every attention layer; Li and Liang, 2021.

    Args:
        prefix_projection: reparameterise by Embedding, Linear, Tanh, Linear (their section 4.3).
        encoder_hidden_size: of that MLP; None is token_dim.
        init_weights: PEFT's name for the start: None or "zero"; as prefix_init.
        prefix_dropout: probability in [0, 1) that a prefix entry is dropped in training.
        prefix_init: "random", "zero" or "text": the keys and values of prefix_init_text.
        prefix_init_text: see there.
        tokenizer_name_or_path: for "text" where get_peft_model is given no tokenizer.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    _own: ClassVar[frozenset[str]] = frozenset(
        {
            "prefix_dropout",
            "prefix_init",
            "prefix_init_text",
            "tokenizer_name_or_path",
        }
    )

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    prefix_dropout: float = 0.0
    prefix_init: str = "random"
    prefix_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_bools("prefix_projection")
        self._check_optional_size("encoder_hidden_size")
        check_dropout("prefix_dropout", self.prefix_dropout)
        self._check_choice("prefix_init", _PREFIX_INITS)
        self._check_strings("prefix_init_text", "tokenizer_name_or_path")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected None or 'zero'")
        if self.init_weights == "zero":
            if self.prefix_init == "text":
                raise ValueError("init_weights is 'zero' and prefix_init 'text'; expected one")
            self.prefix_init = "zero"
        elif self.prefix_init == "zero":
            self.init_weights = "zero"
        _check_goes_with(self, "prefix_init_text", "prefix_init", "text")


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Trainable rows before the input embeddings; Lester et al., 2021.

    Args:
        prompt_tuning_init: how they start. "RANDOM": N(0, 1). "SAMPLE_VOCAB": embeddings of tokens
            drawn from the vocabulary. "TEXT": those of prompt_tuning_init_text, repeated up to the
            prompt's length. "CLASS_LABELS": one a label of class_labels, the mean over the label's
            tokens, and what is left over as SAMPLE_VOCAB (section 3.2 of the paper).
        prompt_tuning_init_text: at most num_virtual_tokens tokens.
        tokenizer_name_or_path: for TEXT and CLASS_LABELS where get_peft_model is given no
            tokenizer.
        tokenizer_kwargs: for ``AutoTokenizer.from_pretrained``.
        class_labels: the verbalised classes; at most num_virtual_tokens of them.
        vocab_size_limit: draw only from so many tokens, the most frequent ones by token_frequencies
            or, without those, the lowest ids, which a tokenizer trained by merges learnt first
            and Lester et al. take likewise.
        token_frequencies: how often each token id occurs, one number per id.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    _own: ClassVar[frozenset[str]] = frozenset(
        {"class_labels", "vocab_size_limit", "token_frequencies"}
    )

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    class_labels: list[str] | None = None
    vocab_size_limit: int | None = None
    token_frequencies: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("prompt_tuning_init", _INITS)
        self._check_strings("prompt_tuning_init_text", "tokenizer_name_or_path")
        self._check_optional_size("vocab_size_limit")
        if self.tokenizer_kwargs is not None and not isinstance(self.tokenizer_kwargs, Mapping):
            raise TypeError(f"tokenizer_kwargs is {self.tokenizer_kwargs!r}; expected a dict")
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ValueError("tokenizer_kwargs has trust_remote_code; expected no running of code")
        _check_goes_with(self, "prompt_tuning_init_text", "prompt_tuning_init", "TEXT")
        _check_goes_with(self, "class_labels", "prompt_tuning_init", "CLASS_LABELS")
        if self.class_labels is not None:
            self.class_labels = name_list("class_labels", self.class_labels)
            if len(self.class_labels) > self.num_virtual_tokens:
                raise ValueError(
                    f"class_labels has {len(self.class_labels)} labels; expected at most "
                    f"num_virtual_tokens, {self.num_virtual_tokens}"
                )
        if self.token_frequencies is not None:
            if self.vocab_size_limit is None:
                raise ValueError("token_frequencies is given without vocab_size_limit")
            self.token_frequencies = _frequencies(self.token_frequencies)

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's ``adapter_config.json``; a start PEFT lacks reads as RANDOM."""
        content = super().to_dict()
        # PEFT would refuse the name; and TEXT without the name of a tokenizer.
        unnamed = self.prompt_tuning_init == "TEXT" and not self.tokenizer_name_or_path
        if self.prompt_tuning_init == "CLASS_LABELS" or unnamed:
            content |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
        if content["prompt_tuning_init"] != "TEXT":
            content["tokenizer_kwargs"] = None
        return content

    def extra_fields(self) -> dict[str, Any]:
        """The fields that PEFT does not have, and the start where PEFT's file cannot name it."""
        extra = super().extra_fields()
        content = self.to_dict()
        for name in ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"):
            if content[name] != getattr(self, name):
                extra[name] = getattr(self, name)
        return extra


@dataclass(kw_only=True)
class PTuningConfig(PromptLearningConfig):
    """A prompt that an encoder computes; Liu et al., "GPT Understands, Too", 2021.

    By default the prompt stands before the input. With a cloze template it stands where the input
    has the pseudo token, ``prompt_token_id``, which has to occur num_virtual_tokens times a row;
    the input then keeps its length. :meth:`fill_template` builds such a row.

    Args:
        encoder_reparameterization_type: "MLP" or "LSTM" (bidirectional, and an MLP).
        encoder_hidden_size: None is token_dim.
        encoder_num_layers: of the LSTM; the MLP has three linear layers.
        encoder_dropout: between the layers of the LSTM; the MLP has none, as in PEFT.
        prompt_token_id: the pseudo token; an id within the vocabulary or not. None: in front.
        cloze_template: how many prompts before, between and after the parts of a row; their sum
            is num_virtual_tokens. Needs prompt_token_id.
    """

    peft_type: ClassVar[str] = "P_TUNING"
    _own: ClassVar[frozenset[str]] = frozenset({"prompt_token_id", "cloze_template"})

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    prompt_token_id: int | None = None
    cloze_template: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("encoder_reparameterization_type", _ENCODERS)
        self._check_optional_size("encoder_hidden_size")
        check_rank("encoder_num_layers", self.encoder_num_layers)
        check_dropout("encoder_dropout", self.encoder_dropout)
        token = self.prompt_token_id
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise TypeError(f"prompt_token_id is {token!r}; expected an int or None")
        if self.cloze_template is not None:
            self._check_template(self.cloze_template)
            self.cloze_template = tuple(self.cloze_template)

    def _check_template(self, template: object) -> None:
        if not isinstance(template, (list, tuple)) or not all(type(n) is int for n in template):
            raise TypeError(f"cloze_template is {template!r}; expected a tuple of int or None")
        if any(n < 0 for n in template) or sum(template) != self.num_virtual_tokens:
            raise ValueError(
                f"cloze_template is {template!r}; expected counts from 0 with the sum "
                f"num_virtual_tokens, {self.num_virtual_tokens}"
            )
        if self.prompt_token_id is None:
            raise ValueError("cloze_template is given and prompt_token_id is None; expected an id")

    def fill_template(self, *parts: Sequence[int]) -> list[int]:
        """One row of input ids: pseudo tokens as cloze_template says, ``parts`` between them.

        Args:
            parts: token ids, one sequence less than cloze_template has counts. In the paper's
                ``(n1, n2, n3)`` these are the context and the mask.

        Raises:
            ValueError: there is no template, the number of parts is another, or one has the
                pseudo token.
        """
        if self.cloze_template is None or self.prompt_token_id is None:
            raise ValueError("cloze_template is None; expected a template to fill")
        if len(parts) != len(self.cloze_template) - 1:
            raise ValueError(
                f"parts has {len(parts)} sequences; expected {len(self.cloze_template) - 1}, one "
                f"less than cloze_template {self.cloze_template} has counts"
            )
        row = [self.prompt_token_id] * self.cloze_template[0]
        for part, count in zip(parts, self.cloze_template[1:], strict=True):
            if self.prompt_token_id in part:
                raise ValueError(f"parts have the pseudo token {self.prompt_token_id} in them")
            row += [*part, *[self.prompt_token_id] * count]
        return row


#: PEFT's name of :class:`PTuningConfig`.
PromptEncoderConfig = PTuningConfig

PROMPT_CONFIGS: Mapping[str, type[PromptLearningConfig]] = {
    config.peft_type: config for config in (PrefixTuningConfig, PromptTuningConfig, PTuningConfig)
}


def _frequencies(value: Any) -> list[float]:
    try:
        counts = [float(count) for count in value]
    except (TypeError, ValueError) as error:
        raise TypeError(f"token_frequencies is {value!r}; expected a list of numbers") from error
    if not all(count >= 0 for count in counts):
        raise ValueError(f"token_frequencies is {value!r}; expected numbers from 0")
    return counts


def _check_goes_with(config: object, name: str, choice: str, wanted: str) -> None:
    """A field that one start needs and no other start has a use for."""
    value, chosen = getattr(config, name), getattr(config, choice)
    if chosen == wanted and not value:
        raise ValueError(f"{name} is {value!r} with {choice}={wanted!r}; expected it to be given")
    if chosen != wanted and value is not None:
        raise ValueError(f"{name} is given with {choice}={chosen!r}; expected {wanted!r}")
