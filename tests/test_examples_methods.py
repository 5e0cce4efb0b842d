"""The examples by every method, and the comparison of the methods, on a tiny random Llama."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from example_runs import (
    SMALL,
    adapter_files,
    arguments_of,
    at_step,
    corpus_of,
    figures,
    load,
    rows_of,
    shared_arguments,
)
from torch.nn import functional as F

import fused_peft

import compare_methods  # isort: skip
import docstring_data  # isort: skip
import finetune_smollm2  # isort: skip
import training  # isort: skip
from methods import METHODS  # isort: skip

PROMPT_METHODS = ("prefix", "prompt", "ptuning")


@pytest.fixture(scope="module")
def whole_runs(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run of each method."""
    out = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        assert finetune_smollm2.main(arguments_of(method, model_dir, data, out / method)) == 0
    return out


# ---------------------------------------------------------------------------- one method


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_losses_are_those_of_the_text_alone(method: str, model_dir: Path) -> None:
    """Virtual positions, padding and the fused layers: as row by row through the plain model."""
    model, tokenizer = load(model_dir)
    corpus = corpus_of(("the", " red"), ("the colour of box 7 is", " white"), ("", "box blue"))
    rows = rows_of(corpus, tokenizer)
    args = finetune_smollm2.build_parser().parse_args(["--method", method, *SMALL[method]])
    finetune_smollm2.complete_options(finetune_smollm2.build_parser(), args)
    torch.manual_seed(3)
    config = METHODS[method].make_config(vars(args))
    fused_peft.get_peft_model(model, config, tokenizer=tokenizer).eval()
    expected = []
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        logits = logits[-len(row.ids) :]
        start = max(1, row.prompt_length)
        expected.append(F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none"))
    fused_peft.fuse_model(model)
    losses = training.completion_losses(model, training.collate(rows))
    torch.testing.assert_close(losses, torch.cat(expected), rtol=1e-5, atol=1e-5)
    with fused_peft.disable_adapter(model):
        bare = training.completion_losses(model, training.collate(rows))
    assert (bare - losses).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "step"), [("prefix", 3), ("prompt", 7), ("ptuning", 5)])
