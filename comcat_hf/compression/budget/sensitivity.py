"""How much every rank moves a model's output, measured one site at a time."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check, optional, whole
from ...errors import InvalidValueError
from ...modeling import Site, measuring, replace_module, unwrapped
from ...modeling.filling import fill
from ...modeling.sites import block_of
from ...progress import progress_bar
from ..calibration.inputs import prepare_batch, read_batches, run_batch
from ..calibration.moments import Statistics
from ..calibration.outputs import Movement, main_output
from ..calibration.statistics import gather
from ..request import WAYS, Request, check_choice, sites_by_way
from .budget import (
    METRICS,
    Budget,
    Choice,
    Option,
    default_step,
    find_options,
    prepare_sites,
    sites_of,
)
from .solver import Solver, ranks_of, solve


__all__ = ["Sensitivities", "interpolate", "measure", "measure_sensitivities", "sensitivity"]

logger = logging.getLogger(__name__)

# Ranks that are measured per option; those between are interpolated.
MEASURED = 4

# Seconds of measuring above which the cost is said to everybody, not only to who listens.
_LONG = 300

# Below these an energy or a movement is rounding.
_NO_ENERGY = 1e-12
_NO_MOVEMENT = 1e-14

# Largest movement of the output, relative to its mean square, at which a run from a later block counts as the same.
_SAME = 1e-6

# Movement of the output by path and choice, then by rank.
Sensitivities = Mapping[tuple[str, str], Mapping[int, float]]


def sensitivity(
    budget: Budget,
    *,
    model: nn.Module,
    collect: Callable[..., Mapping[str, Any]],
    batches: Iterable[Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    sensitivities: Sensitivities | None = None,
    progress: bool | None = None,
    solver: Solver = solve,
    **_: Any,
) -> Choice:
    """The least sum of movements of the model's output, each site truncated alone."""
    if sensitivities is None or statistics is None:
        batches = read_batches(batches)
    if statistics is None:
        statistics = collect(model, batches)
    prepared = prepare_sites(budget.options, statistics)
    if sensitivities is None:
        sensitivities = measure(model, budget.options, budget.step, batches, prepared, progress=progress)
    _check_measured(budget, sensitivities)
    energies = {option: option.discarded(prepared[option.site.name]) for option in budget.options}
    return solver(budget, {o: interpolate(energies[o], sensitivities[o.site.name, o.choice]) for o in budget.options})


def measure_sensitivities(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    scope: str = "model",
    mlp: str = "width",
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    statistics: Statistics | None = None,
    step: int | None = None,
    progress: bool | None = None,
) -> Sensitivities:
    """Measure once how far the output moves when each site alone is truncated, for plans of several reductions.

    The costly part of `strategy="sensitivity"`: give the result to [`allocate_ranks`] as `sensitivities`.

    Args:
        model: a dense transformers model; it is left as it was.
        batches: calibration inputs, read once and kept: mappings, or tensors of the main input.
        scope, mlp, target_modules, exclude_modules, step: as for the plans; see [`allocate_ranks`].
        statistics: what [`collect_statistics`] returned for this model; gathered from the batches if not given.
        progress: show bars; by default where transformers shows its own.

    Returns:
        by path and choice (`"qk"`, `"vo"`, `"rank"`, `"width"`), the movement of the output at a few ranks: mean
        Kullback-Leibler divergence in nats for logits, else the mean squared difference relative to the mean square.

    Raises:
        InvalidValueError: an argument out of range, batches that are empty or do not fit the model, outputs that are
            not finite.
    """
    check_choice("mlp", mlp, WAYS)
    model = unwrapped(model)
    check(step, optional(whole(1)), "step")
    data = {"statistics": statistics}
    found = Request.of(model, target_modules, exclude_modules, data, scope=scope).find_sites(model)
    sites = sites_by_way(found, mlp)
    batches = read_batches(batches)
    if statistics is None:
        statistics = gather(model, batches, found.values(), scope, progress=progress)
    options = find_options(model, sites, METRICS["params"])
    statistics.check_model(model, sites_of(options), found)
    prepared = prepare_sites(options, statistics)
    return measure(model, options, step or default_step(sites), batches, prepared, progress=progress)


