"""One adapter file, whatever the processes share."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import nn

from ..checkpoint._adapters import save_with
from ..checkpoint._modules import unwrap
from ..checkpoint._sharded import groups_of


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """:func:`fused_peft.save_adapter`, called by every process, whatever the model.

    The first process writes; all return when the file is there. :func:`fused_peft.save_adapter`
    does the same where parameters are DTensors. A replicated model (DDP), of which every process
    has all, it writes in whichever process calls it.

    Args:
        model: as there; DistributedDataParallel around it does not matter.
        path: as there. Only the first process's file system counts.
        adapter_name: as there.
        group: of a replicated model, the processes that call; None means all.

    Raises:
        ValueError, AdapterError, OSError: as there, in the process in which it happened; an
            AdapterError that quotes it in the others.
    """
    inner = unwrap(model)
    groups = groups_of(inner)
    if not groups and dist.is_initialized():
        everyone = group if group is not None else dist.group.WORLD
        assert everyone is not None
        groups = [everyone]
    save_with(inner, path, adapter_name, groups)
