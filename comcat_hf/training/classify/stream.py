"""Batches to train, to evaluate and to calibrate on, of which every position is known beforehand.

Training runs along an endless stream of positions. What stands at a position - which image, and how it is augmented -
follows from the seed and the position alone: a resumed run only has to know how far it was, and how positions are
shared out among processes changes nothing. Only the images that are mixed with each other are those of a process's own
batch. An image that cannot be read is replaced by the next of the stream.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import InvalidValueError
from ..batches import make_loader
from ..images import BrokenImageError
from ..seeds import seeded
from .augmentation import ImagePreparation, Mixing
from .data import BrokenImages, RawImage, Split, logger
from .settings import CompressSettings


__all__ = ["Batches", "ImageReader"]

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
    count: int | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.make()

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("The number of batches of a stream is not known beforehand.")
        return self.count


@dataclass(frozen=True)
class ImageReader:
    """Reads the batches of one process from a split.

    The processes that share a stream each read all of it, and decode their own images only.

    Attributes:
        split, preparation: the images, and what is done to each.
        settings: batch sizes, repetitions and worker processes.
        broken: counts the images that cannot be read.
        seed: of the run.
        process, processes: whose batches, and of how many.
    """

    split: Split
    preparation: ImagePreparation
    settings: CompressSettings
    broken: BrokenImages
    seed: int = 0
    process: int = 0
    processes: int = 1

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches in which all images occur, each `repeated_augmentation` times; `None` if that is unknown."""
        if self.split.size is None:
            return None
        count = self.split.size * self.settings.repeated_augmentation
        return math.ceil(count / (self.settings.per_device_train_batch_size * self.processes))

    def train(self, mixing: Mixing, start: int, number: int) -> Iterator[dict[str, Tensor]]:
        """So many batches from batch `start`; all processes together take `B` positions each at a time.

        Returns:
            batches of `pixel_values` `(B, 3, H, W)` and `labels`: `(B,)`, or `(B, classes)` where `mixing` mixes or
            smooths.
        """
        size, repeated = self.settings.per_device_train_batch_size, self.settings.repeated_augmentation
        together = size * self.processes
        first = start * together + self.process * size
        # Rows of a stream are read here, once for all workers.
        ahead = _from_position(self.split, self.seed, first, repeated)
        wanted = (list(islice(ahead, together))[:size] for _ in range(number))
        places = range(first, first + number * together, together)
        for place, items in zip(places, self._load(wanted), strict=True):
            if not bool(items["valid"].all()):
                raise InvalidValueError(
                    f"{self.split.name}: expected images, found {_CANDIDATES} one after the other that cannot be read "
                    f"({'; '.join(self.broken.places)}). Replace or remove them."
                )
            generator = seeded(self.seed, "mix", place) if mixing.mixes else None
            pixel_values, labels = mixing(items["pixel_values"], items["labels"], generator)
            yield {"pixel_values": pixel_values, "labels": labels}

    def evaluate(self) -> Batches:
        """Batches in which every image occurs once over all processes.

        All processes get equally many, filled up with rows that are not valid.

        Returns:
            batches of `pixel_values` `(B, 3, H, W)`, `labels` `(B,)` (-100 where not valid) and `valid` `(B,)`, bool.
        """
        size = self.settings.per_device_eval_batch_size
        total = None if self.split.streaming else math.ceil((self.split.size or 0) / (size * self.processes))
        return Batches(lambda: self._load(_shares(self.split, size, self.process, self.processes)), total)

    def calibrate(self) -> list[dict[str, Tensor]]:
        """Random images, prepared as for an evaluation; the same on every process.

        Returns:
            batches of `pixel_values` `(B, 3, H, W)`; the last one may be smaller. All images where there are fewer
            than asked for.

        Raises:
            InvalidValueError: no image can be read.
        """
        images, broken, wanted = [], 0, self.settings.calibration_samples
        for raw in self._random_rows():
            try:
                images.append(self.preparation.evaluate(self.split.decode(raw)[0]))
            except BrokenImageError as error:
                broken += 1
                logger.warning("%s cannot be read and is left out of the calibration: %s", error.place, error.reason)
            if len(images) == wanted or broken > wanted:
                break
        if not images:
            raise InvalidValueError(
                f"{self.split.name}: expected images to calibrate on, found none of {broken} that can be read. "
                "Replace them."
            )
        size = self.settings.calibration_batch_size
        return [{"pixel_values": torch.stack(images[at : at + size])} for at in range(0, len(images), size)]

    def _random_rows(self) -> Iterator[RawImage]:
        generator = seeded(self.seed, "split", _CALIBRATION)
        if self.split.streaming:
            return self.split.stream(generator)
        return map(self.split.raw, torch.randperm(self.split.size or 0, generator=generator).tolist())

    def _load(self, wanted: Iterable[list[Wanted]]) -> Iterator[dict[str, Tensor]]:
        items = _Items(self.split, self.preparation, self.seed)
        collate = partial(_collate, size=self.preparation.size)
        for batch in make_loader(items, wanted, collate, self.settings.dataloader_num_workers, self.seed):
            self.broken.read(len(batch["valid"]))
            for place, reason in batch.pop("broken"):
                self.broken.note(place, reason)
            yield batch


@dataclass(frozen=True)
class _Items(Dataset):
    """Images by what samplers give: a position, at which an image is augmented, or `None`, and candidates."""

    split: Split
    preparation: ImagePreparation
    seed: int

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


def _shares(split: Split, size: int, process: int, processes: int) -> Iterator[list[Wanted]]:
    """Every row once over all processes, in batches of which each process gets as many."""
    rows: Iterator[Candidate] = split.stream() if split.streaming else iter(range(split.size or 0))
    # Every process goes through all rows, so all of them see the same end.
    while together := list(islice(rows, size * processes)):
        own = together[process * size :][:size]
        yield [*((None, (row,)) for row in own), *[(None, ())] * (size - len(own))]


def _from_position(split: Split, seed: int, first: int, repeated: int) -> Iterator[Wanted]:
    """What stands at each position from one on: an image, at several side by side, and those behind it."""
    number = first // repeated
    # Where the length is known, the epochs before need not be read again.
    epoch = number // split.size if split.size else 0
    rows = islice(_from_epoch(split, seed, epoch), number - epoch * (split.size or 0), None)
    images = deque(islice(rows, _CANDIDATES), maxlen=_CANDIDATES)
    for position in count(first):
        if position // repeated > number:
            images.append(next(rows))
            number += 1
        yield position, tuple(images)


def _from_epoch(split: Split, seed: int, epoch: int) -> Iterator[Candidate]:
    for number in count(epoch):
        yield from islice(_epoch(split, seed, number), split.size)


def _epoch(split: Split, seed: int, epoch: int) -> Iterator[Candidate]:
    """One time through, or more often where the length that was declared is too long."""
    if not split.streaming:
        yield from torch.randperm(split.size, generator=seeded(seed, "order", epoch)).tolist()
        return
    for again in count():
        row = None
        for row in split.stream(seeded(seed, "order", epoch, again)):
            yield row
        if row is None:
            raise InvalidValueError(f"{split.name}: expected images, found an empty stream.")
        if split.size is None:
            return


def _collate(items: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """Joins items; where there is no image the pixels are 0."""
    images = [item["pixel_values"] for item in items]
    return {
        "pixel_values": torch.stack([torch.zeros(3, *size) if image is None else image for image in images]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "valid": torch.tensor([item["valid"] for item in items]),
        "broken": [one for item in items for one in item["broken"]],
    }
