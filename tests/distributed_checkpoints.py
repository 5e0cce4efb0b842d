"""Saving and loading of one adapter file by several processes; run by the processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import prompt_models
import pytest
import torch
import torch.distributed as dist
from distributed_cases import Run, build, distribute, token_ids, train_on, trained, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_peft
from fused_peft import AdapterError, LoraConfig
from fused_peft import distributed as fused_distributed


def train_and_save(run: Run, path: Path) -> dict[str, Tensor]:
    """What a run ends with, and has written."""
    model = build(run)
    wrapped = train_on(model, run)["model"]
    fused_distributed.save_adapter(wrapped, path)
    return trained(model)


def load_and_save(run: Run, path: Path, again: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Loads into a model of other values, saves anew; the values and the logits."""
    model = other_values(build(run))
    wrapped = model if run.parallel == "none" else distribute(model, run)[0]
    wrapped.eval()
    with torch.no_grad():
        wrapped(token_ids(0))  # fully_shard leaves the root's parameters gathered
    assert fused_peft.load_adapter(wrapped, path, is_trainable=True) is wrapped
    with torch.no_grad():
        logits = whole(wrapped(token_ids(0)))
    fused_peft.save_adapter(wrapped, again)
    return trained(model), logits


def other_values(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    return model


def load_beside(path: Path) -> Tensor:
    """Logits with the file's adapter as a further one of split layers."""
    model = build(Run())
    distribute(model, Run("tp"))
    fused_peft.load_adapter(model, path, "other")
    fused_peft.set_adapter(model, "other")
    with torch.no_grad():
        return model(token_ids(0))


def save_replicas(folder: Path) -> None:
    """Only the first process writes, and what stands in another's way does not matter."""
    wrapped, rank, _ = distribute(build(Run()), Run("ddp"))
    blocked = folder / "file"
    target = folder / "target"
    if rank == 1:
        blocked.write_text("no folder", encoding="utf-8")
    fused_distributed.save_adapter(wrapped, blocked if rank == 1 else target)
    assert (target / "adapter_model.safetensors").is_file()
    assert blocked.read_text(encoding="utf-8") == "no folder" or rank == 0


def check_failures(parallel: str, folder: Path) -> None:
    """What fails in one process is raised in all, and nothing is changed."""
    run = Run(parallel)
    wrapped, _, _ = distribute(build(run), run)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    good, bad = folder / f"{parallel}_good", folder / f"{parallel}_file"
    fused_distributed.save_adapter(wrapped, good)
    if rank == 0:
        bad.write_text("no folder", encoding="utf-8")
    with pytest.raises(AdapterError) as caught:
        fused_distributed.save_adapter(wrapped, bad)
    told = f"{bad} is a file; expected a directory, or nothing yet"
    prefix = "" if rank == 0 else "process 0 failed: AdapterError: "
    assert str(caught.value) == prefix + told

    if parallel != "ddp":
        before = trained(wrapped)
        with pytest.raises(AdapterError) as caught:
            fused_peft.load_adapter(wrapped, folder / "absent" if rank == last else good)
        told = f"{folder / 'absent'} does not exist; expected the directory of an adapter"
        assert str(caught.value) == (
            told if rank == last else f"process {last} failed: AdapterError: {told}"
        )
        after = trained(wrapped)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name.endswith("1.down.lora_B.default"):
                parameter.mul_(math.nan)
    with pytest.raises(AdapterError, match=r"1\.down\.lora_B\.weight has NaN or infinity"):
        fused_distributed.save_adapter(wrapped, good)
    with pytest.raises(ValueError, match="'absent'; the model has the adapters"):
        fused_distributed.save_adapter(wrapped, good, "absent")


def check_too_late(path: Path) -> None:
    """A new adapter is not for a model that is wrapped or sharded already."""
    sharded, _, _ = distribute(build(Run()), Run("fsdp"))
    replicated, _, _ = distribute(build(Run()), Run("ddp"))
    for model in (sharded, replicated):
        names = list(model.state_dict())
        with pytest.raises(ValueError, match="adding an adapter comes before"):
            fused_peft.load_adapter(model, path, "other")
        assert list(model.state_dict()) == names


def prompt_round_trip(method: str, path: Path, again: Path) -> tuple[Tensor, Tensor]:
    """A prefix or prompt through files from a sharded model into a sharded one."""
    logits = []
    for seed in (1, 2):
        model = prompt_models.trained(method, seed=seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if seed == 1:
            logits.append(prompt_models.logits(model))
            fused_peft.save_adapter(model, path)
        else:
            assert not torch.equal(prompt_models.logits(model), logits[0])
            fused_peft.load_adapter(model, path, is_trainable=True)
            fused_peft.save_adapter(model, again)
            logits.append(prompt_models.logits(model))
    return logits[0], logits[1]


def new_adapter_of_split_model() -> None:
    """add_adapter of a whole model whose layers are split: the same values everywhere."""
    model = build(Run())
    distribute(model, Run("tp"))
    torch.manual_seed(dist.get_rank())
    config = LoraConfig(r=2, target_modules=["q", "down"], init_lora_weights=False)
    fused_peft.add_adapter(model, config, "second")
    fused_peft.set_adapter(model, ["default", "second"])
    with torch.no_grad():
        y = model(token_ids(0))
        fused_peft.merge_adapter(model, safe=True)
        torch.testing.assert_close(model(token_ids(0)), y)
        fused_peft.unmerge_adapter(model)
        torch.testing.assert_close(model(token_ids(0)), y)
        fused_peft.delete_adapter(model, "second")
        alone = model(token_ids(0))
        with fused_peft.disable_adapter(model):
            assert not torch.allclose(model(token_ids(0)), alone)
        torch.testing.assert_close(alone, build(replace(Run()))(token_ids(0)))
