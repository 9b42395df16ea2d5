"""Accuracy of an image classifier over a split, by one process or many, and the classes that changed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...errors import InvalidValueError
from ...modeling import eval_mode
from .data import BrokenImages


__all__ = ["Changes", "Watch", "evaluate_classifier"]

_TOP = 5
# Images whose class changed, for a report.
_SHOWN = 12

Watch = Callable[[Mapping[str, Any], Tensor], None]


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
    *,
    progress: str | None = None,
    broken: BrokenImages | None = None,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and the loss of a classifier; all processes call it together.

    The model runs in eval mode, and is left in the mode that it was in. Inputs get the dtype of its weights.

    Args:
        model: an image classifier, as accelerate wrapped it or not; it is moved to the accelerator's device.
        batches: of this process: `"pixel_values"` `(B, 3, H, W)`, `"labels"` `(B,)` and, where some rows do not count,
            `"valid"`: bool `(B,)`. Every process has as many batches.
        accelerator: whose processes they are.
        progress: what a bar on the main process says; `None` shows none.
        broken: its `count` says how many images this process could not read so far.
        watch: called with each batch of this process and the classes `(B,)` that the model gives.

    Returns:
        the same on every process: `"top1"` and `"top5"`, shares of the images from 0 to 1 (top-5 is of all classes
        where there are fewer), `"loss"`, the mean cross entropy in nats, `"samples"`, the images that counted, and
        `"broken"`, those that could not be read.

    Raises:
        InvalidValueError: nothing to evaluate on, labels that the model has no class for.
    """
    before = 0 if broken is None else broken.count
    weight = next(p for p in model.parameters() if p.is_floating_point())
    if weight.device.type != accelerator.device.type:
        model.to(accelerator.device)
    quiet = progress is None or not accelerator.is_main_process
    counts, classes = [torch.zeros(6, device=accelerator.device)], _TOP
    with eval_mode(model), tqdm(batches, desc=progress, unit="batch", mininterval=0.5, disable=quiet) as bar:
        for batch in bar:
            labels = batch["labels"].to(accelerator.device)
            valid = batch.get("valid", torch.ones_like(labels, dtype=torch.bool)).to(accelerator.device)
            logits = model(pixel_values=batch["pixel_values"].to(accelerator.device, weight.dtype)).logits.float()
            classes = logits.shape[-1]
            counts.append(_counts(logits, labels, valid))
            if watch is not None:
                watch(batch, logits.argmax(-1))
    unread = 0 if broken is None else broken.count - before
    samples, first, among, lost, broken_ones = _totals(torch.stack(counts), unread, classes, accelerator)
    shares = {"top1": first / samples, "top5": among / samples, "loss": lost / samples}
    return {**shares, "samples": int(samples), "broken": int(broken_ones)}


class Changes:
    """Images to which a compressed model gives another class, while both models are evaluated on the same batches.

    Attributes:
        compared, changed: images of this process that were compared, and those whose class changed.
        images: the first of the changed ones, `(3, H, W)` as the models see them, with the classes by name: those of
            the `"dense"` and the `"compressed"` model and the `"label"`.
    """

    def __init__(self) -> None:
        self.compared, self.changed = 0, 0
        self.images: list[tuple[Tensor, dict[str, int]]] = []
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
        given = {"dense": dense, "compressed": compressed, "label": batch["labels"]}
        for place in places[: _SHOWN - len(self.images)]:
            classes = {name: int(values[place]) for name, values in given.items()}
            self.images.append((batch["pixel_values"][place].cpu().clone(), classes))


def _counts(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Of a batch: images that count, those right at first and among the likeliest, loss, least and greatest label."""
    # Labels that the model has no class for are reported together at the end; on a GPU they would end the process.
    known = valid & (labels >= 0) & (labels < logits.shape[-1])
    right = logits.topk(min(_TOP, logits.shape[-1]), dim=-1).indices.eq(labels[:, None]) & valid[:, None]
    losses = F.cross_entropy(logits, labels.where(known, 0).long(), reduction="none").where(known, 0)
    counted = labels.where(valid, 0)
    values = (valid.sum(), right[:, 0].sum(), right.sum(), losses.sum(), counted.min(), counted.max())
    return torch.stack([value.float() for value in values])


def _totals(counts: Tensor, unread: int, classes: int, accelerator: Accelerator) -> tuple[float, ...]:
    """Over all batches and processes: images that count, those right at first and among, loss, images not read."""
    # In double precision, which not every device has.
    table = counts.cpu().double()
    own = [*table[:, :4].sum(dim=0), table[:, 4].min(), table[:, 5].max()]
    own.append(torch.tensor(float(unread), dtype=torch.float64))
    found = torch.stack(own)[None]
    if accelerator.num_processes > 1:
        found = accelerator.gather(found.to(accelerator.device)).cpu()
    samples, first, among, lost, _, _, unread = found.sum(dim=0).tolist()
    if not samples:
        raise InvalidValueError(
            f"The evaluation: expected images, found none that counts, and {unread:.0f} that could not be read. Give "
            "a split with images (--validation_file, --validation_dir or --validation_split_name)."
        )
    unknown = [label for label in (found[:, 4].min().item(), found[:, 5].max().item()) if not 0 <= label < classes]
    if unknown:
        raise InvalidValueError(
            f"The evaluation: expected labels from 0 to {classes - 1}, the model's classes, found {unknown[0]:.0f}. "
            "Give the data set that the model was trained for, or a model for these classes."
        )
    return samples, first, among, lost, unread
