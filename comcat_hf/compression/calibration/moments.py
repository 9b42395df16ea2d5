"""Statistics: sums of activation moments by module path, how they add up, and the file that holds them."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...checks import TEXT, check, listed, make_document, mapping_of, open_document, parse_json, some_of, whole
from ...closed_forms.attention import AttentionMoments
from ...closed_forms.curvature import Curvature
from ...closed_forms.linear import LinearMoments
from ...errors import CheckpointError, InvalidValueError
from ...hub import push_folder, resolve_file
from ...modeling import Site, known_sites
from ...modeling.views import class_path
from ...tensor_files import read_safetensors, write_safetensors


__all__ = ["STATISTICS_NAME", "Statistics", "Sums", "sum_names", "weighed"]

STATISTICS_NAME = "comcat_statistics.safetensors"

_FORMAT = "comcat_statistics"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sums:
    """Weighted sums over the tokens of one module, float64; those of two halves of the data add up.

    Attributes:
        side: `"heads"` for attention, `"values"` where only its value/output product can be compressed; for a linear
            layer the side of its covariance, `"input"` or `"output"`.
        values: the sums by name. Attention: `count`, `query` (H, p, p); `keys`, `key` (H, p, p), centred within each
            sample; `rows`, `attended` (H, p, p), `attended_sum` (H, p), the only ones of values. Linear: `count`,
            `input` (d_in), `mean` (n), `second` (n, n). With curvature besides `weight`, that of the movements, and:
            attention: `qk_moved`, `vo_moved` (p + 1), `qk_left`, `qk_right`, `vo_left`, `vo_right` (H, p, p), of
            values those of `vo`; linear: `gradient` (d_out, d_out) and `rank_moved` by rank or `width_moved`
            at a few widths.
    """

    side: str
    values: Mapping[str, Tensor]

    @property
    def has_curvature(self) -> bool:
        return "weight" in self.values

    def moved(self, choice: str) -> Tensor | None:
        """The movement of the model's output by a choice: at every rank from 0 on, or at a few widths."""
        found = self.values.get(f"{choice}_moved")
        return None if found is None else (found / self.values["weight"].clamp(min=1e-300)).cpu()

    def moments(self) -> AttentionMoments | LinearMoments:
        return _MOMENTS[self.side](self.values, self.side)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[_WHOLE[self.side]].shape)


def sum_names(side: str) -> tuple[str, ...]:
    """Which sums are kept for a side."""
    return _NAMES[side]


def weighed(moments: Any, sums: Sums) -> Any:
    """Moments with the curvature that other sums of the same module hold."""
    if sums.side in _OF_HEADS:
        return replace(moments, **{f"{pair}_curvature": _curvature(sums.values, pair) for pair in ("qk", "vo")})
    return replace(moments, curvature=sums.values.get("gradient"))


def _attention_moments(sums: Mapping[str, Tensor], side: str) -> AttentionMoments:
    mean = sums["attended_sum"] / sums["rows"]
    second = sums["attended"] / sums["rows"]
    return AttentionMoments(
        query=sums["query"] / sums["count"] if "query" in sums else None,
        key=sums["key"] / sums["keys"] if "key" in sums else None,
        attended=second - mean[:, :, None] * mean[:, None, :],
        attended_mean=mean,
        qk_curvature=_curvature(sums, "qk"),
        vo_curvature=_curvature(sums, "vo"),
    )


def _curvature(sums: Mapping[str, Tensor], choice: str) -> Curvature | None:
    return Curvature(sums[f"{choice}_left"], sums[f"{choice}_right"]) if f"{choice}_left" in sums else None


def _linear_moments(sums: Mapping[str, Tensor], side: str) -> LinearMoments:
    mean = sums["mean"] / sums["count"]
    covariance = sums["second"] / sums["count"] - mean[:, None] * mean
    return LinearMoments(covariance, sums["input"] / sums["count"], side, sums.get("gradient"))


