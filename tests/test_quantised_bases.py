"""LoRA around quantised linear layers: values, gradients, files, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import MAKERS, Int8Linear, Net, Packed4bitLinear, quantised_llama
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_peft import (
    LoraConfig,
    LoraLinear,
    LoraWrappedLinear,
    add_adapter,
    disable_adapter,
    explain,
    get_peft_model,
    load_adapter,
    merge_adapter,
    reference,
    save_adapter,
    set_adapter,
)

MAKER_NAMES = list(MAKERS)
CONFIG = {"target_modules": "all-linear", "r": 4, "lora_alpha": 12, "init_lora_weights": False}


def adapted(name: str, **fields: Any) -> tuple[Net, Net]:
    """The quantised network alone, and one with an adapter that changes what it computes."""
    base = Net(MAKERS[name])
    torch.manual_seed(1)
    return base, get_peft_model(Net(MAKERS[name]), LoraConfig(**{**CONFIG, **fields}))


def expected_layer(base: nn.Module, layer: LoraWrappedLinear, x: Tensor, **kwargs: Any) -> Tensor:
    """By plain torch, around the base's own output."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return reference.lora_update(base(x), x, a, b, scaling=layer.scaling["default"], **kwargs)


@pytest.mark.parametrize("name", MAKER_NAMES)
def test_every_kind_of_base_gets_the_update_around_its_own_product(name: str) -> None:
    base, model = adapted(name)
    assert type(model.first) is type(model.second) is LoraWrappedLinear
    x = torch.randn(40, 64)
    hidden = torch.relu(expected_layer(base.first, model.first, x))
    torch.testing.assert_close(model(x), expected_layer(base.second, model.second, hidden))
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    with disable_adapter(model):
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", MAKER_NAMES)
def test_gradients_are_those_of_the_same_composition_in_plain_torch(name: str) -> None:
    base, model = adapted(name)
    x = torch.randn(40, 64, requires_grad=True)
    dy = torch.randn(40, 32)
    model(x).backward(dy)
    found = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
    x.grad = None
    model.zero_grad()
    hidden = torch.relu(expected_layer(base.first, model.first, x))
    expected_layer(base.second, model.second, hidden).backward(dy)
    truth = {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
    assert len(found) == 5
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, truth[key], rtol=1e-4, atol=1e-4, msg=key)
        assert gradient.norm() > 0


@pytest.mark.parametrize("name", MAKER_NAMES)
def test_only_adapters_train_and_the_loss_falls(name: str) -> None:
    _, model = adapted(name, init_lora_weights=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trained} == {"lora_A", "lora_B"}
    untouched = model.first.base_layer(torch.eye(64))
    x, target = torch.randn(64, 64), torch.randn(64, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model.first.base_layer(torch.eye(64)), untouched)


def test_the_kernel_serves_it_and_explain_says_so() -> None:
    _, model = adapted("subclass of nn.Linear")
    x = torch.randn(40, 64)
    told = explain(model.first, x)
    assert told.startswith("base: quantised.Int8Linear by its own forward; update, kernel: cpu")
    assert "one pass over what the base gave (40 rows), adapters ['default']" in told
    model.first.lora_A["default"].data = model.first.lora_A["default"].double()
    assert "torch: fused_peft.reference.lora_update, because lora_a is torch.float64" in explain(
        model.first, x
    )
    with disable_adapter(model):
        assert explain(model.first, x).endswith("alone because the adapters are disabled")
    set_adapter_none(model)
    assert explain(model.first, x).endswith("alone because no adapter is active")


def set_adapter_none(model: Net) -> None:
    for layer in (model.first, model.second):
        layer.set_adapter([])


def test_explain_names_the_tensor_that_a_plain_linear_computes_with() -> None:
    _, model = adapted("torchao int8")
    assert explain(model.first, torch.randn(2, 64)).startswith("base: F.linear over a torchao.")


