"""Prompt tuning and P-tuning in transformers models, against PEFT with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import prefix_models as models
import pytest
import torch
from prompt_models import P, close, config
from torch import Tensor, nn

import fused_peft
from fused_peft import LoraConfig, PromptTuningConfig

peft = pytest.importorskip("peft")
KINDS = ["llama", "mistral", "qwen2", "gpt2", "bert", "t5", "bart"]
METHODS = ["prompt", "MLP", "LSTM"]
# PEFT warns of the position ids it drops, transformers of what PEFT calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def peft_model(method: str, kind: str, base: nn.Module) -> Any:
    fields = {"num_virtual_tokens": P, "task_type": models.task(kind)}
    if method == "prompt":
        return peft.get_peft_model(base, peft.PromptTuningConfig(**fields))
    fields |= {"encoder_reparameterization_type": method, "encoder_hidden_size": 20}
    return peft.get_peft_model(base, peft.PromptEncoderConfig(**fields))


def pair(method: str, kind: str, **changed: Any) -> tuple[Any, Any]:
    """Our model and PEFT's, in eval mode, with the same base and the same trained weights."""
    base = models.model(kind, **changed)
    theirs = peft_model(method, kind, copy.deepcopy(base)).eval()
    ours = fused_peft.get_peft_model(base, config(method, kind))
    theirs_prompt, prompt = theirs.prompt_encoder["default"], ours.prompt_adapters.current
    with torch.no_grad():
        for parameter in theirs_prompt.parameters():
            parameter.normal_(std=0.3)
    prompt.load_state_dict(theirs_prompt.state_dict())
    return ours.eval(), theirs


@pytest.mark.parametrize("padded", [None, "left", "right", "both"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_are_pefts(kind: str, method: str, padded: str | None) -> None:
    ours, theirs = pair(method, kind)
    inputs: dict[str, Tensor] = models.inputs(kind)
    keep = torch.ones(3, 9, dtype=torch.int64)
    if padded is not None:
        keep = models.mask(padded)
        inputs["attention_mask"] = keep
        if models.task(kind) == "CAUSAL_LM":
            inputs["labels"] = inputs["labels"].masked_fill(keep == 0, -100)
    got, want = ours(**inputs), theirs(**inputs)
    assert got.logits.shape == want.logits.shape
    if models.task(kind) == "CAUSAL_LM":
        assert got.logits.shape[1] == 9 + P
        real = torch.cat([torch.ones(3, P, dtype=torch.int64), keep], 1).bool()
        close(got.logits[real], want.logits[real])
    else:
        close(got.logits, want.logits)
    close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    theirs_grads = {n: p.grad for n, p in theirs.prompt_encoder["default"].named_parameters()}
    for name, parameter in ours.prompt_adapters.current.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, theirs_grads[name], name)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "t5", "bart"])
@pytest.mark.parametrize("method", ["prompt", "LSTM"])
def test_generate_gives_what_peft_generates(kind: str, method: str, search: dict[str, Any]) -> None:
    ours, theirs = pair(method, kind)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = models.tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got = ours.generate(**inputs, **options, **search)
    want = theirs.generate(**inputs, **options, **search)
    assert got.tolist() == want.tolist()
    with fused_peft.disable_adapter(ours):
        assert ours.generate(**inputs, **options, **search).tolist() != got.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_generate_of_left_padded_rows_is_that_of_each_row_alone(kind: str, cache: str) -> None:
    ours = fused_peft.get_peft_model(models.model(kind), config("MLP", kind))
    ids, keep = models.tokens(), models.mask("left")
    options: dict[str, Any] = {"use_cache": cache != "none"}
    if cache == "static":
        options["cache_implementation"] = "static"
    got = ours.generate(
        ids.masked_fill(keep == 0, 0),
        attention_mask=keep,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    for row, tokens, real in zip(got, ids, keep.bool(), strict=True):
        assert row[9:].tolist() == greedy_without_end(ours, tokens[real], 6)


def greedy_without_end(model: Any, ids: Tensor, count: int) -> list[int]:
    """As :func:`greedy`, without the end token, as min_new_tokens has it."""
    row = ids[None]
    for _ in range(count):
        logits = model(row, use_cache=False).logits[0, -1].clone()
        logits[2] = -torch.inf
        row = torch.cat([row, logits.argmax()[None, None]], 1)
    return row[0, len(ids) :].tolist()


def test_generate_from_embeddings_is_that_from_ids() -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("prompt", "llama"))
    ids = models.tokens()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = ours.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 9:]
    embeds = ours.get_input_embeddings()(ids)
    got = ours.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options)
    assert got.tolist() == want.tolist()


def test_steps_with_a_cache_are_the_forward_without() -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("LSTM", "llama"))
    ids = models.tokens()
    whole = ours(ids, use_cache=False).logits
    first = ours(ids[:, :5], use_cache=True)
    close(first.logits, whole[:, : 5 + P])
    keep = torch.ones_like(ids)
    rest = ours(ids[:, 5:], attention_mask=keep, past_key_values=first.past_key_values)
    close(rest.logits, whole[:, 5 + P :])


