"""The distributed example: the losses of the plain one, interruption, other layouts, torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_world import TIMEOUT, World
from example_runs import adapter_files, figures, shared_arguments

import compare_distributed  # isort: skip
import distributed_examples  # isort: skip
import finetune_distributed  # isort: skip
import finetune_smollm2  # isort: skip

# Float32 all through: sums in another order, some ten steps of AdamW on.
BOUND = 2e-5


@pytest.fixture(scope="module")
def arguments(model_dir: Path, data: Path) -> Callable[..., list[str]]:
    """Arguments of a run of 12 short steps whose last rows of an epoch do not divide."""

    def build(out: Path, *more: str) -> list[str]:
        shared = shared_arguments(model_dir, data, out)
        return [*shared, "--rank", "4", "--dtype", "float32", "--batch-tokens", "130", *more]

    return build


@pytest.fixture(scope="module")
def plain(
    arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], float]:
    """Losses of the example that runs in one process, and what it measures at the end."""
    out = tmp_path_factory.mktemp("plain")
    assert finetune_smollm2.main(arguments(out)) == 0
    result = figures(out)
    return result["training"]["loss"], result["held_out"]["loss_after"]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "losses.json").read_text(encoding="utf-8"))
    return found


def check(out: Path, plain: tuple[list[float], float]) -> None:
    found = results(out)
    assert found["losses"] == pytest.approx(plain[0], rel=0, abs=BOUND)
    assert found["held_out_loss"]["after"] == pytest.approx(plain[1], rel=0, abs=BOUND)
    assert found["losses"][-1] < found["losses"][0] - 0.3
    assert sorted(adapter_files(out)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (out / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_two_processes(
    two_processes: World,
    arguments: Callable[..., list[str]],
    plain: tuple[list[float], float],
    tmp_path: Path,
    parallel: str,
) -> None:
    command = arguments(tmp_path, "--parallel", parallel)
    assert two_processes.run(distributed_examples.run, command) == [0, 0]
    check(tmp_path, plain)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("count", [3, 1])
def test_gradients_of_a_batch_that_does_not_divide(
    two_processes: World,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    parallel: str,
    count: int,
) -> None:
    """Those of the plain example: AdamW would hide a wrong factor."""
    plain, *_ = finetune_smollm2.prepare(finetune_smollm2.parse_arguments(arguments(tmp_path)))
    loss = plain._backward(plain.rows[:count]).item()
    command = arguments(tmp_path, "--parallel", parallel)
    for found, grads in two_processes.run(distributed_examples.gradients, command, count):
        assert found == pytest.approx(loss, rel=1e-6)
        assert grads.keys() == plain.parameters.keys()
        for name, parameter in plain.parameters.items():
            size = parameter.grad.abs().max().item()
            close = {"rtol": 0, "atol": 2e-5 * size}
            torch.testing.assert_close(grads[name], parameter.grad, **close, msg=name)
    assert max(p.grad.abs().max().item() for p in plain.parameters.values()) > 1e-3


def test_interrupted_in_two_processes_and_resumed_in_four(
    two_processes: World,
    four_processes: World,
    arguments: Callable[..., list[str]],
    plain: tuple[list[float], float],
    tmp_path: Path,
) -> None:
    """The signal reaches one process only; the layout changes twice."""
    stopped = 128 + signal.SIGTERM
    for world, parallel, stop_at in (
        (two_processes, "fsdp", 3),
        (four_processes, "tp_fsdp", 5),
        (two_processes, "ddp", 7),
        (two_processes, "tp", 9),
    ):
        more = ["--parallel", parallel, *(["--resume"] if stop_at > 3 else [])]
        command = arguments(tmp_path, *more)
        status = world.run(distributed_examples.run, command, stop_at)
        assert status == [stopped] * world.size
        assert (tmp_path / "checkpoint.safetensors").is_file()
        assert not (tmp_path / "losses.json").exists()
    command = arguments(tmp_path, "--parallel", "fsdp", "--resume")
    assert four_processes.run(distributed_examples.run, command) == [0] * 4
    check(tmp_path, plain)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_prompt_methods_split_the_mlp(
    two_processes: World, arguments: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    """Prompts are plain tensors beside split layers; a prefix has no heads to split along."""
    losses = []
    for parallel in ("ddp", "tp"):
        shared = arguments(tmp_path / parallel, "--parallel", parallel, "--method", method)
        command = [a for i, a in enumerate(shared) if "--rank" not in shared[max(0, i - 1) : i + 1]]
        command += ["--virtual-tokens", "4", "--init-text", "the colour", "--steps", "3"]
        assert two_processes.run(distributed_examples.run, command) == [0, 0]
        losses.append(results(tmp_path / parallel)["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=BOUND)


def test_curves_through_torchrun(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = arguments(tmp_path)
    options = [a for i, a in enumerate(options) if "--out" not in options[max(0, i - 1) : i + 1]]
    options = [a for i, a in enumerate(options) if "--dtype" not in options[max(0, i - 1) : i + 1]]
    runs = ["--runs", "ddp:1", "ddp:2", "--steps", "4", "--out", str(tmp_path)]
    within = ["--within", str(BOUND)]
    # What comes last counts: 4 steps, not 12.
    assert compare_distributed.main([*runs, *within, "--", *options, "--steps", "4"]) == 0
    assert "ddp      2 processes: loss" in capfd.readouterr().out
    picture = (tmp_path / compare_distributed.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert results(tmp_path / "ddp_2")["processes"] == 2


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        (["--tensor", "2"], "2", "--tensor 2 is for --parallel tp and tp_fsdp"),
        (["--parallel", "tp", "--tensor", "2"], "4", "--tensor 2 does not fit 4 processes"),
        (["--parallel", "tp_fsdp"], "3", "--tensor 2 does not fit 3 processes"),
        (["--parallel", "pipeline"], "2", "invalid choice: 'pipeline'"),
    ],
)
def test_refused_arguments(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    processes: str,
    message: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit, match="2"):
        finetune_distributed.main(arguments(tmp_path, *more))
    assert message in capsys.readouterr().err


def test_layers_that_cannot_be_split_are_named(two_processes: World, model_dir: Path) -> None:
    import distributed_training
    from example_runs import load

    model, _ = load(model_dir)
    with pytest.raises(ValueError, match=r"can be split in 7: it has \(4, 2\) heads"):
        distributed_training.tensor_plan(model, 7, "lora")
    four = distributed_training.tensor_plan(model, 4, "lora")
    assert {path.rpartition(".")[2] for path in four} == {"gate_proj", "up_proj", "down_proj"}
    two = distributed_training.tensor_plan(model, 2, "lora")
    assert {path.rpartition(".")[2] for path in two} > {"q_proj", "o_proj", "up_proj"}


@pytest.mark.parametrize("processes", [1, 2])
def test_page_on_many_processes(tmp_path: Path, processes: int) -> None:
    """The code blocks of docs/distributed.md are one script, with torchrun and without."""
    page = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 7
    script = tmp_path / "script.py"
    script.write_text("\n\n".join(blocks), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=TIMEOUT)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
