"""Processes that run functions together over gloo, kept from one test to the next."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

#: After this many seconds a call is given up and its processes are killed.
TIMEOUT = 120.0

#: Those that are not installed are left out.
_IMPORTED = (
    "distributed_layers",
    "distributed_checkpoints",
    "transformers.models.llama.modeling_llama",
)


class WorkerError(AssertionError):
    """What went wrong in the processes."""


def _worker(rank: int, size: int, store: str, pipe: Connection) -> None:
    # One machine, so no name has to be resolved; one thread each, so that sums have one order.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    import torch.distributed as dist

    # That DTensor gathers over one mesh dimension after the other, where the tests have two.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # pytest.raises has an exception of its own
            pipe.send((False, traceback.format_exc()))


class World:
    """``size`` processes with a process group; made at the first call, and anew after a failure."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._starts = 0

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` gives in each process; it is found there by its name."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        deadline = time.monotonic() + TIMEOUT
        answers = []
        try:
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(f"process {rank} gave no answer in {TIMEOUT:.0f} s")
                ok, answer = pipe.recv()
                if not ok:
                    raise WorkerError(f"process {rank} of {self.size}:\n{answer}")
                answers.append(answer)
        except (WorkerError, EOFError):
            self.kill()  # the others may wait for the one that failed
            raise
        return answers

    def _start(self) -> None:
        # Forked from a process that has done nothing but import, which would take each of them
        # seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_IMPORTED])
        self._starts += 1
        store = self.folder / f"store_{self.size}_{self._starts}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def kill(self) -> None:
        """End the processes without waiting for what they do."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def close(self) -> None:
        """End the processes, which are idle: they need not take leave of one another."""
        self.kill()
