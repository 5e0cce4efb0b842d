"""A tiny language model, its training in one process or many, and what the tests look at."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_peft
from fused_peft import LoraConfig
from fused_peft.distributed import (
    ColwiseLoraParallel,
    RowwiseLoraParallel,
    clip_grad_norm_,
    parameter_groups,
)

VOCABULARY, WIDTH, HEADS, HIDDEN, LENGTH, BATCH = 24, 16, 4, 32, 8, 8


class Block(nn.Module):
    """Attention and an MLP without norms, whose heads and hidden units may lie elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name == "o"))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(x)))


class TinyModel(nn.Module):
    """``ids [B, T] -> logits [B, T, V]``."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpointing = checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Run:
    """How to train; everything but ``parallel`` is the same for any number of processes."""

    parallel: str = "none"
    """none, ddp, fsdp, tp, tp_mlp, tp_sequence or tp_fsdp."""
    dtype: torch.dtype = torch.float64
    adapter_dtype: torch.dtype | None = None
    widened: bool = False
    """The values are those of dtype, and what is computed is float64."""
    steps: int = 5
    checkpointing: bool = False
    micro_batches: int = 1
    static_graph: bool = False
    bias: str = "none"
    second: bool = False
    """A second adapter of another rank and scaling is active, too."""
    cast: bool = False
    """fully_shard computes in bfloat16."""
    train_head: bool = False
    """The head is trained whole, by modules_to_save."""
    dropout: float = 0.0


def build(run: Run) -> TinyModel:
    """The model with adapters that do something; the same in every process."""
    torch.manual_seed(0)
    model = TinyModel(run.checkpointing).to(run.dtype)
    targets = ["q", "v", "up", "down"] if run.train_head else "all-linear"
    config = LoraConfig(
        r=3,  # divides nothing
        lora_alpha=6,
        lora_dropout=run.dropout,
        target_modules=targets,
        modules_to_save=["head"] if run.train_head else None,
        init_lora_weights=False,
        bias=run.bias,
    )
    fused_peft.get_peft_model(model, config)
    if run.second:
        second = LoraConfig(
            r=2, lora_alpha=1, target_modules=["q", "down"], init_lora_weights=False
        )
        fused_peft.add_adapter(model, second, "second")
        fused_peft.set_adapter(model, ["default", "second"])
    if run.adapter_dtype is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(run.adapter_dtype)
    return model.double() if run.widened else model


def plan(run: Run) -> dict[str, Any]:
    """Which layers are split how."""
    column, row = ColwiseLoraParallel, RowwiseLoraParallel
    mlp = {"blocks.*.up": column(), "blocks.*.down": row()}
    if run.parallel == "tp_mlp":
        return mlp
    attention = {f"blocks.*.{name}": column() for name in ("q", "k", "v")}
    head = {"head": column(output_layouts=Replicate())}
    return {**attention, "blocks.*.o": row(), **mlp, **head}


def distribute(model: TinyModel, run: Run) -> tuple[nn.Module, int, int]:
    """The model in the processes; the rank and number of those that have data of their own."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if run.parallel == "ddp":
        wrapped = DistributedDataParallel(model, static_graph=run.static_graph)
        return wrapped, rank, size
    if run.parallel == "fsdp":
        shard(model, init_device_mesh("cpu", (size,)), run)
        return model, rank, size
    if run.parallel == "tp_fsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan(run))
        shard(model, mesh["dp"], run)
        return model, mesh["dp"].get_local_rank(), 2
    parallelize_module(model, init_device_mesh("cpu", (size,)), plan(run))
    return model, 0, 1


