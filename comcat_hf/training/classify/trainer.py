"""`DistillationTrainer`: transformers' `Trainer` for a compressed classifier that learns from its dense model."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from ...compression.distillation import DistillationLoss, OwnBase
from ...errors import ComCATError, InvalidValueError
from ...tensor_files import check_shapes
from ..checkpoints import Progress, last_checkpoint, warn_of_later, written_last
from .callbacks import WeightAverageCallback
from .logs import LossMeter, cannot_write


__all__ = ["DistillationTrainer"]

_LOSSES = "losses.safetensors"


class DistillationTrainer(Trainer):
    """Fine-tune an image classifier with distillation: a `transformers.Trainer` with a teacher.

    All arguments of `Trainer` keep their meaning. What differs:

    - The loss of a training step is `distillation`; the loss of an evaluation is the cross entropy with the labels.
      Logs also hold the parts of the loss, `task`, `teacher` and `alignment`, and `images_per_second`.
    - Matrices decay; vectors (biases, norms) do not.
    - A checkpoint is read whole or not at all: `training_state.json`, with the digests of its files, is written last,
      and `resume_from_checkpoint=True` takes the last checkpoint that has one. Weights are loaded by the model's own
      conversion of names, every tensor of them.
    - A loss or weights that are not finite end the training; the last checkpoint is as it was.

    Args:
        model: the student: a compressed model, or a PEFT model with a ComCAT adapter of mode `"compress"`.
        args: the training arguments. A non-zero `label_smoothing_factor` smooths the labels of training steps.
        teacher: the dense model; it is put into eval mode and learns nothing. `None` takes a PEFT student's own base
            with its adapters switched off, so that no second model is in memory.
        distillation: the loss; default `DistillationLoss(alignment=1.0)`.
        **kwargs: those of `Trainer`: `train_dataset`, `eval_dataset`, `callbacks`, `compute_metrics`, ...

    Raises:
        InvalidValueError: no teacher where the loss needs one, or an argument that distillation replaces.

    Example:
        >>> args = TrainingArguments("out")
        >>> trainer = DistillationTrainer(model=small, teacher=vit, args=args, train_dataset=images)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        distillation: DistillationLoss | None = None,
        **kwargs: Any,
    ) -> None:
        self.distillation = DistillationLoss(alignment=1.0) if distillation is None else distillation
        args = TrainingArguments("trainer_output") if args is None else args
        _check(model, args, teacher, self.distillation, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        # The loss of a batch is a mean over its images, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = False
        self.label_smoother = None
        # It replaces losses that are not finite, and waits for the device at every step; `log` raises instead.
        self.args.logging_nan_inf_filter = False
        self.teacher = None if teacher is None else teacher.eval().to(self.args.device)
        self._own_base: OwnBase | None = None
        self._resumed: Path | None = None
        self.meter = LossMeter(self.accelerator, self.args.gradient_accumulation_steps)

    @property
    def average(self) -> WeightAverageCallback | None:
        """The moving average of the weights, if a callback keeps one."""
        found = (one for one in self.callback_handler.callbacks if isinstance(one, WeightAverageCallback))
        return next(found, None)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train; with `resume_from_checkpoint=True` from the last whole checkpoint, or from the start without one.

        Checkpoints behind the one that is gone on from are removed when the next is written, with a warning before.

        Raises:
            CheckpointError: the checkpoint named is not whole.
            ComCATError: the loss or the weights are not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
            Progress.read(Path(resume_from_checkpoint))
            warn_of_later(Path(resume_from_checkpoint))
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        average = self.average
        if average is not None:
            average.resumed = self._resumed
        found = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        # Where nothing was logged or saved behind the last step.
        self.meter.check(self.state.global_step)
        self._check_finite()
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a training batch; the cross entropy of one that is evaluated."""
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise InvalidValueError(
                f"A batch: expected 'labels' beside the model's inputs, found {sorted(inputs)}. Let the data collator "
                "return them."
            )
        labels = inputs.pop("labels")
        if not model.training:
            output = model(**inputs)
            loss = F.cross_entropy(output.logits.float(), labels)
            return (loss, {"logits": output.logits}) if return_outputs else loss
        if self.distillation.needs_hidden_states:
            inputs["output_hidden_states"] = True
        # Before the student runs: where it is its own teacher, its adapters are switched off and on again.
        taught = self._ask_teacher(inputs)
        output = model(**inputs)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        parts = self.distillation(output, taught, self._smooth(labels, output.logits.shape[-1]), progress)
        self.meter.add(parts, len(labels))
        return (parts.total, output) if return_outputs else parts.total

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: all of two or more dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, beside the loss of training steps, its parts.

        Raises:
            ComCATError: the loss is not finite, on any process.
        """
        super().log(logs | self.meter.read(self.state.global_step) if "loss" in logs else logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict with the moving average of the weights, if there is one."""
        with nullcontext() if self.average is None else self.average.applied():
            found = super().evaluation_loop(*args, **kwargs)
        self.meter.restart_clock()
        return found

    def _ask_teacher(self, inputs: Mapping[str, Any]) -> Any:
        if not self.distillation.needs_teacher:
            return None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                return self.teacher(**inputs)
        if self._own_base is None:
            # Past DistributedDataParallel, which would wait for gradients.
            self._own_base = OwnBase(self.accelerator.unwrap_model(self.model))
        return self._own_base(**inputs)

    def _smooth(self, labels: Tensor, classes: int) -> Tensor:
        share = self.args.label_smoothing_factor
        if not share:
            return labels
        hard = labels if labels.ndim == 2 else F.one_hot(labels, classes)
        return hard * (1 - share) + share / classes

    def progress(self) -> Progress:
        """Where the training is, as a checkpoint records it."""
        return Progress(self.state.global_step, self.args.seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        self.meter.check(step)
        self._check_finite()
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{step}"
        # Older checkpoints go when the new one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with written_last(self.accelerator, folder, self.progress(), self._resumed):
                super()._save_checkpoint(model, trial)
                self.save_own(folder, self.args.should_save)
        # What torch's writer says of a full disk is a RuntimeError.
        except (OSError, SafetensorError, RuntimeError) as error:
            raise cannot_write(folder, error) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.meter.restart_clock()

    def save_own(self, folder: Path, writes: bool) -> None:
        """Save the average and losses; all processes call it together, as a sharded average is gathered."""
        average = None if self.average is None else self.average.state_dict()
        if writes and average is not None:
            self.average.save(folder, average)
        if writes and (losses := self.meter.state_dict()):
            save_file(losses, folder / _LOSSES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint, _LOSSES)).is_file():
            self.meter.load_state_dict(load_file(file))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, hub_token among them.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_itself:
            self._load_weights(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        if self._loads_itself:
            self._load_weights(folder)
        else:
            super()._load_best_model()
        if self.average is not None:
            self.average.load(folder)

    @property
    def _loads_itself(self) -> bool:
        engines = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(self.model, PreTrainedModel) and not engines

    def _load_weights(self, folder: Path) -> None:
        # Checkpoints of several classes, ViT among them, have other names than the modules; `Trainer` loads them by
        # the modules' names and passes over those that differ.
        saved = type(self.model).from_pretrained(folder, device_map="cpu").state_dict()
        check_shapes(saved, self.model.state_dict(), folder, "Give a checkpoint of this model.")
        self.model.load_state_dict(saved, strict=True)

    @torch.no_grad()
    def _check_finite(self) -> None:
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters() if p.requires_grad]
        bad = (~torch.stack([weight.isfinite().all() for weight in weights]).all()).float()
        if self.accelerator.reduce(bad, reduction="sum").item():
            raise ComCATError(
                f"After step {self.state.global_step} some weights are not finite. Take a lower learning_rate, or "
                "full precision or bf16 if it was fp16; the last checkpoint is as it was."
            )


def _check(
    model: nn.Module,
    args: TrainingArguments,
    teacher: nn.Module | None,
    loss: DistillationLoss,
    kwargs: Mapping[str, Any],
) -> None:
    if kwargs.get("compute_loss_func") is not None:
        raise InvalidValueError(
            "compute_loss_func: expected None, as the loss is `distillation`, found a function. Pass a "
            "DistillationLoss, or use transformers.Trainer."
        )
    if kwargs.get("model_init") is not None or model is None:
        raise InvalidValueError(
            "model: expected a compressed model, found a model_init or none. Build the model and pass it as model=."
        )
    if args.use_liger_kernel:
        raise InvalidValueError(
            "args.use_liger_kernel: expected False, as the loss is `distillation`, found True. Leave it out."
        )
    if teacher is model:
        raise InvalidValueError(
            "teacher: expected the dense model, found the student itself. Pass another model, or None for a PEFT "
            "model's own base."
        )
    if teacher is None and loss.needs_teacher and not isinstance(model, PeftModel):
        raise InvalidValueError(
            f"teacher: expected the dense model, found None, and {type(model).__name__} is no PEFT model whose base "
            "could teach. Pass it, or a loss without a teacher: distillation=DistillationLoss(alpha=0)."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidValueError(
            f"model: expected parameters to train, found a {type(model).__name__} in which all have "
            "requires_grad=False. Call model.requires_grad_(True)."
        )
