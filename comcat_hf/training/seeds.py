"""Generators that belong to a purpose and a position, so that a resumed run draws what it would have drawn."""

import random
from collections.abc import Mapping
from typing import Any, cast

import torch


__all__ = ["choose_seed", "random_states", "seeded", "set_random_states"]

# What a generator is for; of each kind there is one per seed and position. New kinds go to the end.
_KINDS = (
    "instance order",
    "class order",
    "instance image",
    "class image",
    "noise",
    "prior",
    "validation",
    "order",
    "augmentation",
    "mix",
    "dropout",
    "split",
    "search",
    "caption",
)
MAX_SEED = 2**62
_DEFAULT_SEED = 42


def seeded(seed: int, kind: str, *position: int) -> torch.Generator:
    """A generator that belongs to one purpose at one position.

    Args:
        kind: one of `_KINDS`.
        position: whole numbers below 2^62.
    """
    state = seed
    for number in (_KINDS.index(kind), *position):
        # A step of splitmix64: neighbouring positions get unrelated generators.
        state = (state * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % MAX_SEED)


def choose_seed(asked: int | None, before: int | None) -> int:
    """The seed that was asked for, else that of the run that goes on, else 42."""
    return next(seed for seed in (asked, before, _DEFAULT_SEED) if seed is not None)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's global generators: numbers, strings and tensors only."""
    import numpy

    kind, keys, *rest = cast("tuple[Any, ...]", numpy.random.get_state())
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put back what [`random_states`] returned."""
    import numpy

    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
