"""The distillation loss: a small model learns from labels, from a teacher's logits and from its hidden states."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import above, check, finite, whole
from ..errors import InvalidValueError
from ..modeling import eval_mode


__all__ = ["TEACHER_LOSSES", "DistillationLoss", "LossParts", "OwnBase", "ask_teacher", "check_labels"]


@dataclass(frozen=True)
class LossParts:
    """One batch's loss and what it is made of, before weighting; scalars. Only `total` is to be differentiated.

    Attributes:
        total: `(1 - alpha) * task + alpha * teacher + weight(progress) * alignment`.
        task: cross entropy with the labels.
        teacher: hard or soft loss toward the teacher's logits.
        alignment: mean squared distance of the hidden states, averaged over the aligned blocks.
    """

    total: Tensor
    task: Tensor
    teacher: Tensor
    alignment: Tensor


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² KL(softmax(teacher / T) || softmax(student / T))`, mean over samples, for logits `(batch, classes)`."""
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def hard_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross entropy with the class that the teacher finds most likely; the temperature has no part in it."""
    return F.cross_entropy(student.float(), teacher.argmax(dim=-1))


TEACHER_LOSSES: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {"soft": soft_loss, "hard": hard_loss}


class DistillationLoss(nn.Module):
    """Cross entropy, a teacher loss, and an alignment of hidden states that fades out (COMCAT, arXiv 2305.17235).

    Args:
        alpha: share of the teacher loss, 0 to 1; the labels have the rest.
        kind: `"soft"` (the teacher's distribution) or `"hard"` (its most likely class).
        temperature: of the soft loss, above 0.
        alignment: weight of the alignment at the start; it falls to 0 along half a cosine. 0 leaves it out.
        blocks: how many blocks at either end are aligned.
        without_token: what a student with a distillation token (`DeiTForImageClassificationWithTeacher`) learns with.
            By default the labels teach the head of its class token and the teacher that of its distillation token;
            `True`, or `alpha=0`: what there is teaches the mean of both, which is what the model answers.

    Raises:
        InvalidValueError: an argument out of range.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        kind: str = "soft",
        temperature: float = 1.0,
        alignment: float = 0.0,
        blocks: int = 2,
        without_token: bool = False,
    ) -> None:
        super().__init__()
        if kind not in TEACHER_LOSSES:
            raise InvalidValueError(f"kind must be one of {', '.join(map(repr, TEACHER_LOSSES))}, got {kind!r}.")
        check(alpha, finite(0, 1), "alpha")
        check(temperature, above(0), "temperature")
        check(alignment, finite(0), "alignment")
        check(blocks, whole(1), "blocks")
        self.alpha, self.kind, self.temperature = alpha, kind, temperature
        self.alignment, self.blocks, self.without_token = alignment, blocks, without_token

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0 or self.needs_hidden_states

    @property
    def needs_hidden_states(self) -> bool:
        return self.alignment > 0

    def alignment_weight(self, progress: float) -> float:
        """Weight of the alignment after a share `progress` of the training, 0 to 1."""
        return self.alignment * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2

    def forward(self, student: Any, teacher: Any | None, labels: Tensor, progress: float = 0.0) -> LossParts:
        """The loss of one batch.

        Args:
            student: the small model's output, with `logits` `(batch, classes)` (beside a distillation token also
                `cls_logits` and `distillation_logits`) and, for the alignment, `hidden_states`: the embeddings and
                each block's output.
            teacher: the teacher's output, likewise; no gradient goes there. `None` where it is not needed.
            labels: class indices `(batch,)`, or probabilities `(batch, classes)`.
            progress: share of the training that is done, 0 to 1.

        Raises:
            InvalidValueError: outputs that lack something or do not fit each other.
        """
        from_labels, from_teacher = self._heads(student)
        task = F.cross_entropy(from_labels.float(), labels)
        taught, aligned = task.new_zeros(()), task.new_zeros(())
        if self.needs_teacher and teacher is None:
            raise InvalidValueError(
                "The loss needs the teacher's output, got None. Pass it, or set alpha=alignment=0."
            )
        if self.alpha > 0:
            _check_shapes("logits", from_teacher, teacher.logits)
            taught = TEACHER_LOSSES[self.kind](from_teacher, teacher.logits.detach(), self.temperature)
        if self.needs_hidden_states:
            aligned = self._align(student, teacher)
        total = (1 - self.alpha) * task + self.alpha * taught + self.alignment_weight(progress) * aligned
        return LossParts(total, task.detach(), taught.detach(), aligned.detach())

    def _heads(self, student: Any) -> tuple[Tensor, Tensor]:
        """The logits that the labels teach, and those that the teacher teaches."""
        names = ("cls_logits", "distillation_logits")
        heads = [getattr(student, name, None) for name in names]
        # Without a teacher nothing would teach the second head, though the model's answer is the mean of both.
        if self.without_token or self.alpha == 0 or any(head is None for head in heads):
            return student.logits, student.logits
        return heads[0], heads[1]

    def _align(self, student: Any, teacher: Any) -> Tensor:
        ours, theirs = _block_outputs("student", student), _block_outputs("teacher", teacher)
        if len(ours) != len(theirs):
            raise InvalidValueError(
                f"The student has {len(ours)} blocks and the teacher {len(theirs)}; the alignment compares block by "
                "block. Take a teacher of the same depth, or set alignment=0."
            )
        ends = [i for i in range(len(ours)) if i < self.blocks or i >= len(ours) - self.blocks]
        for i in ends:
            _check_shapes(f"hidden states of block {i}", ours[i], theirs[i])
        return torch.stack([F.mse_loss(ours[i].float(), theirs[i].detach().float()) for i in ends]).mean()

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, kind={self.kind!r}, temperature={self.temperature}, alignment={self.alignment}, "
            f"blocks={self.blocks}, without_token={self.without_token}"
        )


