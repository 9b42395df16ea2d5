"""`RankPlan`: the rank of every attention and linear layer and the width of every MLP, and the rank file."""

import copy
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checks import (
    TEXT,
    Kind,
    check_fields,
    finite,
    list_of,
    listed,
    make_document,
    mapping_of,
    open_document,
    optional,
    shown,
    whole,
)
from ..errors import RankPlanError
from ..hub import hub_id, push_folder, read_json, resolve_file, write_json_atomic


__all__ = ["RANKS_FORMAT", "RANKS_NAME", "RankPlan"]

RANKS_NAME = "comcat_ranks.json"

RANKS_FORMAT = "comcat_ranks"
_FORMAT_VERSION = 1

Entry = int | Mapping[str, int]

_NAMES = Kind(
    "a list of module names, or a regular expression", lambda value: TEXT.holds(value) or list_of(TEXT).holds(value)
)
_ENTRIES = ({"qk", "vo"}, {"width"})
_FIELDS = {
    "architecture": optional(TEXT),
    "base_model_name_or_path": optional(TEXT),
    "revision": optional(TEXT),
    "scope": listed("model", "attention", "mlp"),
    "target_modules": optional(_NAMES),
    "metric": listed("params", "macs", "latency"),
    "layout": listed("free", "plain"),
    "strategy": optional(TEXT),
    "reduction": optional(finite(0, 1)),
    "reached": optional(finite(high=1)),
    "ranks": mapping_of(Kind("a rank or ranks", lambda entry: True)),
}


@dataclass(frozen=True)
class RankPlan:
    """A rank plan: the rank or width of every module of a model.

    Attributes:
        ranks: by module path `{"qk": r, "vo": r}` for attention (ranks per head; without one of them that pair stays
            dense), `{"width": k}` for an MLP (hidden units kept) or a rank for a linear layer. An MLP has a width or
            ranks for its layers, not both. Modules that are not named stay dense.
        architecture: class name of the plan's model.
        base_model_name_or_path, revision: source of that model, if known; files name Hub ids only.
        scope: the part that may be compressed: `"model"`, `"attention"` or `"mlp"`.
        target_modules: the targeted modules, if not all: with scope `"model"` the shares are of these.
        metric: the unit of `reduction`: `"params"`, `"macs"` or `"latency"`.
        strategy: the strategy that chose the ranks.
        reduction: the requested share to remove, 0 to 1.
        reached: the share that the plan removes, counted on the built model; for latency, predicted by a table of
            times. `None` if it was not counted again after the ranks were changed.
        layout: `"free"`, or `"plain"` where the configuration of the model's class can express all ranks.
    """

    ranks: Mapping[str, Entry]
    architecture: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    scope: str = "model"
    metric: str = "params"
    strategy: str | None = None
    reduction: float | None = None
    reached: float | None = None
    target_modules: list[str] | str | None = None
    layout: str = "free"
    _source: str = field(default="this plan", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(_values(self), _FIELDS, self._source, error=RankPlanError)
        for name, entry in self.ranks.items():
            check_entry(f"{self._source}: {name}", entry)
        copied = {name: dict(entry) if isinstance(entry, Mapping) else entry for name, entry in self.ranks.items()}
        object.__setattr__(self, "ranks", copied)

    def with_ranks(self, ranks: Mapping[str, Entry | None]) -> "RankPlan":
        """A copy of the plan with other entries for some modules; `compress` counts its reduction again.

        Args:
            ranks: entries by module path, each in place of the old one; `None` leaves that module dense.

        Raises:
            RankPlanError: invalid ranks.
        """
        if not isinstance(ranks, Mapping):
            raise RankPlanError(f"{self._source}: with_ranks takes a mapping of module names to ranks, got {ranks!r}.")
        edited = {name: entry for name, entry in {**self.ranks, **ranks}.items() if entry is not None}
        return replace(self, ranks=edited, reached=None)

    def to_dict(self) -> dict[str, Any]:
        """The content of the rank file; a base in a local folder is not named."""
        values = {**_values(self), "ranks": copy.deepcopy(self.ranks)}
        if hub_id(self.base_model_name_or_path) is None:
            values |= {"base_model_name_or_path": None, "revision": None}
        for name, default in (("target_modules", None), ("layout", "free")):
            if values[name] == default:
                # Earlier versions do not know it.
                del values[name]
        return make_document(RANKS_FORMAT, _FORMAT_VERSION, values)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "this plan") -> "RankPlan":
        """Read a plan from the content of a rank file.

        Args:
            content: a dictionary of [`to_dict`].
            source: the file, for errors.

        Raises:
            RankPlanError: another format, a newer version, unknown fields, invalid ranks.
        """
        known: dict[str, Any] = {"required": ("ranks",), "error": RankPlanError, "edits": True}
        return cls(**open_document(content, RANKS_FORMAT, _FORMAT_VERSION, _FIELDS, source, **known), _source=source)

    def check_model(self, model: object) -> None:
        """Raise RankPlanError if the plan was made for a class that is neither this model's nor of the same family.

        A family is the set of classes of one Python module: a model with and without its heads.
        """
        name = self.architecture
        known = (
            name in (None, cls.__name__)
            or getattr(vars(sys.modules[cls.__module__]).get(name), "__module__", None) == cls.__module__
            for cls in type(model).__mro__
            if cls.__module__ in sys.modules
        )
        if not any(known):
            raise RankPlanError(
                f"{self._source}: expected a plan for {type(model).__name__}, found one for {name}. Give "
                "a plan that was made for this model."
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the rank file into a folder, which is created if missing; an existing file is replaced in one step."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / RANKS_NAME, self.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any
    ) -> "RankPlan":
        """Read a rank file.

        Args:
            pretrained_model_name_or_path: a folder, a rank file, or a repository on the Hub.
            revision: branch, tag or commit on the Hub.
            **kwargs: `token`, `cache_dir`, `subfolder`, `local_files_only`, as for every download from the Hub.

        Raises:
            CheckpointError: no such folder, repository or file.
            RankPlanError: a file that is damaged or is not a plan.
        """
        path = resolve_file(pretrained_model_name_or_path, RANKS_NAME, revision=revision, **kwargs)
        return cls.from_dict(read_json(path), source=str(path))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the rank file.

        Args:
            repo_id: `user/name`; a missing repository is created.
            **kwargs: `private`, `revision`, `commit_message`, `create_pr`, `token`.

        Returns:
            the address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)


def check_entry(where: str, entry: Any) -> None:
    ranks = entry.values() if isinstance(entry, Mapping) and entry else [entry]
    known = not isinstance(entry, Mapping) or any(set(entry) <= names for names in _ENTRIES)
    if not known or not all(whole(1).holds(rank) for rank in ranks):
        raise RankPlanError(
            f"{where}: expected a whole number from 1 for a linear layer, {{'qk': r, 'vo': r}} for attention or "
            f"{{'width': k}} for an MLP, got {shown(entry)}."
        )


def _values(plan: RankPlan) -> dict[str, Any]:
    return {f.name: getattr(plan, f.name) for f in fields(plan) if not f.name.startswith("_")}
