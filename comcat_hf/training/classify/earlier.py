"""Checkpoints of earlier versions, whose fine-tuning was a loop of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from ...errors import CheckpointError
from ...tensor_files import check_shapes, read_safetensors
from ..checkpoints import Progress, restore_random_states, restore_states
from .logs import LOG, read_log


if TYPE_CHECKING:
    from .trainer import DistillationTrainer

__all__ = ["EarlierCheckpoint", "is_earlier"]

_WEIGHTS = "student.safetensors"
# What an engine writes besides, or in place of, the files of plain processes.
_STATES = {DistributedType.FSDP: "pytorch_model_fsdp*", DistributedType.DEEPSPEED: "global_step*"}


def is_earlier(kind: DistributedType, checkpoint: Path) -> bool:
    """Whether an earlier version wrote a checkpoint, so that `Trainer` cannot read it.

    Args:
        kind: of the processes that go on from it.

    Raises:
        CheckpointError: it is of another engine, or of an earlier version with FSDP or DeepSpeed.
    """
    if (checkpoint / TRAINER_STATE_NAME).is_file():
        if not any(checkpoint.glob(_STATES.get(kind, OPTIMIZER_NAME))):
            raise CheckpointError(
                f"{checkpoint}: expected the state of a training under {kind.value}, found another. Resume with the "
                "accelerate configuration that it was written with."
            )
        return False
    if not (checkpoint / _WEIGHTS).is_file() or kind in _STATES:
        raise CheckpointError(
            f"{checkpoint}: expected {TRAINER_STATE_NAME}, found none. An earlier version wrote this checkpoint, and "
            "those are read only where each process holds the whole model, before and after. Finish the training with "
            "that version, or start without --resume_from_checkpoint."
        )
    return True


class EarlierCheckpoint(TrainerCallback):
    """Puts a checkpoint of an earlier version into a training that begins: weights, states, random states, losses.

    It stands behind the callback of the moving average, which starts from the model's weights.
    """

    def __init__(self, trainer: "DistillationTrainer", checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Carry everything over to the bit.

        Raises:
            CheckpointError: the checkpoint does not fit.
        """
        trainer, checkpoint = self.trainer, self.checkpoint
        own = _trained(trainer.model)
        saved, _ = read_safetensors(checkpoint / _WEIGHTS, "trained weights", "Give another checkpoint.")
        check_shapes(saved, own, checkpoint / _WEIGHTS, "Give a checkpoint of this model, plan and route.")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        states = {"optimizer": _Moments(trainer.optimizer), "schedule": _Taken(trainer.lr_scheduler)}
        states |= {"losses": trainer.meter, "scaler": trainer.accelerator.scaler, "average": trainer.average}
        restore_states(checkpoint, {name: value for name, value in states.items() if value is not None})
        restore_random_states(trainer.accelerator, checkpoint)
        state.global_step = Progress.read(checkpoint).step
        state.log_history = read_log(Path(args.output_dir, LOG), state.global_step)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, and buffers that are part of the model's state."""
    kept = model.state_dict()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in kept}


@dataclass(frozen=True)
class _Moments:
    """Takes an optimizer's state; groups without parameters were left out of it."""

    optimizer: Any

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": content["state"]})


@dataclass(frozen=True)
class _Taken:
    """Takes the number of steps that a schedule has taken."""

    scheduler: Any

    def load_state_dict(self, content: Mapping[str, int]) -> None:
        taken, scheduler = int(content["taken"]), self.scheduler
        rates = [base * rate(taken) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        counted = {"last_epoch": taken, "_step_count": taken + 1, "_last_lr": rates}
        scheduler.load_state_dict(scheduler.state_dict() | counted)
