"""Second moments of head and layer activations, gathered on calibration batches."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attention import AttentionSite, LinearSite, Site, eval_mode, find_sites
from ..attention.views import class_path
from ..errors import InvalidValueError
from ..factorization import AttentionMoments, LinearMoments


__all__ = ["Statistics", "collect_statistics"]

Batch = Mapping[str, Any] | Tensor


class Statistics(Mapping[str, AttentionMoments | LinearMoments]):
    """Moments by module path, and what they were gathered from.

    Attributes:
        architecture: class of the model.
        samples: number of samples seen.
        scope: what they were gathered for.
    """

    def __init__(
        self,
        moments: Mapping[str, AttentionMoments | LinearMoments],
        architecture: str,
        samples: int,
        scope: str = "model",
    ) -> None:
        self._moments = dict(moments)
        self.architecture = architecture
        self.samples = samples
        self.scope = scope

    def __getitem__(self, name: str) -> AttentionMoments | LinearMoments:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        return f"Statistics({self.architecture.rpartition('.')[2]}, {len(self)} modules, {self.samples} samples)"

    def check_model(self, model: nn.Module, names: Iterable[str] = ()) -> None:
        """Raise InvalidValueError if these are the statistics of another model, or lack one of the modules named."""
        if class_path(type(model)) != self.architecture:
            raise InvalidValueError(
                f"The statistics were gathered on {self.architecture}, the model is {class_path(type(model))}. "
                "Gather them again with collect_statistics(model, batches)."
            )
        sites = find_sites(model, self.scope)
        for name, moments in self.items():
            expected, found = _shape(sites.get(name)), tuple(_leading(moments).shape)
            if expected is None or found not in expected:
                raise InvalidValueError(
                    f"The statistics of {name} have the shape {found}; the model "
                    + (f"has {expected[0]} there. " if expected else "has no such module. ")
                    + "They were gathered on another model; gather them again with collect_statistics(model, batches)."
                )
        missing = [name for name in names if name not in self]
        if missing:
            raise InvalidValueError(
                f"The statistics, gathered with scope={self.scope!r}, lack {', '.join(missing[:3])}"
                + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
                + ", which the plan factorises. Gather them for the scope of the plan."
            )


@torch.no_grad()
def collect_statistics(
    model: nn.Module, batches: Iterable[Batch], *, scope: str = "model", progress: bool = False
) -> Statistics:
    """Run calibration batches through a model and gather what the closed forms need.

    Per head: `E[q^T q]` with the query bias, the second moment of the keys centred within each sample, covariance and
    mean of the attended values (docs/method.md). Per linear layer: the covariance of the smaller of its input and
    output, and the mean of its input. Sums are kept in float64 whatever the model's dtype. Padded tokens and keys that
    a mask does not admit carry no weight. Memory: `3 H p^2 + min(d_in, d_out)^2` numbers per attention and linear
    layer.

    Args:
        model: a dense model; run in eval mode, without gradients, and left in the mode it was in.
        batches: model inputs: mappings, or tensors of the main input. Labels are allowed and not used. Finite; it is
            read once.
        scope: `"model"`, `"attention"` or `"mlp"`.
        progress: show a progress bar.

    Returns:
        moments by module path.

    Raises:
        InvalidValueError: no batch, a batch without the model's main input or of a wrong shape, activations that are
            not finite.
    """
    sites = find_sites(model, scope)
    device = next(model.parameters()).device
    samples = 0
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        mask = stack.enter_context(_token_mask(model))
        collectors = {name: stack.enter_context(_collector(site, mask)) for name, site in sites.items()}
        for index, batch in enumerate(tqdm(batches, desc="Statistics", disable=not progress)):
            inputs = prepare_batch(model, batch, index, device)
            try:
                model(**inputs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                raise InvalidValueError(
                    f"Calibration batch {index} does not fit {type(model).__name__}: {error} "
                    f"(inputs: {_describe(inputs)})"
                ) from error
            samples += len(inputs[_main_input(model)])
    if samples == 0:
        raise InvalidValueError("The calibration batches are empty: expected at least one batch, got none.")
    return Statistics({n: c.moments(n) for n, c in collectors.items()}, class_path(type(model)), samples, scope)


def prepare_batch(model: nn.Module, batch: Batch, index: int, device: torch.device) -> dict[str, Any]:
    """A batch as keyword arguments of the model, on its device, without labels."""
    main = _main_input(model)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    inputs = {main: batch} if isinstance(batch, Tensor) else batch
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get(main), Tensor):
        found = sorted(inputs) if isinstance(inputs, Mapping) else type(batch).__name__
        raise InvalidValueError(
            f"Batch {index} has no tensor {main!r}, the main input of {type(model).__name__}; found {found}. "
            f"Give mappings with {main!r}, or tensors of it."
        )
    if inputs[main].ndim < 2 or len(inputs[main]) == 0:
        raise InvalidValueError(
            f"Batch {index}: {main!r} must have a batch dimension and samples, got the shape "
            f"{tuple(inputs[main].shape)}."
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items() if not k.startswith("label")}


class _TokenMask:
    """Which tokens of the running batch are real: the two-dimensional mask that the model was called with."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def weights(self, states: Tensor) -> Tensor:
        """One weight per token, `states.shape[:-1]`."""
        if self.mask is not None and self.mask.shape == states.shape[:-1]:
            return self.mask.to(torch.float64)
        return torch.ones(states.shape[:-1], dtype=torch.float64, device=states.device)


