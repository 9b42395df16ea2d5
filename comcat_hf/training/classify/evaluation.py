"""Accuracy of an image classifier over a split, by one process or many."""

import importlib.util
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...errors import InvalidValueError
from ...modeling import eval_mode


__all__ = ["evaluate_classifier"]

_TOP = 5
_PACKAGES = ("evaluate", "datasets")


class _Counter(Protocol):
    count: int


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
    *,
    progress: str | None = None,
    broken: _Counter | None = None,
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

    Returns:
        the same on every process: `"top1"` and `"top5"`, shares of the images from 0 to 1 (top-5 is of all classes
        where there are fewer), `"loss"`, the mean cross entropy in nats, `"samples"`, the images that counted, and
        `"broken"`, those that could not be read.

    Raises:
        InvalidValueError: nothing to evaluate on, labels that the model has no class for, a missing package.
    """
    _check_packages()
    before = 0 if broken is None else broken.count
    weight = next(p for p in model.parameters() if p.is_floating_point())
    if weight.device.type != accelerator.device.type:
        model.to(accelerator.device)
    quiet = progress is None or not accelerator.is_main_process
    rows: list[Tensor] = []
    losses: list[Tensor] = []
    classes = _TOP
    with eval_mode(model), tqdm(batches, desc=progress, unit="batch", mininterval=0.5, disable=quiet) as bar:
        for batch in bar:
            pixels = batch["pixel_values"].to(accelerator.device, weight.dtype)
            labels = batch["labels"].to(accelerator.device)
            valid = batch.get("valid")
            valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid.to(accelerator.device)
            logits = model(pixel_values=pixels).logits.float()
            classes = logits.shape[-1]
            rows.append(_row(logits, labels, valid))
            losses.append(_losses(logits, labels))
    found = torch.tensor([0 if broken is None else broken.count - before], device=accelerator.device)
    total = int(accelerator.reduce(found, reduction="sum").item())
    ranked, labels, lost = _gathered(accelerator, rows, losses, total)
    _check_labels(labels, classes)
    measured = [_accuracy(ranked, labels) if accelerator.is_main_process else None]
    accuracy = broadcast_object_list(measured)[0]
    return {**accuracy, "loss": lost.double().mean().item(), "samples": len(labels), "broken": total}


def _row(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """What is kept of a batch: the likeliest classes, the label, and whether it counts; `(B, k + 2)`."""
    ranked = logits.topk(min(_TOP, logits.shape[-1]), dim=-1).indices
    return torch.cat([ranked, labels.long()[:, None], valid.long()[:, None]], dim=1)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    # Labels that the model has no class for are reported together at the end; on a GPU they would end the process.
    known = (labels >= 0) & (labels < logits.shape[-1])
    return F.cross_entropy(logits, labels.where(known, 0).long(), reduction="none")


def _gathered(
    accelerator: Accelerator, rows: list[Tensor], losses: list[Tensor], broken: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Likeliest classes `(N, k)`, labels `(N,)` and losses `(N,)` of the images that count, of all processes."""
    if rows:
        # Where a process has a shorter batch, it is filled up with rows of zeros, which do not count.
        both = (torch.cat(rows), torch.cat(losses))
        table, lost = accelerator.gather(tuple(accelerator.pad_across_processes(one) for one in both))
        counts = table[:, -1].bool()
        table, lost = table[counts].cpu(), lost[counts].cpu()
        if len(table):
            return table[:, :-2], table[:, -2], lost
    raise InvalidValueError(
        f"The evaluation: expected images, found none that counts, and {broken} that could not be read. Give a split "
        "with images (--validation_file, --validation_dir or --validation_split_name)."
    )


def _check_labels(labels: Tensor, classes: int) -> None:
    unknown = labels[(labels < 0) | (labels >= classes)]
    if len(unknown):
        raise InvalidValueError(
            f"The evaluation: expected labels from 0 to {classes - 1}, the model's classes, found "
            f"{unknown[0].item()}. Give the data set that the model was trained for, or a model for these classes."
        )


def _accuracy(ranked: Tensor, labels: Tensor) -> dict[str, float]:
    # The class itself, not evaluate.load: that would copy it into the user's cache folder first.
    from ...metrics.top_accuracy import TopAccuracy

    with tempfile.TemporaryDirectory() as folder:
        metric = TopAccuracy(keep_in_memory=True, cache_dir=folder)
        return metric.compute(predictions=ranked.tolist(), references=labels.tolist())


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidValueError(
            f"The evaluation needs the packages {' and '.join(_PACKAGES)}, found no {' and no '.join(missing)}. Run "
            "`pip install comcat_hf[train]`."
        )
