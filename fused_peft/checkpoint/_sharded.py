"""Tensors of which each process holds a part, and errors that all processes have to learn of."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import AdapterError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

_NO_RANK = torch.iinfo(torch.int64).max


def as_dtensor(tensor: Any) -> DTensor | None:
    """The tensor, if it is a DTensor. Asking does not import ``torch.distributed.tensor``."""
    return tensor if hasattr(tensor, "full_tensor") else None


def full(tensor: Tensor) -> Tensor:
    """All of a tensor. For a DTensor every process of its mesh has to call this."""
    split = as_dtensor(tensor)
    if split is None:
        return tensor
    with torch.no_grad():
        return split.full_tensor()


def assign(destination: Tensor, value: Tensor) -> None:
    """Copy a whole ``value``, the same in every process, into ``destination``, or into our part."""
    split = as_dtensor(destination)
    with torch.no_grad():
        if split is None:
            destination.copy_(value)
            return
        from torch.distributed.tensor import distribute_tensor

        part = distribute_tensor(
            value.detach(), split.device_mesh, split.placements, src_data_rank=None
        )
        split.to_local().copy_(part.to_local())


def gathered(module: nn.Module) -> nn.Module:
    """The module, or one like it with all of every parameter where some are DTensors."""
    # Asking for the state lets fully_shard put the parameters back into their parts.
    state: Any = module.state_dict(keep_vars=True)
    if all(as_dtensor(tensor) is None for tensor in state.values()):
        return module
    return _with_tensors(module, full)


def _with_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(convert(p), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    twin.__dict__["_modules"] = {
        name: None if child is None else _with_tensors(child, convert)
        for name, child in module._modules.items()
    }
    return twin


# ---- one outcome for all processes


def groups_of(model: nn.Module) -> list[ProcessGroup]:
    """A process group for each dimension of the widest mesh that parameters are split over.

    What is sent along one dimension after the other reaches every process of the mesh. Empty for
    a model without DTensors.
    """
    # Parameters that fully_shard has gathered for a forward pass are plain tensors meanwhile.
    tensors = model.state_dict(keep_vars=True).values()
    found = [
        split for t in tensors if isinstance(t, Tensor) and (split := as_dtensor(t)) is not None
    ]
    if not found:
        return []
    mesh = max((split.device_mesh for split in found), key=lambda mesh: mesh.size())
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def is_first(groups: Sequence[ProcessGroup]) -> bool:
    """Whether this process is the one that writes; always where there are no groups."""
    return all(dist.get_rank(group) == 0 for group in groups)


@contextlib.contextmanager
def same_outcome(groups: Sequence[ProcessGroup]) -> Iterator[None]:
    """Run a block that communicates with nobody; if it fails in one process, all raise.

    Raises:
        AdapterError: another process failed, and this one did not; the message quotes it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    rank, message = _first_error(groups, error) if groups else (None, "")
    if error is not None:
        raise error
    if rank is not None:
        raise AdapterError(f"process {rank} failed: {message}")


def _first_error(groups: Sequence[ProcessGroup], error: Exception | None) -> tuple[int | None, str]:
    """The lowest rank in which there was an error, and what it says; None where there was none."""
    device = _device(groups[0])
    mine = dist.get_rank() if error is not None else _NO_RANK
    first = torch.tensor(mine, device=device)
    _reduce(first, groups, dist.ReduceOp.MIN)
    rank = int(first)
    if rank == _NO_RANK:
        return None, ""
    text = f"{type(error).__name__}: {error}".encode() if mine == rank else b""
    length = torch.tensor(len(text), device=device)
    _reduce(length, groups, dist.ReduceOp.MAX)
    buffer = torch.zeros(int(length), dtype=torch.int32, device=device)
    if text:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    _reduce(buffer, groups, dist.ReduceOp.MAX)
    return rank, bytes(buffer.tolist()).decode(errors="replace")


def _reduce(tensor: Tensor, groups: Sequence[ProcessGroup], op: Any) -> None:
    for group in groups:
        dist.all_reduce(tensor, op, group=group)


def _device(group: ProcessGroup) -> torch.device:
    """Where tensors have to lie that the group's backend sends."""
    kinds = [device.type for device in group._device_types]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