def check_labels(batch: Any) -> None:
    """Refuse a batch that does not map labels beside the model's inputs."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        found = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise InvalidValueError(f"A batch must map 'labels' beside the model's inputs, found {found}.")


@torch.no_grad()
def ask_teacher(teacher: nn.Module, inputs: Mapping[str, Any], adapters: bool = True) -> Any:
    """Run a teacher in eval mode, without gradients, and leave it in the mode it was in.

    Args:
        teacher: the model to learn from; may be the student itself if it is a PEFT model.
        inputs: keyword arguments of its forward.
        adapters: `False` switches a PEFT model's adapters off for the call, so that it answers as its base does.
    """
    with nullcontext() if adapters else teacher.disable_adapter(), eval_mode(teacher):
        return teacher(**inputs)


class OwnBase:
    """A PEFT student's own base as its teacher, again and again: adapters off, eval mode, no gradients.

    It answers as `ask_teacher(model, inputs, adapters=False)` does, which looks through the whole model at every call;
    here what is switched is found once, and parameters are left as they are.

    Args:
        model: the student, with adapters that are on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._switched = [m for m in self._modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The base's output for keyword arguments of its forward."""
        training = [module for module in self._modules if module.training]
        try:
            self._switch(self._switched, "_disable_adapters", True)
            self._switch(training, "training", False)
            return self._model(**inputs)
        finally:
            self._switch(training, "training", True)
            self._switch(self._switched, "_disable_adapters", False)

    def _switch(self, modules: list[nn.Module], name: str, value: bool) -> None:
        # Past nn.Module.__setattr__, which looks for parameters and modules of that name: this is done at every step.
        for module in modules:
            module.__dict__[name] = value


def _block_outputs(who: str, output: Any) -> tuple[Tensor, ...]:
    states = getattr(output, "hidden_states", None)
    if states is None or len(states) < 2:
        raise InvalidValueError(
            f"The {who}'s output has no hidden_states, which the alignment compares. Call the model with "
            "output_hidden_states=True, or set alignment=0."
        )
    return tuple(states[1:])


def _check_shapes(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InvalidValueError(
            f"The {what} of student and teacher must have one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Take a teacher of the same classes, width and input size."
        )
