"""Fixtures of several test files."""

import pytest
import torch
from kernels import ISAS, forced


@pytest.fixture(params=ISAS)
def isa(request):
    """Forces one instruction set, and fills uninitialised memory with NaN."""
    with forced(request.param):
        torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
        yield request.param
        torch.use_deterministic_algorithms(False)
