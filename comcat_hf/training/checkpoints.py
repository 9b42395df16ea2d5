"""Checkpoint folders: `checkpoint-N` is whole when it holds its state, which is written last."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..checks import TEXT, Kind, make_document, mapping_of, open_document, shown, some_of, whole
from ..errors import CheckpointError, InvalidValueError, brief
from ..hub import read_json, write_json_atomic
from ..tensor_files import read_saved, write_saved
from .flags import fixed_flags, values_deciding
from .seeds import random_states, set_random_states


__all__ = [
    "OPTIMIZER",
    "Progress",
    "find_checkpoint",
    "last_checkpoint",
    "list_checkpoints",
    "new_checkpoint",
    "remove_checkpoints",
    "restore_random_states",
    "restore_states",
    "warn_of_later",
    "write_states",
    "written_last",
]

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer.pt"
_STATE = "training_state.json"
_RANDOM = "random_states_{}.pt"
_FORMAT, _VERSION = "comcat_training", 1
_FIELDS = {
    "step": whole(),
    "seed": whole(),
    "facts": mapping_of(Kind("a setting", lambda value: True)),
    "files": mapping_of(TEXT),
}
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Attributes:
        facts: what must be as it was for the continuation to be exact.
    """

    step: int
    seed: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "Progress":
        """Read the state of a checkpoint, and see that its other files are those that it was written with.

        Raises:
            CheckpointError: it has none that can be read, or files that are missing, damaged or of another.
        """
        content = _read_state(checkpoint)
        # Those of earlier versions do not say which files they have.
        for name, digest in content.pop("files", {}).items():
            if not (checkpoint / name).is_file() or _digest(checkpoint / name) != digest:
                raise CheckpointError(
                    f"{checkpoint / name}: expected the file that was written with this checkpoint, found "
                    f"{'another' if (checkpoint / name).is_file() else 'none'}. A checkpoint is read as a whole: give "
                    "another."
                )
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder, as the last file there."""
        others = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _STATE)
        files = {path.relative_to(folder).as_posix(): _digest(path) for path in others}
        write_json_atomic(folder / _STATE, make_document(_FORMAT, _VERSION, {**asdict(self), "files": files}))

    def compare(
        self,
        facts: Mapping[str, Any],
        checkpoint: Path,
        settings: Any,
        what: str,
        steps: int,
        fixed: Sequence[str] = (),
    ) -> None:
        """Say in what a continuation differs from what was interrupted.

        Args:
            facts: of the continuation; those that an older version did not write down are taken for the same.
            checkpoint: where this progress was read.
            settings: of the continuation. Its fixed flags may not differ; where nothing is left to train, so that no
                setting would come to bear, no flag may.
            what: the result that its flags decide.
            steps: of the whole training.
            fixed: further facts that may not differ. Others are warned of.

        Raises:
            InvalidValueError: a fact differs that may not.
        """
        must = (*fixed_flags(type(settings)), *fixed)
        if self.step >= steps:
            must = tuple(name for name in values_deciding(settings, what) if name != "max_train_steps")
        differing = {name: value for name, value in facts.items() if self.facts.get(name, value) != value}
        for name in must:
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


def last_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint in a folder that was written to its end, if there is one."""
    return next((path for path in reversed(list_checkpoints(output_dir)) if (path / _STATE).is_file()), None)


def find_checkpoint(output_dir: Path, asked: str | None, overwrite: bool = False) -> Path | None:
    """The checkpoint to resume from, if one is asked for.

    Args:
        output_dir: where checkpoints lie.
        asked: a path, a name in `output_dir`, or `"latest"`, which starts from the beginning where there is none yet.
        overwrite: whether checkpoints of an earlier training may be there where none is asked for.

    Raises:
        CheckpointError: there is no such checkpoint.
        InvalidValueError: the output folder holds checkpoints of a training that is not to be resumed.
    """
    present = list_checkpoints(output_dir)
    if asked is None:
        if present and not overwrite:
            raise InvalidValueError(
                f"--output_dir {output_dir}: expected no checkpoints, found {present[-1].name} of an earlier "
                "training. Go on with it (--resume_from_checkpoint latest), remove it (--overwrite_output_dir), or "
                "give another folder."
            )
        return None
    if asked == "latest":
        return last_checkpoint(output_dir)
    for path in (Path(asked).expanduser(), output_dir / asked):
        if (path / _STATE).is_file():
            return path
    raise CheckpointError(
        f"--resume_from_checkpoint {asked}: expected a checkpoint, found none there or in {output_dir}, which has "
        f"{', '.join(path.name for path in present) or 'no checkpoints'}. Give one of these, or latest."
    )


