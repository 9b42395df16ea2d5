"""A plain fine-tuning loop on accelerate, with or without a teacher."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..checks import Kind, above, check, finite, whole
from ..errors import ComCATError, InvalidValueError
from ..progress import progress_bar
from .distillation import DistillationLoss, LossParts, ask_teacher, check_labels


__all__ = ["finetune", "one_cycle", "parameter_groups"]

EpochLosses = dict[str, float]

_NORM = Kind("a number above 0", lambda value: value == math.inf or above(0).holds(value))
_PARTS = tuple(field.name for field in fields(LossParts))


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: DataLoader | Sequence[Mapping[str, Any]],
    epochs: int,
    learning_rate: float,
    *,
    loss: DistillationLoss | None = None,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    max_norm: float = 1.0,
    accelerator: Accelerator | None = None,
    progress: bool | None = None,
    description: str = "Fine-tuning",
    on_epoch: Callable[[int, EpochLosses], None] | None = None,
) -> list[EpochLosses]:
    """Train a classifier in place with AdamW: a linear warm-up of the rate, then a cosine to zero.

    Args:
        student: afterwards it is in eval mode, on the accelerator's device.
        teacher: with `None` a PEFT student learns from its own base, adapters switched off, so that no second copy is
            in memory; a `loss` that needs no teacher takes `None` as well.
        loader: batches of the model's inputs and `"labels"`, with a length; processes share a `DataLoader`.
        epochs, learning_rate: times through the loader; the highest rate.
        loss: by default `DistillationLoss(alignment=1.0)`.
        weight_decay: of matrices; biases, norms and other vectors have none.
        warmup: share of the steps in which the rate rises.
        max_norm: gradients are scaled down to this norm; `math.inf` leaves them.
        accelerator: by default `Accelerator()`; its gradient accumulation and mixed precision are respected.
        progress, description: show one bar on the main process, by default where transformers shows its own, and what
            it says.
        on_epoch: called after each epoch with its number, from 1, and its mean losses.

    Returns:
        per epoch the means of the parts of the loss, as `LossParts` names them.

    Raises:
        InvalidValueError: an argument out of range, no teacher where one is needed, a batch without labels.
        ComCATError: the loss is not finite.
    """
    loss = DistillationLoss(alignment=1.0) if loss is None else loss
    check(epochs, whole(1), "epochs")
    check(learning_rate, above(0), "learning_rate")
    check(weight_decay, finite(0), "weight_decay")
    check(warmup, finite(0, 1), "warmup")
    check(max_norm, _NORM, "max_norm")
    _check(student, teacher, loader, loss)
    accelerator = Accelerator() if accelerator is None else accelerator
    optimizer = AdamW(parameter_groups(student, weight_decay), lr=learning_rate)
    steps = epochs * math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
    scheduler = LambdaLR(optimizer, lambda step: one_cycle(step, steps, warmup))
    model, optimizer, loader, scheduler = accelerator.prepare(student, optimizer, loader, scheduler)
    teacher = None if teacher is None else teacher.to(accelerator.device)
    training = _Training(accelerator, model, teacher, optimizer, scheduler, loss, max_norm)
    history: list[EpochLosses] = []
    total, shown = epochs * len(loader), progress if accelerator.is_main_process else False
    with progress_bar(total=total, desc=description, unit="step", mininterval=0.5, progress=shown) as bar:
        for epoch in range(epochs):
            model.train()
            seen: list[Tensor] = []
            for index, batch in enumerate(loader):
                seen.append(training.step(batch, (epoch * len(loader) + index) / total))
                bar.update()
            history.append(_mean_losses(accelerator, seen, epoch + 1))
            bar.set_postfix({"loss": f"{history[-1]['total']:.3f}"}, refresh=False)
            if on_epoch is not None:
                on_epoch(epoch + 1, history[-1])
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    return history


@dataclass(frozen=True)
class _Training:
    """What a step needs, as accelerate wrapped it."""

    accelerator: Accelerator
    model: nn.Module
    teacher: nn.Module | None
    optimizer: Any
    scheduler: Any
    loss: DistillationLoss
    max_norm: float

    def step(self, batch: Mapping[str, Any], progress: float) -> Tensor:
        """Learn from one batch; returns the parts of its loss, stacked."""
        batch = send_to_device(batch, self.accelerator.device)
        with self.accelerator.accumulate(self.model):
            parts = self._losses(batch, progress)
            self.accelerator.backward(parts.total)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return torch.stack([getattr(parts, name).detach().float() for name in _PARTS])

    def _losses(self, batch: Mapping[str, Any], progress: float) -> LossParts:
        check_labels(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.loss.needs_hidden_states:
            inputs["output_hidden_states"] = True
        taught = None
        if self.loss.needs_teacher:
            # Before the student runs: where it is its own teacher, its adapters are switched off and on again.
            own = self.teacher is None
            teacher = self.accelerator.unwrap_model(self.model) if own else self.teacher
            taught = ask_teacher(teacher, inputs, adapters=not own)
        return self.loss(self.model(**inputs), taught, batch["labels"], progress)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer: decay for matrices, none for what has fewer than two dimensions."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _mean_losses(accelerator: Accelerator, seen: list[Tensor], epoch: int) -> EpochLosses:
    means = accelerator.reduce(torch.stack(seen).mean(dim=0), reduction="mean").tolist()
    if not all(map(math.isfinite, means)):
        raise ComCATError(
            f"The loss of epoch {epoch} is not finite. Take a lower learning rate, or full precision if it was half."
        )
    return dict(zip(_PARTS, means, strict=True))


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: up along a line, down along a cosine."""
    rising = max(round(warmup * steps), 1)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2


def _check(student: nn.Module, teacher: nn.Module | None, loader: Any, loss: Any) -> None:
    if not hasattr(loader, "__len__") or len(loader) == 0:
        raise InvalidValueError(
            f"The loader must have a length above 0, so that the rate can be planned; got {type(loader).__name__}. "
            "Use a DataLoader over a data set with a length, or a list of batches."
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InvalidValueError(f"{type(student).__name__} has no parameter to train: all have requires_grad=False.")
    if teacher is None and loss.needs_teacher and not hasattr(student, "disable_adapter"):
        raise InvalidValueError(
            f"The loss needs a teacher, got None, and {type(student).__name__} is no PEFT model that could be its "
            "own. Pass the dense model, or a loss that needs none: DistillationLoss(alpha=0)."
        )
