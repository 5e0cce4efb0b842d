r"""Fine-tune with fused_peft on many processes, with torch's own engines.

    torchrun --nproc-per-node 2 examples/finetune_distributed.py
    torchrun --nproc-per-node 4 examples/finetune_distributed.py --parallel fsdp --steps 100
    torchrun --nproc-per-node 4 examples/finetune_distributed.py --parallel tp_fsdp --tensor 2

The same data, methods and options as ``finetune_smollm2.py``. A batch is the same whatever the
number of processes: those that are parallel in data share its rows, so the losses are those of one
process up to rounding. GPUs and nccl are used where there are any, else CPUs and gloo.

============  ====================================================================================
``ddp``       every process has the whole model; gradients of the adapters are averaged
``fsdp``      parameters are sharded (``fully_shard``), each block gathered when it runs
``tp``        the layers are split (``parallelize_module``); all processes share all rows
``tp_fsdp``   both: ``--tensor`` processes split the layers, groups of them share rows and shards
============  ====================================================================================

Which for what: ``ddp`` while base model and activations fit one device, since only the small
gradients of adapters travel. ``fsdp`` when the frozen weights do not fit. ``tp`` within a machine
with fast links, when one block's activations do not fit or the batch is too small to share;
``tp_fsdp`` over several such machines, ``--tensor`` being the GPUs of one.

Many nodes: run the same command on each, with the same rendezvous endpoint; nothing else changes::

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id finetune \
        --rdzv-endpoint node0.example.org:29500 examples/finetune_distributed.py --parallel fsdp

``--out`` has to be a folder that all nodes see, if ``--resume`` is to work on each. Ctrl-C or
SIGTERM saves at the end of the running step; the same command with ``--resume`` goes on, also with
another number of processes or another ``--parallel``.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from distributed_training import (
    DistributedTrainer,
    Layout,
    SharedInterrupt,
    place_model,
    shared_held_out_loss,
)
from docstring_data import InputError, encode
from finetune_smollm2 import (
    CHECKPOINT,
    COUNT,
    DTYPES,
    build_parser,
    load_model,
    parse_arguments,
    read_corpus,
    settings_of,
)
from methods import METHODS
from results import ADAPTER, Progress, versions, write_json
from training import keep_freed_memory, read_state

import fused_peft
import fused_peft.distributed

LOSSES = "losses.json"
PARALLEL = ("ddp", "fsdp", "tp", "tp_fsdp")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of ``finetune_smollm2.py`` and how to share the work."""
    parser = build_parser()
    parser.description = (__doc__ or "").partition("\n")[0]
    parser.add_argument("--parallel", choices=PARALLEL, default="ddp")
    parser.add_argument(
        "--tensor",
        type=COUNT,
        default=None,
        help="processes that split a layer (default: all for tp, 2 for tp_fsdp, else 1)",
    )
    parser.add_argument("--measured", type=COUNT, default=64, help="most held-out examples")
    args = parse_arguments(argv, parser)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tensor is None:
        args.tensor = {"tp": processes, "tp_fsdp": 2}.get(args.parallel, 1)
    if args.parallel in ("ddp", "fsdp") and args.tensor != 1:
        parser.error(f"--tensor {args.tensor} is for --parallel tp and tp_fsdp")
    if processes % args.tensor or (args.parallel == "tp" and args.tensor != processes):
        parser.error(f"--tensor {args.tensor} does not fit {processes} processes")
    return args


def prepare(args: argparse.Namespace, layout: Layout) -> tuple[DistributedTrainer, list[Any]]:
    """Data, model, adapter and trainer; the last value is the held-out examples to measure."""
    corpus = read_corpus(args)
    settings = settings_of(args, corpus)
    if args.resume:
        read_state(args.out / CHECKPOINT, settings)
    model, tokenizer = load_model(args.model, DTYPES[args.dtype])
    count = min(args.measured, len(corpus.held_out))
    spread = [corpus.held_out[i * len(corpus.held_out) // count] for i in range(count)]
    train, held_out = (
        encode(corpus, examples, tokenizer, args.max_length) for examples in (corpus.train, spread)
    )
    torch.manual_seed(args.seed)  # the same adapter everywhere, whatever then shares it
    config = METHODS[args.method].make_config(vars(args))
    try:
        fused_peft.get_peft_model(model, config, tokenizer=tokenizer)
        fused_peft.fuse_model(model)
        trainable = fused_peft.get_nb_trainable_parameters(model)[0]
        placed = place_model(model.to(layout.device), layout, args.method)
    except ValueError as error:
        raise InputError(f"--method {args.method} --parallel {args.parallel}: {error}") from None
    if layout.is_first:
        print(f"{trainable} trainable parameters; {layout.text()}")
    return DistributedTrainer(placed, train, settings, layout), held_out


def run(args: argparse.Namespace, layout: Layout) -> int:
    """Measures, trains, measures again, and writes; the exit status."""
    checkpoint = args.out / CHECKPOINT
    trainer, held_out = prepare(args, layout)
    keep_freed_memory()
    if args.resume:
        trainer.load(checkpoint)
    else:
        before = shared_held_out_loss(trainer.model, held_out, args.batch_tokens, layout)
        trainer.notes["held_out_loss"] = before
    if layout.is_first:
        print(f"held-out loss before training: {trainer.notes['held_out_loss']:.4f}", flush=True)
    dist.barrier()
    started = time.perf_counter()
    with SharedInterrupt(layout).installed() as interrupt:
        trainer.interrupt = interrupt
        progress = Progress(trainer) if layout.is_first else None
        on_step = progress if progress is not None else lambda _trainer: None
        finished = trainer.train(interrupt, on_step, checkpoint, args.save_every)
        if progress is not None:
            progress.bar.close()
    if not finished:
        if layout.is_first:
            print(f"saved after step {trainer.step}; continue with --resume")
        return 128 + (interrupt.signal_number or signal.SIGINT)
    seconds = time.perf_counter() - started
    after = shared_held_out_loss(trainer.model, held_out, args.batch_tokens, layout)
    fused_peft.distributed.save_adapter(trainer.model, args.out / ADAPTER)
    if layout.is_first:
        write_results(args, trainer, after, seconds)
        checkpoint.unlink()
    dist.barrier()
    return 0


def write_results(
    args: argparse.Namespace, trainer: DistributedTrainer, after: float, seconds: float
) -> None:
    """The losses of the run as JSON, and a line about them."""
    before = trainer.notes["held_out_loss"]
    result = {
        "parallel": args.parallel,
        "processes": dist.get_world_size(),
        "tensor": args.tensor,
        "backend": dist.get_backend(),
        "hyper_parameters": vars(trainer.settings),
        "versions": versions(),
        "losses": trainer.losses.tolist(),
        "held_out_loss": {"before": before, "after": after},
        "tokens": trainer.tokens,
        "seconds": seconds,
    }
    write_json(args.out / LOSSES, result)
    print(
        f"{trainer.step} steps in {seconds:.0f} s, {trainer.tokens / seconds:.0f} tokens/s; "
        f"held-out loss {before:.4f} -> {after:.4f}; adapter and {LOSSES} are in {args.out}/"
    )


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for bad input, 128 + n for signal n."""
    args = parse(argv)
    if "RANK" not in os.environ:  # started without torchrun: one process
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    if os.environ["RANK"] != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    # It advises other meshes for what happens once a step, to one number.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return run(args, Layout.of(args.parallel, args.tensor, device))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
