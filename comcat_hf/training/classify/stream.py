"""Batches to train, to evaluate and to calibrate on, of which every position is known beforehand.

Training runs along an endless stream of positions. What stands at a position - which image, and how it is augmented -
follows from the seed and the position alone: a resumed run only has to know how far it was, and how positions are
shared out among processes changes nothing. Only the images that are mixed with each other are those of a process's own
batch. An image that cannot be read is replaced by the next of the stream.
"""

import math
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import InvalidValueError
from ..images import BrokenImageError
from ..seeds import MAX_SEED, seeded
from .augmentation import ImagePreparation, Mixing
from .data import BrokenImages, RawImage, Split, logger
from .settings import CompressSettings


__all__ = ["Batches", "batches_per_epoch", "calibration_batches", "evaluation_batches", "train_batches"]

# An image and those that may replace it.
_CANDIDATES = 9
_CALIBRATION = 2
# What a row that holds no image has for a label: the losses of torch leave it out.
_NO_LABEL = -100

# By index, or already read from a stream.
Candidate = int | RawImage
Wanted = tuple[int | None, Sequence[Candidate]]


@dataclass(frozen=True)
class Batches:
    """Batches that can be gone through again and again; each time starts at the same place.

    `len` is known where the number of batches is.
    """

    make: Callable[[], Iterator[dict[str, Tensor]]]
    count: int | None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.make()

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("The number of batches of a stream is not known beforehand.")
        return self.count


def batches_per_epoch(split: Split, settings: CompressSettings, num_processes: int) -> int | None:
    """Batches of one process in which all images occur, each `repeated_augmentation` times.

    Args:
        split: of the training.
        settings: batch size and repetitions.
        num_processes: how many share the images.

    Returns:
        the number, or `None` for a stream of unknown length.
    """
    if split.size is None:
        return None
    positions = split.size * settings.repeated_augmentation
    return math.ceil(positions / (settings.per_device_train_batch_size * num_processes))


def train_batches(
    split: Split,
    preparation: ImagePreparation,
    mixing: Mixing,
    settings: CompressSettings,
    seed: int,
    start: int,
    count: int,
    process_index: int,
    num_processes: int,
    broken: BrokenImages,
) -> Batches:
    """The batches of one process; all processes together take `B * num_processes` positions at a time.

    Batch `b` of process `r` holds the `B` positions from `(b * num_processes + r) * B`. The processes that share a
    stream each read all of it, and decode their own images only.

    Args:
        split: of the training.
        preparation, mixing: what is done to images and batches.
        settings: batch size `B`, repetitions and worker processes.
        seed: of the run.
        start, count: the first batch, and how many.
        process_index, num_processes: whose batches, and of how many.
        broken: counts the images that cannot be read.

    Returns:
        batches of `pixel_values` `(B, 3, H, W)` and `labels`: `(B,)`, or `(B, classes)` where `mixing` mixes or
        smooths.
    """
    size = settings.per_device_train_batch_size

    def make() -> Iterator[dict[str, Tensor]]:
        sampler = _TrainSampler(
            split, seed, size, settings.repeated_augmentation, start, count, process_index, num_processes
        )
        loader = _loader(_Items(split, preparation, seed), sampler, settings.dataloader_num_workers)
        for batch, items in enumerate(loader, start=start):
            _note(items, broken)
            if not bool(items["valid"].all()):
                raise InvalidValueError(
                    f"{split.name}: expected images, found {_CANDIDATES} one after the other that cannot be read "
                    f"({'; '.join(broken.places)}). Replace or remove them."
                )
            first = (batch * num_processes + process_index) * size
            generator = seeded(seed, "mix", first) if mixing.mixes else None
            pixel_values, labels = mixing(items["pixel_values"], items["labels"], generator)
            yield {"pixel_values": pixel_values, "labels": labels}

    return Batches(make, count)


def evaluation_batches(
    split: Split,
    preparation: ImagePreparation,
    batch_size: int,
    process_index: int,
    num_processes: int,
    workers: int,
    broken: BrokenImages,
) -> Batches:
    """The batches of one process, in which every image occurs once over all processes.

    All processes get equally many batches, filled up with rows that are not valid.

    Args:
        split: of the evaluation.
        preparation: what is done to images.
        batch_size: images per batch and process, `B`.
        process_index, num_processes: whose batches, and of how many.
        workers: processes that read images ahead.
        broken: counts the images that cannot be read; their rows are not valid.

    Returns:
        batches of `pixel_values` `(B, 3, H, W)`, `labels` `(B,)` (-100 where not valid) and `valid` `(B,)`, bool.
    """
    total = None if split.streaming else math.ceil((split.size or 0) / (batch_size * num_processes))

    def make() -> Iterator[dict[str, Tensor]]:
        sampler = _EvaluationSampler(split, batch_size, process_index, num_processes)
        for items in _loader(_Items(split, preparation), sampler, workers):
            _note(items, broken)
            yield {name: items[name] for name in ("pixel_values", "labels", "valid")}

    return Batches(make, total)