_LINEAR_NAMES = ("count", "input", "mean", "second")
_VALUE_NAMES = ("rows", "attended", "attended_sum")
_NAMES = {
    "heads": ("count", "query", "keys", "key", *_VALUE_NAMES),
    "values": _VALUE_NAMES,
    "input": _LINEAR_NAMES,
    "output": _LINEAR_NAMES,
}
_PAIRS = ("qk_left", "qk_right", "vo_left", "vo_right")
_METRICS = frozenset((*_PAIRS, "gradient"))
_MOVED = ("qk_moved", "vo_moved", "rank_moved", "width_moved")
# What curvature adds, all or nothing; of an output layer either or both kinds of movement.
_LINEAR_CURVATURE, _WAYS = frozenset(("weight", "gradient")), frozenset(("rank_moved", "width_moved"))
_CURVATURE = {
    "heads": frozenset(("weight", *_PAIRS, "qk_moved", "vo_moved")),
    "values": frozenset(("weight", "vo_left", "vo_right", "vo_moved")),
    "input": _LINEAR_CURVATURE,
    "output": _LINEAR_CURVATURE,
}
_EITHER = {"heads": frozenset(), "values": frozenset(), "input": _WAYS, "output": _WAYS}
# Which sum has the shape of the second moments.
_WHOLE = {"heads": "attended", "values": "attended", "input": "second", "output": "second"}
_OF_HEADS = frozenset(("heads", "values"))
_COUNTS = ("count", "keys", "rows")
# By name, from the shape of the second moments; `input` is as wide as the layer's input.
_SHAPE_OF: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    **dict.fromkeys((*_COUNTS, "weight"), lambda shape: ()),
    **dict.fromkeys(_PAIRS, lambda shape: shape),
    **dict.fromkeys(_MOVED, lambda shape: (shape[-1] + 1,)),
    "gradient": lambda shape: (shape[-1], shape[-1]),
    **dict.fromkeys(("query", "key", "attended"), lambda shape: (shape[0], shape[-1], shape[-1])),
    **dict.fromkeys(("attended_sum", "mean", "input"), lambda shape: shape[:-1]),
    "second": lambda shape: (shape[0], shape[0]),
}
_FIELDS = dict.fromkeys(("architecture", "samples", "scope", "sides"), TEXT)
_MOMENTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_OF_HEADS, _attention_moments),
    "input": _linear_moments,
    "output": _linear_moments,
}