def warn_of_later(checkpoint: Path) -> None:
    """Say which checkpoints a training leaves that goes on from this one."""
    if later := _later(checkpoint):
        logger.warning(
            "%s: %s are of the training that is left here; they are removed when this one writes its next checkpoint. "
            "Give another --output_dir to keep them.",
            checkpoint,
            some_of(path.name for path in later),
        )


def _later(checkpoint: Path) -> list[Path]:
    """The checkpoints beside this one that are of later steps: a training has none of these when it writes one."""
    found = list_checkpoints(checkpoint.parent)
    return found[found.index(checkpoint) + 1 :] if checkpoint in found else []


@contextmanager
def written_last(
    accelerator: Accelerator, folder: Path, progress: Progress, resumed: Path | None = None
) -> Iterator[None]:
    """Mark a checkpoint that the block writes in its place as whole when all processes have left the block.

    Args:
        accelerator: whose processes they are.
        folder: of the checkpoint; until the end it is none, whatever was there before, and after an error it is gone.
        progress: where the training is.
        resumed: the checkpoint that the training went on from; those of later steps beside it go when this is whole.
    """
    if accelerator.is_main_process:
        # What an unfinished one left would count as part of this one.
        _remove(folder)
        folder.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress.write(folder)
            if resumed is not None and resumed.parent.resolve() == folder.parent.resolve():
                for path in _later(folder):
                    _remove(path)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


@contextmanager
def new_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    limit: int | None = None,
    resumed: Path | None = None,
) -> Iterator[Path]:
    """A folder `checkpoint-N` that is whole when the block ends; all processes enter it together.

    The block writes what belongs to the training; random states and progress are written here.
    """
    folder = output_dir / f"checkpoint-{progress.step}"
    with written_last(accelerator, folder, progress, resumed):
        write_saved(folder / _RANDOM.format(accelerator.process_index), random_states(accelerator.device))
        yield folder
    if accelerator.is_main_process and limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            _remove(path)


def write_states(folder: Path, states: Mapping[str, Any]) -> None:
    """Write what has a `state_dict`, by name."""
    write_saved(folder / OPTIMIZER, {name: state.state_dict() for name, state in states.items()})


def restore_states(checkpoint: Path, states: Mapping[str, Any]) -> None:
    """Give what [`write_states`] wrote back to what has a `load_state_dict`.

    Raises:
        CheckpointError: the file is missing or damaged, or a state does not fit.
    """
    saved = read_saved(checkpoint / OPTIMIZER, "the state of a training", "Give another checkpoint.")
    for name, state in states.items():
        if not isinstance(saved, Mapping) or name not in saved:
            raise CheckpointError(
                f"{checkpoint / OPTIMIZER}: expected the state of the {name}, found {shown(saved)}. Train with "
                "the same --mixed_precision, or start without --resume_from_checkpoint."
            )
        try:
            state.load_state_dict(saved[name])
        # Of whatever kind: what is read came from a file.
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint / OPTIMIZER}: expected a state of the {name} for this training, found one that does "
                f"not fit ({brief(error)}). Give the settings that the checkpoint was written with."
            ) from error


def restore_random_states(accelerator: Accelerator, checkpoint: Path) -> None:
    """Put this process's generators back, if the checkpoint was written by as many processes.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    processes = accelerator.num_processes
    # Another number is a fact that differs, of which [`Progress.compare`] warns.
    if _read_state(checkpoint)["facts"].get("num_processes", processes) != processes:
        return
    file = checkpoint / _RANDOM.format(accelerator.process_index)
    states = read_saved(file, "the random states of a process", "Give another checkpoint.")
    try:
        set_random_states(states, accelerator.device)
    except Exception as error:
        raise CheckpointError(
            f"{file}: expected the random states of a process, found others ({brief(error)}). Give another checkpoint."
        ) from error


def remove_checkpoints(output_dir: Path, unfinished_only: bool = False) -> None:
    """Remove checkpoints, or only those that were interrupted while being written, by this or an earlier version."""
    for path in list_checkpoints(output_dir):
        if not unfinished_only or not (path / _STATE).is_file():
            _remove(path)
    for path in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    # Without its state a folder is no checkpoint, whatever else is there.
    (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / _STATE
    fix = "Give another checkpoint."
    required = ("step", "seed", "facts")
    content = open_document(read_json(file), _FORMAT, _VERSION, _FIELDS, str(file), required=required, fix=fix)
    step, last = content["step"], content["facts"].get("max_train_steps")
    named = _NAME.fullmatch(checkpoint.name)
    if (named and int(named[1]) != step) or (type(last) is int and step > last):
        expected = f"{int(named[1])}, as its folder says" if named and int(named[1]) != step else f"at most {last}"
        raise CheckpointError(f"{file}: step: expected {expected}, found {step}. {fix}")
    return content


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
