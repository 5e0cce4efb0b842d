"""Fixtures of several test files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, ISAS, forced
from distributed_world import World
from hypothesis import settings

# The same draws in every run, so that a failure is the change's own;
# --hypothesis-profile=default draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(params=ISAS)
def isa(request):
    """Forces one instruction set, and fills uninitialised memory with NaN."""
    with forced(request.param):
        torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
        yield request.param
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The same, and the CUDA kernels under the simulator."""
    with forced(request.param):
        torch.use_deterministic_algorithms(True)
        yield request.param
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for the examples."""
    from example_runs import make_model  # needs transformers

    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for the examples to learn."""
    from example_runs import make_data

    path = tmp_path_factory.mktemp("data") / "boxes.jsonl"
    make_data(path)
    return path


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two processes with a gloo process group."""
    world = World(2, tmp_path_factory.mktemp("two_processes"))
    yield world
    world.close()


@pytest.fixture(scope="session")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Four of them."""
    world = World(4, tmp_path_factory.mktemp("four_processes"))
    yield world
    world.close()
