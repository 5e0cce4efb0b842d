"""The fine-tuning example on a tiny random Llama: loss, interruption, results."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import (
    COLOURS,
    WORDS,
    adapter_files,
    arguments_of,
    at_step,
    corpus_of,
    figures,
    load,
)
from torch.nn import functional as F

import docstring_data  # isort: skip
import finetune_smollm2  # isort: skip
import training  # isort: skip
from docstring_data import InputError  # isort: skip


@pytest.fixture
def arguments(model_dir: Path, data: Path) -> Callable[..., list[str]]:
    """Arguments of a run of 12 short steps, three epochs, with dropout on."""

    def build(out: Path, *more: str) -> list[str]:
        return arguments_of("lora", model_dir, data, out, *more)

    return build


# ------------------------------------------------------------------------- batches and loss


def test_only_completions_carry_loss(model_dir: Path) -> None:
    _, tokenizer = load(model_dir)
    corpus = corpus_of(("the colour", " is red"), ("", "blue box"))
    rows = docstring_data.encode(corpus, corpus.train, tokenizer, 40)
    batch = training.collate(rows)
    eos = tokenizer.eos_token_id
    expected = tokenizer(" is red")["input_ids"] + [eos]
    expected += [*tokenizer("blue box")["input_ids"][1:], eos]  # nothing predicts a first token
    assert batch.targets[batch.targets != training.IGNORED].tolist() == expected
    assert batch.tokens == sum(len(row.ids) for row in rows)
    ended = corpus_of(("the colour", " is red"), end="red")
    assert docstring_data.encode(ended, ended.train, tokenizer, 40)[0].ids[-1] != eos


def test_a_prompt_that_fills_the_length_is_named(model_dir: Path) -> None:
    _, tokenizer = load(model_dir)
    corpus = corpus_of(("a", " red"), ("the colour of box 1 is", " red"))
    limit = len(tokenizer("the colour of box 1 is")["input_ids"])
    with pytest.raises(InputError, match=f"line 2: {limit} prompt .* --max-length {limit}"):
        docstring_data.encode(corpus, corpus.train, tokenizer, limit)


def test_losses_equal_those_of_each_row_alone(model_dir: Path) -> None:
    """Padding, the missing attention mask and the short cut to the output head change nothing."""
    model, tokenizer = load(model_dir)
    corpus = corpus_of(("the", " red"), ("the colour of box 7 is", " white"), ("", "box blue"))
    rows = docstring_data.encode(corpus, corpus.train, tokenizer, 40)
    losses = training.completion_losses(model, training.collate(rows))
    expected = []
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        start = max(1, row.prompt_length)
        expected.append(F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none"))
    torch.testing.assert_close(losses, torch.cat(expected), rtol=1e-5, atol=1e-6)
    mean = training.held_out_loss(model, rows, 40)
    assert mean == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)


def test_batches_hold_like_lengths_within_the_budget() -> None:
    lengths = [(7 * index) % 31 + 1 for index in range(200)]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    batches = training.batches_by_length(lengths, 64, order)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    areas = [training.padded(max(lengths[i] for i in b)) * len(b) for b in batches]
    assert max(areas) <= 64
    assert sum(areas) < 1.1 * sum(map(training.padded, lengths))


def test_the_rate_warms_up_and_falls_to_nearly_nothing() -> None:
    values: dict[str, Any] = dict.fromkeys(training.Settings.__dataclass_fields__, 0)
    values.update(learning_rate=1.0, warmup_steps=4, steps=50)
    settings = training.Settings(**values)
    rates = [settings.learning_rate_at(step) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01


# ------------------------------------------------------------------------------ whole runs


class _Stop(Exception):  # noqa: N818
    """Stands for a kill between two steps."""


@pytest.fixture(scope="module")
def whole_run(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert finetune_smollm2.main(arguments_of("lora", model_dir, data, out)) == 0
    return out


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 7)])
def test_an_interrupted_run_ends_with_the_same_bits(
    arguments: Callable[..., list[str]],
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    step: int,
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(number))
        assert finetune_smollm2.main(arguments(tmp_path)) == 128 + number
    assert signal.getsignal(number) == handler
    assert f"saved after step {step};" in capsys.readouterr().out
    assert not (tmp_path / "adapter").exists()

    torch.manual_seed(12345)  # a new process starts from other random numbers
    assert finetune_smollm2.main(arguments(tmp_path, "--resume")) == 0
    assert adapter_files(tmp_path) == adapter_files(whole_run)
    ours, theirs = figures(tmp_path), figures(whole_run)
    assert ours["training"]["loss"] == theirs["training"]["loss"]
    assert ours["training"]["tokens"] == theirs["training"]["tokens"]
    assert ours["held_out"] == theirs["held_out"]
    assert not (tmp_path / finetune_smollm2.CHECKPOINT).exists()


def test_a_killed_run_goes_on_from_the_last_checkpoint(
    arguments: Callable[..., list[str]],
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def kill() -> None:
        raise _Stop

    with monkeypatch.context() as patch:
        at_step(patch, 5, kill)
        with pytest.raises(_Stop):
            finetune_smollm2.main(arguments(tmp_path, "--save-every", "2"))
    assert finetune_smollm2.main(arguments(tmp_path, "--resume")) == 0
    assert "continuing after step 4 of 12" in capsys.readouterr().out
    assert adapter_files(tmp_path) == adapter_files(whole_run)


def test_a_second_signal_stops_at_once(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    given = arguments(tmp_path, "--save-every", "2")
    assert finetune_smollm2.main(given) == 128 + signal.SIGINT
    assert "--resume continues" in capsys.readouterr().out


def test_resuming_checks_the_arguments_before_it_loads_a_model(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    finetune_smollm2.main(arguments(tmp_path))
    monkeypatch.setattr(finetune_smollm2, "load_model", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        finetune_smollm2.main(arguments(tmp_path))
    assert "add --resume, or remove it" in capsys.readouterr().err
    assert finetune_smollm2.main(arguments(tmp_path, "--resume", "--rank", "8")) == 2
    assert "rank=4, and this one has 8" in capsys.readouterr().err
    checkpoint = tmp_path / finetune_smollm2.CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert finetune_smollm2.main(arguments(tmp_path, "--resume")) == 2
    assert "is not a checkpoint of this program" in capsys.readouterr().err


def test_the_figures_hold_what_was_promised(whole_run: Path, model_dir: Path, data: Path) -> None:
    result = figures(whole_run)
    held, run = result["held_out"], result["training"]
    for when in ("before", "after"):
        assert held[f"perplexity_{when}"] == pytest.approx(math.exp(held[f"loss_{when}"]))
    fall = 1 - held["perplexity_after"] / held["perplexity_before"]
    assert held["perplexity_fall"] == pytest.approx(fall)
    assert len(run["loss"]) == run["steps"] == 12
    assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
    assert run["epochs"] > 2  # the runs above were interrupted in more than one epoch
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["versions"]) >= {"python", "fused-peft", "transformers"}
    assert result["hyper_parameters"]["rank"] == 4
    assert result["peak_rss_mib"] > 50
    assert result["train_examples"] + result["held_out_examples"] == len(WORDS)
    # Per Llama layer r (in + out): q, o 32+32, k, v 32+16, gate, up 32+64, down 64+32.
    assert result["trainable_parameters"] == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    samples = result["samples_before"]
    assert len(samples) == len(result["samples_after"]) == 3
    assert all(sample["prompt"] in WORDS for sample in samples)
    assert all(sample["author"].strip() in COLOURS for sample in samples)
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns_and_the_verdict_follows_the_figures(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dtype", "float32", "--require-improvement", "0.25"]
    learned = arguments(tmp_path / "a", *more, "--steps", "80", "--learning-rate", "1e-2")
    assert finetune_smollm2.main(learned) == 0
    assert "(required: 25%): PASSED" in capsys.readouterr().out
    losses = figures(tmp_path / "a")["training"]["loss"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    still = arguments(tmp_path / "b", *more, "--learning-rate", "1e-12")
    assert finetune_smollm2.main(still) == 1
    assert "(required: 25%): FAILED" in capsys.readouterr().out
    assert abs(figures(tmp_path / "b")["held_out"]["perplexity_fall"]) < 0.01


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps: expected an integer >= 1, got '0'"),
        (["--steps", "many"], "--steps: expected an integer >= 1, got 'many'"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number > 0"),
        (["--dropout", "1"], "--dropout: expected a number from 0 up to below 1"),
        (["--held-out", "1"], "--held-out: expected a number above 0 and below 1"),
        (["--seed", "-1"], "--seed: expected an integer from 0"),
        (["--max-length", "100"], "--max-length 100 does not fit --batch-tokens 80"),
        (["--method", "adapter"], "--method: invalid choice: 'adapter'"),
        (["--method", "ptuning"], "--rank is an option of --method lora, not of ptuning"),
        (["--data", "missing.jsonl"], "--data missing.jsonl: no such file"),
        (["--model", "missing"], "--model missing: expected a transformers folder or a .gguf"),
        (["--model", "."], "--model .: there is no config.json"),
        (["--out", "file"], "--out file: "),
        (["--resume"], "--resume: there is no interrupted run in out"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_loaded(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(finetune_smollm2, "load_model", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        finetune_smollm2.main(arguments(Path("out"), *more))
    assert message in capsys.readouterr().err


def test_bad_data_ends_with_status_2_before_a_model_is_loaded(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n")
    monkeypatch.setattr(finetune_smollm2, "load_model", pytest.fail)
    assert finetune_smollm2.main(arguments(tmp_path / "out", "--data", str(path))) == 2
    assert "line 1: expected the keys" in capsys.readouterr().err
