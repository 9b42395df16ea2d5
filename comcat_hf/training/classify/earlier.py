"""Checkpoints of earlier versions, whose fine-tuning was a loop of its own, in the files that `Trainer` reads."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ...errors import CheckpointError
from ...tensor_files import check_shapes, read_safetensors
from ..checkpoints import Progress, restore_random_states, restore_states
from .logs import LOG, read_log


if TYPE_CHECKING:
    from .trainer import DistillationTrainer

__all__ = ["readable"]

_WEIGHTS = "student.safetensors"
# What an engine writes besides, or in place of, the files of plain processes.
_STATES = {DistributedType.FSDP: "pytorch_model_fsdp*", DistributedType.DEEPSPEED: "global_step*"}


@contextmanager
def readable(trainer: "DistillationTrainer", checkpoint: Path, steps: int) -> Iterator[Path]:
    """A folder from which `Trainer` resumes: the checkpoint itself, or an earlier version's in files of `Trainer`.

    Everything is carried over to the bit: weights, optimizer, rate, random states, moving average, losses.

    Raises:
        CheckpointError: it is of another engine, or of an earlier version with FSDP or DeepSpeed, or does not fit.
    """
    kind = trainer.accelerator.distributed_type
    if (checkpoint / TRAINER_STATE_NAME).is_file():
        if not any(checkpoint.glob(_STATES.get(kind, OPTIMIZER_NAME))):
            raise CheckpointError(
                f"{checkpoint}: expected the state of a training under {kind.value}, found another. Resume with the "
                "accelerate configuration that it was written with."
            )
        yield checkpoint
        return
    if not (checkpoint / _WEIGHTS).is_file() or kind in _STATES:
        raise CheckpointError(
            f"{checkpoint}: expected {TRAINER_STATE_NAME}, found none. An earlier version wrote this checkpoint, and "
            "those are read only where each process holds the whole model, before and after. Finish the training with "
            "that version, or start without --resume_from_checkpoint."
        )
    with tempfile.TemporaryDirectory() as folder:
        _carry_over(trainer, checkpoint, Path(folder), steps)
        yield Path(folder)


@torch.no_grad()
def _carry_over(trainer: "DistillationTrainer", checkpoint: Path, folder: Path, steps: int) -> None:
    progress, own = Progress.read(checkpoint), _trained(trainer.model)
    saved, _ = read_safetensors(checkpoint / _WEIGHTS, "trained weights", "Give another checkpoint.")
    check_shapes(saved, own, checkpoint / _WEIGHTS, "Give a checkpoint of this model, plan and route.")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    trainer.create_optimizer_and_scheduler(steps)
    optimizer, scheduler, scaler = trainer.optimizer, trainer.lr_scheduler, trainer.accelerator.scaler
    states: dict[str, Any] = {"optimizer": _Moments(optimizer), "schedule": _Taken(scheduler), "losses": trainer.meter}
    if scaler is not None:
        states["scaler"] = scaler
    if trainer.average is not None:
        trainer.average.start(trainer.model)
        states["average"] = trainer.average
    restore_states(checkpoint, states)
    restore_random_states(trainer.accelerator, checkpoint)
    # As `Trainer` writes them, but on every process.
    trainer._save(str(folder))
    trainer._save_rng_state(str(folder))
    trainer.save_own(folder, True)
    files = {OPTIMIZER_NAME: optimizer, SCHEDULER_NAME: scheduler} | ({} if scaler is None else {SCALER_NAME: scaler})
    for name, state in files.items():
        torch.save(state.state_dict(), folder / name)
    state = TrainerState(global_step=progress.step, train_batch_size=trainer.args.train_batch_size)
    state.log_history = read_log(Path(trainer.args.output_dir, LOG), progress.step)
    state.compute_steps(trainer.args, steps)
    state.save_to_json(str(folder / TRAINER_STATE_NAME))
    progress.write(folder)
    trainer.optimizer = trainer.lr_scheduler = None


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
