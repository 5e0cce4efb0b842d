"""A pytest plugin that runs a test suite, PEFT's own above all, with every PEFT model fused.

``pytest -p peft_suite_plugin`` with this folder on PYTHONPATH; see CONTRIBUTING.md. The last line
of the report says how often the fused forward ran, and how often PEFT's own did in a fused layer.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch

_stack = contextlib.ExitStack()
_calls: Counter[str] = Counter()


def _counted(function: Any, name: str) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _calls[name] += 1
        return function(*args, **kwargs)

    return wrapper


def pytest_configure(config: pytest.Config) -> None:
    from fused_peft.integrations import _peft_linear
    from fused_peft.integrations.peft import fused

    _peft_linear.linear_with_adapters = _counted(_peft_linear.linear_with_adapters, "fused")
    _peft_linear.FusedLinear.forward = _counted(_peft_linear.FusedLinear.forward, "all")
    _stack.enter_context(fused())


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(
        f"fused_peft: {_calls['fused']} forward passes fused, "
        f"{_calls['all'] - _calls['fused']} of a fused layer handed to PEFT"
    )