def test_dropout_has_the_kernels_own_mask() -> None:
    base, model = adapted("subclass of nn.Linear", lora_dropout=0.5)
    x = torch.randn(40, 64)
    model.train()
    torch.manual_seed(3)
    found = model.first(x)
    torch.manual_seed(3)
    seed = torch.randint(2**62, (), dtype=torch.int64)
    expected = expected_layer(base.first, model.first, x, dropout_p=0.5, seed=seed)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, expected_layer(base.first, model.first, x), atol=1e-2)
    model.eval()
    torch.testing.assert_close(model.first(x), expected_layer(base.first, model.first, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype: torch.dtype) -> None:
    base, model = adapted("subclass of nn.Linear")
    for net in (base, model):
        for layer in (net.first, net.second):
            getattr(layer, "base_layer", layer).bias.data = layer.bias.data.to(dtype)
    x = torch.randn(40, 64).to(dtype)
    y = model.first(x)
    assert y.dtype == dtype
    truth = base.first(x).double() + 3 * (
        x.double()
        @ model.first.lora_A["default"].double().T
        @ model.first.lora_B["default"].double().T
    )
    error = (y.double() - truth).norm() / truth.norm()
    plain = (expected_layer(base.first, model.first, x).double() - truth).norm() / truth.norm()
    assert error <= plain * 1.05
    assert "kernel" in explain(model.first, x)


def test_several_adapters_are_summed() -> None:
    base, model = adapted("subclass of nn.Linear")
    add_adapter(model, LoraConfig(**{**CONFIG, "r": 2, "lora_alpha": 5}), "other")
    set_adapter(model, ["default", "other"])
    x = torch.randn(7, 64)
    expected = base.first(x)
    for name, scaling in (("default", 3.0), ("other", 2.5)):
        a, b = model.first.lora_A[name], model.first.lora_B[name]
        expected = expected + scaling * (x @ a.T @ b.T)
    torch.testing.assert_close(model.first(x), expected)
    model.first.lora_dropout["other"] = 0.5
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model.first(x), expected, atol=1e-3)
    assert len({n for n, p in model.named_parameters() if p.requires_grad}) == 8


@pytest.mark.parametrize("name", MAKER_NAMES)
def test_an_adapter_goes_to_a_file_and_back(name: str, tmp_path: Path) -> None:
    _, model = adapted(name)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert set(tensors) == {
        f"{prefix}{layer}.lora_{half}.weight" for layer in ("first", "second") for half in "AB"
    }
    again = load_adapter(Net(MAKERS[name]), tmp_path)
    model.eval().requires_grad_(False)  # some bases have another product for evaluation
    x = torch.randn(40, 64)
    assert torch.equal(again(x), model(x))
    # The same adapter fits the unquantised network, where it can be merged.
    dense = load_adapter(Net(), tmp_path)
    assert type(dense.first) is LoraLinear
    torch.testing.assert_close(dense(x), model(x), rtol=0.2, atol=0.5)


