"""The paper's differentiable rank search (COMCAT, arXiv 2305.17235).

Every option has candidate ranks with Gumbel-softmax weights. The paper evaluates each candidate as a dense product;
here one forward of a [`NestedModel`] has the value and the gradients of that mixture (docs/method.md).
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, Subset

from ...checks import TEXT, Kind, above, check, check_fields, finite, list_of, optional, shown, whole
from ...configs import RankPlan
from ...errors import CheckpointError, ComCATError, InvalidValueError
from ...modeling import unwrapped
from ...progress import progress_bar
from ...tensor_files import read_saved, write_saved
from ..budget.allocation import check_ask, finish_plan
from ..budget.budget import METRICS, Budget, entries, find_budget
from ..calibration.moments import Statistics
from ..distillation import DistillationLoss, ask_teacher, check_labels
from ..request import Request, sites_by_way
from .nested import Candidates, Key, NestedModel


__all__ = ["SearchState", "search_ranks", "split_for_search"]

_EPOCHS = 5

_TWO_TEMPERATURES = Kind(
    "two finite numbers above 0",
    lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(above(0).holds, value)),
)

_TENSOR = optional(
    Kind("a tensor of finite numbers", lambda value: isinstance(value, Tensor) and bool(value.isfinite().all()))
)
_TENSORS = ("logits", "exp_avg", "exp_avg_sq")
_FIELDS = {
    "step": whole(),
    "names": list_of(TEXT),
    "candidates": list_of(list_of(whole())),
    **dict.fromkeys((*_TENSORS, "generator"), _TENSOR),
}


@dataclass
class SearchState:
    """Where a search stands; `search_ranks` fills it in place after every step.

    Attributes:
        step: steps done.
        names: `"site:choice"` of every option, in the order of the rows below.
        candidates: the ranks of every option; 0 stands for the dense weights.
        logits, exp_avg, exp_avg_sq: `(options, candidates)`, the logits and AdamW's moments; rows are padded.
        generator: state of the generator of the Gumbel noise.
    """

    step: int = 0
    names: list[str] = field(default_factory=list)
    candidates: list[list[int]] = field(default_factory=list)
    logits: Tensor | None = None
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    generator: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors only: `torch.save` it, and `torch.load` it with `weights_only=True`."""
        return copy.deepcopy({f.name: getattr(self, f.name) for f in fields(self)})

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what [`state_dict`] returned.

        Raises:
            InvalidValueError: other fields, or such as do not belong together.
        """
        if not isinstance(content, Mapping) or set(content) != set(_FIELDS):
            raise InvalidValueError(
                f"The state of a search has the fields {', '.join(_FIELDS)}, got {shown(content)}. Load what "
                "SearchState.state_dict() returned."
            )
        check_fields(content, _FIELDS, "The state of a search")
        _check_tensors(content)
        for name, value in content.items():
            setattr(self, name, copy.deepcopy(value))

    def begin(self, candidates: Candidates, seed: int) -> None:
        """Fill this state if it is empty, or see that it fits.

        Raises:
            InvalidValueError: the state of another search.
        """
        names, ranks = candidates.names(), [[rank or 0 for rank in row] for row in candidates.ranks]
        if self.logits is None:
            self.names, self.candidates = names, ranks
            self.logits, self.exp_avg, self.exp_avg_sq = (torch.zeros(candidates.padding.shape) for _ in range(3))
            self.generator = torch.Generator().manual_seed(seed).get_state()
        elif (self.names, self.candidates) != (names, ranks):
            raise InvalidValueError(
                f"The state is of another search: it has {len(self.names)} options and this one {len(names)}, or "
                "their candidate ranks differ. Give the model, scope, metric and step it was begun with."
            )

    def save(self, path: str | Path) -> None:
        """Write a file, under a temporary name first."""
        write_saved(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "SearchState":
        """Read what [`save`] wrote; nothing but numbers, strings and tensors is unpickled.

        Raises:
            CheckpointError: no such file, or no state of a search.
        """
        state = cls()
        try:
            state.load_state_dict(read_saved(path, "the state of a search"))
        except InvalidValueError as error:
            raise CheckpointError(f"{path}: {error} Give what SearchState.save wrote.") from error
        return state

    def probabilities(self) -> dict[str, dict[int, float]]:
        """How likely every candidate of every option is now; 0 stands for the dense weights."""
        rows = zip(self.names, self.candidates, [] if self.logits is None else self.logits, strict=True)
        return {
            name: dict(zip(ranks, row[: len(ranks)].softmax(0).tolist(), strict=True)) for name, ranks, row in rows
        }


def _check_tensors(content: Mapping[str, Any]) -> None:
    """Raise InvalidValueError if the tensors of a state are not those of its options."""
    names, rows = content["names"], content["candidates"]
    shape = (len(names), max(map(len, rows), default=0))
    tensors, generator = [content[name] for name in _TENSORS], content["generator"]
    if not any((content["step"], names, rows, generator is not None, *(tensor is not None for tensor in tensors))):
        return
    fits = len(rows) == len(names) and all(t is not None and t.dtype == torch.float32 for t in tensors)
    fits = fits and generator is not None and all(tensor.shape == shape for tensor in tensors)
    try:
        torch.Generator().set_state(generator if fits else torch.empty(0))
    except (RuntimeError, TypeError) as error:
        raise InvalidValueError(
            f"The state of a search: expected names, candidates and tensors of {shape[0]} options with at most "
            f"{shape[1]} candidates each and the state of a generator, got others."
        ) from error


def split_for_search(dataset: Dataset, share: float = 0.1, seed: int = 0) -> tuple[Subset, Subset]:
    """Cut a search split from a *training* set.

    Args:
        dataset: training data with a length. Never validation data: ranks chosen on it flatter its accuracy.
        share: of the samples to search on, 0 to 1, both excluded.
        seed: of the permutation.

    Returns:
        the search split, and the rest to train on.

    Raises:
        InvalidValueError: a share out of range, or one that leaves either part empty.
    """
    if not 0 < share < 1:
        raise InvalidValueError(f"share must be between 0 and 1, both excluded, got {share!r}.")
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise InvalidValueError(f"A share of {share} of {len(dataset)} samples leaves one part empty.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[:count])), Subset(dataset, sorted(order[count:]))


def search_ranks(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    reduction: float,
    *,
    scope: str = "model",
    metric: str = "params",
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    teacher: nn.Module | None = None,
    loss: DistillationLoss | None = None,
    beta: float = 1.5,
    learning_rate: float = 1e-2,
    weight_decay: float = 5e-4,
    temperature: tuple[float, float] = (5.0, 0.1),
    statistics: Statistics | None = None,
    step: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    state: SearchState | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> RankPlan:
    """Learn the ranks by gradient descent on Gumbel-softmax weights of candidates (COMCAT, arXiv 2305.17235).

    Only the logits learn; the weights stay. The loss is multiplied by `(cost / target) ** beta` while the expected
    cost is over target. The plan takes the most likely ranks that meet the budget. Interrupted and called again with
    the same arguments and its `state`, a search goes on as if nothing had happened; a loader that shuffles with
    torch's global generator is replayed.

    Args:
        model: a dense classifier; it is not changed.
        loader: batches of model inputs and `"labels"`, of training data (see [`split_for_search`]); processes share a
            `DataLoader`.
        reduction, scope, metric, target_modules, exclude_modules, step, inputs: as in [`allocate_ranks`].
        steps, epochs: how long to search; give one. By default 5 epochs.
        teacher: a model to learn from as well.
        loss: by default `DistillationLoss()` with a teacher, and cross entropy without.
        beta: exponent of the penalty.
        learning_rate, weight_decay: of AdamW.
        temperature: at the first and the last step, exponential between.
        statistics: what `collect_statistics` returned, for factors fitted to activations.
        accelerator: by default `Accelerator()`; every process needs the same `seed` and `state`.
        state: filled in place, see [`SearchState`].
        seed: of noise and order.
        progress: show a bar on the main process; by default where transformers shows its own.

    Returns:
        a plan that removes at least `reduction` and at most 0.005 more, counted on the built model; the same on every
        process.

    Raises:
        InvalidValueError: an argument out of range, no batch, a batch without labels, the state of another search.
        BudgetError: a reduction out of reach.
        ComCATError: gradients that are not finite.
    """
    check_ask(reduction, metric, step)
    check(learning_rate, above(0), "learning_rate")
    check(temperature, _TWO_TEMPERATURES, "temperature")
    check(beta, finite(0), "beta")
    check(weight_decay, finite(0), "weight_decay")
    if steps is not None and epochs is not None:
        raise InvalidValueError(f"Give either steps or epochs, got steps={steps!r} and epochs={epochs!r}.")
    check(steps, optional(whole(1)), "steps")
    check(epochs, optional(whole(1)), "epochs")
    check(seed, whole(), "seed")
    loss = loss or DistillationLoss(alpha=0.0 if teacher is None else 0.5)
    if loss.needs_teacher and teacher is None:
        raise InvalidValueError("The loss needs a teacher, got None. Pass one, or DistillationLoss(alpha=0).")
    model = unwrapped(model)
    asked: dict[str, Any] = {"scope": scope, "metric": metric, "strategy": "search", "step": step}
    request = Request.of(model, target_modules, exclude_modules, {"statistics": statistics}, **asked)
    sites = sites_by_way(request.find_sites(model), request.mlp)
    budget, count = find_budget(model, sites, reduction, METRICS[metric], request, inputs)
    candidates = Candidates(budget)

    accelerator = accelerator or Accelerator()
    if isinstance(loader, DataLoader):
        loader = accelerator.prepare_data_loader(loader)
    steps = _length(loader, epochs or _EPOCHS) if steps is None else steps
    state = SearchState() if state is None else state
    state.begin(candidates, seed)
    nested = NestedModel(model, [(o.site.name, o.choice) for o in budget.options], statistics)
    nested.model.to(accelerator.device)
    teacher = None if teacher is None else teacher.to(accelerator.device)
    search = _Search(accelerator, nested, candidates, budget, loss, teacher, beta, temperature, steps)
    search.run(loader, state, learning_rate, weight_decay, seed, progress)
    return finish_plan(model, entries(sites, candidates.choose(state.logits)), count, budget.total, reduction, request)


@dataclass(frozen=True)
class _Search:
    """What a step needs."""

    accelerator: Accelerator
    nested: NestedModel
    candidates: Candidates
    budget: Budget
    loss: DistillationLoss
    teacher: nn.Module | None
    beta: float
    temperature: tuple[float, float]
    steps: int

    def run(
        self,
        loader: Iterable[Any],
        state: SearchState,
        learning_rate: float,
        decay: float,
        seed: int,
        progress: bool | None,
    ) -> None:
        logits = nn.Parameter(state.logits.clone())
        optimizer = AdamW([logits], lr=learning_rate, weight_decay=decay)
        generator = torch.Generator()
        generator.set_state(state.generator)
        if state.step:
            moments = {"exp_avg": state.exp_avg.clone(), "exp_avg_sq": state.exp_avg_sq.clone()}
            optimizer.state[logits] = {"step": torch.tensor(float(state.step)), **moments}
        shown = progress if self.accelerator.is_main_process else False
        bar = progress_bar(total=self.steps, initial=state.step, desc="Rank search", unit="step", progress=shown)
        with bar, torch.random.fork_rng(devices=[]):
            for batch in _batches(loader, state.step, self.steps, seed):
                cost = self.step(batch, state.step, logits, optimizer, generator)
                moments = optimizer.state[logits]
                state.logits, state.generator = logits.detach().clone(), generator.get_state()
                state.exp_avg, state.exp_avg_sq = moments["exp_avg"].clone(), moments["exp_avg_sq"].clone()
                state.step += 1
                bar.update()
                bar.set_postfix({"removed": f"{1 - cost:.3f}"}, refresh=False)

    def step(
        self, batch: Any, index: int, logits: nn.Parameter, optimizer: AdamW, generator: torch.Generator
    ) -> float:
        """Learn from one batch; returns the expected cost as a share of the whole."""
        check_labels(batch)
        done = index / max(self.steps - 1, 1)
        noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
        first, last = self.temperature
        mixture = self.candidates.mix(logits, noise, first * (last / first) ** done)
        cost = self.candidates.cost(mixture)
        scales = self.candidates.scales(mixture, self.nested.sizes)
        packed = torch.cat(list(scales.values())).to(self.accelerator.device)
        scales = dict(zip(scales, packed.split([len(scale) for scale in scales.values()]), strict=True))
        total = self._loss(send_to_device(batch, self.accelerator.device), scales, done)
        target = 1 - self.budget.asked / self.budget.total
        (total * (cost / target).clamp(min=1).pow(self.beta).to(total)).backward()
        logits.grad = self.accelerator.reduce(logits.grad.to(packed.device), reduction="mean").to(logits.device)
        if not logits.grad.isfinite().all():
            raise ComCATError(
                f"The gradients of search step {index} are not finite. Check the inputs and the weights."
            )
        optimizer.step()
        optimizer.zero_grad()
        return cost.item()

    def _loss(self, batch: Mapping[str, Any], scales: Mapping[Key, Tensor], done: float) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.loss.needs_hidden_states:
            inputs["output_hidden_states"] = True
        taught = ask_teacher(self.teacher, inputs) if self.loss.needs_teacher else None
        with self.accelerator.autocast():
            output = self.nested(scales, **inputs)
        return self.loss(output, taught, batch["labels"], done).total


def _batches(loader: Iterable[Any], done: int, steps: int, seed: int) -> Iterator[Any]:
    """The batches after those that are done; every epoch in an order of its own, the same whenever it is replayed."""
    index, epoch = 0, 0
    while done < steps and index < steps:
        before = index
        torch.default_generator.manual_seed(seed + epoch)
        for batch in loader:
            if index >= steps:
                return
            if index >= done:
                yield batch
            index += 1
        if index == before:
            raise InvalidValueError("The loader is empty: expected at least one batch, or one that can be read again.")
        epoch += 1


def _length(loader: Any, epochs: int) -> int:
    if not isinstance(loader, Sized) or len(loader) == 0:
        raise InvalidValueError(
            f"The loader must have a length above 0, or steps must be given; got {type(loader).__name__}. "
            "Use a DataLoader over a data set with a length, or a list of batches."
        )
    return epochs * len(loader)
