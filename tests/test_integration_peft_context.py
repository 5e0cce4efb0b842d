"""``fused()``: every PEFT model made within is fused, and PEFT is left as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("peft")

import peft
import prefix_models
from peft.tuners.tuners_utils import BaseTuner
from peft_models import (
    TRANSFORMERS_TAKES_IT,
    adapted,
    config,
    in_kernel,
    kinds,
    only_embedding,
    prompt_tuned,
    two_layers,
    with_adalora,
)

from fused_peft.integrations.peft import fuse, fused, unfuse

Make = Callable[[], Any]
BOTH = {"target_modules": ["lin", "other"]}


def test_layers_that_are_made_later_are_fused() -> None:
    model = fuse(adapted(two_layers()))
    assert kinds(model) == ["FusedLinear"]
    model.add_adapter("second", config(target_modules=["other"]))
    assert kinds(model) == ["FusedLinear"] * 2
    copied = copy.deepcopy(model)
    unfuse(model).add_adapter("third", config(target_modules=["other"]))
    assert kinds(model) == ["Linear"] * 2
    assert kinds(copied) == ["FusedLinear"] * 2


def make_with_get_peft_model() -> Any:
    return peft.get_peft_model(two_layers(), config(**BOTH))


def make_by_injection() -> Any:
    return peft.inject_adapter_in_model(config(**BOTH), two_layers())


def make_with_the_tuner() -> Any:
    return peft.LoraModel(two_layers(), config(**BOTH), "default")


def make_in_transformers() -> Any:
    model = prefix_models.model("llama", num_hidden_layers=1)
    model.add_adapter(config(target_modules=["q_proj", "v_proj"]))
    return model


@pytest.mark.parametrize(
    "make",
    [
        make_with_get_peft_model,
        make_by_injection,
        make_with_the_tuner,
        pytest.param(make_in_transformers, marks=TRANSFORMERS_TAKES_IT),
    ],
)
def test_models_made_within_are_fused(make: Make) -> None:
    with fused():
        model = make()
    assert kinds(model) == ["FusedLinear"] * 2
    assert kinds(make()) == ["Linear"] * 2
    assert kinds(fuse(make())) == ["FusedLinear"] * 2
    assert kinds(unfuse(model)) == ["Linear"] * 2


def test_models_made_within_stay_fused() -> None:
    with fused():
        model = adapted(two_layers())
    assert in_kernel(model)
    model.add_adapter("second", config(target_modules=["other"]))
    assert kinds(model) == ["FusedLinear"] * 2


def test_what_cannot_be_fused_is_left_alone_within() -> None:
    with fused():
        assert kinds(only_embedding()) == ["Embedding"]
        assert kinds(with_adalora()) == ["SVDLinear"]
        prompted = prompt_tuned()
    assert "get_prompt" not in vars(prompted)


def patched() -> list[str]:
    return [
        f"{owner.__name__}.{name}"
        for owner, name in ((BaseTuner, "inject_adapter"), (peft.PeftModel, "add_adapter"))
        if hasattr(vars(owner)[name], "__wrapped__")
    ]


def test_contexts_nest_and_leave_nothing_behind() -> None:
    before = vars(BaseTuner)["inject_adapter"], vars(peft.PeftModel)["add_adapter"]
    with fused():
        with pytest.raises(KeyError), fused():
            raise KeyError
        assert kinds(adapted()) == ["FusedLinear"]
        assert len(patched()) == 2
    assert patched() == []
    assert (vars(BaseTuner)["inject_adapter"], vars(peft.PeftModel)["add_adapter"]) == before
    assert kinds(adapted()) == ["Linear"]


def test_a_context_is_its_thread_s_own() -> None:
    made: dict[str, list[str]] = {}
    entered, leave = threading.Event(), threading.Event()

    def within() -> None:
        with fused():
            entered.set()
            leave.wait(10)
            made["within"] = kinds(adapted())

    thread = threading.Thread(target=within)
    thread.start()
    entered.wait(10)
    made["beside"] = kinds(adapted())
    with fused():
        made["in one of its own"] = kinds(adapted())
    leave.set()
    thread.join()
    assert made == {
        "beside": ["Linear"],
        "in one of its own": ["FusedLinear"],
        "within": ["FusedLinear"],
    }
    assert patched() == []


def test_another_wrapper_around_ours_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    with fused():
        ours = vars(BaseTuner)["inject_adapter"]

        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            ours(self, *args, **kwargs)

        monkeypatch.setattr(BaseTuner, "inject_adapter", wrapper)
    assert vars(BaseTuner)["inject_adapter"] is wrapper
    assert kinds(adapted()) == ["Linear"]
