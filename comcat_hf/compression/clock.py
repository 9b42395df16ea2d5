"""Timing calls side by side."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch


__all__ = ["for_seconds", "in_turns", "time_call", "wait_for"]

Key = TypeVar("Key")


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    # A CPU is done when it returns.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_call(call: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Seconds of one call, above 0, when it is called so many times in a row."""
    wait_for(device)
    start = time.perf_counter_ns()
    for _ in range(times):
        call()
    wait_for(device)
    return max(time.perf_counter_ns() - start, 1) / times / 1e9


def in_turns(
    calls: Mapping[Key, Callable[[], Any]],
    device: torch.device,
    rounds: Iterable[Any],
    *,
    times: Mapping[Key, int] | None = None,
    warm_up: int = 2,
) -> dict[Key, list[float]]:
    """Time calls in turns, so that a machine that slows down does so for all.

    Args:
        calls: what to time.
        device: on which it runs.
        rounds: each item is a round, which times every call.
        times: how many times in a row each is called in a round; by default once.
        warm_up: untimed calls of each before the first round.

    Returns:
        the seconds of one call of each, by round.
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    for index, _ in enumerate(rounds):
        # There and back, so that none always finds the caches of the same neighbour.
        for key in list(calls)[:: 1 if index % 2 else -1]:
            taken[key].append(time_call(calls[key], device, 1 if times is None else times[key]))
    return taken


def for_seconds(seconds: float, fewest: int, most: int) -> Iterator[int]:
    """Rounds for about so many seconds."""
    end = time.perf_counter() + seconds
    for index in range(most):
        if index >= fewest and time.perf_counter() >= end:
            return
        yield index