class Statistics(Mapping[str, AttentionMoments | LinearMoments]):
    """Moments by module path, and what they were gathered from. Those of two parts of the data add up: `a + b`.

    Attributes:
        sums: the raw sums by module path; reading an item makes moments of them.
        architecture: class of the model.
        samples: number of samples seen.
        scope: what they were gathered for.
    """

    def __init__(self, sums: Mapping[str, Sums], architecture: str, samples: int, scope: str = "model") -> None:
        self.sums = dict(sums)
        self.architecture = architecture
        self.samples = samples
        self.scope = scope

    def without_moments(self) -> "Statistics":
        """What [`weighed`] reads: the metrics of the curvature alone, without the covariances, which are larger."""
        sums = {
            path: Sums(one.side, {n: one.values[n] for n in _METRICS & set(one.values)})
            for path, one in self.sums.items()
        }
        return Statistics(sums, self.architecture, self.samples, self.scope)

    def __getitem__(self, name: str) -> AttentionMoments | LinearMoments:
        return self.sums[name].moments()

    def __contains__(self, name: object) -> bool:
        return name in self.sums

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def __repr__(self) -> str:
        return f"Statistics({self.architecture.rpartition('.')[2]}, {len(self)} modules, {self.samples} samples)"

    def __add__(self, other: "Statistics") -> "Statistics":
        return self.merge(other) if isinstance(other, Statistics) else NotImplemented

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both parts of the data together.

        Raises:
            InvalidValueError: the two were gathered on different models or for different scopes.
        """
        for what in ("architecture", "scope"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise InvalidValueError(
                    f"Statistics can be merged if their {what} is the same, got {mine!r} and {theirs!r}. "
                    "Gather both with the same model and scope."
                )
        differing = [n for n in {**self.sums, **other.sums} if _signature(self, n) != _signature(other, n)]
        if differing:
            name = differing[0]
            raise InvalidValueError(
                f"Statistics can be merged if they come from the same model; at {name} one has "
                f"{_signature(self, name)}, the other {_signature(other, name)}. Gather both with the same model."
            )
        sums = {}
        for name, one in self.sums.items():
            # Curvature that one of the two lacks is not that of both.
            theirs = other.sums[name].values
            alike = one.values if one.values.keys() == theirs.keys() else sum_names(one.side)
            sums[name] = Sums(one.side, {k: one.values[k] + theirs[k].to(one.values[k].device) for k in alike})
        return Statistics(sums, self.architecture, self.samples + other.samples, self.scope)

    @property
    def has_curvature(self) -> bool:
        """Whether the curvature of the model's output was gathered too."""
        return any(sums.has_curvature for sums in self.sums.values())

    def check_model(
        self, model: nn.Module, names: Iterable[str] = (), sites: Mapping[str, Site] | None = None
    ) -> None:
        """Raise InvalidValueError if these are the statistics of another model, or lack those of a site named.

        `sites`: those of the model that were found already; they are found anew where these statistics hold others.
        """
        if class_path(type(model)) != self.architecture:
            raise InvalidValueError(
                f"The statistics were gathered on {self.architecture}, the model is {class_path(type(model))}. "
                "Gather them again with collect_statistics(model, batches)."
            )
        if sites is None or not self.sums.keys() <= {site.moments_path for site in sites.values()}:
            sites = known_sites(model, self.scope, width=True)
        expected: dict[str, list[tuple[int, ...]]] = {}
        for site in sites.values():
            # At a layer that reads hidden units: of the MLP and of the layer, whose statistics older files hold.
            expected.setdefault(site.moments_path, []).append(site.moments_shape)
        for name, sums in self.sums.items():
            shapes = expected.get(name, [])
            if sums.shape not in shapes:
                raise InvalidValueError(
                    f"The statistics of {name} have the shape {sums.shape}; the model "
                    + (f"has {' or '.join(map(str, shapes))} there. " if shapes else "has no such module. ")
                    + "They were gathered on another model; gather them again with collect_statistics(model, batches)."
                )
        missing = [name for name in names if (sites[name].moments_path if name in sites else name) not in self]
        if missing:
            raise InvalidValueError(
                f"The statistics, gathered with scope={self.scope!r}, lack {some_of(missing)}, which the plan "
                "factorises. Gather them for the scope and the modules of the plan."
            )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the statistics into a folder, made if absent. A file that is there is replaced in one step."""
        fields = {
            "architecture": self.architecture,
            "samples": str(self.samples),
            "scope": self.scope,
            "sides": json.dumps({name: sums.side for name, sums in self.sums.items()}),
        }
        metadata = make_document(_FORMAT, str(_FORMAT_VERSION), fields)
        tensors = {f"{name}:{key}": value for name, sums in self.sums.items() for key, value in sums.values.items()}
        write_safetensors(Path(save_directory) / STATISTICS_NAME, tensors, metadata)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any
    ) -> "Statistics":
        """Read what [`save_pretrained`] wrote, onto the CPU.

        Args:
            pretrained_model_name_or_path: a folder, a statistics file, or a repository on the Hub.
            revision: branch, tag or commit on the Hub.
            **kwargs: `token`, `cache_dir`, `subfolder`, `local_files_only`, as elsewhere on the Hub.

        Raises:
            CheckpointError: no such folder, repository or file; a file that is damaged, newer or holds no statistics.
        """
        path = resolve_file(pretrained_model_name_or_path, STATISTICS_NAME, revision=revision, **kwargs)
        tensors, metadata = read_safetensors(path, "statistics")
        return cls(*_read(str(path), metadata, tensors))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the statistics file; `kwargs` and the result are those of [`RankPlan.push_to_hub`]."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)


def _read(
    path: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Sums], str, int, str]:
    fields = open_document(metadata, _FORMAT, str(_FORMAT_VERSION), _FIELDS, path)
    samples = int(fields["samples"]) if re.fullmatch("[0-9]{1,18}", fields["samples"]) else fields["samples"]
    check(samples, whole(1), f"{path}: samples", error=CheckpointError)
    sides = parse_json(fields["sides"], f"{path}: sides")
    check(sides, mapping_of(listed(*_NAMES)), f"{path}: sides", error=CheckpointError)
    expected = {f"{name}:{key}" for name, side in sides.items() for key in _keys(name, side, tensors)}
    if differing := sorted(expected - tensors.keys()) or sorted(tensors.keys() - expected):
        raise CheckpointError(
            f"{path}: expected the sums of the modules that its header names, found {differing[0]} in one of the "
            "two only. Save or download it again."
        )
    sums = {
        name: Sums(side, {k: tensors[f"{name}:{k}"] for k in _keys(name, side, tensors)})
        for name, side in sides.items()
    }
    for name, found in sums.items():
        _check_sums(f"{path}: {name}", found)
    return sums, fields["architecture"], samples, fields["scope"]


def _keys(name: str, side: str, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Which sums a file must hold of a module: with one of the curvature, all of it."""
    here = {key for key in (*_CURVATURE[side], *_EITHER[side]) if f"{name}:{key}" in tensors}
    return (*_NAMES[side], *sorted(_CURVATURE[side] | here if here else here))


def _check_sums(where: str, sums: Sums) -> None:
    """Raise CheckpointError if sums are not of one module, not finite or of no token."""
    shape = sums.shape
    for name, value in sums.values.items():
        free = value.ndim == 1 if name == "input" or name in _MOVED else name == "gradient" and value.ndim == 2
        wanted = value.shape if free else _SHAPE_OF[name](shape)
        if value.shape != wanted or not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(
                f"{where}: expected {name} to be {tuple(wanted)} finite numbers, found {tuple(value.shape)} of "
                f"{value.dtype}. Gather the statistics again."
            )
        if name in _COUNTS and value <= 0:
            raise CheckpointError(f"{where}: expected {name} above 0, found {value.item()}. Gather them again.")


def _signature(statistics: Statistics, name: str) -> tuple[str, tuple[int, ...]] | None:
    sums = statistics.sums.get(name)
    return None if sums is None else (sums.side, sums.shape)
