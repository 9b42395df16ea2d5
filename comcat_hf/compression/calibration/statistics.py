"""Second moments of head and layer activations, gathered on calibration batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...closed_forms.attention import AttentionMoments
from ...closed_forms.linear import LinearMoments
from ...closed_forms.roots import gram
from ...errors import InvalidValueError
from ...modeling import AttentionSite, LinearSite, MLPSite, Site, measuring, unwrapped
from ...modeling.views import class_path
from ...progress import progress_bar
from ..request import Request, sites_by_way
from .curvature import gather_curvature
from .inputs import Batch, all_counts, check_any, main_input, prepare_batch, run_batch, several
from .moments import Statistics, Sums, sum_names


__all__ = ["Statistics", "collect_statistics", "gather"]

# Added to a score, anything lower takes the key away; the hosts use -10000 or the least number of the dtype.
_REFUSED = -5000.0

# Layers as wide as this have the products of their moments in float32, whose rounding is far below the ridge.
_WIDE = 512


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    scope: str = "model",
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    curvature: bool = False,
    mlp: str = "width",
    progress: bool | None = None,
    accelerator: Any | None = None,
) -> Statistics:
    """Run calibration batches through a model and gather what the closed forms need.

    Per head: `E[q^T q]` with the query bias, the second moment of the keys centred within each sample, covariance and
    mean of the attended values (docs/method.md). Per linear layer: the covariance of the smaller of its input and
    output, and the mean of its input; where a layer reads the hidden units of a known MLP always the covariance of its
    input, which serves the MLP's width and the layer's rank. Sums are kept in float64 whatever the model's dtype.
    Padded tokens and keys that a mask does not admit carry no weight. Memory: `3 H p^2` numbers per attention,
    `n^2` per known MLP of n hidden units, `min(d_in, d_out)^2` per other linear layer.

    Args:
        model: a dense model; run in eval mode, without gradients, and left in the mode it was in.
        batches: model inputs: mappings, or tensors of the main input. Labels are allowed and not used. Finite; read
            once, with `curvature` twice, where an iterator is kept.
        scope: `"model"`, `"attention"` or `"mlp"`.
        target_modules, exclude_modules: which modules; see [`allocate_ranks`].
        curvature: gather besides how the model's output sees errors at each site, for `strategy="curvature"`: a second
            pass forward, and one backward to the activations.
        mlp: whether the curvature is that of the widths of MLPs, the ranks of their layers, or both; see
            [`allocate_ranks`].
        progress: show a bar, under several processes that of the first; by default where transformers shows its own.
        accelerator: an `accelerate.Accelerator`: every process reads its own batches and gets the statistics of all.
            A sample that a prepared loader repeats to even out its batches counts again.

    Returns:
        moments by module path.

    Raises:
        InvalidValueError: no batch, a batch without the model's main input or of a wrong shape, activations that are
            not finite; under several processes in all of them.
    """
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
        progress = progress if accelerator.is_main_process else False
    model = unwrapped(model)
    sites = Request.of(model, target_modules, exclude_modules, scope=scope, mlp=mlp).find_sites(model)
    # Not by `read_batches`: under several processes one may have none.
    batches = list(batches) if curvature and isinstance(batches, Iterator) else batches
    how = {"progress": progress, "accelerator": accelerator}
    found = gather(model, batches, sites.values(), scope, **how)
    return gather_curvature(model, batches, sites_by_way(sites, mlp).values(), found, **how) if curvature else found


@torch.no_grad()
def gather(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Iterable[Site],
    scope: str,
    *,
    progress: bool | None = None,
    accelerator: Any | None = None,
) -> Statistics:
    """[`collect_statistics`] at the sites given."""
    # Of an MLP and its output layer the MLP: what it gathers serves both.
    given = list(sites)
    places = {site.moments_path: site for site in (*given, *(site for site in given if site.kind == "mlp"))}
    samples, error = 0, None
    with ExitStack() as stack:
        stack.enter_context(measuring(model))
        mask = stack.enter_context(token_mask(model))
        collectors = {name: stack.enter_context(collecting(site, mask)) for name, site in places.items()}
        try:
            for index, batch in enumerate(progress_bar(several(batches), desc="Statistics", progress=progress)):
                samples += _run(model, batch, index)
        except Exception as caught:
            if accelerator is None:
                raise
            error = caught
    if accelerator is not None:
        samples = _reduce(accelerator, collectors, samples, error, next(model.parameters()).device)
    check_any(samples)
    return Statistics({n: c.finish(n) for n, c in collectors.items()}, class_path(type(model)), samples, scope)


def _run(model: nn.Module, batch: Batch, index: int) -> int:
    inputs = prepare_batch(model, batch, index, next(model.parameters()).device)
    run_batch(model, inputs, index)
    return len(inputs[main_input(model)])


def _reduce(
    accelerator: Any, collectors: Mapping[str, Any], samples: int, error: Exception | None, device: torch.device
) -> int:
    """Sum over all processes, in place; returns the number of samples of all of them."""
    counts = [samples, *(collector.calls for collector in collectors.values())]
    samples, *calls = map(int, all_counts(accelerator, counts, error, "Statistics", device))
    for collector, called in zip(collectors.values(), calls, strict=True):
        own = {name: collector.sums.get(name, zeros) for name, zeros in collector.zeros(device).items()}
        collector.sums, collector.calls = accelerator.reduce(own, "sum"), called
    return samples


class TokenMask:
    """Which tokens of the running batch are real: the two-dimensional mask that the model was called with."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def weights(self, states: Tensor) -> Tensor:
        """One weight per token, `states.shape[:-1]`."""
        if self.mask is not None and self.mask.shape == states.shape[:-1]:
            return self.mask.to(torch.float64)
        return torch.ones(states.shape[:-1], dtype=torch.float64, device=states.device)


