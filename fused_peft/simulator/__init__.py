"""Runs CUDA kernels without a GPU: the compiled PTX itself, on the CPU, checked and counted.

``launch`` runs a kernel of a PTX text on NumPy arrays; ``python -m fused_peft.simulator run
./program`` runs a program built with ``nvcc -cudart shared`` as it is. What the sanitizers found
(memory, initialisation, races, synchronisation) is read with ``findings()``, counts with
``counters()``. What is modelled and what is not: csrc/simulator/README.md.
"""

from fused_peft.simulator._launch import Module, launch, load
from fused_peft.simulator._library import SimulatorError, is_available, library_path
from fused_peft.simulator._results import (
    Counters,
    Finding,
    LineConflicts,
    counters,
    findings,
    print_counters,
    reset,
)
from fused_peft.simulator._settings import DEVICES, device, options, use_device
from fused_peft.simulator._torch import has_kernels, kernels_path, simulated_cuda

__all__ = [
    "DEVICES",
    "Counters",
    "Finding",
    "LineConflicts",
    "Module",
    "SimulatorError",
    "counters",
    "device",
    "findings",
    "has_kernels",
    "is_available",
    "kernels_path",
    "launch",
    "library_path",
    "load",
    "options",
    "print_counters",
    "reset",
    "simulated_cuda",
    "use_device",
]