def calibration_batches(
    split: Split, preparation: ImagePreparation, settings: CompressSettings, seed: int
) -> list[dict[str, Tensor]]:
    """Random images, prepared as for an evaluation; the same on every process.

    Args:
        split: of the training.
        preparation: what is done to images.
        settings: how many images, and how many per batch.
        seed: of the run.

    Returns:
        batches of `pixel_values` `(B, 3, H, W)`; the last one may be smaller. All images where there are fewer than
        asked for.

    Raises:
        InvalidValueError: no image can be read.
    """
    images, broken = [], 0
    for raw in _calibration_rows(split, seed):
        try:
            images.append(preparation.evaluate(split.decode(raw)[0]))
        except BrokenImageError as error:
            broken += 1
            logger.warning("%s cannot be read and is left out of the calibration: %s", error.place, error.reason)
        if len(images) == settings.calibration_samples or broken > settings.calibration_samples:
            break
    if not images:
        raise InvalidValueError(
            f"{split.name}: expected images to calibrate on, found none of {broken} that can be read. Replace them."
        )
    size = settings.calibration_batch_size
    return [{"pixel_values": torch.stack(images[at : at + size])} for at in range(0, len(images), size)]


def _calibration_rows(split: Split, seed: int) -> Iterator[RawImage]:
    generator = seeded(seed, "split", _CALIBRATION)
    if split.streaming:
        yield from split.stream(generator)
    else:
        yield from (split.raw(index) for index in torch.randperm(split.size or 0, generator=generator).tolist())


def _note(items: dict[str, Any], broken: BrokenImages) -> None:
    broken.read(len(items["valid"]))
    for places in items["broken"]:
        for place, reason in places:
            broken.note(place, reason)


@dataclass(frozen=True)
class _Items(Dataset):
    """Images by what samplers give: a position, at which an image is augmented, or `None`, and candidates."""

    split: Split
    preparation: ImagePreparation
    seed: int = 0

    def __getitem__(self, wanted: Wanted) -> dict[str, Any]:
        position, candidates = wanted
        broken = []
        for candidate in candidates:
            try:
                raw = candidate if isinstance(candidate, RawImage) else self.split.raw(candidate)
                image, label = self.split.decode(raw)
            except BrokenImageError as error:
                broken.append((error.place, error.reason))
                continue
            if position is None:
                pixels = self.preparation.evaluate(image)
            else:
                pixels = self.preparation.train(image, seeded(self.seed, "augmentation", position))
            return {"pixel_values": pixels, "labels": label, "valid": True, "broken": broken}
        return {"pixel_values": None, "labels": _NO_LABEL, "valid": False, "broken": broken}


@dataclass(frozen=True)
class _TrainSampler:
    """Positions with their candidates; rows of a stream are read here, once for all workers."""

    split: Split
    seed: int
    batch_size: int
    repeats: int
    start: int
    count: int
    process: int
    processes: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Wanted]]:
        order = _Order(self.split, self.seed)
        for batch in range(self.start, self.start + self.count):
            first = (batch * self.processes + self.process) * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(position, order.window(position // self.repeats)) for position in positions]


@dataclass(frozen=True)
class _EvaluationSampler:
    split: Split
    batch_size: int
    process: int
    processes: int

    def __iter__(self) -> Iterator[list[Wanted]]:
        rows: Iterator[Candidate] = self.split.stream() if self.split.streaming else iter(range(self.split.size or 0))
        # Every process goes through all rows, so all of them see the same end.
        while together := list(islice(rows, self.batch_size * self.processes)):
            own = together[self.process * self.batch_size :][: self.batch_size]
            yield [*((None, (row,)) for row in own), *[(None, ())] * (self.batch_size - len(own))]


class _Order:
    """The images without end, every epoch in an order of its own; numbers asked for must not fall."""

    def __init__(self, split: Split, seed: int) -> None:
        self._split, self._seed = split, seed
        self._rows: Iterator[Candidate] | None = None
        self._ahead: deque[Candidate] = deque()
        self._first = 0

    def window(self, number: int) -> tuple[Candidate, ...]:
        """The image that is at the turn, and those behind it."""
        if self._rows is None:
            # Where the length is known, the epochs before need not be read again.
            epoch = number // self._split.size if self._split.size else 0
            self._first, self._rows = epoch * (self._split.size or 0), self._from(epoch)
        while self._first < number:
            if self._ahead:
                self._ahead.popleft()
            else:
                next(self._rows)
            self._first += 1
        while len(self._ahead) < _CANDIDATES:
            self._ahead.append(next(self._rows))
        return tuple(self._ahead)

    def _from(self, epoch: int) -> Iterator[Candidate]:
        while True:
            yield from islice(self._epoch(epoch), self._split.size)
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Candidate]:
        """One time through, or more often where the length that was declared is too long."""
        if not self._split.streaming:
            yield from torch.randperm(self._split.size, generator=seeded(self._seed, "order", epoch)).tolist()
            return
        again = 0
        while True:
            row = None
            for row in self._split.stream(seeded(self._seed, "order", epoch, again)):
                yield row
            if row is None:
                raise InvalidValueError(f"{self._split.name}: expected images, found an empty stream.")
            if self._split.size is None:
                return
            again += 1


def _loader(items: _Items, sampler: Iterable[list[Wanted]], workers: int) -> DataLoader:
    return DataLoader(
        items,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate, size=items.preparation.size),
        # Its own: a loader draws from the global generator, and a resumed run makes its loader at another time.
        generator=torch.Generator().manual_seed(items.seed % MAX_SEED),
        worker_init_fn=_ignore_signals,
        pin_memory=workers > 0 and torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    # A signal to all processes is for the main one, which still needs the batches of the step it is in.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """Joins items; where there is no image the pixels are 0."""
    images = [item["pixel_values"] for item in items]
    return {
        "pixel_values": torch.stack([torch.zeros(3, *size) if image is None else image for image in images]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "valid": torch.tensor([item["valid"] for item in items]),
        "broken": [item["broken"] for item in items],
    }
