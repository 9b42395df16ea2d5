"""One artefact for any budget: a dense model with the moments from which every smaller one is made, without images."""

import copy
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..checks import check, finite, listed, make_document, open_document
from ..closed_forms.width import HiddenUnits
from ..configs import RankPlan
from ..errors import InvalidValueError
from ..hub import push_folder, read_json, resolve_file, write_json_atomic
from ..modeling import apply_ranks, unwrapped
from ..modeling.layout import LAYOUTS, make_plain
from ..native import attach_plan, is_native, load_model
from .budget.allocation import allocate, check_ask
from .budget.budget import METRICS, find_budget, prepare_sites
from .calibration.curvature import gather_curvature
from .calibration.inputs import read_batches
from .calibration.moments import Statistics
from .calibration.statistics import gather
from .request import Request, check_data, check_merged, sites_by_way


__all__ = ["ELASTIC_NAME", "Elastic"]

ELASTIC_NAME = "comcat_elastic.json"

_OF_THE_HUB = ("allow_patterns", "commit_message", "create_pr", "ignore_patterns", "private", "revision", "token")
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
        statistics: Statistics | None,
        low: float,
        high: float,
        *,
        batches: Iterable[Any] | None = None,
        progress: bool | None = None,
        scope: str = "model",
        metric: str = "params",
        layout: str = "free",
    ) -> None:
        """Prepare what all reductions have in common; what needs no statistics comes first.

        `batches` serve for the statistics, or for their curvature, where there is none.

        Raises:
            InvalidValueError: no range, or statistics without curvature or of another model.
            BudgetError: the largest reduction is out of reach.
        """
        self.dense, self.low, self.high, self.model = unwrapped(dense), low, high, None
        check_merged(self.dense)
        if not all(isinstance(share, (int, float)) for share in (low, high)) or not 0 < low < high < 1:
            raise InvalidValueError(
                f"elastic: expected two shares between 0 and 1, the smaller first, such as (0.3, 0.7), got "
                f"{(low, high)!r}."
            )
        check_ask(high, metric, None)
        how: dict[str, Any] = {"scope": scope, "metric": metric, "layout": layout}
        self._request = Request(strategy="curvature", mlp="width", statistics=True, curvature=True, **how)
        self._sites = self._request.find_sites(self.dense)
        sites = sites_by_way(self._sites, "width")
        budget, _ = find_budget(self.dense, sites, high, METRICS[metric], self._request)
        check_data({"statistics": statistics})
        if batches is not None and (statistics is None or not statistics.has_curvature):
            batches = read_batches(batches)
            if statistics is None:
                statistics = gather(self.dense, batches, self._sites.values(), scope, progress=progress)
            statistics.check_model(self.dense, sites, self._sites)
            statistics = gather_curvature(self.dense, batches, sites.values(), statistics, progress=progress)
        if statistics is None or not statistics.has_curvature:
            raise InvalidValueError(
                "elastic: expected statistics with curvature, found none. Gather them with "
                "collect_statistics(model, batches, curvature=True), or give batches."
            )
        statistics.check_model(self.dense, sites, self._sites)
        self.statistics = statistics
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
        **how: Any,
    ) -> "Elastic":
        """Prepare with the least and the largest reduction as one value; `how` is the rest of the arguments."""
        if not isinstance(shares, (tuple, list)) or len(shares) != 2:
            raise InvalidValueError(f"elastic: expected two shares, such as (0.3, 0.7), got {shares!r}.")
        if statistics is None and batches is None:
            raise InvalidValueError("elastic: expected batches, or statistics with curvature; found neither.")
        return cls(model, statistics, *shares, batches=batches, **how)

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
        self.model = attach_plan(small, plan) if is_native(small) else small
        return self.model

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Write the dense model, its statistics and the range into a folder.

        Args:
            save_directory: the folder.
            push_to_hub: upload the folder afterwards.
            repo_id: where to; by default the name of the folder.
            **kwargs: those of the model's `save_pretrained`, and of [`push_folder`].
        """
        if not is_native(self.dense):
            raise InvalidValueError(
                f"Elastic.save_pretrained: expected a model of transformers or diffusers, which has a format for it, "
                f"found {type(self.dense).__name__}. Keep its weights and `statistics` yourself."
            )
        folder = Path(save_directory)
        hub = {key: kwargs.pop(key) for key in _OF_THE_HUB if key in kwargs}
        # Without its range the folder is none of ours, until all of it is written.
        (folder / ELASTIC_NAME).unlink(missing_ok=True)
        self.dense.save_pretrained(folder, **kwargs)
        self.statistics.save_pretrained(folder)
        request = self._request
        fields = {"low": self.low, "high": self.high, "scope": request.scope, "metric": request.metric}
        write_json_atomic(folder / ELASTIC_NAME, make_document(_FORMAT, _VERSION, fields | {"layout": request.layout}))
        if push_to_hub:
            push_folder(folder, repo_id or folder.resolve().name, **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what [`save_pretrained`] writes; `kwargs` and the result are those of [`push_folder`]."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, reduction: float | None = None, **kwargs: Any
    ) -> "Elastic":
        """Read what [`save_pretrained`] wrote.

        Args:
            pretrained_model_name_or_path: folder, or repository on the Hub.
            reduction: for `model`, if given.
            **kwargs: `revision`, `token`, `cache_dir`, `subfolder` and `local_files_only`, as elsewhere on the Hub.

        Raises:
            CheckpointError: no such folder or repository, or damaged files.
        """
        path = resolve_file(pretrained_model_name_or_path, ELASTIC_NAME, **kwargs)
        fields = open_document(read_json(path), _FORMAT, _VERSION, _FIELDS, str(path), required=tuple(_FIELDS))
        statistics = Statistics.from_pretrained(pretrained_model_name_or_path, **kwargs)
        elastic = cls(load_model(pretrained_model_name_or_path, **kwargs), statistics, **fields)
        if reduction is not None:
            elastic.set_reduction(reduction)
        return elastic
