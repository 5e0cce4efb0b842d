"""What a fine-tuning run reports: progress, figures, samples, the plot of its loss, peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import math
import platform
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from docstring_data import Corpus
from training import Trainer

import fused_peft
from fused_peft.checkpoint import WEIGHTS_NAME

ADAPTER = "adapter"
FIGURES = "figures.json"


class Progress:
    """A progress bar with the recent loss, the speed and the time left."""

    def __init__(self, trainer: Trainer) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self.bar = tqdm(
            total=trainer.settings.steps,
            initial=trainer.step,
            unit="step",
            dynamic_ncols=True,
            # A log file gets a line's worth now and then, a terminal a moving bar.
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def __call__(self, trainer: Trainer) -> None:
        """Moves on by one step."""
        # update() says whether it drew; the loss is read from the tensor only then.
        if self.bar.update(1):
            recent = trainer.losses[max(0, trainer.step - 20) : trainer.step].mean().item()
            speed = trainer.tokens / trainer.seconds
            self.bar.set_postfix_str(f"loss {recent:.3f}, {speed:.0f} tokens/s")


def restart_peak_memory() -> None:
    """Makes :func:`peak_memory_mib` count from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mib() -> float:
    """The most memory the process held at once since :func:`restart_peak_memory`, or ever."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


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
            "seconds_per_step": trainer.seconds / trainer.step,
            "loss": trainer.losses.tolist(),
        },
        # Of the whole process, from the first measurement on: the loading of the model, which
        # needs more, is the same for every method.
        "peak_rss_mib": peak_memory_mib(),
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
    fused_peft.save_adapter(model, out / ADAPTER)
    result["adapter_bytes"] = (out / ADAPTER / WEIGHTS_NAME).stat().st_size
    held = result["held_out"]
    plot_losses(
        out / "loss.png", result["training"]["loss"], held["loss_before"], held["loss_after"]
    )
    write_json(out / FIGURES, result)


def running_mean(losses: list[float]) -> tuple[list[int], list[float]]:
    """The steps at which a window of a twelfth of the run ends, and the mean loss over it."""
    window = max(1, len(losses) // 12)
    means: list[float] = torch.tensor(losses).unfold(0, window, 1).mean(-1).tolist()
    return list(range(window, len(losses) + 1)), means


def plot_losses(path: Path, losses: list[float], before: float, after: float) -> None:
    """The loss of every step, its running mean, and the two held-out measurements."""
    from matplotlib.figure import Figure

    ends, means = running_mean(losses)
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.3, label="step")
    axes.plot(ends, means, color="C0", label=f"mean of {ends[0]} steps")
    axes.plot([0, len(losses)], [before, after], "o", color="C3", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_comparison(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """The running mean of each run's loss by step, and what was measured on the held-out part."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).add_subplot()
    for index, (title, result) in enumerate(results.items()):
        losses, held = result["training"]["loss"], result["held_out"]
        ends, means = running_mean(losses)
        axes.plot(ends, means, color=f"C{index}", label=title)
        axes.plot(len(losses), held["loss_after"], "o", color=f"C{index}")
        if index == 0:
            axes.plot(0, held["loss_before"], "o", color="black", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


def write_json(path: Path, content: Any) -> None:
    """Replaces ``path`` in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
