"""What the stages of a run leave in its folder, and with which settings each was made."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import Kind, make_document, mapping_of, open_document, whole
from ...configs import RankPlan
from ...errors import InvalidValueError
from ...transport import read_json, write_json_atomic
from .settings import CompressSettings


__all__ = ["Artefacts", "check_writable", "digest_of", "facts_of", "whole_folder"]

_RECORD = "comcat_stages.json"
_FORMAT, _VERSION = "comcat_stages", 1
_FIELDS = {
    "seed": whole(),
    "stages": mapping_of(Kind("the settings of a stage", lambda facts: isinstance(facts, Mapping))),
}

_MODEL = ("model_name_or_path", "model_revision")
_DATA = (
    *("dataset_name", "dataset_config_name", "train_file", "train_dir", "train_split_name", "image_column_name"),
    *("label_column_name", "streaming", "max_train_samples"),
)
_SEARCH = ("search_epochs", "search_share", "search_batch_size", "search_learning_rate", "search_beta", "teacher")
_WHERE = ("scope", "target_modules", "exclude_modules")
_CALIBRATION = (*_MODEL, *_DATA, "calibration_samples", "calibration_batch_size", *_WHERE)
_TRAINING = (
    *("route", "modules_to_save", "num_train_epochs", "max_train_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "scale_lr", "min_learning_rate", "weight_decay", "ema_decay"),
    *("teacher", "distillation_type", "distillation_alpha", "distillation_temperature", "alignment"),
)
# Settings that decide what a stage makes; a stage whose settings changed is not reused.
_FACTS: Mapping[str, tuple[str, ...]] = {
    "calibrate": _CALIBRATION,
    "allocate": (*_CALIBRATION, "reduction", "metric", "strategy", "mlp", "rank_step", "plan", "weights_only"),
    "initialize": (*_CALIBRATION, "weights_only", "compensate"),
    "finetune": (*_MODEL, *_DATA, *_TRAINING),
}


@dataclass(frozen=True)
class Artefacts:
    """The folder of a run.

    Attributes:
        folder: `output_dir`; the final model lies in it.
    """

    folder: Path

    @property
    def statistics(self) -> Path:
        return self.folder / "statistics"

    @property
    def initial(self) -> Path:
        """The factorised model before it is fine-tuned."""
        return self.folder / "initial"

    @property
    def search_state(self) -> Path:
        return self.folder / "search_state.pt"

    @property
    def results(self) -> Path:
        return self.folder / "eval_results.json"

    @property
    def sweep(self) -> Path:
        """A model of another reduction, while it is measured."""
        return self.folder / ".sweep"

    @property
    def sweep_results(self) -> Path:
        return self.folder / "sweep_results.json"

    @property
    def picture(self) -> Path:
        """Ranks and spectra, for the card."""
        return self.folder / "ranks.png"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def seed(self) -> int | None:
        """The seed of the run so far."""
        return self._read().get("seed")

    def is_done(self, stage: str, facts: Mapping[str, Any]) -> bool:
        """Whether a stage was finished.

        Args:
            stage: its name.
            facts: what it would be made with now, as [`facts_of`] gives them.

        Raises:
            InvalidValueError: it was finished with other settings.
        """
        before = self._read().get("stages", {}).get(stage)
        if before is None:
            return False
        facts = json.loads(json.dumps(facts))
        differing = [name for name in facts if before.get(name) != facts[name]]
        if differing:
            name = differing[0]
            raise InvalidValueError(
                f"{self.folder}: the stage {stage} was done with --{name} {before.get(name)}, and is asked for with "
                f"{facts[name]}. Give the same, another --output_dir, or --overwrite_output_dir."
            )
        return True

    def was_done(self, stage: str) -> bool:
        """Whether a stage was finished, with whatever settings."""
        return stage in self._read().get("stages", {})

    def note(self, stage: str, facts: Mapping[str, Any], seed: int) -> None:
        """Write down that a stage is finished."""
        content = self._read()
        stages = {**content.get("stages", {}), stage: dict(facts)}
        record = make_document(_FORMAT, _VERSION, {"seed": seed, "stages": stages})
        write_json_atomic(self.folder / _RECORD, record)

    def clear(self) -> None:
        """Remove what stages made; the folder may hold other files, which stay."""
        for path in (self.statistics, self.initial, self.sweep):
            shutil.rmtree(path, ignore_errors=True)
        files = (self.search_state, self.results, self.sweep_results, self.picture, self.report)
        for path in (*files, self.folder / _RECORD):
            path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        path = self.folder / _RECORD
        if not path.is_file():
            return {}
        fix = "Give another --output_dir, or --overwrite_output_dir."
        return open_document(read_json(path), _FORMAT, _VERSION, _FIELDS, str(path), fix=fix)


def facts_of(settings: CompressSettings, stage: str, seed: int) -> dict[str, Any]:
    """The settings that decide what a stage makes."""
    names = _FACTS[stage]
    if stage == "allocate" and settings.strategy == "search":
        names = (*names, *_SEARCH)
    return {name: getattr(settings, name) for name in names} | {"seed": seed}


def digest_of(plan: RankPlan) -> str:
    """A short name of what a plan says."""
    content = json.dumps({name: plan.ranks[name] for name in sorted(plan.ranks)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_writable(folder: Path) -> None:
    """Make a folder, and see that files can be written there.

    Raises:
        InvalidValueError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidValueError(
            f"--output_dir {folder}: expected a folder that can be written to, found one that cannot ({error}). "
            "Give another, or change its permissions."
        ) from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that has its name only when the block has ended; one that is there is replaced."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
