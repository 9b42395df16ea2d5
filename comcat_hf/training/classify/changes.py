"""Images to which the compressed model gives another class than the dense one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


__all__ = ["ChangedImage", "Changes"]

_MOST = 12

Watch = Callable[[Mapping[str, Any], Tensor], None]


@dataclass(frozen=True)
class ChangedImage:
    """An image with three classes.

    Attributes:
        inputs: the image as the models see it, `(3, H, W)`.
        label: its label.
        dense, compressed: the classes that the models give.
    """

    inputs: Tensor
    label: int
    dense: int
    compressed: int


class Changes:
    """The classes that changed, gathered while both models are evaluated on the same batches of this process.

    Attributes:
        compared, changed: images that were compared, and those whose class changed.
        images: the first of the changed ones.
    """

    def __init__(self) -> None:
        self.compared, self.changed = 0, 0
        self.images: list[ChangedImage] = []
        self._dense: list[Tensor] = []

    def watch(self, dense: bool) -> Watch:
        """What an evaluation calls: of the dense model it remembers the classes, else it compares and starts anew."""
        if dense:
            return lambda batch, classes: self._dense.append(classes)
        self.compared, self.changed, self.images = 0, 0, []
        before = iter(self._dense)
        return lambda batch, classes: self._compare(batch, next(before).to(classes.device), classes)

    def _compare(self, batch: Mapping[str, Any], dense: Tensor, compressed: Tensor) -> None:
        valid = batch["valid"].to(dense.device)
        places = ((dense != compressed) & valid).nonzero()[:, 0].tolist()
        self.compared += int(valid.sum())
        self.changed += len(places)
        for place in places[: _MOST - len(self.images)]:
            classes = (int(values[place]) for values in (batch["labels"], dense, compressed))
            self.images.append(ChangedImage(batch["pixel_values"][place].cpu().clone(), *classes))
