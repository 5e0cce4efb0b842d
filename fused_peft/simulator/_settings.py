"""The device that launches are checked against, the schedule, and which checks run."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from fused_peft.simulator._library import OptionsStruct, call, text_of

DEVICES = ("a100", "rtx4090", "h100", "h200")
_TIMINGS = ("early", "late", "random")
_CHECKS = ("memcheck", "initcheck", "racecheck", "synccheck")


def device() -> str:
    """Key of the device in force, one of ``DEVICES``."""
    return text_of(call("device"))


@contextlib.contextmanager
def use_device(key: str) -> Iterator[None]:
    """Within the context, launches see this device's limits.

    Raises:
        ValueError: the key is none of ``DEVICES``.
    """
    before = device()
    if not call("use_device", key.encode()):
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {key!r}")
    try:
        yield
    finally:
        call("use_device", before.encode())


@contextlib.contextmanager
def options(
    *,
    seed: int | None = None,
    async_timing: str | None = None,
    checks: bool | tuple[str, ...] | None = None,
    max_sms: int | None = None,
    max_findings: int | None = None,
    threads: int | None = None,
    hang_budget: int | None = None,
) -> Iterator[None]:
    """Within the context, launches run with these options; those left None stay as they are.

    Args:
        seed: permutes the schedule of warps and CTAs. The same seed gives the same run.
        async_timing: when data of an asynchronous copy lands: "early" (at its issue), "late" (at
            the wait that asks for it) or "random".
        checks: True for all, False for none, or names out of "memcheck", "initcheck",
            "racecheck", "synccheck".
        max_sms: how many SMs the device has at most; 0 for its own number.
        max_findings: how many findings of a launch are kept.
        threads: worker threads.
        hang_budget: warp instructions without any progress after which a launch counts as hung.

    Raises:
        ValueError: an unknown async_timing or check.
    """
    before, now = OptionsStruct(), OptionsStruct()
    call("get_options", ctypes.byref(before))
    call("get_options", ctypes.byref(now))
    numbers = {
        "seed": seed,
        "max_sms": max_sms,
        "max_findings": max_findings,
        "threads": threads,
        "hang_budget": hang_budget,
    }
    for name, value in numbers.items():
        if value is not None:
            setattr(now, name, value)
    if async_timing is not None:
        if async_timing not in _TIMINGS:
            raise ValueError(
                f"async_timing: expected one of {', '.join(_TIMINGS)}, got {async_timing!r}"
            )
        now.async_timing = _TIMINGS.index(async_timing)
    if checks is not None:
        wanted = (_CHECKS if checks else ()) if isinstance(checks, bool) else checks
        for name in wanted:
            if name not in _CHECKS:
                raise ValueError(f"checks: expected out of {', '.join(_CHECKS)}, got {name!r}")
        for name in _CHECKS:
            setattr(now, name, int(name in wanted))
    call("set_options", ctypes.byref(now))
    try:
        yield
    finally:
        call("set_options", ctypes.byref(before))
