"""Labelled images to train and to evaluate on, read one by one, and an account of those that cannot be read."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidValueError
from ..images import read_image
from ..seeds import seeded
from .labels import LabelTable, match_labels, model_labels
from .settings import CompressSettings
from .sources import open_sources, size_of


__all__ = ["BrokenImages", "RawImage", "Split", "Splits", "open_splits"]

logger = logging.getLogger(__name__)

_NAMED = 5
_BUFFER = 1000
# Shares of a stream of unknown length are taken of at least so many images.
_LEAST_READ = 1000
_SEARCH, _FEWER = 0, 1


class BrokenImages:
    """Counts images that cannot be read, each once, and ends the run when they are too many.

    Attributes:
        places: the first few.
    """

    def __init__(self, limit: float, size: int | None = None) -> None:
        """Count from 0.

        Args:
            limit: how many there may be: a count, or a share if it is below 1.
            size: images that the share is of; default: those that were read so far, at least 1000.
        """
        self.places: list[str] = []
        self._limit, self._size = limit, size
        self._read = 0
        self._seen: set[str] = set()

    @classmethod
    def of(cls, settings: CompressSettings, split: "Split | None") -> "BrokenImages":
        """A count for one split."""
        return cls(settings.max_broken_images, None if split is None else split.size)

    @property
    def count(self) -> int:
        """How many different images could not be read."""
        return len(self._seen)

    def read(self, count: int) -> None:
        """Take note of images that were asked for."""
        self._read += count

    def note(self, place: str, reason: str) -> None:
        """Count an image; the first few are logged as warnings.

        Raises:
            InvalidValueError: there are too many now.
        """
        if place in self._seen:
            return
        self._seen.add(place)
        if len(self.places) < _NAMED:
            self.places.append(place)
            logger.warning("%s cannot be read and is left out: %s", place, reason)
        if self.count > self._allowed():
            raise InvalidValueError(
                f"{self.count} images cannot be read, among them {'; '.join(self.places)} (the last one: {reason}); "
                f"expected at most --max_broken_images {self._limit:g}. Replace or remove them, or allow more."
            )

    def _allowed(self) -> float:
        if self._limit >= 1:
            return self._limit
        return self._limit * (self._size if self._size is not None else max(self._read, _LEAST_READ))


@dataclass(frozen=True, slots=True)
class RawImage:
    """A row that was not yet decoded."""

    place: str
    image: Any
    label: Any


@dataclass(frozen=True)
class Split:
    """Labelled images, map-style or as a stream.

    Attributes:
        name: for messages.
        rows: the data set, images not decoded.
        labels: from its labels to the model's numbers.
        size: how many images; `None` for a stream of unknown length.
        streaming: whether images can only be read one after the other.
        indices: the rows that belong to the split; `None` for all, or for the first `size` of a stream.
        limited: whether a stream ends after `size` images by wish.
    """

    name: str
    rows: Any = field(repr=False)
    image_column: str
    label_column: str
    labels: LabelTable
    size: int | None
    streaming: bool = False
    indices: Tensor | None = field(default=None, repr=False)
    limited: bool = False

    def read(self, index: int) -> tuple[Any, int]:
        """An image in RGB and its label as the model numbers it; map-style only.

        Raises:
            BrokenImageError: it cannot be read.
            InvalidValueError: the model lacks its label.
        """
        return self.decode(self.raw(index))

    def raw(self, index: int) -> RawImage:
        """A row, not decoded; map-style only."""
        row = index if self.indices is None else int(self.indices[index])
        return self._raw(self.rows[row], f"[{row}]")

    def decode(self, raw: RawImage) -> tuple[Any, int]:
        """An image in RGB, upright, and its label as the model numbers it.

        Raises:
            BrokenImageError: it cannot be read.
            InvalidValueError: the model lacks its label.
        """
        label = self.labels(raw.label)
        return read_image(raw.image, raw.place), label

    def stream(self, generator: torch.Generator | None = None) -> Iterator[RawImage]:
        """All rows one after the other.

        Args:
            generator: shuffles: the files the data set consists of, and rows near each other; default: as they are.
        """
        rows = self._numbered(generator)
        return rows if generator is None else _shuffled(rows, generator)

    def _numbered(self, generator: torch.Generator | None) -> Iterator[RawImage]:
        if not self.streaming:
            yield from (self.raw(index) for index in range(self.size or 0))
            return
        # With a limit the first files count, so they stay the first.
        if generator is None or self.limited or self.rows.num_shards == 1:
            parts = [(0, self.rows)]
        else:
            count = self.rows.num_shards
            order = torch.randperm(count, generator=generator).tolist()
            parts = [(part, self.rows.shard(num_shards=count, index=part)) for part in order]
        for part, rows in parts:
            for number, row in enumerate(rows):
                yield self._raw(row, f"[{number}]" if len(parts) == 1 else f"[file {part}, {number}]")

    def _raw(self, row: Any, number: str) -> RawImage:
        image = row[self.image_column]
        path = image.get("path") if isinstance(image, dict) else None
        return RawImage(f"{self.name}{number}{f' ({path})' if path else ''}", image, row[self.label_column])


@dataclass(frozen=True)
class Splits:
    """What a run reads.

    Attributes:
        search: to search ranks on; cut off from what was `train`, where that can be.
    """

    train: Split | None
    search: Split | None
    validation: Split | None


def open_splits(settings: CompressSettings, config: Any, seed: int) -> Splits:
    """Open the images that the settings name, and match their labels with the model's.

    With `max_train_samples` a random choice of the training images stays, of a stream the first ones; the choice of
    `max_eval_samples` is random as well, but does not depend on the seed, so that runs can be compared.

    Raises:
        InvalidValueError: a source is missing or cannot be read, lacks a column, or has labels that the model lacks;
            or the model does not give each image one label.
    """
    if not settings.has_source:
        return Splits(None, None, None)
    names, chosen = model_labels(config, f"--model_name_or_path {settings.model_name_or_path}")
    opened: dict[str, Split] = {}
    sources = open_sources(settings)
    from datasets import Dataset

    for role, (place, rows) in sources.items():
        table, names = match_labels(rows, settings.label_column_name, names, chosen, place)
        # Names that came from the training images hold for the validation images as well.
        chosen = chosen or any(name != f"LABEL_{number}" for number, name in enumerate(names))
        columns = settings.image_column_name, settings.label_column_name
        opened[role] = Split(place, rows, *columns, table, size_of(rows), streaming=not isinstance(rows, Dataset))
    train = _limited(opened.get("train"), settings.max_train_samples, seeded(seed, "split", _FEWER))
    validation = _limited(opened.get("validation"), settings.max_eval_samples, seeded(0, "split", _FEWER))
    search = None
    if train is not None and settings.strategy == "search" and not train.streaming:
        train, search = _cut_search(train, settings.search_share, seeded(seed, "split", _SEARCH))
    return Splits(train, search, validation)


def _limited(split: Split | None, most: int | None, generator: torch.Generator) -> Split | None:
    if split is None or most is None or (split.size is not None and split.size <= most):
        return split
    if split.streaming:
        # A stream of unknown length may be shorter still.
        return replace(split, size=most if split.size is not None else None, rows=split.rows.take(most), limited=True)
    chosen = torch.randperm(split.size, generator=generator)[:most].sort().values
    return replace(split, indices=chosen, size=most)


def _cut_search(split: Split, share: float, generator: torch.Generator) -> tuple[Split, Split]:
    count = round(share * split.size)
    if not 0 < count < split.size:
        raise InvalidValueError(
            f"--search_share {share} of the {split.size} images of {split.name}: expected some to search on and some "
            "to train on, found that one part is empty. Give another share, or more images."
        )
    order = torch.randperm(split.size, generator=generator)
    rows = torch.arange(split.size) if split.indices is None else split.indices
    search, train = (rows[part.sort().values] for part in (order[:count], order[count:]))
    return replace(split, indices=train, size=len(train)), replace(split, indices=search, size=len(search))


def _shuffled(rows: Iterator[RawImage], generator: torch.Generator) -> Iterator[RawImage]:
    """Through a buffer: every row that comes takes the place of a random one, which goes.

    Rows that `datasets` shuffles do not say their numbers, by which broken ones are named and counted once.
    """
    buffer = list(islice(rows, _BUFFER))
    if len(buffer) == _BUFFER:
        places: list[int] = []
        for row in rows:
            if not places:
                places = torch.randint(_BUFFER, (_BUFFER,), generator=generator).tolist()
            place = places.pop()
            buffer[place], leaving = row, buffer[place]
            yield leaving
    yield from (buffer[index] for index in torch.randperm(len(buffer), generator=generator).tolist())
