"""Batches by position: which positions a process takes, and a loader whose workers read them ahead."""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .seeds import MAX_SEED


__all__ = ["make_loader", "positions"]


def positions(batch_size: int, start: int, count: int, process: int, processes: int) -> Iterator[list[int]]:
    """The positions of `count` batches of a process, from batch `start`.

    All processes together take `batch_size * processes` positions at a time, so that how many there are changes
    nothing.
    """
    for batch in range(start, start + count):
        first = (batch * processes + process) * batch_size
        yield list(range(first, first + batch_size))


def make_loader(
    items: Dataset, batches: Iterable[list[Any]], collate: Callable[[list[Any]], Any], workers: int, seed: int
) -> DataLoader:
    """A loader of what `items` has at the indices of each batch."""
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        # Its own: a loader draws from the global generator, and a resumed run makes its loader at another time.
        generator=torch.Generator().manual_seed(seed % MAX_SEED),
        worker_init_fn=_ignore_signals,
        pin_memory=workers > 0 and torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    # A signal to all processes is for the main one, which still needs the batches of the step it is in.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
