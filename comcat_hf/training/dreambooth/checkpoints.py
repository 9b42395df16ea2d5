"""Checkpoints of an adapter's training: all that an exact continuation needs, and never the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from ...customization.pipelines import WEIGHTS
from ...tensor_files import check_shapes, read_safetensors
from ..checkpoints import Progress, new_checkpoint, restore_random_states, restore_states, write_states
from .outputs import save_adapter
from .settings import CustomizeSettings


__all__ = ["restore", "save_checkpoint"]


def save_checkpoint(
    accelerator: Accelerator,
    settings: CustomizeSettings,
    progress: Progress,
    pipeline: Any,
    states: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, all processes together.

    Returns:
        its folder.
    """
    output_dir = Path(settings.output_dir).expanduser()
    with new_checkpoint(accelerator, output_dir, progress, settings.checkpoints_total_limit) as folder:
        if accelerator.is_main_process:
            save_adapter(settings, pipeline, folder)
            write_states(folder, states)
    return output_dir / f"checkpoint-{progress.step}"


def restore(
    accelerator: Accelerator,
    checkpoint: Path,
    parts: Mapping[str, nn.Module],
    adapter_name: str,
    states: Mapping[str, Any],
) -> None:
    """Put everything back as it was when the checkpoint was written.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit.
    """
    for name, model in parts.items():
        _restore_adapter(checkpoint / name / WEIGHTS, model, adapter_name)
    restore_states(checkpoint, states)
    restore_random_states(accelerator, checkpoint)


@torch.no_grad()
def _restore_adapter(file: Path, model: nn.Module, adapter_name: str) -> None:
    saved, _ = read_safetensors(file, "an adapter", "Give another checkpoint.")
    own: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    check_shapes(saved, own, file, "Give a checkpoint of this base and of these ranks.")
    for key, tensor in own.items():
        tensor.copy_(saved[key])
