"""Fine-tuning of an adapter: batches, loss, schedule, and a loop that can be interrupted.

Everything that decides the final weights is a function of :class:`Settings`, the data and the step
number, or is saved by :meth:`Trainer.save`: a resumed run ends with the same bits.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from docstring_data import Encoded, InputError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_peft.ops import cross_entropy

MAX_GRADIENT_NORM = 1.0
BETAS = (0.9, 0.99)
CHECKPOINT_FORMAT = 2
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """What decides the final weights; ``model`` is a name and ``data`` a fingerprint.

    An option that the method does not have is None.
    """

    model: str
    data: str
    method: str
    rank: int | None
    alpha: int | None
    dropout: float | None
    virtual_tokens: int | None
    encoder_hidden_size: int | None
    init_text: str | None
    learning_rate: float
    warmup_steps: int
    steps: int
    batch_tokens: int
    max_length: int
    held_out: float
    seed: int
    dtype: str

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero at ``steps``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


# ------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length."""

    ids: Tensor
    """``[B, T]`` int64."""
    targets: Tensor
    """``[B, T]`` int64: the token to predict at each position, or IGNORED."""
    at_head: Tensor
    """``[B, T]`` bool: the positions that go through the output head, all targets among them."""
    tokens: int
    """How many of ``ids`` are not padding."""