def test_an_interrupted_run_ends_with_the_same_bits(
    method: str,
    step: int,
    model_dir: Path,
    data: Path,
    whole_runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        given = arguments_of(method, model_dir, data, tmp_path)
        assert finetune_smollm2.main(given) == 128 + signal.SIGINT
    assert not (tmp_path / "adapter").exists()
    torch.manual_seed(12345)  # a new process starts from other random numbers
    assert finetune_smollm2.main([*given, "--resume"]) == 0
    assert adapter_files(tmp_path) == adapter_files(whole_runs / method)
    ours, theirs = figures(tmp_path), figures(whole_runs / method)
    assert ours["training"]["loss"] == theirs["training"]["loss"]
    assert ours["held_out"] == theirs["held_out"]


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_on_disk_is_the_one_that_was_measured(
    method: str, whole_runs: Path, model_dir: Path, data: Path
) -> None:
    model, tokenizer = finetune_smollm2.load_model(model_dir, torch.bfloat16)
    fused_peft.fuse_model(model)
    corpus = docstring_data.read_jsonl(data, 0.2)
    rows = docstring_data.encode(corpus, corpus.held_out, tokenizer, 40)
    held = figures(whole_runs / method)["held_out"]
    assert training.held_out_loss(model, rows, 80) == held["loss_before"]
    fused_peft.load_adapter(model, whole_runs / method / "adapter")
    assert training.held_out_loss(model, rows, 80) == held["loss_after"]
    assert held["loss_after"] != held["loss_before"]


def test_the_figures_follow_from_the_sizes(whole_runs: Path) -> None:
    counts = {m: figures(whole_runs / m)["trainable_parameters"] for m in PROMPT_METHODS}
    # 6 virtual tokens: keys and values of 2 layers, 2 heads of 8; 32 wide embeddings; an MLP.
    mlp = (32 * 16 + 16) + (16 * 16 + 16) + (16 * 32 + 32)
    assert counts == {"prefix": 6 * 2 * 2 * 16, "prompt": 6 * 32, "ptuning": 6 * 32 + mlp}
    for method in METHODS:
        weights = whole_runs / method / "adapter" / "adapter_model.safetensors"
        assert figures(whole_runs / method)["adapter_bytes"] == weights.stat().st_size


def test_a_text_that_does_not_fit_ends_with_status_2(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments_of("prompt", model_dir, data, tmp_path, "--virtual-tokens", "1")
    assert finetune_smollm2.main(given) == 2
    assert "expected 1 to 1, num_virtual_tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------- the comparison


@pytest.fixture
def comparison(model_dir: Path, data: Path) -> Callable[..., list[str]]:
    """Arguments of a comparison of LoRA, prefix tuning, and others."""

    def build(out: Path, *more: str) -> list[str]:
        given = ["--virtual-tokens", "6", "--rank", "4", "--init-text", "the colour"]
        given += ["--dropout", "0.1"]
        return [*shared_arguments(model_dir, data, out), *given, *more]

    return build


def test_every_method_runs_in_a_process_of_its_own(
    comparison: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = comparison(tmp_path, "--methods", "lora", "prefix", "--require-improvement", "0.99")
    assert compare_methods.main(given) == 1
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert list(results) == ["lora", "prefix"]
    for method, result in results.items():
        assert result == figures(tmp_path / method)
        (line,) = [x for x in output.splitlines() if x.startswith(METHODS[method].title + "  ")]
        assert f"{result['trainable_parameters']:,}" in line
        assert f"{result['held_out']['loss_after']:.3f}" in line
        assert f"down {result['held_out']['perplexity_fall']:.1%}" in line
    # Same budget, and the same model before.
    assert results["prefix"]["training"]["tokens"] == results["lora"]["training"]["tokens"]
    assert (
        results["prefix"]["held_out"]["loss_before"] == (results["lora"]["held_out"]["loss_before"])
    )
    assert "at least 99%: FAILED: LoRA, prefix tuning" in output
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_comparison_goes_on_with_what_is_not_done(
    comparison: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[str] = []

    def run_here(arguments: list[str]) -> int:
        started.append(arguments[arguments.index("--method") + 1])
        return finetune_smollm2.main(arguments)

    def stop_in_prompt_tuning() -> None:
        if started[-1] == "prompt":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(compare_methods, "run_in_process", run_here)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert compare_methods.main(comparison(whole)) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, stop_in_prompt_tuning)
        started.clear()
        assert compare_methods.main(comparison(stopped)) == 128 + signal.SIGTERM
    assert started == ["lora", "prefix", "prompt"]
    assert "prompt tuning ended with status 143; --resume continues" in capsys.readouterr().out
    assert not (stopped / "comparison.json").exists()
    with pytest.raises(SystemExit, match="2"):
        compare_methods.main(comparison(stopped))
    assert "add --resume, or remove" in capsys.readouterr().err

    started.clear()
    assert compare_methods.main(comparison(stopped, "--resume")) == 0
    assert started == ["prompt", "ptuning"]
    for method in METHODS:
        assert adapter_files(stopped / method) == adapter_files(whole / method)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "lora"], "--method: expected --methods"),
        (["--methods", "lora", "adapter"], "--methods: invalid choice: 'adapter'"),
        (["--methods", "prompt", "--rank", "4"], "--rank is an option of none of prompt"),
        (["--resume"], "--resume: there is no interrupted comparison in"),
        (["--steps", "0"], "--steps: expected an integer >= 1"),
        (["--batch-tokens", "none"], "--batch-tokens: expected an integer >= 1"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(compare_methods, "run_in_process", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        compare_methods.main(["--out", str(tmp_path), *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / compare_methods.UNFINISHED).exists()
