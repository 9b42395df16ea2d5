"""What the stages of a run leave in its folder, and with which settings each was made."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import Kind, make_document, mapping_of, open_document, whole
from ...configs import RankPlan
from ...errors import InvalidValueError
from ...hub import read_json, write_json_atomic
from ..checkpoints import remove_checkpoints


__all__ = ["Artefacts", "digest_of", "whole_folder"]

_RECORD = "comcat_stages.json"
_FORMAT, _VERSION = "comcat_stages", 1
_STAGES = mapping_of(Kind("the settings of a stage", lambda facts: isinstance(facts, Mapping)))
_FIELDS = {"seed": whole(), "stages": _STAGES, "begun": _STAGES}


def _place(name: str) -> Any:
    return property(lambda self: self.folder / name)


@dataclass(frozen=True)
class Artefacts:
    """The folder of a run.

    Attributes:
        initial: the factorised model before it is fine-tuned.
        sweep: a model of another reduction, while it is measured.
        picture: ranks and spectra, for the card.
    """

    folder: Path

    statistics = _place("statistics")
    initial = _place("initial")
    search_state = _place("search_state.pt")
    results = _place("eval_results.json")
    sweep = _place(".sweep")
    sweep_results = _place("sweep_results.json")
    picture = _place("ranks.png")
    report = _place("report.html")

    def seed(self) -> int | None:
        """The seed of the run so far."""
        return self._read().get("seed")

    def is_done(self, stage: str, facts: Mapping[str, Any]) -> bool:
        """Whether a stage was finished.

        Args:
            facts: what decides its result, as [`CompressSettings.facts`] gives it. Where the record has no such fact,
                an older version wrote it: it is taken for the same.

        Raises:
            InvalidValueError: it was finished, or begun, with other settings.
        """
        record = self._read()
        finished, begun = (record.get(name, {}).get(stage) for name in ("stages", "begun"))
        before = finished or begun or {}
        for name, value in json.loads(json.dumps(facts)).items():
            if before.get(name, value) != value:
                raise InvalidValueError(
                    f"{self.folder}: the stage {stage} was {'done' if finished else 'begun'} with --{name} "
                    f"{before[name]}, and is asked for with {value}. Give the same, another --output_dir, or "
                    "--overwrite_output_dir."
                )
        return finished is not None

    def was_done(self, stage: str) -> bool:
        """Whether a stage was finished, with whatever settings."""
        return stage in self._read().get("stages", {})

    def begin(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Write down that a stage has begun, and with which settings it has to go on."""
        self._write("begun", stage, facts)

    def note(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Write down that a stage is finished; figures of the models before are removed."""
        self.results.unlink(missing_ok=True)
        self._write("stages", stage, facts)

    def clear(self) -> None:
        """Remove what stages made, checkpoints among it; the folder may hold other files, which stay."""
        remove_checkpoints(self.folder)
        for path in (self.statistics, self.initial, self.sweep):
            shutil.rmtree(path, ignore_errors=True)
        files = (self.search_state, self.results, self.sweep_results, self.picture, self.report)
        for path in (*files, self.folder / _RECORD):
            path.unlink(missing_ok=True)

    def _write(self, part: str, stage: str, facts: Mapping[str, Any]) -> None:
        content = self._read() | {"seed": facts["seed"]}
        content |= {part: {**content.get(part, {}), stage: dict(facts)}}
        write_json_atomic(self.folder / _RECORD, make_document(_FORMAT, _VERSION, content))

    def _read(self) -> dict[str, Any]:
        path = self.folder / _RECORD
        if not path.is_file():
            return {}
        fix = "Give another --output_dir, or --overwrite_output_dir."
        required = ("seed",)
        return open_document(read_json(path), _FORMAT, _VERSION, _FIELDS, str(path), required=required, fix=fix)


def digest_of(plan: RankPlan) -> str:
    """A short name of what a plan says."""
    content = json.dumps({name: plan.ranks[name] for name in sorted(plan.ranks)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
