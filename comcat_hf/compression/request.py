"""What is asked of a compression: every default is decided here, and nowhere else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checks import Kind, check, optional, some_of, whole
from ..errors import InvalidValueError
from ..modeling import EVERYTHING, Site, Targets, find_sites
from ..modeling.layout import LAYOUTS
from .calibration.moments import Statistics


__all__ = ["WAYS", "Request", "check_choice", "check_data", "check_merged", "sites_by_way"]

# How an MLP is made smaller: by its hidden units, by the ranks of its layers, or by whichever costs less.
WAYS = ("width", "rank", "mixed")

# Strategies that look at statistics, and those that measure on batches.
_INFORMED = ("spectrum", "sensitivity", "curvature")
_MEASURING = ("sensitivity", "curvature")

_MEASURED = {
    "statistics": Kind(
        "what collect_statistics returns or Statistics.from_pretrained reads",
        lambda value: isinstance(value, Statistics),
    ),
    "sensitivities": Kind("what measure_sensitivities returns", lambda value: isinstance(value, Mapping)),
}


@dataclass(frozen=True)
class Request:
    """How a model shall be compressed.

    Attributes:
        scope, metric, step: see [`allocate_ranks`].
        strategy, mlp, compensate: see [`compress`]; `None` is decided by the data that there is.
        refine: steps of training on the batches; 0 for none.
        layout: see [`compress`].
        targets: which modules are meant.
        batches, statistics, sensitivities, curvature: whether there are any.
        weights_only: the factors are fitted to no data, whatever the ranks are chosen by.
    """

    scope: str = "model"
    metric: str = "params"
    strategy: str | None = None
    mlp: str | None = None
    compensate: bool | None = None
    refine: int = 0
    layout: str = "free"
    targets: Targets = EVERYTHING
    step: int | None = None
    batches: bool = False
    statistics: bool = False
    sensitivities: bool = False
    curvature: bool = False
    weights_only: bool = False

    def __post_init__(self) -> None:
        fitted = (self.batches or self.statistics) and not self.weights_only
        decided = {
            "strategy": self._measured_by,
            # Without data nothing makes up for the units that are cut, and a search chooses ranks alone.
            "mlp": "width" if self.layout == "plain" or (fitted and self.strategy != "search") else "rank",
            "compensate": self.batches and not self.weights_only,
        }
        for name, value in decided.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.compensate and not self.batches:
            raise InvalidValueError("compensate=True fits the outputs of blocks to real inputs: give batches.")
        check_choice("layout", self.layout, LAYOUTS)
        if self.layout == "plain" and (self.mlp != "width" or self.strategy == "search"):
            found = "strategy='search'" if self.strategy == "search" else f"mlp={self.mlp!r}"
            raise InvalidValueError(
                f"layout='plain': expected MLPs that lose hidden units, found {found}, which gives layers ranks that "
                "no configuration names. Leave it out, or choose layout='free'."
            )
        check(self.refine, whole(), "refine", fix="Give the number of steps, such as refine=300.")
        if self.refine and (not self.batches or self.weights_only):
            raise InvalidValueError(f"refine={self.refine} trains the factors on real inputs: give batches.")

    @classmethod
    def of(
        cls, model: nn.Module, target_modules: Any, exclude_modules: Any, data: Mapping[str, Any] = {}, **how: Any
    ) -> "Request":
        """A request with this data, by name; raises InvalidValueError for modules and data that cannot be meant."""
        check_data(data)
        given: dict[str, Any] = {name: value is not None for name, value in data.items()}
        given["curvature"] = getattr(data.get("statistics"), "has_curvature", False)
        return cls(targets=Targets.of(model, target_modules, exclude_modules).check(model), **given, **how)

    @property
    def informed(self) -> bool:
        """Whether the strategy looks at statistics."""
        return self.strategy in _INFORMED

    @property
    def measures(self) -> bool:
        """Whether the strategy measures on batches."""
        return self.strategy in _MEASURING

    @property
    def whole(self) -> bool:
        """Whether the reduction is of the whole model."""
        return self.scope == "model" and self.targets.target_modules is None

    def gathers(self, planned: bool) -> bool:
        """Whether statistics must be gathered from the batches; `planned`: the ranks are given."""
        needed = not self.compensate or (self.informed and not planned) or self.weighs(planned)
        return needed and self.batches and not self.statistics

    def weighs(self, planned: bool) -> bool:
        """Whether the curvature must be gathered from the batches; `planned`: the ranks are given."""
        wanted = (self.strategy == "curvature" or planned) and not self.weights_only
        return wanted and self.batches and not self.curvature

    def find_sites(self, model: nn.Module) -> dict[str, Site]:
        """The sites of a model that are meant, MLPs as wholes among them."""
        return find_sites(model, self.scope, width=True, targets=self.targets)

    def check(self) -> None:
        """Raise InvalidValueError for a strategy that does not go together with what there is."""
        check_choice("mlp", self.mlp, WAYS)
        if self.mlp == "mixed" and self.strategy == "uniform":
            raise InvalidValueError(
                "mlp='mixed' compares what width and rank cost, which strategy='uniform' does not look at: choose "
                "mlp='width' or 'rank', or strategy='spectrum', 'sensitivity' or 'curvature'."
            )
        enough = self.curvature if self.strategy == "curvature" else self.sensitivities and self.statistics
        if self.measures and not (self.batches or enough):
            raise InvalidValueError(
                f"strategy={self.strategy!r} measures on calibration inputs: pass batches=, mappings or tensors of "
                "the main input, or choose strategy='spectrum', which needs none."
            )

    @property
    def _measured_by(self) -> str:
        if self.sensitivities and (self.batches or self.statistics):
            return "sensitivity"
        return "curvature" if self.batches or self.curvature else "uniform"


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise InvalidValueError if an argument is none of the values allowed."""
    if value not in tuple(allowed):
        raise InvalidValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_data(data: Mapping[str, Any]) -> None:
    """Raise InvalidValueError for statistics or sensitivities, by name, that are none."""
    for name, kind in _MEASURED.items():
        check(data.get(name), optional(kind), name)


def check_merged(model: nn.Module) -> None:
    """Raise InvalidValueError if a model carries adapters."""
    if getattr(model, "peft_config", None):
        raise InvalidValueError(
            f"{type(model).__name__} carries the adapters {', '.join(model.peft_config)}. Merge them first, "
            "model = model.merge_and_unload(), or load the model again without them."
        )


def sites_by_way(sites: Mapping[str, Site], mlp: str) -> dict[str, Site]:
    """Of all sites of a model those that this way of making its MLPs smaller (`WAYS`) chooses from.

    Raises:
        InvalidValueError: there are MLPs alone, and it is their layers that get ranks.
    """
    if mlp == "rank":
        layers = {name: site for name, site in sites.items() if site.kind != "mlp"}
        if sites and not layers:
            raise InvalidValueError(
                f"mlp='rank' gives ranks to the layers of MLPs: expected some among the modules to compress, found "
                f"MLPs as wholes, {some_of(sites)}. Name their layers too, or choose mlp='width'."
            )
        return layers
    known = {path for site in sites.values() if site.kind == "mlp" for path in site.dense_modules()}
    return {name: site for name, site in sites.items() if mlp == "mixed" or name not in known}
