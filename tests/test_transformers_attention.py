"""The attention implementation "fused_peft" without a prefix; eager attention is the measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from prefix_models import inputs, mask, model, task, tokens
from transformers import StaticCache

import fused_peft
from fused_peft import ops
from fused_peft.integrations import transformers as integration
from fused_peft.nn.plain_attention import plain_attention

integration.register()

DECODERS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "gemma2",
    "gpt_oss",
    "llama4",
]
OTHERS = ["bert", "roberta", "llama classifier", "t5", "bart"]
#: These have what the op has no argument for, in every layer.
PLAIN = {"gemma2", "gpt_oss", "llama4", "t5"}


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of the op."""
    calls: list[dict[str, Any]] = []
    original = ops.prefix_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "prefix_attention", counted)
    return calls


def both(built: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``run`` gives with our attention and with eager attention."""
    built.set_attn_implementation("eager")
    eager = run()
    built.set_attn_implementation("fused_peft")
    return run(), eager


def real(logits: Tensor, keep: Tensor | None, kind: str) -> Tensor:
    """The logits of tokens that are no padding."""
    return logits if keep is None or task(kind) != "CAUSAL_LM" else logits * keep[..., None]


@pytest.mark.parametrize("padding", [None, "none", "left", "right", "both"])
@pytest.mark.parametrize("kind", DECODERS + OTHERS)
def test_logits_and_gradients(
    kind: str, padding: str | None, op_calls: list[dict[str, Any]]
) -> None:
    built = model(kind)
    keep = None if padding is None else mask(padding)
    more = {} if keep is None else {"attention_mask": keep}

    def run() -> Tensor:
        out = built(**inputs(kind), **more).logits
        built.zero_grad()
        (real(out, keep, kind) ** 2).sum().backward()
        grads = [p.grad.flatten() for p in built.parameters() if p.grad is not None]
        return torch.cat((real(out, keep, kind).flatten().detach(), *grads))

    got, expected = both(built, run)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert bool(op_calls) == (kind not in PLAIN)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("kind", [*DECODERS, "t5", "bart"])
def test_generate(
    kind: str, cache: dict[str, Any], search: dict[str, Any], op_calls: list[dict[str, Any]]
) -> None:
    built = model(kind)
    keep = mask("left")

    def run() -> Tensor:
        out = built.generate(
            tokens(),
            attention_mask=keep,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **cache,
            **search,
        )
        return torch.cat((out.sequences.flatten().float(), torch.stack(out.logits).flatten()))

    got, expected = both(built, run)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if kind in DECODERS and kind not in PLAIN | {"mistral", "qwen2"}:
        assert len(op_calls) == 2 * 6  # every layer of every step, whatever the cache


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2"])
def test_prompt_in_chunks_through_a_static_cache(kind: str, op_calls: list[dict[str, Any]]) -> None:
    built = model(kind)
    keep = mask("left")

    def run() -> Tensor:
        cache = StaticCache(config=built.config, max_cache_len=12)
        parts = [
            built(
                tokens()[:, begin:end],
                attention_mask=keep[:, :end],
                past_key_values=cache,
                use_cache=True,
            ).logits
            for begin, end in ((0, 4), (4, 5), (5, 9))
        ]
        return real(torch.cat(parts, dim=1), keep, kind).detach()

    got, expected = both(built, run)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert bool(op_calls) == (kind not in PLAIN)
    whole = real(built(tokens(), attention_mask=keep).logits, keep, kind)
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(3, -1)
PATTERN = (torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(2)) > 0.4) | torch.eye(
    9, dtype=torch.bool
)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2", "gpt_oss", "llama4"])
def test_what_no_compact_mask_can_say(kind: str, op_calls: list[dict[str, Any]]) -> None:
    built = model(kind)
    for arguments in (
        {"position_ids": POSITIONS, "use_cache": False},  # packed sequences
        {"attention_mask": PATTERN},
        {"attention_mask": torch.where(PATTERN, 0.0, torch.finfo(torch.float32).min)},
    ):
        before = len(op_calls)

        def run(arguments: dict[str, Any] = arguments) -> Tensor:
            allowed = {**arguments}
            if built.config._attn_implementation == "eager":
                given = allowed.get("attention_mask")
                if given is not None and given.dtype == torch.bool:  # eager adds its masks
                    given = torch.where(given, 0.0, torch.finfo(torch.float32).min)
                    allowed["attention_mask"] = given
            return built(tokens(), **allowed).logits

        got, expected = both(built, run)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        # GPT-2 does not hand its position ids to the mask's function before ours is asked.
        if "attention_mask" in arguments:
            assert len(op_calls) == before


def test_functions_added_to_the_mask_and_bidirectional_use(op_calls: list[dict[str, Any]]) -> None:
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    built = model("mistral")
    built.set_attn_implementation("fused_peft")
    embeds = torch.zeros(3, 9, 8)
    keep = mask("both").bool()
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        for extra in (
            {"or_mask_function": lambda b, h, q, k: k == 0},
            {"and_mask_function": lambda b, h, q, k: k != 3},
            {"block_sequence_ids": torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1]] * 3)},
        ):
            built.set_attn_implementation("sdpa")
            expected = make(built.config, embeds, keep, None, **extra)
            built.set_attn_implementation("fused_peft")
            got = make(built.config, embeds, keep, None, **extra)
            assert torch.equal(got, expected)
            assert got.dtype == torch.bool
    for extra in ({}, {"or_mask_function": lambda b, h, q, k: k == 0}):
        got = create_causal_mask(
            built.config, embeds, keep, None, allow_is_causal_skip=False, **extra
        )
        assert got.dtype == torch.bool  # a caller who puts masks together
        assert got.shape == (3, 1, 9, 9)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_decoder_used_in_both_directions(kind: str) -> None:
    from transformers.masking_utils import create_causal_mask

    built = model(kind)
    built.set_attn_implementation("fused_peft")
    built.config.is_causal = False  # its modules still say that they are causal
    embeds = torch.zeros(3, 9, 8)
    got = create_causal_mask(built.config, embeds, None, None, allow_is_causal_skip=False)
    assert got.shape == (3, 1, 9, 9)
    assert got.all()
    for more in ({}, {"attention_mask": mask("both")}):
        got, expected = both(built, lambda more=more: built(tokens(), **more).logits)
        keep = more.get("attention_mask", torch.ones(3, 9))[..., None]
        torch.testing.assert_close(got * keep, expected * keep, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert", "t5"])
def test_attention_weights_where_they_are_asked_for(kind: str) -> None:
    built = model(kind)
    keep = mask("right")
    arguments = {**inputs(kind), "attention_mask": keep, "output_attentions": True}

    def run() -> Tensor:
        out = built(**arguments)
        maps = out.decoder_attentions if kind == "t5" else out.attentions
        return torch.stack(maps)[:, :2].detach()

    got, expected = both(built, run)
    assert got.shape == (3 if kind == "t5" else 2, 2, 4, 9, 9)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "t5"])
def test_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    built = model(kind, **({"dropout_rate": 0.0} if kind == "t5" else {})).train()
    built.set_attn_implementation("fused_peft")

    def grads() -> Tensor:
        built.zero_grad()
        built(**inputs(kind), attention_mask=mask("both")).loss.backward()
        return torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None])

    expected = grads()
    built.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(grads(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("padding", [None, "both"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "bert", "t5"])
def test_compiles_without_a_graph_break(
    kind: str, padding: str | None, op_calls: list[dict[str, Any]]
) -> None:
    built = model(kind)
    built.set_attn_implementation("fused_peft")
    arguments = inputs(kind)
    if kind == "gpt2":  # transformers warns about its loss, which breaks the graph
        del arguments["labels"]
    if padding is not None:
        arguments["attention_mask"] = mask(padding)
    expected = built(**arguments).logits
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments).logits, expected, rtol=1e-5, atol=1e-5)
    # Under a compiler the op runs as well, Mistral's window included.
    if padding is not None and kind != "t5":
        assert all(call["sliding_window"] == 4 for call in op_calls) == (kind == "mistral")
        assert len(op_calls) == 4


def test_packed_sequences_compiled() -> None:
    built = model("mistral")
    built.set_attn_implementation("fused_peft")
    arguments = {"position_ids": POSITIONS, "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens(), **arguments).logits,
        built(tokens(), **arguments).logits,
        rtol=1e-5,
        atol=1e-5,
    )


def test_half_precision_and_dropout() -> None:
    built = model("llama", attention_dropout=0.5).to(torch.bfloat16)
    got, expected = both(built, lambda: built(tokens(), attention_mask=mask("left")).logits)
    assert got.dtype == torch.bfloat16
    keep = mask("left")[..., None]
    torch.testing.assert_close(got * keep, expected * keep, rtol=2e-2, atol=4e-2)
    built.train()
    torch.manual_seed(0)
    first, second = built(tokens()).logits, built(tokens()).logits
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(built(tokens()).logits, first, rtol=0, atol=0)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [None, rand(4)])
@pytest.mark.parametrize("bias", [None, rand(1, 4, 3, 5)])
@pytest.mark.parametrize("kept", [None, rand(2, 1, 3, 5) > -0.5, rand(2, 1, 3, 5)])
@pytest.mark.parametrize("weights_wanted", [False, True])
def test_plain_attention_against_the_formula(
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    weights_wanted: bool,
) -> None:
    q, k, v = rand(2, 4, 3, 8), rand(2, 2, 5, 8, seed=2), rand(2, 2, 5, 6, seed=3)
    out, weights = plain_attention(
        q, k, v, kept, bias, softcap=softcap, sinks=sinks, weights_wanted=weights_wanted
    )
    assert (weights is not None) == weights_wanted
    for b in range(2):
        for h in range(4):
            scores = q[b, h] @ k[b, h // 2].t() / 8**0.5
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if bias is not None:
                scores = scores + bias[0, h]
            if kept is not None and kept.dtype != torch.bool:
                scores = scores + kept[b, 0]
            top = scores.exp()
            if kept is not None and kept.dtype == torch.bool:
                top = top * kept[b, 0]
            share = top / (top.sum(-1, keepdim=True) + (0 if sinks is None else sinks[h].exp()))
            torch.testing.assert_close(out[b, h], share @ v[b, h // 2])
            if weights is not None:
                torch.testing.assert_close(weights[b, h], share)


def test_paged_attention_is_refused() -> None:
    built = model("llama")
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(NotImplementedError, match="no paged attention"):
        integration.attention_forward(
            built.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None, cache=object()
        )


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=r"expected 5\.0 or later"):
        integration.register()


def test_use_fused_attention_keeps_the_logits():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 100, (2, 7))
    expected = llama(ids).logits
    fused_peft.use_fused_attention(llama)
    assert llama.config._attn_implementation == "fused_peft"
    torch.testing.assert_close(llama(ids).logits, expected)


def test_use_fused_attention_refuses_what_it_cannot_serve():
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100))
    with pytest.raises(ValueError, match="model is a BloomForCausalLM"):
        fused_peft.use_fused_attention(bloom)
    assert bloom.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="model is a Linear"):
        fused_peft.use_fused_attention(torch.nn.Linear(2, 2))
