"""A tiny model, tiny data and short runs for the tests of the examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import docstring_data
import finetune_smollm2
import results
import training
from docstring_data import Corpus, Example
from methods import METHODS

transformers = pytest.importorskip("transformers")
for needed in ("tqdm", "matplotlib"):
    pytest.importorskip(needed)

COLOURS = ("red", "green")
WORDS = [f"the colour of box {index} is" for index in range(40)]
#: What makes a run of a method small and, where it can be, random.
SMALL: dict[str, list[str]] = {
    "lora": ["--rank", "4", "--dropout", "0.1"],
    "prefix": ["--virtual-tokens", "6", "--dropout", "0.1", "--init-text", "the colour"],
    "prompt": ["--virtual-tokens", "6", "--init-text", "the colour"],
    "ptuning": ["--virtual-tokens", "6", "--encoder-hidden-size", "16"],
}
assert SMALL.keys() == METHODS.keys()


def make_model(path: Path) -> None:
    """A 2-layer Llama of random weights and a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*WORDS, " ".join(COLOURS)], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # at the default 0.02 no adapter could make a confident logit
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def make_data(path: Path) -> None:
    """A JSONL file of 40 lines that a tiny model can learn."""
    rows = [
        {"prompt": prompt, "completion": " " + COLOURS[index % len(COLOURS)]}
        for index, prompt in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shared_arguments(model_dir: Path, data: Path, out: Path) -> list[str]:
    """Arguments of a run of 12 short steps, three epochs, of any method."""
    given = ["--model", model_dir, "--data", data, "--out", out, "--steps", 12]
    return [*map(str, [*given, "--batch-tokens", 80, "--max-length", 40, "--held-out", 0.2])]


def arguments_of(method: str, model_dir: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Those with the method and its own options."""
    shared = shared_arguments(model_dir, data, out)
    return [*shared, "--method", method, *SMALL[method], *more]


def load(model_dir: Path) -> tuple[Any, Any]:
    """The tiny model in float32, and its tokenizer."""
    return finetune_smollm2.load_model(model_dir, torch.float32)


def corpus_of(*pairs: tuple[str, str], end: str | None = None) -> Corpus:
    """Prompts and completions to train on."""
    examples = [Example(p, c, p + c, f"line {i}") for i, (p, c) in enumerate(pairs, start=1)]
    return Corpus("test", examples, [], end)


def rows_of(corpus: Corpus, tokenizer: Any) -> list[docstring_data.Encoded]:
    """Its training part, encoded."""
    return docstring_data.encode(corpus, corpus.train, tokenizer, 40)


def adapter_files(out: Path) -> dict[str, bytes]:
    """What a run saved, by file name."""
    return {path.name: path.read_bytes() for path in sorted((out / "adapter").iterdir())}


def figures(out: Path) -> dict[str, Any]:
    """What a run measured."""
    result: dict[str, Any] = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    return result


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Makes runs in this process call ``action`` after a step."""

    class Acting(results.Progress):
        def __call__(self, trainer: training.Trainer) -> None:
            super().__call__(trainer)
            if trainer.step == step:
                action()

    monkeypatch.setattr(finetune_smollm2, "Progress", Acting)