def test_positions_that_are_given_come_after_the_prompt() -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("prompt", "llama"))
    ids, keep = models.tokens(), models.mask("left")
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    got = ours(ids, attention_mask=keep, position_ids=positions).logits[1, -5:]
    close(got, ours(ids[1:2, 4:]).logits[0, -5:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("MLP", "llama")).train()
    inputs = models.inputs("llama")
    ours(**inputs).loss.backward()
    weight = ours.prompt_adapters.current.embedding.weight
    want, weight.grad = weight.grad, None
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours(**inputs).loss.backward()
    close(weight.grad, want)


def test_prompt_is_float32_and_joins_a_bfloat16_model() -> None:
    base = models.model("llama").bfloat16()
    theirs = peft_model("prompt", "llama", copy.deepcopy(base)).eval()
    ours = fused_peft.get_peft_model(base, config("prompt", "llama"))
    weight = theirs.prompt_encoder["default"].embedding.weight
    ours.prompt_adapters.current.load_prompt_embeddings(weight)
    assert ours.prompt_adapters.current.embedding.weight.dtype == torch.float32
    inputs = models.inputs("llama")
    got, want = ours(**inputs), theirs(**inputs)
    assert got.logits.dtype == torch.bfloat16
    assert torch.equal(got.logits, want.logits)


def test_compiled_forward_is_one_graph() -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("MLP", "llama"))
    inputs = {**models.inputs("llama"), "use_cache": False}
    want = ours(**inputs)
    torch._dynamo.reset()
    got = torch.compile(ours, backend="aot_eager", fullgraph=True)(**inputs)
    close(got.logits, want.logits)
    close(got.loss, want.loss)


def test_head_is_trained_whole_and_disabled_with_the_prompt() -> None:
    base = models.model("bert")
    inputs = models.inputs("bert")
    plain = base(**inputs).logits
    names = [name for name, _ in base.named_parameters()]
    ours = fused_peft.get_peft_model(base, config("prompt", "bert"))
    trainable = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert trainable == [
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
        "prompt_adapters.adapters.default.embedding.weight",
    ]
    count, total = fused_peft.get_nb_trainable_parameters(ours)
    assert count == P * 32 + 2 * 32 + 2
    assert total == sum(p.numel() for p in ours.parameters())
    assert ours.fused_peft_config["default"].modules_to_save == ["classifier", "score"]
    assert not torch.equal(ours(**inputs).logits, plain)
    with fused_peft.disable_adapter(ours):
        assert torch.equal(ours(**inputs).logits, plain)
    fused_peft.delete_adapter(ours, "default")
    assert not hasattr(ours, "prompt_adapters")
    assert not ours._forward_pre_hooks
    assert torch.equal(ours(**inputs).logits, plain)
    assert len(names) == len([n for n, _ in base.named_parameters()])


@pytest.mark.parametrize("cloze", [False, True])
def test_classifier_reads_the_last_real_token(cloze: bool) -> None:
    kind = "llama classifier"
    ours, theirs = pair("MLP", kind)
    ids, labels = models.tokens(), torch.tensor([0, 1, 1])
    ids[:, :P] = 39
    got, want = ours(ids, labels=labels), theirs(ids, labels=labels)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    if cloze:
        fused_peft.add_adapter(ours, config("MLP", kind, prompt_token_id=39), "cloze")
        fused_peft.set_adapter(ours, "cloze")
    # PEFT reads the last position, padding or not.
    keep = models.mask("right")
    got = ours(ids.masked_fill(keep == 0, 0), attention_mask=keep).logits
    for row, tokens, real in zip(got, ids, keep.bool(), strict=True):
        close(row, ours(tokens[real][None]).logits[0])
    assert not torch.allclose(got[2], ours(ids[2:]).logits[0], atol=1e-3)


def test_token_types_of_the_prompt_are_pefts() -> None:
    ours, theirs = pair("prompt", "bert")
    inputs = {**models.inputs("bert"), "token_type_ids": torch.ones(3, 9, dtype=torch.int64)}
    close(ours(**inputs).logits, theirs(**inputs).logits)


def test_question_answering_counts_positions_behind_the_prompt() -> None:
    transformers = pytest.importorskip("transformers")
    base = transformers.BertForQuestionAnswering(transformers.BertConfig(**models.SIZES)).eval()
    ours = fused_peft.get_peft_model(
        base, PromptTuningConfig(num_virtual_tokens=P, task_type="QUESTION_ANS")
    )
    start, end = torch.tensor([1, 2, 3]), torch.tensor([4, 4, 4])
    out = ours(models.tokens(), start_positions=start, end_positions=end)
    cross = nn.functional.cross_entropy
    want = (cross(out.start_logits, start + P) + cross(out.end_logits, end + P)) / 2
    close(out.loss, want)


