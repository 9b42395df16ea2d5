"""One artefact for any budget: a dense model with the moments from which every smaller one is made, without images."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import check, finite, listed, make_document, open_document
from ..closed_forms.width import HiddenUnits
from ..configs import RankPlan
from ..errors import InvalidValueError
from ..hub import read_json, resolve_file, write_json_atomic
from ..modeling import apply_ranks, unwrapped
from ..modeling.layout import LAYOUTS, make_plain
from ..native import attach_plan, load_model
from .budget.allocation import allocate, check_allocation
from .budget.budget import METRICS, find_budget, prepare_sites
from .calibration.moments import Statistics
from .calibration.statistics import collect_statistics
from .request import Request, check_merged, sites_by_way


__all__ = ["ELASTIC_NAME", "Elastic"]

ELASTIC_NAME = "comcat_elastic.json"

_FORMAT, _VERSION = "comcat_elastic", 1
_FIELDS = {
    "low": finite(0, 1),
    "high": finite(0, 1),
    "scope": listed("model", "attention", "mlp"),
    "metric": listed(*METRICS),
    "layout": listed(*LAYOUTS),
}


class Elastic:
    """A dense model and the moments of its activations: a compressed model of any reduction in a range, in seconds.

    Ranks and widths come from the curvature, and the factors are the closed forms of the moments, as from
    `compress(model, reduction, statistics=statistics)`. What all reductions have in common is computed once: the
    singular bases of the products, and the order of each MLP's hidden units. No images are needed, so blocks are not
    fitted to one another (`compensate`); `refine` helps where there are images.

    Attributes:
        dense: the dense model.
        statistics: moments and curvature.
        low, high: the least and the largest reduction.
        model: the compressed model of the last [`set_reduction`]; `None` before.
    """

    def __init__(
        self,
        dense: nn.Module,
        statistics: Statistics,
        low: float,
        high: float,
        *,
        scope: str = "model",
        metric: str = "params",
        layout: str = "free",
    ) -> None:
        """Prepare what all reductions have in common.

        Raises:
            InvalidValueError: no range, or statistics without curvature or of another model.
            BudgetError: the largest reduction is out of reach.
        """
        self.dense = dense = unwrapped(dense)
        check_merged(dense)
        if not all(isinstance(share, (int, float)) for share in (low, high)) or not 0 < low < high < 1:
            raise InvalidValueError(
                f"elastic: expected two shares between 0 and 1, the smaller first, such as (0.3, 0.7), got "
                f"{(low, high)!r}."
            )
        if not getattr(statistics, "has_curvature", False):
            raise InvalidValueError(
                "elastic: expected statistics with curvature, found none. Gather them with "
                "collect_statistics(model, batches, curvature=True), or give batches."
            )
        self.statistics, self.low, self.high, self.model = statistics, low, high, None
        data = {"statistics": statistics}
        how = {"scope": scope, "metric": metric, "layout": layout}
        self._request = Request.of(dense, None, None, data, strategy="curvature", mlp="width", **how)
        check_allocation(self._request, high, None)
        self._sites = self._request.find_sites(dense)
        sites = sites_by_way(self._sites, "width")
        statistics.check_model(dense, sites, self._sites)
        budget, _ = find_budget(dense, sites, high, METRICS[metric], self._request)
        prepared = prepare_sites(budget.options, statistics)
        self._prepared = {
            sites[name].moments_path: found.with_products(sites[name].output_layer[1].weight.detach())
            if isinstance(found, HiddenUnits)
            else found
            for name, found in prepared.items()
        }

    @classmethod
    def of(
        cls,
        model: nn.Module,
        shares: Any,
        *,
        batches: Iterable[Any] | None = None,
        statistics: Statistics | None = None,
        progress: bool | None = None,
        scope: str = "model",
        **how: Any,
    ) -> "Elastic":
        """Gather the statistics, where none are given, and prepare; `how` are `metric` and `layout`.

        `shares` are the least and the largest reduction.
        """
        if not isinstance(shares, (tuple, list)) or len(shares) != 2:
            raise InvalidValueError(f"elastic: expected two shares, such as (0.3, 0.7), got {shares!r}.")
        if statistics is None:
            if batches is None:
                raise InvalidValueError("elastic: expected batches, or statistics with curvature; found neither.")
            statistics = collect_statistics(
                model, batches, scope=scope, curvature=True, mlp="width", progress=progress
            )
        return cls(model, statistics, *shares, scope=scope, **how)

    def plan(self, reduction: float) -> RankPlan:
        """The rank plan of a reduction.

        Raises:
            InvalidValueError: a reduction outside of the range.
            BudgetError: in the plain layout, a reduction that no equal widths reach.
        """
        check(reduction, finite(), "reduction")
        if not self.low <= reduction <= self.high:
            raise InvalidValueError(
                f"reduction: expected a share from {self.low} to {self.high}, the range that this elastic model was "
                f"made for, got {reduction}. Make it again with another elastic=."
            )
        data = {"statistics": self.statistics, "batches": None, "sensitivities": None}
        return allocate(self.dense, self._sites, reduction, self._request, data, None, None, False)

    def set_reduction(self, reduction: float) -> nn.Module:
        """Make the compressed model of a reduction and keep it as `model`; errors are those of [`plan`]."""
        plan = self.plan(reduction)
        small = copy.deepcopy(self.dense)
        apply_ranks(small, plan.ranks, statistics=self._prepared)
        if plan.layout == "plain":
            make_plain(small, self.dense, plan.ranks)
        self.model = attach_plan(small, plan)
        return self.model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the dense model, its statistics and the range into a folder; `kwargs` are those of the model."""
        folder = Path(save_directory)
        self.dense.save_pretrained(folder, **kwargs)
        self.statistics.save_pretrained(folder)
        request = self._request
        fields = {"low": self.low, "high": self.high, "scope": request.scope, "metric": request.metric}
        write_json_atomic(folder / ELASTIC_NAME, make_document(_FORMAT, _VERSION, fields | {"layout": request.layout}))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, reduction: float | None = None, **kwargs: Any
    ) -> "Elastic":
        """Read what [`save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path: folder, or repository on the Hub.
            reduction: for `model`, if given.
            **kwargs: `revision`, `token` and others of a download.

        Raises:
            CheckpointError: no such folder or repository, or damaged files.
        """
        path = resolve_file(pretrained_model_name_or_path, ELASTIC_NAME, **kwargs)
        fields = open_document(read_json(path), _FORMAT, _VERSION, _FIELDS, str(path), required=tuple(_FIELDS))
        statistics = Statistics.from_pretrained(pretrained_model_name_or_path, **kwargs)
        elastic = cls(load_model(pretrained_model_name_or_path), statistics, **fields)
        if reduction is not None:
            elastic.set_reduction(reduction)
        return elastic
