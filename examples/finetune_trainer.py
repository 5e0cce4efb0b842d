"""Fine-tune by LoRA with transformers' Trainer: with fused_peft, with PEFT, or with PEFT fused.

The scripts of people who use PEFT differ from this one in the lines of ``adapted`` only. The data
are those of ``finetune_smollm2.py``: SmolLM2-135M-Instruct learns to write docstrings, or any
model the lines of ``--data``.

    python examples/finetune_trainer.py
    python examples/finetune_trainer.py --backend peft
    python examples/finetune_trainer.py --backend peft-fused
    python examples/finetune_trainer.py --compile

Each prints the time of a step, and leaves an adapter in PEFT's format.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from docstring_data import Encoded, InputError, encode
from finetune_smollm2 import (
    COUNT,
    DTYPES,
    MEASURED_EXAMPLES,
    RATE,
    SEED,
    SHARE,
    load_model,
    packaged_model,
    read_corpus,
)
from methods import METHODS
from results import ADAPTER, write_json
from torch import Tensor
from training import IGNORED

import fused_peft

BACKENDS = ("ours", "peft", "peft-fused")
# The first steps allocate memory and, where asked for, compile.
WARM_UP_STEPS = 3


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; makes ``--out``."""
    lora = METHODS["lora"].defaults
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="ours", help="whose LoRA layers")
    add("--fuse-model", action="store_true", help="fuse the frozen layers, too")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="by torch.compile")
    add("--gradient-checkpointing", action="store_true")
    add("--data", type=Path, help="JSONL file; left out: the standard library's docstrings")
    add("--model", type=Path, help="transformers directory or .gguf file; left out: SmolLM2")
    add("--out", type=Path, default=Path("out/trainer"), help="folder for what is written")
    add("--steps", type=COUNT, default=100)
    add("--batch-size", type=COUNT, default=4, help="rows a step")
    add("--max-length", type=COUNT, default=128, help="tokens of every row, with padding")
    add("--held-out", type=SHARE, default=0.1, help="share of modules, or of lines, to measure on")
    add("--learning-rate", type=RATE, default=lora["learning_rate"])
    add("--rank", type=COUNT, default=lora["rank"])
    add("--alpha", type=COUNT, default=lora["alpha"])
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the frozen weights")
    add("--seed", type=SEED, default=0)
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    args.model = packaged_model(parser) if args.model is None else args.model
    needed = ["transformers", "accelerate", *(["peft"] if args.backend != "ours" else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"missing {', '.join(missing)}: pip install {' '.join(missing)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def adapted(model: Any, args: argparse.Namespace) -> Any:
    """The model with a LoRA adapter of the backend asked for."""
    fields = {
        "r": args.rank,
        "lora_alpha": args.alpha,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if args.backend == "ours":
        model = fused_peft.get_peft_model(model, fused_peft.LoraConfig(**fields))
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    if args.backend == "peft-fused":
        from fused_peft.integrations.peft import fuse

        fuse(model)
    if args.fuse_model:
        fused_peft.fuse_model(model if args.backend == "ours" else model.get_base_model())
    return model


class Collator:
    """Rows of tokens, padded on the right to one length: what is compiled once serves them all."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """``[B, length]`` input_ids, attention_mask and labels."""
        ids = torch.zeros(len(rows), self.length, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for index, row in enumerate(rows):
            count = len(row.ids)
            ids[index, :count] = torch.tensor(row.ids)
            mask[index, :count] = 1
            labels[index, row.prompt_length : count] = ids[index, row.prompt_length : count]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_trainer(model: Any, parts: dict[str, list[Encoded]], args: argparse.Namespace) -> Any:
    """Trainer, with a ``step_seconds`` list that it fills."""
    import transformers

    seconds: list[float] = []

    class StepTimer(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    callbacks: list[Any] = [StepTimer()]
    if args.backend == "ours":
        from fused_peft.integrations.trainer import AdapterCheckpointCallback

        callbacks.append(AdapterCheckpointCallback())
    arguments = transformers.TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile_backend=args.compile,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,  # a row is no dict; the collator makes one of several
        report_to=[],
        seed=args.seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=Collator(args.max_length),
        train_dataset=parts["train"],
        eval_dataset=parts["held_out"],
        callbacks=callbacks,
    )
    trainer.step_seconds = seconds
    return trainer


def run(args: argparse.Namespace) -> int:
    """Trains and measures; the exit status."""
    corpus = read_corpus(args)
    model, tokenizer = load_model(args.model, DTYPES[args.dtype])
    measured = min(MEASURED_EXAMPLES // 4, len(corpus.held_out))
    spread = [corpus.held_out[i * len(corpus.held_out) // measured] for i in range(measured)]
    parts = {
        name: encode(corpus, examples, tokenizer, args.max_length)
        for name, examples in (("train", corpus.train), ("held_out", spread))
    }
    torch.manual_seed(args.seed)
    model = adapted(model, args)
    trainer = make_trainer(model, parts, args)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(args.out / ADAPTER))
    steady = trainer.step_seconds[WARM_UP_STEPS:] or trainer.step_seconds
    result = {
        "backend": args.backend,
        "compile": args.compile,
        "fuse_model": args.fuse_model,
        "seconds_per_step": statistics.median(steady),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "held_out_loss_before": before,
        "held_out_loss_after": after,
    }
    write_json(args.out / "trainer.json", result)
    compiled = f", compiled by {args.compile}" if args.compile else ""
    print(
        f"{args.backend}{compiled}: {result['seconds_per_step']:.3f} s/step, held-out loss "
        f"{before:.3f} -> {after:.3f}; adapter and trainer.json are in {args.out}/"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for bad input."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
