"""Curvature of a model's output at its sites, from one backward pass over the calibration batches."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...closed_forms.curvature import basis_movement, head_gradients, pair_movement, width_movement
from ...closed_forms.linear import linear_basis
from ...closed_forms.roots import gram
from ...closed_forms.width import output_factors
from ...errors import InvalidValueError, brief
from ...modeling import AttentionSite, LinearSite, MLPSite, Site, measuring
from ...progress import progress_bar
from .inputs import all_counts, cut_batch, main_input, prepare_batch, run_batch
from .moments import Statistics, Sums
from .outputs import main_output
from .probes import Probe


__all__ = ["NoGradientsError", "gather_curvature", "movements"]

# Shares of an MLP's hidden units at which its movement is taken; widths between are interpolated.
_WIDTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)

# Activations are held of so many samples at a time, or of fewer whose inputs have so many numbers: four images of
# 224 x 224.
_SAMPLES, _NUMBERS = 16, 4 * 3 * 224 * 224


class NoGradientsError(InvalidValueError):
    """A model whose output has no gradients with respect to its activations."""


def gather_curvature(
    model: nn.Module,
    batches: Iterable[Any],
    sites: Iterable[Site],
    statistics: Statistics,
    *,
    progress: bool | None = None,
    accelerator: Any | None = None,
) -> Statistics:
    """The statistics with the curvature of the model's output at these sites (docs/method.md).

    One forward and one backward pass to activations alone. Kept are, per attention, `4 H p^2` numbers for the metric
    and the movement of the output at every rank; per linear layer and MLP `d_out^2` and the movement at every rank, or
    at a few widths. While it runs, of every MLP its refitted output factors at these widths.

    Args:
        model: dense; left as it was.
        batches: calibration inputs, read once.
        sites: those of the model, with statistics.
        statistics: of the sites; their head maps, bases and orders of units are those whose truncation is weighed.
        progress, accelerator: see [`collect_statistics`].

    Raises:
        NoGradientsError: a model without a backward pass, in float16, or made in inference mode.
        InvalidValueError: outputs or gradients that are not finite, batches that do not fit.
    """
    sites = list(sites)
    weights = next(model.parameters())
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise NoGradientsError(
            f"The curvature: expected a model with gradients, found {type(model).__name__} made in inference mode. "
            'Load it outside of torch.inference_mode(), or choose strategy="spectrum".'
        )
    if weights.dtype == torch.float16:
        raise NoGradientsError(
            "The curvature: expected a model in float32 or bfloat16, found float16, whose gradients underflow. Gather "
            'it on model.float(), or choose strategy="spectrum".'
        )
    probe = Probe(model, 0 if accelerator is None else accelerator.process_index)
    weight, error = 0.0, None
    with ExitStack() as stack:
        stack.enter_context(measuring(model))
        stack.enter_context(_differentiable(model))
        meters = [stack.enter_context(_metering(site, statistics[site.moments_path])) for site in sites]
        try:
            for index, batch in enumerate(progress_bar(batches, desc="Curvature", progress=progress)):
                inputs = prepare_batch(model, batch, index, weights.device)
                samples = len(inputs[main_input(model)])
                for part in cut_batch(inputs, main_input(model), math.ceil(samples / _most(inputs, samples))):
                    weight += _run(model, part, index, probe, meters)
        except Exception as caught:
            if accelerator is None:
                raise
            error = caught
    if accelerator is not None:
        (weight,) = all_counts(accelerator, [weight], error, "The curvature", weights.device)
        for meter in meters:
            meter.sums = accelerator.reduce(meter.sums, "sum")
    return _with_curvature(statistics, meters, weight)


def _run(model: nn.Module, inputs: Mapping[str, Any], index: int, probe: Probe, meters: Sequence["_Meter"]) -> float:
    output = main_output(run_batch(model, inputs, index))
    if not all(value.isfinite().all() for value in output.values()):
        raise InvalidValueError(
            f"The output of {type(model).__name__} is not finite on the calibration batches. Check the inputs and the "
            "weights."
        )
    mask = inputs.get("attention_mask")
    scalar, weight = probe(output, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    try:
        scalar.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise NoGradientsError(
            f"{type(model).__name__} has no backward pass here, which the curvature needs ({brief(error)}). Choose "
            'strategy="spectrum", or load the model without its kernels.'
        ) from error
    # Two towers may see different numbers of samples.
    counts = {len(value) for value in output.values()}
    for meter in meters:
        meter.close(counts)
    return weight


def movements(statistics: Statistics, site: Site, choice: str) -> dict[int, float]:
    """The movement of the output by truncating one choice of a site, by rank, or at a few widths.

    Raises:
        InvalidValueError: the statistics have no curvature there.
    """
    sums = statistics.sums.get(site.moments_path)
    moved = None if sums is None else sums.moved(choice)
    if moved is None:
        raise InvalidValueError(
            f"{site.name}, {choice}: expected statistics with its curvature, found none. Gather them with "
            "collect_statistics(model, batches, curvature=True), with the mlp= of the plan, or give batches."
        )
    ranks = _widths(site.full_ranks[choice]) if choice == "width" else range(len(moved))
    return {rank: value for rank, value in zip(ranks, moved.tolist(), strict=True) if rank}


def _widths(units: int) -> list[int]:
    return [max(round(share * units), 1) for share in _WIDTHS]


class _Meter(ABC):
    """Takes the states and gradients that pass one site."""

    def __init__(self, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.site = site
        device = site.output_layer[1].weight.device
        # What no gradient reaches does not move the output.
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self.held: dict[str, Tensor] = {}

    @abstractmethod
    def hooks(self) -> Iterator[Any]:
        """Handles of the hooks that call [`take`]."""

    @abstractmethod
    def take(self, name: str, states: Tensor, gradients: Tensor) -> None:
        """What one call gives; a module may be called several times."""

    def hold(self, name: str, value: Tensor) -> None:
        self.held[name] = self.held[name] + value if name in self.held else value

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] += value

    def close(self, counts: Collection[int]) -> None:
        """A batch of so many samples has ended: add them up."""
        for name, value in self.held.items():
            self.add(name, _by_sample(value, counts, self.site.name).double().square().sum(0))
        self.held = {}

    def _watch(self, states: Tensor, name: str, of: Callable[[Tensor], Tensor] = lambda states: states) -> Tensor:
        """The states, part of the graph from here on; [`take`] gets `of` them once there is a gradient."""
        states = states if states.requires_grad else states.detach().requires_grad_()
        kept = of(states.detach())
        states.register_hook(lambda gradient: self.take(name, kept, gradient.detach()))
        return states


class _AttentionMeter(_Meter):
    def __init__(self, site: AttentionSite, moments: Any) -> None:
        heads, size = site.view.num_heads, site.view.head_dim
        square = (heads, size, size)
        shapes = {"moved": (size + 1,), "left": square, "right": square}
        super().__init__(site, {f"{choice}_{name}": shapes[name] for choice in site.choices for name in shapes})
        self.view = site.view
        self.maps = {choice: site.maps(choice, moments) for choice in site.choices}
        self.mean = moments.attended_mean.flatten()

    def hooks(self) -> Iterator[Any]:
        view = self.view
        for stream in view.streams:
            if "qk" in self.maps:
                query = view.projection("query", stream)
                yield query.register_forward_hook(lambda module, args, output: self._watch(output, "qk"))
            if (output := view.projection("output", stream)) is not None:
                yield output.register_forward_pre_hook(
                    lambda module, args: (self._watch(args[0], "vo", self._centred), *args[1:])
                )

    def _centred(self, states: Tensor) -> Tensor:
        attended = self.view.attended(states)
        return attended - self.mean.to(attended)

    def take(self, name: str, states: Tensor, gradients: Tensor) -> None:
        if name == "vo":
            gradients = self.view.attended(gradients)
        self.hold(name, head_gradients(_three(states), _three(gradients), self.view.num_heads))

    def close(self, counts: Collection[int]) -> None:
        for name, value in self.held.items():
            found = _by_sample(value, counts, self.site.name)
            self.add(f"{name}_moved", pair_movement(found.double(), *self.maps[name]).square().sum(0))
            self.add(f"{name}_left", torch.einsum("bhij,bhkj->hik", found, found))
            self.add(f"{name}_right", torch.einsum("bhji,bhjk->hik", found, found))
        self.held = {}


class _OutputMeter(_Meter):
    """Watches the output of a layer."""

    def __init__(self, site: LinearSite | MLPSite, moved: str, count: int) -> None:
        self.layer = site.output_layer[1]
        super().__init__(site, {moved: (count,), "gradient": (self.layer.out_features,) * 2})

    def hooks(self) -> Iterator[Any]:
        yield self.layer.register_forward_hook(self._on_call)

    def _on_call(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self._watch(output, "output")

    def metric(self, gradients: Tensor) -> None:
        rows = gradients.float().flatten(0, -2)
        self.add("gradient", gram(rows))


class _LinearMeter(_OutputMeter):
    def __init__(self, site: LinearSite, moments: Any) -> None:
        super().__init__(site, "rank_moved", site.full_ranks["rank"] + 1)
        self.read, self.write = (side.float() for side in linear_basis(site.linear.weight, moments=moments))
        bias = site.linear.bias
        mean = moments.mean.to(site.linear.weight)
        self.mean = torch.nn.functional.linear(mean, site.linear.weight, bias).detach().float()

    def take(self, name: str, states: Tensor, gradients: Tensor) -> None:
        outputs, gradients = _three(states).float() - self.mean, _three(gradients).float()
        self.hold("rank_moved", basis_movement(outputs, gradients, self.write, self.read))
        self.metric(gradients)


class _MLPMeter(_OutputMeter):
    def __init__(self, site: MLPSite, moments: Any) -> None:
        super().__init__(site, "width_moved", len(_WIDTHS))
        units = site.prepare(moments, max(_widths(site.view.width)))
        # Not the units themselves, which hold their covariance.
        self.order = units.order
        self.mean = moments.mean.to(self.layer.weight)
        self.factors = output_factors(self.layer.weight, units, _widths(site.view.width))

    def _on_call(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        hidden = args[0].detach() - self.mean
        return self._watch(output, "output", lambda states: hidden)

    def take(self, name: str, states: Tensor, gradients: Tensor) -> None:
        states, gradients = _three(states).float(), _three(gradients).float()
        weight = self.layer.weight.detach().float()
        moved = [
            width_movement(hidden.mT @ gradient, self.order, self.factors, weight)
            for hidden, gradient in zip(states, gradients, strict=True)
        ]
        self.hold("width_moved", torch.stack(moved))
        self.metric(gradients)


_METERS: Mapping[type, Callable[..., _Meter]] = {
    AttentionSite: _AttentionMeter,
    LinearSite: _LinearMeter,
    MLPSite: _MLPMeter,
}


@contextmanager
def _metering(site: Site, moments: Any) -> Iterator[_Meter]:
    with torch.no_grad():
        meter = _METERS[type(site)](site, moments)
    # This frame lasts as long as the meter does, and covariances are large.
    del moments
    handles = list(meter.hooks())
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients of activations, not of weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def _most(inputs: Mapping[str, Any], samples: int) -> int:
    """Of how many samples activations are held at a time."""
    numbers = max(value.numel() // samples for value in inputs.values() if isinstance(value, Tensor))
    return max(min(_SAMPLES, _NUMBERS // max(numbers, 1)), 1)


def _three(states: Tensor) -> Tensor:
    """(samples, tokens, width), whatever lies between."""
    return states.flatten(1, -2) if states.ndim > 2 else states[:, None]


def _by_sample(value: Tensor, counts: Collection[int], name: str) -> Tensor:
    """Sums over what a model makes of one sample in the batch dimension: windows, frames."""
    # Fewer than the outputs: of several that the model mixes, such as the frames of a video.
    if any(count % len(value) == 0 for count in counts):
        return value
    samples = next((count for count in sorted(counts, reverse=True) if len(value) % count == 0), None)
    if samples is None:
        raise InvalidValueError(
            f"{name}: expected the {' or '.join(map(str, counts))} samples of a batch, found {len(value)} there, so "
            'gradients of single samples cannot be told apart. Choose strategy="sensitivity" or "spectrum".'
        )
    return value.unflatten(0, (samples, -1)).sum(1)


def _with_curvature(statistics: Statistics, meters: Sequence[_Meter], weight: float) -> Statistics:
    sums = dict(statistics.sums)
    for meter in meters:
        path = meter.site.moments_path
        if not all(value.isfinite().all() for value in meter.sums.values()):
            raise InvalidValueError(
                f"The gradients at {meter.site.name} are not finite. Check the inputs and weights, or choose "
                'strategy="spectrum".'
            )
        found = {"weight": torch.tensor(weight, dtype=torch.float64), **meter.sums}
        sums[path] = Sums(sums[path].side, {**sums[path].values, **found})
    return Statistics(sums, statistics.architecture, statistics.samples, statistics.scope)
