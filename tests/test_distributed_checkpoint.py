"""One adapter file for any number of processes, however they share the model."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import distributed_cases as cases
import distributed_checkpoints as checkpoints
import pytest
import torch
from distributed_cases import Run
from distributed_world import World
from safetensors.torch import load_file
from torch import Tensor

import fused_peft

WEIGHTS = "adapter_model.safetensors"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_two_one_four_processes(
    two_processes: World, four_processes: World, tmp_path: Path, parallel: str
) -> None:
    first = two_processes.run(checkpoints.train_and_save, Run(parallel), tmp_path / "0")
    same(first[1], first[0])
    logits = []
    values, y = checkpoints.load_and_save(Run(), tmp_path / "0", tmp_path / "1")
    same(values, first[0])
    logits.append(y)
    steps = [(four_processes, "tp"), (two_processes, "fsdp"), (four_processes, "tp_fsdp")]
    for index, (world, how) in enumerate(steps, start=1):
        results = world.run(
            checkpoints.load_and_save, Run(how), tmp_path / str(index), tmp_path / str(index + 1)
        )
        for values, y in results:
            same(values, first[0])
            logits.append(y)
    for y in logits[1:]:
        torch.testing.assert_close(y, logits[0], rtol=0, atol=1e-13)
    files = [(tmp_path / str(index) / WEIGHTS).read_bytes() for index in range(5)]
    assert all(file == files[0] for file in files)
    written = sorted(path.name for path in (tmp_path / "3").iterdir())
    assert written == ["adapter_config.json", WEIGHTS]


def test_peft_reads_what_four_processes_wrote(four_processes: World, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = Run("tp_fsdp", torch.float32, train_head=False, second=False)
    four_processes.run(checkpoints.train_and_save, run, tmp_path)
    base = cases.build(run)
    with fused_peft.disable_adapter(base), torch.no_grad():
        plain = cases.TinyModel()
        plain.load_state_dict(
            {k: v for k, v in base.state_dict().items() if k in plain.state_dict()}
        )
        torch.testing.assert_close(plain(cases.token_ids(0)), base(cases.token_ids(0)))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    ours = fused_peft.load_adapter(plain, tmp_path)
    with torch.no_grad():
        expected, y = theirs(cases.token_ids(0)), ours(cases.token_ids(0))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / WEIGHTS).keys() == {
        f"base_model.model.{name}.{factor}.weight"
        for name, module in ours.named_modules()
        if isinstance(module, fused_peft.LoraLinear)
        for factor in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_biases_and_whole_modules(two_processes: World, tmp_path: Path, parallel: str) -> None:
    run = Run(parallel, train_head=True, bias="all")
    first = two_processes.run(checkpoints.train_and_save, run, tmp_path / "0")
    again = Run("fsdp", train_head=True, bias="all")
    for values, _ in two_processes.run(
        checkpoints.load_and_save, again, tmp_path / "0", tmp_path / "1"
    ):
        same(values, first[0])
    same(load_file(tmp_path / "1" / WEIGHTS), load_file(tmp_path / "0" / WEIGHTS))


def test_loading_beside_an_adapter_of_split_layers(two_processes: World, tmp_path: Path) -> None:
    two_processes.run(checkpoints.train_and_save, Run("fsdp"), tmp_path)
    expected = fused_peft.load_adapter(cases.build(Run()), tmp_path)(cases.token_ids(0)).detach()
    for y in two_processes.run(checkpoints.load_beside, tmp_path):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


def test_adapters_of_a_split_model_come_and_go(two_processes: World) -> None:
    two_processes.run(checkpoints.new_adapter_of_split_model)


def test_only_the_first_of_the_replicas_writes(two_processes: World, tmp_path: Path) -> None:
    two_processes.run(checkpoints.save_replicas, tmp_path)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_a_failure_is_everybodys(two_processes: World, tmp_path: Path, parallel: str) -> None:
    two_processes.run(checkpoints.check_failures, parallel, tmp_path)


def test_a_failure_on_a_mesh_of_two_dimensions(four_processes: World, tmp_path: Path) -> None:
    started = time.monotonic()
    four_processes.run(checkpoints.check_failures, "tp_fsdp", tmp_path)
    assert time.monotonic() - started < 30  # nobody waited for a timeout


def test_a_new_adapter_comes_before_wrapping(two_processes: World, tmp_path: Path) -> None:
    two_processes.run(checkpoints.train_and_save, Run("fsdp", steps=1), tmp_path)
    two_processes.run(checkpoints.check_too_late, tmp_path)


@pytest.mark.parametrize("method", ["prefix", "prefix MLP", "prompt", "MLP"])
def test_prompt_methods(two_processes: World, tmp_path: Path, method: str) -> None:
    pytest.importorskip("transformers")
    first, second = tmp_path / "0", tmp_path / "1"
    for saved, loaded in two_processes.run(checkpoints.prompt_round_trip, method, first, second):
        assert torch.equal(saved, loaded)
    for file in first.glob("*.safetensors"):
        same(load_file(second / file.name), load_file(file))