def padded(length: int) -> int:
    """The next multiple of 8: few lengths mean few kernels compiled and buffers that fit again."""
    return -(-length // 8) * 8


def collate(rows: list[Encoded]) -> Batch:
    """One batch of ``rows``, padded on the right with token 0, which nothing attends to."""
    length = padded(max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        first = max(1, row.prompt_length)
        targets[index, first - 1 : len(row.ids) - 1] = ids[index, first : len(row.ids)]
    at_head = targets != IGNORED
    # Rounded up like the lengths, by positions whose logits nothing reads.
    missing = -int(at_head.sum()) % 64
    at_head.view(-1)[(~at_head).view(-1).nonzero()[:missing]] = True
    return Batch(ids, targets, at_head, sum(len(row.ids) for row in rows))


def batches_by_length(lengths: list[int], batch_tokens: int, order: Tensor) -> list[list[int]]:
    """Indices of rows of like length, one row or at most ``batch_tokens`` padded ones a batch.

    ``order`` [n] decides which rows of equal length meet: a random one mixes them anew each epoch.
    """
    batches: list[list[int]] = []
    for index in sorted(order.tolist(), key=lambda row: padded(lengths[row])):
        # Rows come shortest first, so this one sets the width of the batch it joins.
        if not batches or (len(batches[-1]) + 1) * padded(lengths[index]) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def epoch_batches(rows: list[Encoded], settings: Settings, epoch: int) -> list[list[int]]:
    """The batches of an epoch in a random order that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator)
    batches = batches_by_length([len(row.ids) for row in rows], settings.batch_tokens, order)
    shuffle = torch.randperm(len(batches), generator=generator)
    return [batches[index] for index in shuffle.tolist()]


# ---------------------------------------------------------------------------------- loss


def completion_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy ``[n]`` float32 of each target of the batch.

    The output head sees only the positions that predict a target: it is the widest matrix by far
    and prompt tokens need no logits. No attention mask is passed: under causal attention a real
    token never sees the padding to its right, and without a mask the faster attention runs.
    Virtual tokens that a method puts in front have positions of their own, which are left out.
    """

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        of_text = inputs[0][:, -batch.ids.shape[1] :]
        return (of_text[batch.at_head],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(input_ids=batch.ids, use_cache=False).logits
    finally:
        hook.remove()
    targets = batch.targets[batch.at_head]
    losses = cross_entropy(logits, targets, IGNORED)
    return losses[targets != IGNORED]


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks for the next step instead of returning them to the system.

    The logits alone are tens of megabytes, and fetching such pages anew takes a tenth of a step.
    What is free now, as after the loading of a model, is returned first.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # malloc.h
        libc.malloc_trim(0)
        for option in (trim_threshold, mmap_threshold):
            libc.mallopt(option, 1 << 30)


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Encoded], batch_tokens: int) -> float:
    """Mean cross-entropy a completion token, in nats, with dropout off."""
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for indices in batches_by_length(
        [len(row.ids) for row in rows], batch_tokens, torch.arange(len(rows))
    ):
        losses = completion_losses(model, collate([rows[index] for index in indices]))
        total += losses.sum(dtype=torch.float64)
        count += losses.numel()
    return total.item() / count


# ---------------------------------------------------------------------- interrupted runs


class Interrupt:
    """Set by SIGINT and SIGTERM, read at step boundaries; a second signal does not wait for one."""

    signal_number: int | None = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    @contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """Takes the two signals over for the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


class Trainer:
    """The loop's state: adapter parameters, optimiser, position in the data, and history.

    Args:
        model: a causal language model of transformers with an adapter put in.
        rows: the training examples.
        settings: see :class:`Settings`.
    """

    def __init__(self, model: Any, rows: list[Encoded], settings: Settings) -> None:
        self.model, self.rows, self.settings = model, rows, settings
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=BETAS, weight_decay=0.0, fused=True
        )
        self.step = 0
        self.epoch = 0
        self.position = 0
        self.tokens = 0
        self.seconds = 0.0
        self.losses = torch.zeros(settings.steps)
        self.notes: dict[str, Any] = {}
        """JSON values kept with the checkpoint, such as what was measured before training."""

    def train(
        self,
        interrupt: Interrupt,
        on_step: Callable[[Trainer], None],
        checkpoint: Path,
        save_every: int,
    ) -> bool:
        """Runs to the last step, or to the end of the step in which a signal came.

        ``checkpoint`` is written every ``save_every`` steps and wherever the loop ends.

        Returns:
            True when all steps are done.
        """
        self.model.train()
        batches = epoch_batches(self.rows, self.settings, self.epoch)
        while self.step < self.settings.steps and interrupt.signal_number is None:
            if self.position == len(batches):
                self.epoch, self.position = self.epoch + 1, 0
                batches = epoch_batches(self.rows, self.settings, self.epoch)
            started = time.perf_counter()
            self._train_on([self.rows[index] for index in batches[self.position]])
            self.seconds += time.perf_counter() - started
            on_step(self)
            if self.step % save_every == 0:
                self.save(checkpoint)
        self.save(checkpoint)
        return self.step == self.settings.steps

    def _train_on(self, rows: list[Encoded]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        loss = self._backward(rows)
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses[self.step] = loss
        self.step += 1
        self.position += 1
        self.tokens += sum(len(row.ids) for row in rows)

    def _backward(self, rows: list[Encoded]) -> Tensor:
        """Adds up the gradients of the mean loss of a batch, which it returns."""
        loss = completion_losses(self.model, collate(rows)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _clip_gradients(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)

    # -------------------------------------------------------------------- checkpoint

    def save(self, path: Path) -> None:
        """Writes everything that the next step depends on to one safetensors file, atomically.

        One file, its JSON in the safetensors header, so that no kill can leave halves of two
        checkpoints.
        """
        self._write(path, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """``weight.<name>`` of every parameter, and ``<key>.<name>`` of what AdamW keeps of it."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        tensors = {
            "rng": torch.get_rng_state(),
            "losses": self.losses[: self.step].clone(),
            **tensors,
        }
        state = {
            "format": CHECKPOINT_FORMAT,
            "settings": asdict(self.settings),
            "environment": _environment(),
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "notes": self.notes,
        }
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata={"state": json.dumps(state)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continues from what :meth:`save` wrote; the trainer is untouched when that fails.

        Raises:
            InputError: the file is no checkpoint, or one of another model, data or setting.
        """
        state = read_state(path, self.settings)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        optimizer_keys = ("exp_avg", "exp_avg_sq", "step") if state["step"] else ()
        for name, parameter in self.parameters.items():
            for key in ("weight", *optimizer_keys):
                shape = () if key == "step" else tuple(parameter.shape)
                found = tensors.get(f"{key}.{name}")
                if found is None or tuple(found.shape) != shape:
                    what = "nothing" if found is None else tuple(found.shape)
                    raise InputError(f"{path}: {key}.{name} of shape {shape} expected, got {what}")
        self._take(tensors, optimizer_keys)
        if state["environment"] != _environment():
            print(
                f"note: the run was on {state['environment']} and goes on with {_environment()}: "
                "sums may be grouped differently, and the last bits of the weights differ"
            )
        torch.set_rng_state(tensors["rng"])
        self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
        self.tokens, self.seconds, self.notes = state["tokens"], state["seconds"], state["notes"]
        self.losses[: self.step] = tensors["losses"]

    def _take(self, tensors: dict[str, Tensor], optimizer_keys: Sequence[str]) -> None:
        """The counterpart of :meth:`_tensors`; all are there, and of the right shapes."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"] for key in optimizer_keys
                }


def read_state(path: Path, settings: Settings) -> dict[str, Any]:
    """The JSON part of a checkpoint, once it is known to be of a run with these settings.

    Raises:
        InputError: the file is no checkpoint, or one of another model, data or setting.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {state['format']!r}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a checkpoint of this program ({error})") from None
    for key, value in asdict(settings).items():
        if state["settings"].get(key) != value:
            raise InputError(
                f"{path} is of a run with {key}={state['settings'].get(key)!r}, and this one has "
                f"{value!r}; resume with the same arguments, or remove the file to start anew"
            )
    return state


def _environment() -> dict[str, Any]:
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
