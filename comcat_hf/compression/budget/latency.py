"""Budgets in measured latency: a table of how long every shape of a model's layers takes at a few ranks.

Multiply-accumulates say little of time where kernels are small, work on tiles or wait to be launched. The table holds
times from the device that counts and can be carried to another machine, where the ranks are then chosen.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from ...checks import TEXT, Kind, check_fields, make_document, mapping_of, open_document, optional, whole
from ...errors import CheckpointError, InvalidValueError
from ...hub import read_json, resolve_file, write_json_atomic
from ...modeling import Site, Tokens, read_ranks
from .budget import Saved


__all__ = ["LATENCY_NAME", "LatencyMetric", "LatencyTable", "ShapeTimes"]

LATENCY_NAME = "comcat_latency.json"

_FORMAT = "comcat_latency"
_FORMAT_VERSION = 1
_FIELDS = {
    "total": whole(1),
    "shapes": mapping_of(Kind("times of a shape", lambda times: isinstance(times, Mapping | ShapeTimes))),
    **dict.fromkeys(("architecture", "device", "dtype"), optional(TEXT)),
    "threads": optional(whole(1)),
    "batch_size": whole(1),
}
# JSON has no names but texts.
_RANK = re.compile("[1-9][0-9]{0,8}")
_TIME = whole(1)
_RANKS = Kind(
    "nanoseconds by rank",
    lambda ranks: isinstance(ranks, Mapping) and all(_RANK.fullmatch(r) and _TIME.holds(t) for r, t in ranks.items()),
)
_TIMES = {"sites": whole(1), "dense": whole(1), "choices": mapping_of(_RANKS)}


@dataclass(frozen=True)
class ShapeTimes:
    """How long one shape of a site takes on one batch.

    The pairs of an attention are timed together, at one rank, and share equally what they save: kernels take one width
    for query, key and value, so that either pair alone saves little or, for the padding, nothing at all.

    Attributes:
        sites: how many sites of the model have this shape.
        dense: nanoseconds with dense weights.
        choices: nanoseconds by rank and by choice, `"rank"`, `"width"`, or several that were timed at one rank,
            `"qk+vo"`.
    """

    sites: int
    dense: int
    choices: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = [time for ranks in self.choices.values() for item in ranks.items() for time in item]
        if not all(type(number) is int and number > 0 for number in (self.sites, self.dense, *times)):
            raise InvalidValueError(
                "The times of a shape must be whole numbers of nanoseconds above 0, by choice and rank, got "
                f"sites={self.sites!r}, dense={self.dense!r}, choices={self.choices!r}. Measure them with "
                "measure_latency."
            )

    def saved(self, choice: str, limit: int) -> tuple[int, ...]:
        """Nanoseconds that each rank up to the limit saves, `(limit + 1,)`; falling to 0, which stays 0.

        Linear between the ranks that were timed, as fast as the lowest of them below it, dense at the limit. Times
        that fall where the rank rises are noise and are averaged.
        """
        together = next((name for name in self.choices if choice in name.split("+")), choice)
        sharing = len(together.split("+"))
        timed = self.choices.get(together, {})
        ranks = sorted(rank for rank in timed if rank < limit)
        times = _rising([timed[rank] for rank in ranks])
        if not times:
            return (0,) * (limit + 1)
        knots = [(0, times[0]), *zip(ranks, times, strict=True), (limit, self.dense)]
        result = [self.dense]
        for (low, start), (high, end) in pairwise(knots):
            for rank in range(low + 1, high + 1):
                between = round((self.dense - start - (end - start) * (rank - low) / (high - low)) / sharing)
                # Each rank costs something, if a nanosecond: of equals the higher is the better choice.
                result.append(max(min(between, result[-1] - 1), 0))
        result[0] = result[1]
        return tuple(result)


@dataclass(frozen=True)
class LatencyTable:
    """How long a model and the shapes of its sites take on one device; see [`measure_latency`].

    Attributes:
        total: nanoseconds of the dense model's whole forward on one batch.
        shapes: times by shape.
        architecture: class of the model.
        device: name of the device.
        dtype: of the weights, as `"torch.float32"`.
        threads: of the CPU.
        batch_size: samples in one batch.
    """

    total: int
    shapes: Mapping[str, ShapeTimes]
    architecture: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_fields(vars(self), _FIELDS, "A latency table", fix="Use measure_latency.")

    def check_model(self, sites: Mapping[str, Site], tokens: Mapping[str, Tokens], *, whole: bool) -> None:
        """Raise InvalidValueError if the table is of another model.

        Args:
            sites: those of the model, by name.
            tokens: of one sample, by `Site.moments_path`; a site without them is not run and not looked at.
            whole: see that there are as many sites of every shape: what the table's total was measured with.
        """
        shapes = {n: s.signature(tokens[s.moments_path]) for n, s in sites.items() if s.moments_path in tokens}
        fix = "Measure one on this model, measure_latency(model, inputs), and pass the same inputs= here."
        for name, shape in shapes.items():
            if shape not in self.shapes:
                alike = [known for known in self.shapes if known.startswith(f"{sites[name].kind} ")]
                raise InvalidValueError(
                    f"The latency table, measured on {self._where()}, has no times for {name}, expected the shape "
                    f"'{shape}', found {', '.join(map(repr, alike)) or f'no {sites[name].kind} at all'}. {fix}"
                )
        for shape, count in Counter(shapes.values()).items():
            if whole and count != self.shapes[shape].sites:
                raise InvalidValueError(
                    f"The latency table, measured on {self._where()}, has the total of a model with "
                    f"{self.shapes[shape].sites} sites of the shape '{shape}', found {count} in this one. {fix}"
                )

    def _where(self) -> str:
        return f"{self.architecture or 'a model'} ({self.device}, {self.dtype}, {self.batch_size} samples)"

    def to_dict(self) -> dict[str, Any]:
        """The table as it stands in its file."""
        return make_document(_FORMAT, _FORMAT_VERSION, asdict(self))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "this table") -> "LatencyTable":
        """Read what [`to_dict`] wrote; errors name the `source`.

        Raises:
            CheckpointError: another format, a newer version, fields that are missing, unknown or damaged.
        """
        content = open_document(content, _FORMAT, _FORMAT_VERSION, _FIELDS, source)
        shapes = {name: _read_times(f"{source}: {name}", times) for name, times in content.pop("shapes").items()}
        return cls(shapes=shapes, **content)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the table into a folder, made if absent. A file that is there is replaced in one step."""
        write_json_atomic(Path(save_directory) / LATENCY_NAME, self.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any
    ) -> "LatencyTable":
        """Read a table from a folder, a file, or a repository on the Hub; arguments as of `RankPlan.from_pretrained`.

        Raises:
            CheckpointError: no such folder, repository or file, or one that holds no table.
        """
        path = resolve_file(pretrained_model_name_or_path, LATENCY_NAME, revision=revision, **kwargs)
        return cls.from_dict(read_json(path), source=str(path))


