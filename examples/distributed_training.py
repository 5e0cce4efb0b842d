"""How processes share a model and a batch: the parts of ``finetune_distributed.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from docstring_data import Encoded
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import (
    BETAS,
    MAX_GRADIENT_NORM,
    Batch,
    Interrupt,
    Settings,
    Trainer,
    batches_by_length,
    collate,
    completion_losses,
)

from fused_peft.distributed import (
    ColwiseLoraParallel,
    RowwiseLoraParallel,
    clip_grad_norm_,
    parameter_groups,
)


@dataclass(frozen=True)
class Layout:
    """Which processes split layers, and which share a batch's rows."""

    parallel: str
    mesh: DeviceMesh
    """Two dimensions: ``data``, the groups that share rows, and ``tensor``, inside of a group."""
    device: torch.device

    @classmethod
    def of(cls, parallel: str, tensor: int, device: torch.device) -> Layout:
        """Neighbouring ranks, which torchrun puts on one machine, split layers."""
        shape = (dist.get_world_size() // tensor, tensor)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        return cls(parallel, mesh, device)

    @property
    def is_first(self) -> bool:
        """Whether this process reports and writes."""
        return dist.get_rank() == 0

    @property
    def part(self) -> int:
        """Which part of a batch this process has."""
        return self.mesh["data"].get_local_rank()

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided."""
        return self.mesh["data"].size()

    def summed(self, *values: Tensor | float) -> list[float]:
        """Each value, summed over the parts."""
        both = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
        both = both.to(self.device)
        dist.all_reduce(both, group=self.mesh["data"].get_group())
        return both.tolist()

    def text(self) -> str:
        """For the user."""
        split = self.mesh["tensor"].size()
        return (
            f"{dist.get_world_size()} processes over {dist.get_backend()}, {self.parallel}: "
            f"{self.parts} parts of a batch, layers split in {split}"
        )


# --------------------------------------------------------------------------------- model


class Replicas(DistributedDataParallel):
    """DDP whose output head can be asked for, as :func:`completion_losses` does."""

    def get_output_embeddings(self) -> Any:
        """The model's."""
        return self.module.get_output_embeddings()


def place_model(model: Any, layout: Layout, method: str) -> Any:
    """The model with adapters, as ``layout`` wants it.

    Raises:
        ValueError: the layers cannot be split in so many parts.
    """
    if layout.parallel == "ddp":
        return Replicas(model)
    if layout.mesh["tensor"].size() > 1:
        plan = tensor_plan(model, layout.mesh["tensor"].size(), method)
        parallelize_module(model, layout.mesh["tensor"], plan)
    if layout.parallel in ("fsdp", "tp_fsdp"):
        for block in blocks(model):
            fully_shard(block, mesh=layout.mesh["data"])
        fully_shard(model, mesh=layout.mesh["data"])
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def tensor_plan(model: Any, parts: int, method: str) -> dict[str, Any]:
    """Which linear layers of a model of the Llama kind are split how.

    Attention is split by heads, where the heads divide, and a prefix has none that would have to be
    split along; the MLP by its hidden units.

    Raises:
        ValueError: nothing divides by ``parts``, or the layers have other names.
    """
    column, row = ColwiseLoraParallel, RowwiseLoraParallel
    heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
    kinds: dict[str, Any] = {}
    if method != "prefix" and not any(count % parts for count in heads):
        kinds.update(q_proj=column, k_proj=column, v_proj=column, o_proj=row)
    if not model.config.intermediate_size % parts:
        kinds.update(gate_proj=column, up_proj=column, down_proj=row)
    plan = {
        path: kinds[name]()
        for path, module in model.named_modules()
        if (name := path.rpartition(".")[2]) in kinds and isinstance(module, nn.Linear)
    }
    if not plan:
        raise ValueError(
            f"no layer of {type(model).__name__} can be split in {parts}: it has {heads} heads and "
            f"intermediate_size {model.config.intermediate_size}"
        )
    return plan


# ---------------------------------------------------------------------------------- loss


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors there."""
    tensors = {name: getattr(batch, name).to(device) for name in ("ids", "targets", "at_head")}
    return dataclasses.replace(batch, **tensors)


def count_targets(rows: Sequence[Encoded]) -> int:
    """How many tokens of the rows carry loss, as in :func:`collate`."""
    return sum(len(row.ids) - max(1, row.prompt_length) for row in rows)


def losses_of_part(model: Any, rows: list[Encoded], layout: Layout) -> Tensor:
    """The sum of the losses of this process's part of the rows.

    A process without any runs one row for nothing: the others wait for it in the collectives.
    """
    mine = rows[layout.part :: layout.parts]
    batch = on_device(collate(mine or rows[:1]), layout.device)
    total = completion_losses(model, batch).sum()
    return total if mine else total * 0.0


@torch.no_grad()
def shared_held_out_loss(
    model: Any, rows: list[Encoded], batch_tokens: int, layout: Layout
) -> float:
    """Mean cross-entropy a completion token, in nats; the same number in every process."""
    model.eval()
    lengths = [len(row.ids) for row in rows]
    total = torch.zeros((), dtype=torch.float64, device=layout.device)
    for indices in batches_by_length(lengths, batch_tokens, torch.arange(len(rows))):
        total += losses_of_part(model, [rows[index] for index in indices], layout)
    return layout.summed(total)[0] / count_targets(rows)


# ------------------------------------------------------------------------------ training


class SharedInterrupt(Interrupt):
    """A signal that any process got counts for all, at the end of the same step.

    A launcher sends the signal on, so one comes more than once; it kills who does not end in time.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.received = 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = number


class DistributedTrainer(Trainer):
    """The same loop in every process; rows, gradients and checkpoints are shared.

    Args:
        model: as :func:`place_model` gives it.
        rows: all training examples.
        settings: as for Trainer.
        layout: who does what.
    """

    def __init__(self, model: Any, rows: list[Encoded], settings: Settings, layout: Layout) -> None:
        super().__init__(model, rows, settings)
        self.layout = layout
        self.interrupt: SharedInterrupt | None = None
        self.parameters = {n.removeprefix("module."): p for n, p in self.parameters.items()}
        groups = parameter_groups(self.parameters.values())
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)

    def _backward(self, rows: list[Encoded]) -> Tensor:
        # Of a process's part of the data: a resumed run draws the same, with as many parts. Those
        # that split a layer draw the same numbers.
        seed = self.settings.seed * 1_000_003 + self.step
        torch.manual_seed(seed * 4096 + self.layout.part)
        targets = count_targets(rows)
        total = losses_of_part(self.model, rows, self.layout)
        # DDP and fully_shard take the mean over the parts, and this is to be the sum.
        (total * (self.layout.parts / targets)).backward()  # type: ignore[no-untyped-call]
        received = self.interrupt.received if self.interrupt is not None else 0
        flag = torch.tensor(float(received), dtype=torch.float64, device=self.layout.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if self.interrupt is not None and flag:
            self.interrupt.signal_number = int(flag)
        return torch.tensor(self.layout.summed(total.detach())[0] / targets)

    def _clip_gradients(self) -> None:
        clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)

    # -------------------------------------------------------------------- checkpoint

    def save(self, path: Path) -> None:
        """One file as Trainer's, written by the first process; the others wait for it."""
        tensors = self._tensors()
        if self.layout.is_first:
            self._write(path, tensors)
        dist.barrier()

    def _tensors(self) -> dict[str, Tensor]:
        whole = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        weights = get_model_state_dict(self.model, options=whole)
        state = self._optimizer_state(whole)["state"]
        tensors = {f"weight.{name}": weights[name] for name in self.parameters}
        for name, values in state.items():
            tensors.update({f"{key}.{name}": value for key, value in values.items()})
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _optimizer_state(self, options: StateDictOptions) -> dict[str, Any]:
        """``state`` by parameter name, and ``param_groups``."""
        state: dict[str, Any]
        state = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return state

    def _take(self, tensors: dict[str, Tensor], optimizer_keys: Sequence[str]) -> None:
        whole = StateDictOptions(full_state_dict=True, strict=False)
        weights = {name: tensors[f"weight.{name}"] for name in self.parameters}
        set_model_state_dict(self.model, weights, options=whole)
        if not optimizer_keys:
            return
        # The groups stay as they are here; another layout has others.
        state = self._optimizer_state(whole)
        state["state"] = {
            name: {key: tensors[f"{key}.{name}"] for key in optimizer_keys}
            for name in self.parameters
        }
        set_optimizer_state_dict(self.model, self.optimizer, state, options=whole)