class _Collector(ABC):
    """Adds up what passes one site."""

    side: str

    def __init__(self, mask: TokenMask) -> None:
        self.mask = mask
        self.sums: dict[str, Tensor] = {}
        self.calls = 0

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums that are no counts."""

    def zeros(self, device: torch.device) -> dict[str, Tensor]:
        """The sums of a process that saw nothing."""
        shapes = self.shapes()
        return {n: torch.zeros(shapes.get(n, ()), dtype=torch.float64, device=device) for n in sum_names(self.side)}

    def finish(self, name: str) -> Sums:
        if not self.calls:
            raise InvalidValueError(
                f"{name} was not reached by the calibration batches, so it has no statistics. Give the inputs that "
                "the whole model needs, or leave it out of the scope."
            )
        if not all(value.isfinite().all() for value in self.sums.values()):
            raise InvalidValueError(
                f"The activations of {name} are not finite on the calibration batches. Check the inputs, the weights "
                "and, in half precision, the range of the activations."
            )
        if any(self.sums[count] <= 0 for count in set(self.sums) - set(self.shapes())):
            raise InvalidValueError(
                f"No token of the calibration batches carries weight at {name}; check attention_mask."
            )
        return Sums(self.side, self.sums)

    def moments(self, name: str) -> AttentionMoments | LinearMoments:
        return self.finish(name).moments()


class _AttentionCollector(_Collector):
    def __init__(self, site: AttentionSite, mask: TokenMask) -> None:
        super().__init__(mask)
        self.view = site.view
        self.side = "heads" if "qk" in site.choices else "values"
        self.keys_admitted: Tensor | None = None
        self.streams: list[Tensor] = []
        self.other_input = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        heads, size = self.view.num_heads, self.view.head_dim
        pairs = ("query", "key", "attended") if self.side == "heads" else ("attended",)
        return {**dict.fromkeys(pairs, (heads, size, size)), "attended_sum": (heads, size)}

    def hooks(self) -> Iterator[Any]:
        view = self.view
        yield view.module.register_forward_pre_hook(self._on_call, with_kwargs=True)
        for stream in view.streams:
            if self.side == "heads":
                query, key = (view.projection(role, stream) for role in ("query", "key"))
                yield query.register_forward_hook(lambda module, args, output: self._on_query(output))
                yield key.register_forward_hook(lambda module, args, output: self._keys_of_stream(output))
            if (output := view.projection("output", stream)) is not None:
                yield output.register_forward_pre_hook(lambda m, args: self._on_attended(view.attended(args[0])))

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # diffusers names the other input, and gives its mask three dimensions.
        self.other_input = kwargs.get("encoder_hidden_states") is not None
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 and not self.other_input else None)
        self.keys_admitted = None
        if isinstance(mask, Tensor) and mask.ndim in (3, 4):
            admitted = mask if mask.dtype == torch.bool else mask > _REFUSED
            self.keys_admitted = admitted.flatten(1, -2).any(dim=1)

    def _weights(self, states: Tensor, *, keys: bool = False) -> Tensor:
        weights = self.mask.weights(states)
        admitted = self.keys_admitted
        if admitted is not None and (keys or not self.other_input) and states.ndim == 3:
            # The mask of the windows of one image serves all images.
            times, left = divmod(len(states), len(admitted))
            if not left and admitted.shape[1] == states.shape[1]:
                weights = weights * admitted.repeat(times, 1)
        return weights.reshape(1, -1) if states.ndim == 2 else weights.flatten(1)

    def _heads(self, states: Tensor) -> Tensor:
        """(samples, H, tokens, p)"""
        heads = _precise(states).unflatten(-1, (self.view.num_heads, self.view.head_dim))
        # Packed tokens have no dimension of samples, those of an image perhaps two.
        heads = heads[None] if states.ndim == 2 else heads.flatten(1, -3)
        return heads.transpose(1, 2)

    def _on_query(self, states: Tensor) -> None:
        weights, heads = self._weights(states), self._heads(states)
        self._add(count=weights.sum(), query=_second(heads, weights))

    def _keys_of_stream(self, states: Tensor) -> None:
        # A softmax goes over the keys of all streams.
        self.streams.append(states)
        if len(self.streams) == len(self.view.streams):
            self._on_key(states if len(self.streams) == 1 else torch.cat(self.streams, dim=1))
            self.streams = []

    def _on_key(self, states: Tensor) -> None:
        weights, heads = self._weights(states, keys=True), self._heads(states)
        total = weights.sum(1).clamp(min=1e-12)
        mean = torch.einsum("bn,bhni->bhi", weights.to(heads), heads) / total.to(heads)[:, None, None]
        self._add(keys=weights.sum(), key=_second(heads - mean[:, :, None], weights))

    def _on_attended(self, states: Tensor) -> None:
        weights, heads = self._weights(states), self._heads(states)
        self.calls += 1
        self._add(
            rows=weights.sum(),
            attended=_second(heads, weights),
            attended_sum=torch.einsum("bn,bhni->hi", weights.to(heads), heads).double(),
        )


class _LinearCollector(_Collector):
    def __init__(self, linear: nn.Linear, side: str, mask: TokenMask) -> None:
        super().__init__(mask)
        self.linear, self.side = linear, side

    def shapes(self) -> dict[str, tuple[int, ...]]:
        inputs = self.linear.in_features
        size = inputs if self.side == "input" else self.linear.out_features
        return {"input": (inputs,), "mean": (size,), "second": (size, size)}

    def hooks(self) -> Iterator[Any]:
        yield self.linear.register_forward_hook(lambda module, args, output: self._on_call(args[0], output))

    def _on_call(self, states: Tensor, output: Tensor) -> None:
        weights = self.mask.weights(states).flatten()
        inner = _precise((states if self.side == "input" else output).flatten(0, -2))
        mean = (weights.to(inner) @ inner).double()
        entered = mean.clone() if self.side == "input" else weights @ states.flatten(0, -2).double()
        self.calls += 1
        self._add(
            count=weights.sum(), input=entered, mean=mean, second=gram(inner, inner * weights[:, None].to(inner))
        )


def _precise(rows: Tensor) -> Tensor:
    return rows.to(torch.float64 if rows.shape[-1] < _WIDE else torch.promote_types(rows.dtype, torch.float32))


def _second(heads: Tensor, weights: Tensor) -> Tensor:
    """The weighted second moment of each head, summed, float64."""
    weighted = heads * weights[:, None, :, None].to(heads)
    return (weighted.mT @ heads).sum(0, dtype=torch.float64)


def _of_linear(site: LinearSite, mask: TokenMask) -> _LinearCollector:
    linear = site.linear
    return _LinearCollector(linear, "output" if linear.out_features < linear.in_features else "input", mask)


def _of_mlp(site: MLPSite, mask: TokenMask) -> _LinearCollector:
    return _LinearCollector(site.view.output, "input", mask)


_COLLECTORS: Mapping[type, Callable[..., Any]] = {
    AttentionSite: _AttentionCollector,
    LinearSite: _of_linear,
    MLPSite: _of_mlp,
}


@contextmanager
def collecting(site: Site, mask: TokenMask) -> Iterator[Any]:
    """Within it what passes a site is added up, by the collector that is given."""
    collector = _COLLECTORS[type(site)](site, mask)
    handles = list(collector.hooks())
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask]:
    """Follow the mask into every submodel: of two towers only one may have it."""
    holder = TokenMask()

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        # What a model makes of its mask for its own submodels has four dimensions.
        if mask is None or mask.ndim == 2:
            holder.mask = mask

    models = [module for module in model.modules() if module is model or isinstance(module, PreTrainedModel)]
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in models]
    try:
        yield holder
    finally:
        for handle in handles:
            handle.remove()