class LatencyMetric:
    """A budget in what a table says of one dense model's sites; nanoseconds per batch.

    Args:
        table: the times.
        sites: what may be chosen.
        tokens: of one sample, by `Site.moments_path`.
    """

    name = "latency"

    def __init__(self, table: LatencyTable, sites: Mapping[str, Site], tokens: Mapping[str, Tokens]) -> None:
        self.table, self.sites, self.tokens = table, sites, tokens
        # Twelve equal blocks have one curve.
        self._curves = cache(lambda shape, choice, limit: table.shapes[shape].saved(choice, limit))

    def __call__(
        self, model: nn.Module, names: tuple[str, ...] | None = None, inputs: Mapping[str, Any] | None = None
    ) -> int:
        """What the model is predicted to take: as a whole with `names=None`, else its sites alone."""
        removed = 0
        for name, entry in read_ranks(model).items():
            # Others were in place before, and in the table's total.
            if name in self.sites:
                site = self.sites[name]
                removed += sum(_look_up(self._curve(site, c), rank) for c, rank in site.ranks(entry).items())
        return (self.table.total if names is None else self._sum_of_sites()) - removed

    def savings(
        self, model: nn.Module, inputs: Mapping[str, Any] | None = None
    ) -> Callable[[Site, str], tuple[Saved, int]]:
        def of(site: Site, choice: str) -> tuple[Saved, int]:
            curve = self._curve(site, choice)
            return partial(_look_up, curve), curve.index(0)

        return of

    def _sum_of_sites(self) -> int:
        # The layers of an MLP that is a site itself are in its time.
        inside = {path for site in self.sites.values() if site.kind == "mlp" for path in site.dense_modules()}
        run = [s for name, s in self.sites.items() if name not in inside and s.moments_path in self.tokens]
        return sum(self.table.shapes[self._shape(s)].dense * self.tokens[s.moments_path].calls for s in run)

    def _curve(self, site: Site, choice: str) -> tuple[int, ...]:
        shape = self._shape(site)
        if shape is None:
            return (0,)
        calls = self.tokens[site.moments_path].calls
        return tuple(calls * saved for saved in self._curves(shape, choice, site.choices[choice]))

    def _shape(self, site: Site) -> str | None:
        # What no sample runs through takes no time.
        tokens = self.tokens.get(site.moments_path)
        return None if tokens is None else site.signature(tokens)


def _read_times(source: str, times: Any) -> ShapeTimes:
    check_fields(times, _TIMES, source, error=CheckpointError, fix="Save it again, or measure anew.")
    choices = {choice: {int(rank): t for rank, t in ranks.items()} for choice, ranks in times["choices"].items()}
    return ShapeTimes(times["sites"], times["dense"], choices)


def _look_up(saved: tuple[int, ...], rank: int | None) -> int:
    return 0 if rank is None else saved[rank]


def _rising(times: list[float]) -> list[float]:
    """The nearest times, in the mean square, that do not fall."""
    blocks: list[tuple[float, int]] = []
    for value in times:
        size = 1
        while blocks and blocks[-1][0] >= value:
            other, count = blocks.pop()
            value, size = (other * count + value * size) / (count + size), count + size
        blocks.append((value, size))
    return [value for value, size in blocks for _ in range(size)]
