"""transformers' Trainer on models with our adapters: losses, checkpoints, resuming."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    get_peft_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from fused_peft.integrations.trainer import (  # noqa: E402 (it imports transformers)
    AdapterCheckpointCallback,
    save_adapters_only,
)

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "ptuning": PTuningConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
CHECKPOINTING = {"reentrant": True, "not reentrant": False}


def base_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def adapted(method: str = "lora") -> Any:
    torch.manual_seed(1)
    return get_peft_model(base_model(), copy.deepcopy(CONFIGS[method]))


def pefts(method: str, start: Path) -> Any:
    """PEFT's model with the adapter in ``start``, to be trained."""
    if method == "lora":
        return peft.PeftModel.from_pretrained(base_model(), str(start), is_trainable=True)
    # PEFT does not load a prompt for training: one is made, and given the values.
    model = peft.get_peft_model(base_model(), peft.PeftConfig.from_pretrained(str(start)))
    values = load_file(start / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(values)
    return model


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 64, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


def trainer(model: nn.Module, out: Path, *, steps: int = 4, **options: Any) -> Any:
    callbacks = [AdapterCheckpointCallback()] if hasattr(model, "fused_peft_config") else []
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return transformers.Trainer(
        model, arguments, train_dataset=rows(16, 2), eval_dataset=rows(4, 3), callbacks=callbacks
    )


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("method", CONFIGS)
def test_gradient_checkpointing_changes_no_loss(method: str, kind: str, tmp_path: Path) -> None:
    plain = trainer(adapted(method), tmp_path)
    plain.train()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": CHECKPOINTING[kind]}}
    checkpointed = trainer(adapted(method), tmp_path, gradient_checkpointing=True, **options)
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)
    assert losses(plain)[-1] != losses(plain)[0]
    assert_same(trained_state(checkpointed.model), trained_state(plain.model))


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str
)
@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_losses_are_pefts(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The same adapter, once in our model and once in PEFT's, trained by the same Trainer."""
    ours = adapted(method)
    save_adapter(ours, tmp_path / "start")
    results = []
    for model in (ours, pefts(method, tmp_path / "start")):
        run = trainer(model, tmp_path, **options)
        before = run.evaluate()["eval_loss"]
        run.train()
        results.append([*losses(run), run.evaluate()["eval_loss"]])
        assert results[-1][-1] != pytest.approx(before, rel=1e-3)
    assert results[0] == pytest.approx(results[1], rel=1e-2 if options.get("bf16") else 1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_checkpoint_is_an_adapter_that_peft_loads(method: str, tmp_path: Path) -> None:
    run = trainer(adapted(method), tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    checkpoint = tmp_path / "checkpoint-4"
    files = {path.name for path in checkpoint.iterdir()}
    assert ADAPTER_FILES | {"model.safetensors", "optimizer.pt"} <= files
    assert "config.json" not in files
    trained = sum(p.numel() for p in trained_state(run.model).values())
    assert (checkpoint / "model.safetensors").stat().st_size < 4 * trained + 4096
    run.model.eval()
    ids = rows(2, 5)[0]["input_ids"][None]
    theirs = peft.PeftModel.from_pretrained(base_model(), str(checkpoint)).eval()
    again = load_adapter(base_model(), checkpoint)
    with torch.no_grad():
        expected = run.model(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
        found = theirs(input_ids=ids).logits[:, -expected.shape[1] :]
        torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base_model()(input_ids=ids).logits, expected[:, -12:], atol=1e-3)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_resumed_run_ends_with_the_same_bits(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(adapted(method), tmp_path / "whole")
    whole.train()
    trainer(
        adapted(method), tmp_path / "part", steps=2, save_strategy="steps", save_steps=2
    ).train()
    torch.manual_seed(9)
    resumed = trainer(get_peft_model(base_model(), copy.deepcopy(CONFIGS[method])), tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    finally:
        logger.removeHandler(caplog.handler)
    assert_same(trained_state(resumed.model), trained_state(whole.model))
    assert losses(resumed) == losses(whole)
    assert "missing keys" not in caplog.text


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        adapted(),
        tmp_path,
        steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that it is not the last one
    )
    run.train()
    evaluated = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert max(evaluated) != evaluated[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(max(evaluated), rel=1e-6)


def test_save_model_writes_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(adapted(), tmp_path / "out")
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == ADAPTER_FILES | {"training_args.bin"}
    again = load_adapter(base_model(), tmp_path / "adapter", is_trainable=True)
    assert_same(trained_state(again), trained_state(run.model))


def test_only_the_main_process_saves(tmp_path: Path) -> None:
    model = adapted()
    save_adapters_only(model)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "main", is_main_process=True)
    assert {path.name for path in (tmp_path / "main").iterdir()} == ADAPTER_FILES


def test_the_merged_model_can_be_saved_whole(tmp_path: Path) -> None:
    run = trainer(adapted(), tmp_path / "out")
    run.train()
    model = run.model.eval()
    ids = rows(1, 5)[0]["input_ids"][None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    merge_adapter(model)
    type(model).save_pretrained(model, tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_other_states_load_as_strictly_as_before() -> None:
    model = adapted()
    save_adapters_only(model)
    state = model.state_dict()
    model.load_state_dict(state)
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    trained = {name: state[name] for name in trained_state(model)}
    assert model.load_state_dict(trained, strict=False).missing_keys == []
    removed = trained.popitem()[0]
    assert removed in model.load_state_dict(trained, strict=False).missing_keys


def test_an_optimizer_of_the_base_model_is_refused(tmp_path: Path) -> None:
    model = base_model()
    optimizer = torch.optim.AdamW(model.parameters())
    get_peft_model(model, copy.deepcopy(CONFIGS["lora"]))
    run = trainer(model, tmp_path)
    run.optimizer = optimizer
    with pytest.raises(ValueError, match="none of the 28 that are trained"):
        run.train()


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no active adapter"):
        save_adapters_only(base_model())