def test_adapters_take_turns() -> None:
    base = models.model("llama")
    ids = models.tokens()
    ours = fused_peft.get_peft_model(base, config("prompt", "llama"), "one")
    one = ours(ids).logits
    fused_peft.add_adapter(ours, config("LSTM", "llama", num_virtual_tokens=2), "two")
    assert torch.equal(ours(ids).logits, one)
    fused_peft.set_adapter(ours, "two")
    assert ours(ids).logits.shape[1] == 11
    two = ours.prompt_adapters.adapters["two"]
    assert all(p.requires_grad for p in two.parameters())
    assert not any(p.requires_grad for p in ours.prompt_adapters.adapters["one"].parameters())
    with pytest.raises(ValueError, match=r"\['one', 'two'\].*only one can be active"):
        fused_peft.set_adapter(ours, ["one", "two"])
    with pytest.warns(UserWarning, match="now 'one' is"):
        fused_peft.delete_adapter(ours, "two")
    assert torch.equal(ours(ids).logits, one)
    assert ours.prompt_adapters.current.embedding.weight.requires_grad


def test_lora_and_a_prompt_work_together() -> None:
    ids = models.tokens()
    ours = fused_peft.get_peft_model(
        models.model("llama"), LoraConfig(target_modules=["q_proj", "down_proj"]), "lora"
    )
    fused_peft.add_adapter(ours, config("MLP", "llama"), "prompt")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    fused_peft.set_adapter(ours, ["lora", "prompt"])
    both = ours(ids)
    rows = ours.prompt_adapters.current.virtual_tokens()
    embeds = torch.cat([rows.expand(3, -1, -1), ours.get_input_embeddings()(ids)], 1)
    fused_peft.set_adapter(ours, "lora")
    close(both.logits, ours(inputs_embeds=embeds).logits)
    fused_peft.set_adapter(ours, ["lora", "prompt"])
    ours(ids, labels=ids).loss.backward()
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in ours.named_parameters() if "lora_" in n or "prompt_" in n}
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="'prompt' is a prefix or prompt"):
        fused_peft.merge_adapter(ours, adapter_names=["prompt"])
    fused_peft.merge_adapter(ours)
    torch.testing.assert_close(ours(ids).logits, both.logits, atol=1e-5, rtol=1e-5)


def test_lora_leaves_the_prompt_encoder_alone() -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("MLP", "llama"), "prompt")
    fused_peft.add_adapter(ours, LoraConfig(target_modules="all-linear", bias="none"), "lora")
    assert all(type(m) is nn.Linear for m in ours.prompt_adapters.adapters["prompt"].mlp_head[::2])


def test_merging_a_model_with_only_a_prompt_is_refused() -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config("prompt", "llama"))
    with pytest.raises(ValueError, match="'default' is a prefix or prompt"):
        fused_peft.merge_adapter(ours)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_copy_has_a_prompt_of_its_own(kind: str) -> None:
    ours = fused_peft.get_peft_model(models.model(kind), config("prompt", kind))
    inputs = models.inputs(kind)
    want = ours(**inputs).loss
    other = copy.deepcopy(ours)
    assert type(other) is type(ours)
    assert other.state_dict().keys() == ours.state_dict().keys()
    with torch.no_grad():
        ours.prompt_adapters.current.embedding.weight.zero_()
        ours.get_input_embeddings().weight.zero_()
    assert torch.equal(other(**inputs).loss, want)
    ids = models.tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["cache_implementation"] = "static"
    before = other.generate(ids, **options)
    fused_peft.delete_adapter(ours, "default")
    assert torch.equal(other.generate(ids, **options), before)


# The modules


@pytest.mark.parametrize("method", ["MLP", "LSTM"])
def test_folding_keeps_the_prompt_and_the_encoder_can_go_on(method: str) -> None:
    ours = fused_peft.get_peft_model(models.model("llama"), config(method, "llama"))
    encoder = ours.prompt_adapters.current
    state, prompt = encoder.encoder_state(), encoder.prompt_embeddings()
    other = fused_peft.PromptEncoder(encoder.config)
    other.load_encoder_state(state)
    assert torch.equal(other.prompt_embeddings(), prompt)
    logits = ours(models.tokens()).logits
    encoder.fold_reparameterization()
    encoder.fold_reparameterization()
    assert [n for n, _ in encoder.named_parameters()] == ["embedding.weight"]
    assert encoder.embedding.weight.requires_grad
    assert encoder.encoder_state() == {}
    close(ours(models.tokens()).logits, logits)  # torch's LSTM rounds otherwise without gradient
    with pytest.raises(ValueError, match=r"'embedding\.weight' is unknown"):
        encoder.load_encoder_state(state)
    with pytest.raises(ValueError, match=r"shape \(2, 32\); expected floating point .*\(3, 32\)"):
        encoder.load_prompt_embeddings(torch.zeros(2, 32))
    del state["mlp_head.0.bias"]
    with pytest.raises(ValueError, match=r"'mlp_head\.0\.bias' is missing"):
        other.load_encoder_state(state)
