"""Checkpoints of a training: all that an exact continuation needs, and never the base."""

import io
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import CheckpointError, InvalidValueError
from ...transport import read_json, write_bytes_atomic, write_json_atomic
from ..pipelines import WEIGHTS, save_comcat_weights
from .settings import CustomizeSettings


__all__ = ["Progress", "find_checkpoint", "list_checkpoints", "remove_checkpoints", "restore", "save_checkpoint"]

logger = logging.getLogger(__name__)

_STATE = "training_state.json"
_OPTIMIZER = "optimizer.pt"
_RANDOM = "random_states_{}.pt"
_FORMAT, _VERSION = "comcat_training", 1
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Attributes:
        step: optimizer steps that are done.
        seed: of the run.
        facts: what must be as it was for the continuation to be exact.
    """

    step: int
    seed: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "Progress":
        """Read the state of a checkpoint.

        Raises:
            CheckpointError: it has none that can be read.
        """
        content = read_json(checkpoint / _STATE)
        if content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise CheckpointError(
                f"{checkpoint / _STATE}: expected {_FORMAT!r} of version {_VERSION}, found "
                f"{content.get('format')!r} of version {content.get('version')!r}. Give a checkpoint of this version "
                "of comcat_hf."
            )
        try:
            return cls(int(content["step"]), int(content["seed"]), dict(content["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint / _STATE}: expected step, seed and facts, found {error}. Give another checkpoint."
            ) from error

    def compare(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Say in what a continuation differs from what was interrupted.

        Raises:
            InvalidValueError: the adapter or the parts that it is for differ.
        """
        differing = {name: value for name, value in facts.items() if self.facts.get(name) != value}
        for name in ("qk_rank", "vo_rank", "core", "train_text_encoder"):
            if name in differing:
                raise InvalidValueError(
                    f"{checkpoint}: expected a training with --{name} {differing[name]}, found one with "
                    f"{self.facts.get(name)}. Give the same --{name}, or start without --resume_from_checkpoint."
                )
        for name, value in differing.items():
            logger.warning(
                "%s: %s was %s and is %s now, so the training goes on, but not as it would have.",
                checkpoint,
                name,
                self.facts.get(name),
                value,
            )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by their steps."""
    if not output_dir.is_dir():
        return []
    found = {path: match for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
    return sorted(found, key=lambda path: int(found[path][1]))


def find_checkpoint(settings: CustomizeSettings) -> Path | None:
    """The checkpoint to resume from, if one is asked for.

    Args:
        settings: `"latest"`, with none yet, starts from the beginning.

    Raises:
        CheckpointError: there is no such checkpoint.
        InvalidValueError: the output folder holds checkpoints of a training that is not to be resumed.
    """
    output_dir, asked = Path(settings.output_dir).expanduser(), settings.resume_from_checkpoint
    present = list_checkpoints(output_dir)
    if asked is None:
        if present and not settings.overwrite_output_dir:
            raise InvalidValueError(
                f"--output_dir {output_dir}: expected no checkpoints, found {present[-1].name} of an earlier "
                "training. Go on with it (--resume_from_checkpoint latest), remove it (--overwrite_output_dir), or "
                "give another folder."
            )
        return None
    if asked == "latest":
        return present[-1] if present else None
    for path in (Path(asked).expanduser(), output_dir / asked):
        if (path / _STATE).is_file():
            return path
    raise CheckpointError(
        f"--resume_from_checkpoint {asked}: expected a checkpoint, found none there or in {output_dir}, which has "
        f"{', '.join(path.name for path in present) or 'no checkpoints'}. Give one of these, or latest."
    )


def save_checkpoint(
    accelerator: Accelerator,
    settings: CustomizeSettings,
    progress: Progress,
    pipeline: Any,
    states: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, all processes together; it has its name only when it is whole.

    Args:
        accelerator: whose processes they are.
        settings: where to, and how many are kept.
        progress: where the training is.
        pipeline: with the adapter.
        states: by name what has a `state_dict`.

    Returns:
        its folder.
    """
    output_dir = Path(settings.output_dir).expanduser()
    folder = output_dir / f"checkpoint-{progress.step}"
    unfinished = output_dir / f".checkpoint-{progress.step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _write_tensors(unfinished / _RANDOM.format(accelerator.process_index), _random_states(accelerator.device))
    if accelerator.is_main_process:
        save_comcat_weights(
            pipeline,
            unfinished,
            settings.adapter_name,
            base_model_name_or_path=settings.pretrained_model_name_or_path,
            revision=settings.revision,
        )
        _write_tensors(unfinished / _OPTIMIZER, {name: state.state_dict() for name, state in states.items()})
        write_json_atomic(unfinished / _STATE, {"format": _FORMAT, "version": _VERSION, **asdict(progress)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if folder.exists():
            _remove(folder)
        os.replace(unfinished, folder)
        if settings.checkpoints_total_limit is not None:
            for path in list_checkpoints(output_dir)[: -settings.checkpoints_total_limit]:
                _remove(path)
    accelerator.wait_for_everyone()
    return folder


def restore(
    accelerator: Accelerator,
    checkpoint: Path,
    parts: Mapping[str, nn.Module],
    adapter_name: str,
    states: Mapping[str, Any],
) -> None:
    """Put everything back as it was when the checkpoint was written.

    Args:
        accelerator: whose processes read it.
        checkpoint: its folder.
        parts: the adapted models by name.
        adapter_name: of the adapter in them.
        states: by name what has a `load_state_dict`.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit.
    """
    for name, model in parts.items():
        _restore_adapter(checkpoint / name / WEIGHTS, model, adapter_name)
    saved = _read_tensors(checkpoint / _OPTIMIZER)
    for name, state in states.items():
        if name not in saved:
            raise CheckpointError(
                f"{checkpoint / _OPTIMIZER}: expected the state of the {name}, found {', '.join(saved)}. Train with "
                "the same --mixed_precision, or start without --resume_from_checkpoint."
            )
        try:
            state.load_state_dict(saved[name])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint / _OPTIMIZER}: expected a state of the {name} for this training, found one that does "
                f"not fit ({error}). Give the settings that the checkpoint was written with."
            ) from error
    file = checkpoint / _RANDOM.format(accelerator.process_index)
    if file.is_file():
        _set_random_states(_read_tensors(file), accelerator.device)


