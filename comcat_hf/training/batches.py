"""A loader of batches that are named by their positions, whose workers leave signals to the main process."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .seeds import MAX_SEED


__all__ = ["make_loader"]


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
