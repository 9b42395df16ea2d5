"""Rank plans: which rank every attention and linear layer of a model gets, which width every MLP, and their file."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import RankPlanError
from ..transport import push_folder, read_json, resolve_file, write_json_atomic


__all__ = ["RANKS_NAME", "RankPlan"]

RANKS_NAME = "comcat_ranks.json"

_FORMAT = "comcat_ranks"
_FORMAT_VERSION = 1

Entry = int | Mapping[str, int]


@dataclass(frozen=True)
class RankPlan:
    """Which rank or width every module of a model gets.

    Attributes:
        ranks: per module path `{"qk": r, "vo": r}` for attention (ranks per head; one may be missing: that pair stays
            dense), `{"width": k}` for an MLP (hidden units kept) or a rank for a linear layer. An MLP has a width or
            ranks for its layers, not both. Modules that are not named stay dense.
        architecture: class name of the model the plan was made for.
        base_model_name_or_path, revision: where that model came from, if known.
        scope: what was allowed to be compressed: `"model"`, `"attention"` or `"mlp"`.
        target_modules: which modules were meant, where not all were: with scope `"model"` the shares are of these.
        metric: what `reduction` counts: `"params"`, `"macs"` or `"latency"`.
        strategy: how the ranks were found.
        reduction: the share that was asked to be removed, 0 to 1.
        reached: the share that the plan removes, counted on the built model; of latency as a table of times predicts.
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
    _source: str = field(default="this plan", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, Mapping):
            raise RankPlanError(f"{self._source}: 'ranks' must map module names to ranks, got {self.ranks!r}.")
        for name, entry in self.ranks.items():
            check_entry(f"{self._source}: {name}", entry)
        copied = {name: dict(entry) if isinstance(entry, Mapping) else entry for name, entry in self.ranks.items()}
        object.__setattr__(self, "ranks", copied)

    def to_dict(self) -> dict[str, Any]:
        """The plan as it stands in a rank file."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        ranks = copy.deepcopy(values.pop("ranks"))
        if self.target_modules is None:
            # Earlier versions do not know it.
            del values["target_modules"]
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **values, "ranks": ranks}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "this plan") -> "RankPlan":
        """Read what [`to_dict`] wrote.

        Args:
            content: the dictionary.
            source: where it came from; errors name it.

        Raises:
            RankPlanError: another format, a newer version, unknown fields, ranks that are no ranks.
        """
        content = dict(content)
        found = content.pop("format", None)
        if found != _FORMAT:
            raise RankPlanError(f"{source} is no rank file: 'format' must be {_FORMAT!r}, got {found!r}.")
        version = content.pop("format_version", None)
        if version != _FORMAT_VERSION:
            raise RankPlanError(
                f"{source} has format_version {version!r}; this comcat_hf reads {_FORMAT_VERSION}. "
                "Update comcat_hf if the file is newer."
            )
        known = {f.name for f in fields(cls) if not f.name.startswith("_")}
        if "ranks" not in content or set(content) - known:
            unknown = sorted(set(content) - known)
            raise RankPlanError(
                f"{source}: expected the fields {', '.join(sorted(known))}, "
                + (f"found unknown {', '.join(unknown)}." if unknown else "'ranks' is missing.")
            )
        return cls(**content, _source=source)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the rank file into a folder, made if absent. A file that is there is replaced in one step."""
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
            **kwargs: `token`, `cache_dir`, `subfolder`, `local_files_only`, as elsewhere on the Hub.

        Raises:
            CheckpointError: no such folder, repository or file.
            RankPlanError: a file that is damaged or holds no plan.
        """
        path = resolve_file(pretrained_model_name_or_path, RANKS_NAME, revision=revision, **kwargs)
        return cls.from_dict(read_json(path), source=str(path))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the rank file.

        Args:
            repo_id: `user/name`; the repository is created if absent.
            **kwargs: `private`, `revision`, `commit_message`, `create_pr`, `token`.

        Returns:
            the address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)


def check_entry(where: str, entry: Any) -> None:
    ranks = entry.values() if isinstance(entry, Mapping) and entry else [entry]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranks):
        raise RankPlanError(
            f"{where}: expected a whole number from 1 for a linear layer, {{'qk': r, 'vo': r}} for attention or "
            f"{{'width': k}} for an MLP, got {entry!r}."
        )
