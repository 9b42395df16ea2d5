"""What the package is compared with: other closed forms that make a model smaller without training.

Each takes a subject (a dense model, see `_cases.py`), a scope and a reduction, and returns a compressed copy that
removes at least that share of the scope, counted by `numel`, or raises `OutOfReach`.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import comcat_hf
from comcat_hf.closed_forms.linear import LinearMoments, factorize_linear
from comcat_hf.compression.calibration.inputs import prepare_batch
from comcat_hf.modeling import LowRankAttention, LowRankLinear, find_sites, replace_module


# Arguments of `allocate_ranks` for the baselines whose ranks are the package's: the same share of low rank everywhere.
UNIFORM: Mapping[str, Any] = {"strategy": "uniform", "mlp": "rank"}

# As in the package, a layer with fewer ranks to choose from, such as a classifier of ten classes, stays dense.
FEWEST = 12


class OutOfReach(Exception):
    """The reduction is more than a method can remove."""


def original(subject: Any, scope: Any, reduction: float) -> nn.Module:
    """The original release: truncated SVD of `W_Q W_K^T` and `W_V W_O`; query, key and value biases are dropped."""
    plan = subject.plan(scope, reduction, **UNIFORM)
    model = copy.deepcopy(subject.model)
    drop_biases(model, plan.ranks)
    small = comcat_hf.compress(model, plan=plan)
    for module in small.modules():
        if isinstance(module, LowRankAttention) and module.qk_rank is not None:
            # It is zero by now; without it the count is that of the original.
            getattr(module, module._family.query).bias = None
    return small


@torch.no_grad()
def drop_biases(model: nn.Module, ranks: Mapping[str, Any]) -> None:
    """Zero the biases of query, key and value in the pairs that a plan factorises, in place."""
    for name, site in find_sites(model).items():
        if name in ranks and site.kind == "attention":
            chosen, view = site.ranks(ranks[name]), site.view
            pairs = {"qk": (view.query, view.key), "vo": (view.value,)}
            for linear in (
                linear for pair, linears in pairs.items() if chosen[pair] is not None for linear in linears
            ):
                if linear.bias is not None:
                    linear.bias.zero_()


def weights_only(subject: Any, scope: Any, reduction: float) -> nn.Module:
    """The package without data: truncated SVDs of the products, exact biases, uniform ranks."""
    return comcat_hf.compress(subject.model, plan=subject.plan(scope, reduction, **UNIFORM))


def one_sided(subject: Any, scope: Any, reduction: float) -> nn.Module:
    """One matrix of each product is factorised, the key's and the output's, by its own truncated SVD (UniSVD's idea).

    Query and value stay dense, so that at most half of the attention's weights can go. Layers outside attention get
    plain truncated SVDs.
    """
    return factored(subject, scope, reduction, layers_of(subject.model, scope.sites, sides=("key", "output")))


def whitened(subject: Any, scope: Any, reduction: float) -> nn.Module:
    """Every matrix on its own, whitened by the second moment of its inputs, biases as they are (SVD-LLM's form)."""
    layers = layers_of(subject.model, scope.sites)
    return factored(subject, scope, reduction, layers, {path: subject.inputs[path].plain() for path in layers})


def whitened_centred(subject: Any, scope: Any, reduction: float) -> nn.Module:
    """The same with the covariance in place of the second moment and the mean error put into the bias."""
    layers = layers_of(subject.model, scope.sites)
    return factored(subject, scope, reduction, layers, {path: subject.inputs[path].centred() for path in layers})


BASELINES: Mapping[str, Callable[[Any, Any, float], nn.Module]] = {
    "original": original,
    "weights-only": weights_only,
    "one-sided": one_sided,
    "whitened": whitened,
    "whitened, centred": whitened_centred,
}


def layers_of(
    model: nn.Module, scope: str, sides: tuple[str, ...] = ("query", "key", "value", "output")
) -> dict[str, nn.Linear]:
    """The linear layers within a scope by path; of attention those of the sides named."""
    layers: dict[str, nn.Linear] = {}
    for site in find_sites(model, scope).values():
        if site.kind == "attention":
            projections = zip(("query", "key", "value", "output"), site.view.projections().items(), strict=True)
            layers.update(item for side, item in projections if side in sides)
            continue
        for path, module in site.dense_modules().items():
            found = ((f"{path}.{name}" if name else path, part) for name, part in module.named_modules())
            layers.update(
                (name, part) for name, part in found if isinstance(part, nn.Linear) and limit(part) >= FEWEST
            )
    return layers


def limit(linear: nn.Linear) -> int:
    """The rank from which on two factors have no fewer parameters than the weight."""
    n, m = linear.in_features, linear.out_features
    return -(-n * m // (n + m))


def factored(
    subject: Any,
    scope: Any,
    reduction: float,
    layers: Mapping[str, nn.Linear],
    moments: Mapping[str, LinearMoments] | None = None,
) -> nn.Module:
    """A copy in which every layer has the same share of its ranks."""
    total = scope.size(subject.model)
    return with_factors(subject.model, uniform_ranks(layers, reduction * total, total), moments)


def uniform_ranks(layers: Mapping[str, nn.Linear], remove: float, total: int) -> dict[str, int]:
    """The largest share of their ranks that all layers can keep when this many parameters must go, to a single rank.

    Raises:
        OutOfReach: ranks of one everywhere remove less; the message says how much, as a share of `total`.
    """

    def saved(ranks: Mapping[str, int]) -> int:
        return sum(layer.weight.numel() - ranks[path] * sum(layer.weight.shape) for path, layer in layers.items())

    def at(share: float) -> dict[str, int]:
        return {path: max(int(share * limit(layer)), 1) for path, layer in layers.items()}

    if saved(at(0.0)) < remove:
        raise OutOfReach(f"at most {int(1e3 * saved(at(0.0)) / total) / 1e3:.1%} of it can go")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(at(middle)) >= remove else (low, middle)
    ranks = at(low)
    spare = saved(ranks) - remove
    for path, layer in layers.items():
        # What rounding took is given back, one rank a layer.
        if sum(layer.weight.shape) <= spare and ranks[path] + 1 < limit(layer):
            ranks[path] += 1
            spare -= sum(layer.weight.shape)
    return ranks


@torch.no_grad()
def with_factors(
    model: nn.Module, ranks: Mapping[str, int], moments: Mapping[str, LinearMoments] | None = None
) -> nn.Module:
    """A copy of a model with two factors in the place of each linear layer named."""
    small = copy.deepcopy(model)
    for path, rank in ranks.items():
        dense = small.get_submodule(path)
        factors = factorize_linear(dense.weight, dense.bias, rank, moments=(moments or {}).get(path))
        bias = factors.bias is not None
        layer = LowRankLinear(
            dense.in_features, dense.out_features, rank, bias, dense.weight.device, dense.weight.dtype
        )
        layer.first_factor.weight.copy_(factors.first_weight)
        layer.weight.copy_(factors.second_weight)
        if bias:
            layer.bias.copy_(factors.bias)
        replace_module(small, dense, layer.train(dense.training))
    return small


@dataclass
class InputSums:
    """What one layer is given on the calibration data, summed over the tokens that count, in float64."""

    count: Tensor | float = 0.0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, states: Tensor, mask: Tensor | None) -> None:
        masked = mask is not None and mask.shape == states.shape[:-1]
        rows = (states[mask.bool()] if masked else states.flatten(0, -2)).double()
        self.count += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.T @ rows

    def plain(self) -> LinearMoments:
        """The second moment, as if the inputs had no mean: the bias then stays what it is."""
        return LinearMoments(self.second / self.count, torch.zeros_like(self.first), "input")

    def centred(self) -> LinearMoments:
        mean = self.first / self.count
        return LinearMoments(self.second / self.count - torch.outer(mean, mean), mean, "input")


@torch.no_grad()
def sum_inputs(model: nn.Module, layers: Mapping[str, nn.Linear], batches: list[Any]) -> dict[str, InputSums]:
    """Run the calibration batches once and sum the inputs of every layer; padded tokens do not count."""
    sums = {path: InputSums() for path in layers}
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {}

    def hook(path: str, module: nn.Module, args: tuple) -> None:
        sums[path].add(args[0], inputs.get("attention_mask"))

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(hook, path)).remove)
        for index, batch in enumerate(batches):
            inputs = prepare_batch(model, batch, index, device)
            model(**inputs)
    return sums
