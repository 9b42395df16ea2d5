"""The endless stream of training examples, of which every position is known beforehand.

What stands at a position - which image, where it is cropped, whether it is mirrored, and its noise - is drawn from the
seed and the position alone. A resumed run therefore only has to know how far it was.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..batches import make_loader
from ..seeds import seeded
from .data import Example, Prepared, prepare_image
from .settings import CustomizeSettings


__all__ = ["ExampleStream"]

_EXAMPLES = {"instance": "instances", "class": "classes"}


@dataclass(frozen=True)
class ExampleStream(Dataset):
    """Examples of the subject by position, each with one of the class if there are any.

    Every epoch runs through the images in an order of its own.

    Attributes:
        instances, classes: the examples; `classes` may be empty.
        settings: how images are made ready. Where latents are cached, items hold no pixels.
        together: positions that all processes take at a time; in buckets their images have one size.
    """

    instances: tuple[Example, ...]
    classes: tuple[Example, ...]
    seed: int
    settings: CustomizeSettings
    together: int

    def __len__(self) -> int:
        """Positions per epoch: so many that each image occurs."""
        return max(self._lengths.values())

    def __getitem__(self, position: int) -> list[dict[str, Any]]:
        items = [self._item("instance", self.instances, position)]
        if self.classes:
            items.append(self._item("class", self.classes, position))
        return items

    @functools.cached_property
    def nearest(self) -> tuple[int, ...]:
        """Which bucket every image of the subject takes."""
        from diffusers.training_utils import find_nearest_bucket

        sizes = (example.open().size for example in self.instances)
        return tuple(find_nearest_bucket(height, width, self.settings.buckets) for width, height in sizes)

    @functools.cached_property
    def _lengths(self) -> dict[str, int]:
        """Positions per epoch, by kind; the same for all epochs."""
        return {kind: len(self._order(kind, 0)) for kind in _EXAMPLES}

    def size_of(self, kind: str, index: int) -> int | tuple[int, int]:
        """The size to which one image is brought."""
        buckets = self.settings.buckets if kind == "instance" else ()
        return buckets[self.nearest[index]] if buckets else self.settings.resolution

    def _order(self, kind: str, epoch: int) -> list[int]:
        """The images of one epoch; those of a bucket stand together, filled up with images of that bucket."""
        count, generator = len(getattr(self, _EXAMPLES[kind])), seeded(self.seed, f"{kind} order", epoch)
        drawn = torch.randperm(count, generator=generator).tolist()
        if kind == "class" or not self.settings.buckets:
            return drawn
        steps = []
        for bucket in sorted(set(self.nearest)):
            members = [index for index in drawn if self.nearest[index] == bucket]
            filled = [members[i % len(members)] for i in range(-(-len(members) // self.together) * self.together)]
            steps += [filled[i : i + self.together] for i in range(0, len(filled), self.together)]
        return [index for step in torch.randperm(len(steps), generator=generator).tolist() for index in steps[step]]

    def _item(self, kind: str, examples: tuple[Example, ...], position: int) -> dict[str, Any]:
        epoch, place = divmod(position, self._lengths[kind])
        index = self._order(kind, epoch)[place]
        generator = seeded(self.seed, f"{kind} image", position)
        flip = self.settings.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        prompt = "" if kind == "instance" and self._drops(position) else examples[index].prompt
        item = {"kind": kind, "index": index, "flip": flip, "prompt": prompt}
        if not self.settings.cache_latents:
            item["image"] = self.prepare(kind, index, flip, generator)
        return item

    def _drops(self, position: int) -> bool:
        share = self.settings.caption_dropout
        return share > 0 and bool(torch.rand((), generator=seeded(self.seed, "caption", position)) < share)

    def prepare(self, kind: str, index: int, flip: bool, generator: torch.Generator | None = None) -> Prepared:
        """Open an image and make it ready."""
        image = getattr(self, _EXAMPLES[kind])[index].open()
        centered = self.settings.center_crop or self.settings.cache_latents
        return prepare_image(image, self.size_of(kind, index), centered, flip, generator)

    def loader(self, start: int, steps: int, process: int) -> DataLoader:
        """The batches of one process: `steps` of them, from batch `start`.

        Returns:
            batches as lists of items: those of the subject, then those of the class.
        """
        size, together = self.settings.train_batch_size, self.together
        firsts = range(start * together + process * size, (start + steps) * together, together)
        batches = [list(range(first, first + size)) for first in firsts]
        return make_loader(self, batches, _collate, self.settings.dataloader_num_workers, self.seed)


def _collate(pairs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [items[part] for part in range(len(pairs[0])) for items in pairs]