@pytest.mark.parametrize("name", ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"])
def test_peft_computes_the_same_on_the_same_base(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, model = adapted(name)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(MAKERS[name]), str(tmp_path))
    x = torch.randn(5, 64)
    # One layer: with activations of 8 bits the next would enlarge a last digit's difference.
    layer = theirs.base_model.model.first
    model.eval()  # bitsandbytes has another product for evaluation
    torch.testing.assert_close(layer(x), model.first(x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_adapter(Net(MAKERS[name]), tmp_path / "theirs")
    assert torch.equal(again.first.lora_B["default"], model.first.lora_B["default"])


@pytest.mark.parametrize("name", MAKER_NAMES)
def test_merging_is_refused_and_changes_nothing(name: str) -> None:
    _, model = adapted(name)
    mixed = nn.ModuleDict({"plain": nn.Linear(64, 64), "packed": MAKERS[name](nn.Linear(64, 64))})
    get_peft_model(mixed, LoraConfig(**CONFIG))
    before = mixed["plain"].weight.clone()
    with pytest.raises(TypeError, match="'packed': adapters cannot be merged into a"):
        merge_adapter(mixed)
    with pytest.raises(TypeError, match=r"'packed'.*model\.dequantize"):
        merge_adapter(mixed, safe=True)
    assert torch.equal(mixed["plain"].weight, before)
    assert not mixed["plain"].merged
    with pytest.raises(TypeError, match="cannot be merged"):
        model.first.merge()
    with pytest.raises(TypeError, match="cannot be merged"):
        model.first.check_merge(["default"])


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_decompose_the_weight_are_refused(kind: str) -> None:
    model = Net(Int8Linear)
    with pytest.raises(ValueError, match=f"'first': init_lora_weights is '{kind}', which decomp"):
        get_peft_model(model, LoraConfig(**{**CONFIG, "init_lora_weights": kind}))
    assert type(model.first) is Int8Linear


def test_biases_of_the_base_are_trained_where_the_config_says(tmp_path: Path) -> None:
    _, model = adapted("subclass of nn.Linear", bias="lora_only")
    model(torch.randn(3, 64)).sum().backward()
    assert model.first.base_layer.bias.grad is not None
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.first.base_layer.bias" in tensors
    again = load_adapter(Net(Int8Linear), tmp_path)
    assert torch.equal(again.first.bias, model.first.bias)


def test_one_layer_by_hand() -> None:
    base = Int8Linear(nn.Linear(64, 96))
    layer = LoraWrappedLinear(base, r=4, lora_alpha=8, init_lora_weights="gaussian")
    assert layer.base_layer is base
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not base.bias.requires_grad
    assert layer.lora_A["default"].dtype == torch.float32
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), base(x))  # lora_b is zero
    assert "in_features=64, out_features=96" in str(layer)
    layer.reset_adapter("default")
    with pytest.raises(TypeError, match="base_layer is a LoraWrappedLinear already"):
        LoraWrappedLinear(layer)
    with pytest.raises(TypeError, match=r"base_layer is a torch\.nn\.modules\.activation\.ReLU"):
        LoraWrappedLinear(nn.ReLU())
    with pytest.raises(TypeError, match=r"linear is a quantised\.Int8Linear with a forward of its"):
        LoraLinear.from_linear(base)


def test_it_can_be_copied_and_saved_whole() -> None:
    _, model = adapted("module without a weight")
    x = torch.randn(2, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    _, other = adapted("module without a weight")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))


def test_hooks_of_the_base_stay_with_it() -> None:
    model = Net(Packed4bitLinear)
    seen = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    get_peft_model(model, LoraConfig(**CONFIG))
    model(torch.randn(2, 64))
    assert len(seen) == 1


def test_compiles_without_a_break() -> None:
    _, model = adapted("subclass of nn.Linear")
    x = torch.randn(40, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class Router(nn.Linear):
    """Some layers of transformers give more than a tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.argmax(-1)


def test_a_base_that_gives_no_tensor_says_so() -> None:
    model = nn.Sequential(Router(8, 4))
    get_peft_model(model, LoraConfig(**CONFIG))
    with pytest.raises(TypeError, match=r"Router, gave a tuple; .* exclude_modules"):
        model(torch.randn(2, 8))


def test_a_quantised_llama_trains_and_generates() -> None:
    model = quantised_llama(Int8Linear)
    ids = torch.randint(1, 64, (2, 9))
    before = model(ids).logits
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert sum(isinstance(m, LoraWrappedLinear) for m in model.modules()) == 14
    assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    step = ids
    for _ in range(5):
        step = torch.cat([step, model(step, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, step[:, : out.shape[1]])


def test_transformers_loads_in_4_bits_and_trainer_trains(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from fused_peft.integrations.trainer import AdapterCheckpointCallback

    quantised_llama(lambda linear: linear).save_pretrained(tmp_path / "base")

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        )

    model = load()
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    kind = type(model.model.layers[0].mlp.up_proj.base_layer).__name__
    assert kind == "Linear4bit"
    data = [{"input_ids": torch.arange(1, 13), "labels": torch.arange(1, 13)}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=8,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[AdapterCheckpointCallback()]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    ids = data[0]["input_ids"][None]
    again = load_adapter(load(), tmp_path / "out" / "checkpoint-8")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)
