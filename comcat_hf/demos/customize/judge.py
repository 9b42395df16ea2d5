"""The judge of the demo: a small classifier of real digits, which never sees what the generator learns from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compress import Digits, shift
from .base import Bar, upsample


__all__ = ["Judge", "train_judge"]

BATCH = 64
_RATE = 3e-3


@dataclass(frozen=True)
class Judge:
    """A classifier of all ten digits.

    Attributes:
        model: from `(n, 1, 16, 16)` to scores.
        accuracy: on the real images that the generator learns from, none of which it was trained on.
        recall: by digit, on the same images.
    """

    model: nn.Module
    accuracy: float
    recall: tuple[float, ...]

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """The digit read in each of some images `(n, 3, 16, 16)` from -1 to 1."""
        return self.model(images.mean(dim=1, keepdim=True)).argmax(-1)


def train_judge(data: Digits, epochs: int, bar: Bar) -> Judge:
    """Train a judge on the third of the images that the generator has no part in, and test it on the rest.

    Args:
        data: all ten digits.
        epochs: of training, with images shifted by a pixel at most.
        bar: counts the epochs.
    """
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in bar(epochs, "Judge"):
        for picks in torch.randperm(len(data.held_labels)).split(BATCH):
            scores = model(upsample(shift(data.held_images[picks])).mean(dim=1, keepdim=True))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(scores, data.held_labels[picks]).backward()
            optimizer.step()
        schedule.step()
    untested = Judge(model.eval().requires_grad_(False), 0.0, ())
    right = untested.read(upsample(data.train_images)) == data.train_labels
    recall = tuple(right[data.train_labels == digit].float().mean().item() for digit in range(10))
    return Judge(model, right.float().mean().item(), recall)