@torch.no_grad()
def measure(
    model: nn.Module,
    options: Sequence[Option],
    step: int,
    batches: Sequence[Any],
    prepared: Mapping[str, Any] | None = None,
    *,
    progress: bool | None = None,
) -> Sensitivities:
    """Truncate one option at a time at a few ranks and measure how far the model's output moves ([`Movement`]).

    Blocks before the one that is truncated do not run again. Memory: the model's output and one block's output on all
    batches. The model is left as it was, also after an error.

    Args:
        model: the dense model.
        options: what there is to choose; ranks in multiples of `step`.
        batches: calibration inputs.
        prepared: by site, its moments as `Site.prepare` made them ready; without, the closed forms of the weights.
        progress: show bars; by default where transformers shows its own.

    Raises:
        InvalidValueError: batches that do not fit the model, outputs that are not finite.
    """
    ranks = {option: _measured_ranks(option, step) for option in options}
    count = sum(map(len, ranks.values()))
    result: dict[tuple[str, str], dict[int, float]] = {(option.site.name, option.choice): {} for option in options}
    with measuring(model), progress_bar(total=count, desc="Sensitivity", progress=progress) as bar:
        start = time.perf_counter()
        meter = _Meter(model, batches)
        _say_cost(options, count, len(batches), time.perf_counter() - start)
        for block, together in _by_block(options).items():
            with meter.starting_at(block):
                for option in together:
                    name, choice = option.site.name, option.choice
                    moments = (prepared or {}).get(name)
                    for rank in ranks[option]:
                        with _truncated(model, option.site, choice, rank, moments):
                            result[name, choice][rank] = meter.movement(f"{name}, {choice}, rank {rank}")
                        bar.update()
    return result


def _say_cost(options: Sequence[Option], count: int, batches: int, seconds: float) -> None:
    blocks = {block_of(option.site.moments_path) for option in options} - {None}
    logger.log(
        logging.WARNING if count * seconds > _LONG else logging.INFO,
        "Sensitivity: %d truncations of %d pairs and layers on %d batches: at most %d forward passes, most of them "
        "from a later block on; no more than about %s.",
        count,
        len(options),
        batches,
        # Besides: the dense model, what each block gives, and whether it serves.
        (count + 1 + len(blocks)) * batches + 1 + 2 * len(blocks),
        f"{count * seconds / 60:.0f} minutes" if count * seconds > 90 else f"{count * seconds:.0f} seconds",
    )


def _check_measured(budget: Budget, sensitivities: Sensitivities) -> None:
    missing = [o for o in budget.options if not sensitivities.get((o.site.name, o.choice))]
    if missing:
        raise InvalidValueError(
            f"The sensitivities lack {missing[0].site.name}, {missing[0].choice}"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ". Measure them on this model, with the scope and the mlp= of the plan."
        )
    for option in budget.options:
        for rank, moved in sensitivities[option.site.name, option.choice].items():
            number = isinstance(moved, int | float) and math.isfinite(moved)
            if type(rank) is not int or not 1 <= rank <= option.limit or not number:
                raise InvalidValueError(
                    f"The sensitivities of {option.site.name}, {option.choice}: expected ranks from 1 to "
                    f"{option.limit} with finite numbers, found {rank!r} with {moved!r}. Measure them again on this "
                    "model."
                )


def interpolate(energy: Tensor, measured: Mapping[int, float]) -> Tensor:
    """The movement at every rank, from that at a few ranks and the discarded energy at all; never increasing.

    Linear in logarithms between the measured ranks, proportional to the energy outside them.

    Args:
        energy: what each rank discards, `(limit + 1,)`, 0 at the limit.
        measured: movement by rank.
    """
    if not measured:
        return torch.zeros_like(energy)
    known = torch.tensor(sorted(measured))
    moved = torch.tensor([measured[int(rank)] for rank in known], dtype=torch.float64)
    # A larger rank that moves the output more is chance.
    moved = moved.flip(0).cummax(0).values.flip(0).clamp(min=_NO_MOVEMENT).log()
    log = energy.clamp(min=_NO_ENERGY).log()
    every = torch.arange(len(energy))
    high = torch.searchsorted(known, every).clamp(1, len(known) - 1) if len(known) > 1 else torch.zeros_like(every)
    low = (high - 1).clamp(min=0)
    span = log[known[low]] - log[known[high]]
    share = torch.where(span > 0, (log[known[low]] - log) / span.clamp(min=1e-9), 1.0).clamp(0, 1)
    result = moved[low] + share * (moved[high] - moved[low])
    result = torch.where(every < known[0], moved[0] + log - log[known[0]], result)
    result = torch.where(every > known[-1], moved[-1] + log - log[known[-1]], result).exp()
    result[-1] = 0
    return result