class _AttentionCollector:
    def __init__(self, site: AttentionSite, mask: _TokenMask) -> None:
        self.view, self.mask = site.view, mask
        self.sums: dict[str, Tensor] = {}
        self.keys_admitted: Tensor | None = None

    def hooks(self) -> Iterator[Any]:
        view = self.view
        yield view.module.register_forward_pre_hook(self._on_call, with_kwargs=True)
        yield view.query.register_forward_hook(lambda module, args, output: self._on_query(output))
        yield view.key.register_forward_hook(lambda module, args, output: self._on_key(output))
        yield view.output.register_forward_pre_hook(lambda module, args: self._on_attended(args[0]))

    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.keys_admitted = None
        if isinstance(mask, Tensor) and mask.ndim == 4:
            admitted = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            self.keys_admitted = admitted.any(dim=1).any(dim=1)

    def _weights(self, states: Tensor) -> Tensor:
        weights = self.mask.weights(states)
        if self.keys_admitted is not None and self.keys_admitted.shape[-1] == states.shape[1]:
            weights = weights * self.keys_admitted
        return weights

    def _heads(self, states: Tensor) -> Tensor:
        return states.to(torch.float64).unflatten(-1, (self.view.num_heads, self.view.head_dim))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _on_query(self, states: Tensor) -> None:
        weights, heads = self._weights(states), self._heads(states)
        self._add("count", weights.sum())
        self._add("query", torch.einsum("bn,bnhi,bnhj->hij", weights, heads, heads))

    def _on_key(self, states: Tensor) -> None:
        weights, heads = self._weights(states), self._heads(states)
        total = weights.sum(1).clamp(min=1e-12)
        mean = torch.einsum("bn,bnhi->bhi", weights, heads) / total[:, None, None]
        heads = heads - mean[:, None]
        self._add("keys", weights.sum())
        self._add("key", torch.einsum("bn,bnhi,bnhj->hij", weights, heads, heads))

    def _on_attended(self, states: Tensor) -> None:
        weights, heads = self._weights(states), self._heads(states)
        self._add("rows", weights.sum())
        self._add("attended", torch.einsum("bn,bnhi,bnhj->hij", weights, heads, heads))
        self._add("attended_sum", torch.einsum("bn,bnhi->hi", weights, heads))

    def moments(self, name: str) -> AttentionMoments:
        sums = _checked(name, self.sums, ("count", "keys", "rows"))
        mean = sums["attended_sum"] / sums["rows"]
        second = sums["attended"] / sums["rows"]
        return AttentionMoments(
            query=sums["query"] / sums["count"],
            key=sums["key"] / sums["keys"],
            attended=second - mean[:, :, None] * mean[:, None, :],
            attended_mean=mean,
        )


class _LinearCollector:
    def __init__(self, site: LinearSite, mask: _TokenMask) -> None:
        self.linear, self.mask = site.linear, mask
        self.side = "output" if self.linear.out_features < self.linear.in_features else "input"
        self.sums: dict[str, Tensor] = {}

    def hooks(self) -> Iterator[Any]:
        yield self.linear.register_forward_hook(lambda module, args, output: self._on_call(args[0], output))

    def _on_call(self, states: Tensor, output: Tensor) -> None:
        weights = self.mask.weights(states).flatten()
        states = states.to(torch.float64).flatten(0, -2)
        inner = states if self.side == "input" else output.to(torch.float64).flatten(0, -2)
        values = {"count": weights.sum(), "input": weights @ states, "mean": weights @ inner}
        values["second"] = (inner * weights[:, None]).T @ inner
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def moments(self, name: str) -> LinearMoments:
        sums = _checked(name, self.sums, ("count",))
        mean = sums["mean"] / sums["count"]
        covariance = sums["second"] / sums["count"] - torch.outer(mean, mean)
        return LinearMoments(covariance=covariance, mean=sums["input"] / sums["count"], side=self.side)


_COLLECTORS = {AttentionSite: _AttentionCollector, LinearSite: _LinearCollector}


@contextmanager
def _collector(site: Site, mask: _TokenMask) -> Iterator[Any]:
    collector = _COLLECTORS[type(site)](site, mask)
    handles = list(collector.hooks())
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _token_mask(model: nn.Module) -> Iterator[_TokenMask]:
    """Follow the mask into every submodel: of two towers only one may have it."""
    holder = _TokenMask()

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


def _checked(name: str, sums: dict[str, Tensor], counts: tuple[str, ...]) -> dict[str, Tensor]:
    if not sums:
        raise InvalidValueError(
            f"{name} was not reached by the calibration batches, so it has no statistics. Give the inputs that the "
            "whole model needs, or leave it out of the scope."
        )
    if not all(value.isfinite().all() for value in sums.values()):
        raise InvalidValueError(
            f"The activations of {name} are not finite on the calibration batches. Check the inputs, the weights and, "
            "in half precision, the range of the activations."
        )
    if any(sums[count] <= 0 for count in counts):
        raise InvalidValueError(f"No token of the calibration batches carries weight at {name}; check attention_mask.")
    return sums


def _main_input(model: nn.Module) -> str:
    return getattr(model, "main_input_name", "pixel_values")


def _describe(inputs: Mapping[str, Any]) -> str:
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in inputs.items()}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _leading(moments: AttentionMoments | LinearMoments) -> Tensor:
    return moments.query if isinstance(moments, AttentionMoments) else moments.covariance


def _shape(site: Site | None) -> tuple[tuple[int, ...], ...] | None:
    if isinstance(site, AttentionSite):
        p = site.view.head_dim
        return ((site.view.num_heads, p, p),)
    if isinstance(site, LinearSite):
        n = min(site.linear.in_features, site.linear.out_features)
        return ((n, n),)
    return None
