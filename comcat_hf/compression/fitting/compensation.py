"""Factorising layer by layer, each on what the layers before it, already compressed, produce.

A block's attention and MLP get their factors from the activations that reach them in the compressed model, and from
weights that predict the dense activations from those. Their output factor and bias are then fitted again, by ridge
regression toward the closed form, onto what the dense block would have added plus the drift of the residual stream so
far, and before that the first layers of MLPs that have lost units (docs/method.md). No labels, and no passes back
through the model.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modeling import LowRankLinear, MLPSite, Site, apply_ranks, eval_mode
from ...modeling.filling import fill, warn_not_finite
from ...modeling.sites import block_of
from ...modeling.surgery import sites_for, substitute_module
from ...progress import progress_bar
from ..calibration.inputs import prepare_batch, read_batches
from ..calibration.moments import Statistics, weighed
from ..calibration.statistics import TokenMask, collecting, token_mask
from .calls import Calls, Reached, blocks_between, record_calls, stop
from .first_layers import FirstLayers
from .readers import Readers, shared_parameters
from .regression import Regression


__all__ = ["compress_in_order"]

# Relative error below which a sum of two captured tensors counts as the residual stream.
_EXACT = 1e-3

# Scales on a layer's output below this share of the largest count as zero.
_NO_SCALE = 1e-6


@torch.no_grad()
def compress_in_order(
    model: nn.Module,
    ranks: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    statistics: Statistics | None = None,
    ridge: float | None = None,
    progress: bool | None = None,
) -> None:
    """Replace the modules named in a plan, in place and in forward order, with compensation.

    Memory: some six hidden states of one block on all batches, `tokens * d` numbers each, in an MLP that loses units
    three more and its units, and the moments of one site; where a block does not take what the block before it gives,
    the states that it takes.

    Args:
        model: a dense model, changed in place; on an error it may be half changed, so pass a copy.
        ranks: entries of a plan by module path.
        batches: calibration inputs, read once.
        statistics: of the dense model; where they have its curvature, the factors are fitted to that too.
        ridge: pull of the output factors toward the closed form, as a share of their inputs' mean variance; by
            default the one with which either half of the batches predicts the other best.
        progress: show a bar over the blocks; by default where transformers shows its own.

    Where the batches give no finite weights, those of the closed form stay, with a warning that names the modules.

    Raises:
        RankPlanError: unknown module names or ranks that do not fit.
        InvalidValueError: no batch, or one that does not fit the model.
    """
    sites = sites_for(ranks, model)
    chosen = {name: sites[name].ranks(entry) for name, entry in ranks.items()}
    device = next(model.parameters()).device
    inputs = [prepare_batch(model, batch, index, device) for index, batch in enumerate(read_batches(batches))]
    blocks: dict[str, list[str]] = {}
    for name in ranks:
        # Not by its name: an MLP may have that of its block.
        blocks.setdefault(block_of(sites[name].moments_path) or "", []).append(name)
    rest = blocks.pop("", [])
    order = blocks_between(model, blocks)
    training = {name for name, module in model.named_modules() if module.training}
    shared = shared_parameters(model)
    with eval_mode(model):
        calls = record_calls(model, order, inputs)
        # A block that is only a list of its parts is never called, so it has no stream to be fitted to.
        rest += [name for path in order if not calls[path].arguments for name in blocks.get(path, ())]
        before: Calls | None = None
        unfitted: list[str] = []
        called = [path for path in order if calls[path].arguments]
        for path in progress_bar(called, desc="Compressing", progress=progress):
            record = calls.pop(path)
            record.follow(before)
            block = _Block(model, path, record, ridge, statistics, shared)
            unfitted += block.compress({name: sites[name] for name in sites if name in blocks.get(path, ())}, chosen)
            before = record
        if rest:
            moments = _rest_moments(model, {name: sites[name] for name in rest}, inputs, statistics)
            apply_ranks(model, {name: ranks[name] for name in rest}, statistics=moments)
    warn_not_finite(unfitted)
    for name in training.intersection(path for site in sites.values() for path in site.dense_modules()):
        model.get_submodule(name).train()


@dataclass(frozen=True)
class _Residual:
    """Where the residual stream meets a layer's output: `total = stream + scale * output`."""

    stream: str
    total: str
    scale: Tensor

    def missing(self, total: Tensor, stream: Tensor, output: Tensor) -> Tensor:
        """How far the stream behind the layer is from a total."""
        return total - stream - self.scale.to(output) * output


