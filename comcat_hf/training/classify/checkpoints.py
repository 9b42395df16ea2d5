"""Checkpoints of a fine-tuning: all that an exact continuation needs, and never the teacher or a frozen base."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...errors import CheckpointError, ComCATError, brief
from ...hub import write_bytes_atomic
from ...tensor_files import check_shapes, read_safetensors
from ..checkpoints import (
    Progress,
    new_checkpoint,
    remove_checkpoints,
    restore_random_states,
    restore_states,
    write_states,
)
from ..flags import fixed_flags
from .logs import cannot_write
from .settings import CompressSettings


__all__ = [
    "MUST",
    "WEIGHTS",
    "Trained",
    "check_finite",
    "facts_of_training",
    "is_sharded",
    "restore",
    "save_checkpoint",
]

WEIGHTS = "student.safetensors"
# What no continuation may change: what is trained, and what is kept beside it.
MUST = (*fixed_flags(CompressSettings), "plan")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def facts_of_training(
    settings: CompressSettings, accelerator: Accelerator, seed: int, plan: str, steps: int
) -> dict[str, Any]:
    """What a continuation must share with a training to be exact.

    Args:
        settings: of the training.
        accelerator: whose processes and precision it has.
        seed: of the run.
        plan: digest of the rank plan.
        steps: of the whole training.
    """
    facts = settings.facts("finetune", seed)
    # It counts in the number of steps.
    del facts["num_train_epochs"]
    return facts | {
        "plan": plan,
        "max_train_steps": steps,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds.

    Attributes:
        student: the model without what accelerate put around it.
        optimizer, scaler: of the training; `None` for no scaler.
        states: by name what else has a `state_dict`; the same on all processes.
    """

    student: nn.Module
    optimizer: Any
    scaler: Any
    states: Mapping[str, Any]

    def all_states(self) -> dict[str, Any]:
        scaler = {} if self.scaler is None else {"scaler": self.scaler}
        return {"optimizer": self.optimizer, **scaler, **self.states}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model, or its optimizer's whole state."""
    return accelerator.distributed_type in _SHARDED


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, progress: Progress, trained: Trained, limit: int | None
) -> Path:
    """Write a checkpoint, all processes together.

    Args:
        accelerator: whose processes they are.
        output_dir: where to.
        progress: where the training is.
        trained: what is written.
        limit: how many checkpoints are kept.

    Returns:
        its folder.

    Raises:
        ComCATError: it cannot be written; nothing is left of it, and those before are as they were.
    """
    folder = output_dir / f"checkpoint-{progress.step}"
    try:
        with new_checkpoint(accelerator, output_dir, progress, limit) as unfinished:
            _ENGINES.get(accelerator.distributed_type, _WHOLE).save(accelerator, unfinished, trained)
    except (OSError, SafetensorError) as error:
        if accelerator.is_main_process:
            remove_checkpoints(output_dir, unfinished_only=True)
        raise cannot_write(folder, error) from error
    return folder


def restore(accelerator: Accelerator, checkpoint: Path, trained: Trained) -> None:
    """Put everything back as it was when the checkpoint was written.

    Args:
        accelerator: whose processes read it.
        checkpoint: its folder.
        trained: what is filled.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit.
    """
    _ENGINES.get(accelerator.distributed_type, _WHOLE).load(accelerator, checkpoint, trained)
    restore_random_states(accelerator, checkpoint)


@torch.no_grad()
def check_finite(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """See that all trained weights are finite; all processes call it together.

    Raises:
        ComCATError: some are not; on all processes.
    """
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad]
    bad = (~torch.stack([weight.isfinite().all().to(accelerator.device) for weight in weights]).all()).float()
    if is_sharded(accelerator):
        bad = accelerator.reduce(bad, reduction="sum")
    if bad.item():
        raise ComCATError(
            f"After step {step} some weights are not finite. Take a lower --learning_rate, or --mixed_precision no or "
            "bf16 if it was fp16; the last checkpoint is as it was."
        )


@dataclass(frozen=True)
class _Engine:
    """How one way to spread a training over processes writes and reads it."""

    save: Callable[[Accelerator, Path, Trained], None]
    load: Callable[[Accelerator, Path, Trained], None]


def _save_whole(accelerator: Accelerator, folder: Path, trained: Trained) -> None:
    if accelerator.is_main_process:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _own(trained.student).items()}
        # Not save_file: the file is flushed to the disk, and a full one is an OSError.
        write_bytes_atomic(folder / WEIGHTS, save(tensors))
        write_states(folder, trained.all_states())


@torch.no_grad()
def _load_whole(accelerator: Accelerator, checkpoint: Path, trained: Trained) -> None:
    file = checkpoint / WEIGHTS
    fix = "Give another checkpoint, or the accelerate configuration that it was written with."
    saved, _ = read_safetensors(file, "a training whose processes hold the whole model", fix)
    own = _own(trained.student)
    check_shapes(saved, own, file, "Give a checkpoint of this model, plan and route.")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    restore_states(checkpoint, trained.all_states())


def _save_sharded(accelerator: Accelerator, folder: Path, trained: Trained) -> None:
    try:
        accelerator.save_state(str(folder))
    # What torch's writer says of a full disk.
    except RuntimeError as error:
        raise OSError(str(error)) from error
    # Gathered by all, written by one.
    states = {name: _Kept(state.state_dict()) for name, state in trained.states.items()}
    if accelerator.is_main_process:
        write_states(folder, states)


def _load_sharded(accelerator: Accelerator, checkpoint: Path, trained: Trained) -> None:
    if (checkpoint / WEIGHTS).is_file():
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of {accelerator.distributed_type.value}, found one of processes "
            "that hold the whole model. Resume with the accelerate configuration that it was written with."
        )
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint}: expected the state of a training under {accelerator.distributed_type.value}, found none "
            f"that fits ({brief(error)}). Resume with the accelerate configuration that it was written with."
        ) from error
    restore_states(checkpoint, trained.states)


@dataclass(frozen=True)
class _Kept:
    content: Mapping[str, Any]

    def state_dict(self) -> Mapping[str, Any]:
        return self.content


def _own(student: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters, and buffers that are part of the model's state."""
    parameters = dict(student.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    kept = student.state_dict()
    return trained | {name: buffer for name, buffer in student.named_buffers() if name in kept}


_WHOLE = _Engine(_save_whole, _load_whole)
_ENGINES = dict.fromkeys(_SHARDED, _Engine(_save_sharded, _load_sharded))