def remove_checkpoints(output_dir: Path, unfinished_only: bool = False) -> None:
    """Remove checkpoints, or only what was left of those that were interrupted while being written."""
    if output_dir.is_dir():
        for path in output_dir.glob(".checkpoint-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
    if not unfinished_only:
        for path in list_checkpoints(output_dir):
            _remove(path)


def _remove(folder: Path) -> None:
    # Under its name there is a whole checkpoint or none.
    leaving = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(folder, leaving)
    shutil.rmtree(leaving)


@torch.no_grad()
def _restore_adapter(file: Path, model: nn.Module, adapter_name: str) -> None:
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: expected the weights of an adapter, found none that can be read ({error}). Give another "
            "checkpoint."
        ) from error
    own: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for key in sorted(own.keys() | saved.keys()):
        expected, found = (tuple(side[key].shape) if key in side else None for side in (own, saved))
        if expected != found:
            raise CheckpointError(
                f"{file}: expected {key} of shape {expected}, found {found}. Give a checkpoint of this base and of "
                "these ranks."
            )
        own[key].copy_(saved[key])


def _write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    payload = io.BytesIO()
    torch.save(dict(content), payload)
    write_bytes_atomic(path, payload.getvalue())


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A file that was cut short ends in errors of many kinds.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected the state of a training, found none that can be read ({error}). Give another "
            "checkpoint."
        ) from error


def _random_states(device: torch.device) -> dict[str, Any]:
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    import numpy

    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
