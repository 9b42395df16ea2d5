"""The endless stream of training examples, of which every position is known beforehand.

What stands at a position - which image, where it is cropped, whether it is mirrored, and its noise - is drawn from the
seed and the position alone. A resumed run therefore only has to know how far it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..batches import make_loader, positions
from ..seeds import seeded
from .data import Example, Prepared, prepare_image


__all__ = ["ExampleStream", "stream_loader"]


@dataclass(frozen=True)
class ExampleStream(Dataset):
    """Examples of the subject by position, each with one of the class if there are any.

    Every epoch runs through the images in an order of its own.

    Attributes:
        instances, classes: the examples; `classes` may be empty.
        resolution, center_crop, random_flip: how images are made ready.
        open_images: whether items hold pixels; not where the latents are cached.
    """

    instances: tuple[Example, ...]
    classes: tuple[Example, ...]
    seed: int
    resolution: int
    center_crop: bool
    random_flip: bool
    open_images: bool = True

    def __len__(self) -> int:
        """Positions per epoch: so many that each image occurs."""
        return max(len(self.instances), len(self.classes))

    def __getitem__(self, position: int) -> list[dict[str, Any]]:
        items = [self._item("instance", self.instances, position)]
        if self.classes:
            items.append(self._item("class", self.classes, position))
        return items

    def _item(self, kind: str, examples: tuple[Example, ...], position: int) -> dict[str, Any]:
        epoch, place = divmod(position, len(examples))
        index = _order(self.seed, f"{kind} order", epoch, len(examples))[place]
        generator = seeded(self.seed, f"{kind} image", position)
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        item = {"kind": kind, "index": index, "flip": flip, "prompt": examples[index].prompt}
        if self.open_images:
            item["image"] = self.prepare(examples[index], flip, generator)
        return item

    def prepare(self, example: Example, flip: bool, generator: torch.Generator | None = None) -> Prepared:
        """Open an example's image and make it ready."""
        return prepare_image(example.open(), self.resolution, self.center_crop, flip, generator)


def stream_loader(
    stream: ExampleStream, batch_size: int, start: int, steps: int, process: int, processes: int, workers: int = 0
) -> DataLoader:
    """The batches of one process; all processes together take `batch_size * processes` positions at a time.

    Args:
        start, steps: the first batch, and how many.
        process, processes: whose batches, and of how many.

    Returns:
        batches as lists of items: those of the subject, then those of the class.
    """
    batches = positions(batch_size, start, steps, process, processes)
    return make_loader(stream, batches, _collate, workers, stream.seed)


def _collate(pairs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [items[part] for part in range(len(pairs[0])) for items in pairs]


def _order(seed: int, kind: str, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=seeded(seed, kind, epoch)).tolist())