class _Meter:
    """Runs a model on all batches and compares with what it gave before anything was truncated."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.model, self.batches = model, batches
        self.current = 0
        self.kept: list[Any] = []
        self.skipped: tuple[str, ...] = ()
        self.expected: list[dict[str, Tensor]] = []
        self.expected = [main_output(output) for output, _ in self._outputs(range(len(batches)))]
        if not all(value.isfinite().all() for outputs in self.expected for value in outputs.values()):
            raise InvalidValueError(
                f"The output of {type(self.model).__name__} is not finite on the calibration batches. Check the "
                "inputs and the weights."
            )
        if self._movement([0]) > _SAME:
            logger.warning(
                "%s gives another output when it runs again on the same batch, so what truncation does cannot be told "
                "from chance. Give the batches what makes it repeatable.",
                type(model).__name__,
            )

    def movement(self, what: str) -> float:
        """How far the output lies from what is expected; errors name `what` was done."""
        moved = self._movement(range(len(self.batches)))
        if not moved < float("inf"):
            raise InvalidValueError(
                f"The output of {type(self.model).__name__} is not finite with {what}. In half precision measure on a "
                "copy in float32 and pass the plan on."
            )
        return moved

    @contextmanager
    def starting_at(self, block: str | None) -> Iterator[None]:
        """Within it the blocks before this one give what they gave before, where the model allows that."""
        before = _blocks_before(self.model, block)
        if before:
            self.kept, self.skipped = self._record(before[-1]), before
            # Twice: the first run may change what is kept, in place.
            if max(self._movement([0]) for _ in range(2)) > _SAME:
                self.kept, self.skipped = [], ()
        else:
            self.kept, self.skipped = [], ()
        yield

    def _record(self, block: str) -> list[Any]:
        seen: list[Any] = []
        # What was kept for the block before serves as far as it goes.
        usable = self.skipped and set(self.skipped) < set(_blocks_before(self.model, block)) | {block}
        if not usable:
            self.kept, self.skipped = [], ()
        for _ in self._outputs(range(len(self.batches)), watch=(block, seen)):
            pass
        return seen

    def _movement(self, which: Iterable[int]) -> float:
        movement = Movement(self.model)
        for index, (output, mask) in zip(which, self._outputs(which), strict=True):
            movement.add(self.expected[index], main_output(output), mask)
        return movement.total()

    def _outputs(self, which: Iterable[int], watch: tuple[str, list] | None = None) -> Iterator[tuple[Any, Any]]:
        device = next(self.model.parameters()).device
        with ExitStack() as stack:
            for path in self.skipped:
                stack.enter_context(_answering(self.model.get_submodule(path), lambda: self.kept[self.current]))
            for index in which:
                self.current = index
                inputs = prepare_batch(self.model, self.batches[index], index, device)
                with _watching(self.model, watch):
                    output = run_batch(self.model, inputs, index)
                mask = inputs.get("attention_mask")
                yield output, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@contextmanager
def _answering(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """Within it a module returns what `answer` gives, whatever it is called with."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: answer()
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _watching(model: nn.Module, watch: tuple[str, list] | None) -> Iterator[None]:
    if watch is None:
        yield
        return
    path, seen = watch
    last: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: last.append(output))
    try:
        yield
    finally:
        handle.remove()
    seen.append(last[-1] if last else None)


@contextmanager
def _truncated(model: nn.Module, site: Site, choice: str, rank: int, moments: Any | None) -> Iterator[None]:
    """Within it one choice of a site has this rank."""
    substitutes = site.substitutes({choice: rank})
    fill(site, substitutes, moments)
    dense = site.dense_modules()
    try:
        for path, substitute in substitutes.items():
            replace_module(model, dense[path], substitute)
        yield
    finally:
        for path, substitute in substitutes.items():
            replace_module(model, substitute, dense[path])


def _measured_ranks(option: Option, step: int) -> list[int]:
    ranks = ranks_of(option, step) or list(range(1, option.limit))
    last = len(ranks) - 1
    return sorted({ranks[round(last * i / (MEASURED - 1))] for i in range(MEASURED)}) if ranks else []


def _by_block(options: Iterable[Option]) -> dict[str | None, list[Option]]:
    """Options by block, blocks of one list in order, so that what one gave serves the next."""
    found: dict[str | None, list[Option]] = {}
    for option in options:
        found.setdefault(block_of(option.site.moments_path), []).append(option)
    return dict(sorted(found.items(), key=lambda item: _position(item[0])))


def _position(block: str | None) -> tuple[str, int]:
    parent, _, index = (block or "").rpartition(".")
    return parent, int(index) if index else -1


def _blocks_before(model: nn.Module, block: str | None) -> tuple[str, ...]:
    parent, index = _position(block)
    names = {name for name, _ in model.get_submodule(parent).named_children()} if index > 0 else set()
    return tuple(f"{parent}.{i}".removeprefix(".") for i in range(index) if str(i) in names)