def shard(model: TinyModel, mesh: DeviceMesh, run: Run) -> None:
    policy = MixedPrecisionPolicy()
    if run.cast:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def token_ids(step: int) -> Tensor:
    """The ids ``[BATCH, LENGTH]`` of a step: counting up by a row's own stride."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(1, VOCABULARY, (2, BATCH, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCABULARY


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over the rows and positions given."""
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """All of every trainable parameter."""
    return {
        name.removeprefix("module."): whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train(run: Run) -> dict[str, Any]:
    """Losses over the whole batch, norms, first gradients and final parameters of a run."""
    model = build(run)
    result = train_on(model, run)
    return {**result, "model": None, "final": trained(model)}


def train_on(model: TinyModel, run: Run) -> dict[str, Any]:
    """The same for a model that is there; ``model`` of the result is as it is distributed now."""
    wrapped, rank, size = (model, 0, 1) if run.parallel == "none" else distribute(model, run)
    optimizer = torch.optim.AdamW(parameter_groups(wrapped.parameters()), lr=0.02)
    losses, norms, grads = [], [], {}
    for step in range(run.steps):
        rows = token_ids(step)[rank::size]
        total = torch.zeros((), dtype=torch.float64)
        for index, ids in enumerate(rows.chunk(run.micro_batches)):
            last = index == run.micro_batches - 1
            if isinstance(wrapped, FSDPModule):
                wrapped.set_requires_gradient_sync(last)
            alone = isinstance(wrapped, DistributedDataParallel) and not last
            with wrapped.no_sync() if alone else contextlib.nullcontext():
                loss = loss_of(wrapped, ids) / run.micro_batches
                loss.backward()
            total += loss.detach().double()
        if size > 1:  # equal parts of the batch, so the mean is the mean of means
            dist.all_reduce(total)
            if run.parallel == "tp_fsdp":
                total /= dist.get_world_size() // size
        losses.append(total.item() / size)
        assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)
        if step == 0:
            named = wrapped.named_parameters()
            grads = {n.removeprefix("module."): whole(p.grad) for n, p in named if p.requires_grad}
        norms.append(clip_grad_norm_(wrapped.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "grads": grads, "model": wrapped}


# ---- what a run shows only while it runs


def dropout_of_ddp(seeds: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a training forward on the same rows everywhere, and the gradients after it."""
    model = build(Run(dropout=0.5))
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(seeds[dist.get_rank()])
    y = wrapped(token_ids(0))
    y.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads


def adapters_of_ddp() -> dict[str, Tensor]:
    """Adapters that started from another seed in each process, once DDP has the model."""
    torch.manual_seed(dist.get_rank())
    model = fused_peft.get_peft_model(TinyModel(), LoraConfig(target_modules=["q"]))
    DistributedDataParallel(model)
    return trained(model)


def prompt_gradients(method: str, parallel: str, checkpointing: bool) -> dict[str, Tensor]:
    """Gradients of a prefix or prompt from a batch of which each process has a part."""
    import prefix_models
    import prompt_models

    model = prompt_models.trained(method).train()
    rank, size = 0, 1
    wrapped: nn.Module = model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if parallel != "none":
        rank, size = dist.get_rank(), dist.get_world_size()
    if parallel == "ddp":
        wrapped = DistributedDataParallel(model)
    elif parallel == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, prefix_models.SIZES["vocab_size"], (4, 6), generator=generator)
    logits = wrapped(input_ids=ids[rank::size], use_cache=False).logits
    logits.float().square().mean().backward()
    named = model.named_parameters()
    return {name: whole(p.grad) for name, p in named if p.requires_grad}


def refusals() -> None:
    """What has to come before DDP and fully_shard says so, and changes nothing."""
    config = LoraConfig(r=2, target_modules=["up"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    replicated = DistributedDataParallel(build(Run()))
    sharded = build(Run())
    fully_shard(sharded.blocks[0], mesh=mesh)
    for model, what in ((replicated, "wrapped by Dist"), (sharded, "'blocks.0' is sharded by F")):
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=f"{what}.*adding an adapter comes before"):
            fused_peft.add_adapter(model, config, "second")
        assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="sharded by FSDP; merging comes before"):
        fused_peft.merge_adapter(sharded)
    with pytest.raises(ValueError, match="sharded over processes; save the adapter"):
        sharded.blocks[0].up.merge()
    layer = fully_shard(build(Run()).blocks[0].up, mesh=mesh)
    with pytest.raises(RuntimeError, match="expected a LoraLinear that is not split yet"):
        parallelize_module(layer, mesh, ColwiseLoraParallel())
    # Replicas all merge the same.
    x = token_ids(0)
    y = replicated(x)
    fused_peft.merge_adapter(replicated)
    torch.testing.assert_close(replicated(x), y)
    # A layer inside of what fully_shard has, called past it.
    both = build(Run())
    parallelize_module(both, mesh, plan(Run("tp_mlp")))
    wide = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    both = build(Run())
    parallelize_module(both, wide["tp"], plan(Run("tp_mlp")))
    fully_shard(both, mesh=wide["dp"])
    with pytest.raises(RuntimeError, match="call the module that was given to fully_shard"):
        both.blocks[0].up(torch.ones(1, WIDTH, dtype=torch.float64))