class _Block:
    def __init__(
        self,
        model: nn.Module,
        path: str,
        calls: Calls,
        ridge: float | None,
        statistics: Statistics | None,
        shared: Collection[int],
    ) -> None:
        self.model, self.calls, self.ridge, self.statistics = model, calls, ridge, statistics
        self.shared = shared
        self.path, self.module = path, model.get_submodule(path)
        self.mask = TokenMask()
        # The running batch, and how often modules whose outputs are kept were called on it.
        self.index = 0
        self.called: Counter[str] = Counter()

    def compress(self, sites: Mapping[str, Site], ranks: Mapping[str, Any]) -> list[str]:
        """Compress these sites of the block; returns those whose weights the batches give no finite values."""
        unfitted = []
        outputs = {name: site.output_layer for name, site in sites.items()}
        readers = {name: Readers(site.input_layers, self.shared) for name, site in sites.items()}
        residuals, totals = self._dense_pass({name: linear for name, (_, linear) in outputs.items()}, readers)
        with ExitStack() as stack:
            # The totals are in the order of the calls.
            for name in totals:
                site = sites[name]
                readers.pop(name).correct(self._run_small, self.mask)
                with collecting(site, self.mask) as collector:
                    for _ in self._run_small(outputs[name][1]):
                        pass
                substitutes = site.substitutes(ranks[name])
                fitted = fill(site, substitutes, _weighed(collector.moments(name), site, self.statistics))
                for path, dense in site.dense_modules().items():
                    if path in substitutes:
                        substitute_module(self.model, dense, substitutes[path])
                if name in residuals:
                    linear = self.model.get_submodule(outputs[name][0])
                    first = None
                    if isinstance(site, MLPSite) and linear.in_features < site.view.width:
                        layers = [self.model.get_submodule(path) for path, _ in site.view.first]
                        first = self._fit_first(layers, linear, residuals[name], totals[name])
                    last = name == next(reversed(totals))
                    fitted &= self._refit(linear, residuals[name], totals[name], last, first)
                totals[name] = []
                if not fitted:
                    unfitted.append(name)
                inner = name.removeprefix(f"{self.path}.")
                streams = (residual.stream for residual in residuals.values())
                if site.kind == "attention" and inner != name and not any(s.startswith(f"{inner}.") for s in streams):
                    stack.enter_context(self._kept(name))
            if not self.calls.small_out:
                self.calls.small_out = list(self._run(self.calls.small_in))
        return unfitted

    @contextmanager
    def _kept(self, path: str) -> Iterator[None]:
        """Within it a module is run once a batch, and gives the same again: what it takes changes no more."""
        module = self.model.get_submodule(path)
        kept: dict[tuple[int, int], Any] = {}
        forward, own = module.forward, "forward" in vars(module)

        def once(*args: Any, **kwargs: Any) -> Any:
            key = self.index, self.called[path]
            self.called[path] += 1
            output = kept[key] if key in kept else forward(*args, **kwargs)
            states, *others = (output,) if isinstance(output, Tensor) else output
            # Scores beside the states are larger than all the hidden states.
            if not any(isinstance(value, Tensor) for value in others):
                kept[key] = output
            # A copy: a block may add to it in place.
            return states.clone() if isinstance(output, Tensor) else (states.clone(), *others)

        module.forward = once
        try:
            yield
        finally:
            module.forward = forward
            if not own:
                del module.forward

    def _run(self, states: list[Tensor], until: nn.Module | None = None) -> Iterator[Tensor | None]:
        """Run the block on all batches; with `until` only until that module has been called."""
        handle = until.register_forward_hook(stop) if until is not None else None
        try:
            for index, mask in enumerate(self.calls.masks):
                self.mask.mask, self.index = mask, index
                self.called.clear()
                try:
                    output = self.calls.run(self.module, states[index], index)
                except Reached:
                    output = None
                yield output
        finally:
            if handle is not None:
                handle.remove()

    def _run_small(self, until: nn.Module) -> Iterator[None]:
        return self._run(self.calls.small_in, until)

    def _dense_pass(
        self, linears: Mapping[str, nn.Module], readers: Mapping[str, Readers]
    ) -> tuple[dict[str, _Residual], dict[str, list[Tensor]]]:
        """Run the dense block on dense inputs: where each layer meets the stream, and the stream behind it."""
        residuals: dict[str, _Residual] = {}
        totals: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            seen = stack.enter_context(_captured(self.module, linears))
            for reader in readers.values():
                stack.enter_context(reader.recording())
            for index, output in enumerate(self._run(self.calls.dense_in)):
                events = {"block.in": self.calls.dense_in[index], **seen, "block.out": output}
                self.calls.dense_out.append(output)
                for name in sorted(linears, key=lambda name: list(events).index(f"={name}")):
                    if index == 0 and (found := _find_residual(events, name)) is not None:
                        residuals[name] = found
                    kept = totals.setdefault(name, [])
                    if name in residuals:
                        kept.append(events[residuals[name].total])
        return residuals, totals

    def _refit(
        self,
        linear: nn.Module,
        residual: _Residual,
        totals: list[Tensor],
        last: bool,
        first: FirstLayers | None = None,
    ) -> bool:
        """Fit the output factor again; what would not be finite is left as it is, which is returned as false.

        Where the last layer adds to the stream and the block ends there, what it gives follows without another run.
        First layers that have been changed to no good are as before.
        """
        regression, ends, error = Regression(), [], 0.0
        ends_block = last and residual.total == "block.out" and bool((residual.scale == 1).all())
        for (z, given, stream), total in zip(self._reads(linear, residual), totals, strict=True):
            weights = self.mask.weights(z)
            regression.add(z, total - stream, weights)
            if ends_block:
                ends.append((stream, z))
            if first is not None:
                error += float(residual.missing(total, stream, given)[weights > 0].square().sum())
        if first is not None and not error <= first.error:
            first.undo()
            return self._refit(linear, residual, totals, last)
        fitted = _solve(regression, linear, residual.scale, self.ridge)
        self.calls.small_out = [stream + F.linear(z, linear.weight, linear.bias) for stream, z in ends]
        return fitted

    def _reads(self, linear: nn.Module, residual: _Residual) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the compressed block up to a layer: what this reads and gives and the stream there, each batch.

        A layer with factors reads what its first factor gives.
        """
        held: dict[str, Tensor] = {}
        handles = [linear.register_forward_hook(lambda module, args, output: held.update(z=args[0], y=output))]
        if isinstance(linear, LowRankLinear):
            hook = linear.first_factor.register_forward_hook(lambda module, args, output: held.update(first=output))
            handles.append(hook)
        try:
            with _captured(self.module, {}) as seen:
                for index, _ in enumerate(self._run(self.calls.small_in, linear)):
                    events = {"block.in": self.calls.small_in[index], **seen}
                    yield held.get("first", held["z"]), held["y"], events[residual.stream]
        finally:
            for handle in handles:
                handle.remove()

    def _fit_first(
        self, layers: list[nn.Linear], linear: nn.Linear, residual: _Residual, totals: list[Tensor]
    ) -> FirstLayers | None:
        """Fit the first layers of a narrowed MLP; `None` where they are as before."""
        first = FirstLayers(layers, linear, residual.scale)
        with first.recording():
            for index, (z, given, stream) in enumerate(self._reads(linear, residual)):
                used = self.mask.weights(z) > 0
                halves = {index % 2: used}
                if len(totals) == 1:
                    early = torch.zeros_like(used)
                    early[: len(early) // 2] = True
                    halves = {0: used & early, 1: used & ~early}
                first.add(residual.missing(totals[index], stream, given), halves)
        return first if first.improve() else None


def _solve(regression: Regression, linear: nn.Module, scale: Tensor, ridge: float | None) -> bool:
    """Write the coefficients into the layer where they are finite."""
    # With a scale on the output the stream gets `scale * output`; where that is nothing, nothing can be fitted.
    used = scale.abs() > _NO_SCALE * scale.abs().max()
    try:
        weight, bias = regression.solve(linear.weight.double().T, torch.where(used, scale, 1.0), ridge)
    except torch.linalg.LinAlgError:
        return False
    weight, bias = weight.T.to(linear.weight)[used], bias.to(linear.bias)[used]
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return False
    linear.weight[used], linear.bias[used] = weight, bias
    return True


@contextmanager
def _captured(block: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the norms of a block take and give, and the named linear layers give, in the order of their last calls."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in block.named_modules():
            if "norm" in type(module).__name__.lower():
                hook = module.register_forward_hook(
                    lambda m, args, output, name=name: seen.update(
                        {f"{name}.in": args[0], f"{name}.out": _first(output)}
                    )
                )
                stack.callback(hook.remove)
        for name, linear in linears.items():
            hook = linear.register_forward_hook(lambda m, args, output, name=name: seen.update({f"={name}": output}))
            stack.callback(hook.remove)
        yield seen


def _first(output: Any) -> Tensor:
    # Norms that a condition steers give gates besides.
    return output[0] if isinstance(output, tuple) else output


def _find_residual(seen: Mapping[str, Tensor], name: str) -> _Residual | None:
    output = seen[f"={name}"].double()
    order = list(seen)
    # The last block of two streams may give nothing of one.
    shapes = {key: state.shape for key, state in seen.items() if isinstance(state, Tensor)}
    points = [key for key in order if not key.startswith("=") and shapes.get(key) == output.shape]
    here = order.index(f"={name}")
    energy = output.flatten(0, -2).square().sum(0)
    for total in (key for key in points if order.index(key) > here):
        for stream in (key for key in reversed(points) if order.index(key) < here):
            added = seen[total].double() - seen[stream].double()
            for scale in (torch.ones_like(energy), _scale(added, output, energy)):
                if (added - scale * output).norm() <= _EXACT * added.norm() and added.norm() > 0:
                    return _Residual(stream, total, scale)
    return None


def _scale(added: Tensor, output: Tensor, energy: Tensor) -> Tensor:
    return (added * output).flatten(0, -2).sum(0) / energy.clamp(min=torch.finfo(energy.dtype).tiny)


def _rest_moments(
    model: nn.Module, sites: Mapping[str, Site], inputs: list[dict[str, Any]], statistics: Statistics | None
) -> dict[str, Any]:
    with ExitStack() as stack:
        mask = stack.enter_context(token_mask(model))
        collectors = {name: stack.enter_context(collecting(site, mask)) for name, site in sites.items()}
        for batch in inputs:
            model(**batch)
    found = {name: collector.moments(name) for name, collector in collectors.items()}
    return {site.moments_path: _weighed(found[name], site, statistics) for name, site in sites.items()}


def _weighed(moments: Any, site: Site, statistics: Statistics | None) -> Any:
    sums = None if statistics is None else statistics.sums.get(site.moments_path)
    return moments if sums is None else weighed(moments, sums)
