"""The distributed example in processes that have a process group already; run by them."""

from __future__ import annotations

import os
import signal
from typing import Any

import example_runs  # puts the examples on the path
import pytest
import torch
import torch.distributed as dist
from distributed_cases import whole
from torch import Tensor

import distributed_training  # isort: skip
import finetune_distributed  # isort: skip
from distributed_training import DistributedTrainer, Layout  # isort: skip

assert example_runs


def run(arguments: list[str], stop_at: int | None = None) -> int:
    """The exit status; with ``stop_at`` the last process gets a signal in the step after it."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    args = finetune_distributed.parse(arguments)
    layout = Layout.of(args.parallel, args.tensor, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if stop_at is not None and dist.get_rank() == dist.get_world_size() - 1:
            backward = DistributedTrainer._backward

            def interrupted(trainer: DistributedTrainer, rows: Any) -> Any:
                if trainer.step == stop_at - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return backward(trainer, rows)

            patch.setattr(distributed_training.DistributedTrainer, "_backward", interrupted)
        return finetune_distributed.run(args, layout)


def gradients(arguments: list[str], count: int) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of a batch of the first ``count`` rows."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    args = finetune_distributed.parse(arguments)
    layout = Layout.of(args.parallel, args.tensor, torch.device("cpu"))
    trainer, _ = finetune_distributed.prepare(args, layout)
    loss = trainer._backward(trainer.rows[:count])
    return loss.item(), {name: whole(p.grad) for name, p in trainer.parameters.items()}
