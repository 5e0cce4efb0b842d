"""examples/finetune_trainer.py: every backend on a tiny model, and SmolLM2 for 20 steps."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import example_runs  # noqa: F401 (finds the examples)
import pytest
import torch

import fused_peft

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

import finetune_smollm2  # noqa: E402 (they import transformers)
import finetune_trainer  # noqa: E402

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def run(model_dir: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    """What a short run on the tiny model measured."""
    arguments = ["--model", model_dir, "--data", data, "--out", out, "--steps", 12]
    arguments += ["--max-length", 32, "--held-out", 0.2, "--dtype", "float32", "--rank", 4]
    arguments += ["--learning-rate", 3e-2]
    assert finetune_trainer.main([*map(str, arguments), *more]) == 0
    result: dict[str, Any] = json.loads((out / "trainer.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("backend", finetune_trainer.BACKENDS)
def test_every_backend_learns_and_leaves_an_adapter(
    backend: str, model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(model_dir, data, tmp_path, "--backend", backend)
    assert result["held_out_loss_after"] < 0.8 * result["held_out_loss_before"]
    assert len(result["losses"]) == 12
    assert 0 < result["seconds_per_step"] < 10
    assert f"{backend}: {result['seconds_per_step']:.3f} s/step" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= ADAPTER_FILES
    base, _ = finetune_smollm2.load_model(model_dir, torch.float32)
    fused_peft.load_adapter(base, tmp_path / "adapter")


def test_the_backends_have_the_same_losses(model_dir: Path, data: Path, tmp_path: Path) -> None:
    losses = {
        backend: run(model_dir, data, tmp_path / backend, "--backend", backend)["losses"]
        for backend in finetune_trainer.BACKENDS
    }
    assert losses["peft-fused"] == pytest.approx(losses["peft"], rel=1e-4)
    # Ours draws other starting values, so its losses are near and not the same.
    assert losses["ours"][0] == pytest.approx(losses["peft"][0], rel=1e-4)


@pytest.mark.parametrize("option", ["--gradient-checkpointing", "--compile=eager", "--fuse-model"])
def test_the_options_change_no_loss(
    option: str, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    plain = run(model_dir, data, tmp_path / "plain")
    other = run(model_dir, data, tmp_path / "other", option)
    assert other["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_bad_input(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--data", str(tmp_path / "none.jsonl")], "no such file"),
        (["--backend", "theirs"], "invalid choice"),
        (["--steps", "0"], "expected an integer >= 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            finetune_trainer.main(["--out", str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_smollm2_learns_in_20_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model: its loss falls, and PEFT reads the adapter to the same logits."""
    pytest.importorskip("gguf")
    from argparse import ArgumentParser

    path = finetune_smollm2.packaged_model(ArgumentParser())
    base, tokenizer = finetune_smollm2.load_model(path, torch.float32)
    load: Callable[..., Any] = lambda *_: (copy.deepcopy(base), tokenizer)  # noqa: E731
    monkeypatch.setattr(finetune_trainer, "load_model", load)
    monkeypatch.setattr(finetune_trainer, "MEASURED_EXAMPLES", 32)
    arguments = ["--steps", 20, "--batch-size", 1, "--max-length", 128, "--out", tmp_path]
    arguments += ["--learning-rate", 3e-3, "--fuse-model", "--dtype", "float32"]
    assert finetune_trainer.main([str(a) for a in arguments]) == 0
    result = json.loads((tmp_path / "trainer.json").read_text(encoding="utf-8"))
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.05
    ids = tokenizer("def mean(values):\n    '''", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        ours = fused_peft.load_adapter(copy.deepcopy(base), tmp_path / "adapter")(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, ours, atol=0.1)
