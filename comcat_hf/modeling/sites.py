"""Sites: the places of a model that a rank plan can give a rank to, or a width.

A site knows its dense module or modules, which entries of a plan it takes, what those cost, which modules replace the
dense ones and how the replacements get their factors. Everything above (tuner, native loading, allocation) works on
sites alone, so that a further kind of site is a further class here and a row in `finding.py`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..closed_forms.attention import AttentionMoments, LinearMoments, factorize_linear, factorize_qk, factorize_vo
from ..closed_forms.width import HiddenUnits, narrow_mlp, order_units
from ..errors import InvalidValueError, RankPlanError
from .lowrank import LowRankAttention, LowRankLinear, NarrowLinear, empty_linear
from .mlps import MLPView
from .views import AttentionView


__all__ = ["AttentionSite", "LinearSite", "MLPSite", "Site", "Tokens", "block_of", "check_disjoint"]

_BLOCK = re.compile(r"^((?:.*\.)?\d+)(?:\.|$)")

Entry = int | Mapping[str, int]


@dataclass(frozen=True)
class Tokens:
    """How many tokens one sample sends through a site in a call: as queries (or rows of a linear layer), and as keys.

    `calls`: how often; more than once where blocks share a module.
    """

    queries: int
    keys: int
    calls: int = 1


class Site(Protocol):
    """One place that a rank or a width can be given to.

    Attributes:
        kind: `"attention"`, `"linear"` or `"mlp"`.
        replacement: class of the first of the substitutes.
        name: under which path plans name it.
    """

    kind: ClassVar[str]
    replacement: ClassVar[type[nn.Module]]
    name: str

    @property
    def moments_path(self) -> str:
        """Path of the module at which its moments are gathered, and under which statistics hold them."""
        ...

    @property
    def choices(self) -> dict[str, int]:
        """What can be chosen here, each with the rank (or width) from which on the weights better stay dense."""
        ...

    def entry(self, ranks: Mapping[str, int | None]) -> Entry | None:
        """Write chosen ranks as a plan has them; `None` if everything stays dense."""
        ...

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        """Read an entry of a plan; raises RankPlanError if it does not fit this site.

        With `wider` heads may be wider than the dense ones, as those are that adapters were merged into.
        """
        ...

    def saved_parameters(self, choice: str, rank: int | None) -> int:
        """How many parameters this choice at this rank removes."""
        ...

    def saved_macs(self, choice: str, rank: int | None, tokens: Tokens) -> int:
        """How many multiply-accumulates per sample this choice at this rank removes."""
        ...

    def dense_modules(self) -> dict[str, nn.Module]:
        """The modules that can be replaced here, by path."""
        ...

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        """Empty modules that replace the dense ones, by path; device and dtype are those of the dense ones."""
        ...

    def prepare(self, moments: Any | None = None) -> Any:
        """Do once what all ranks have in common; [`initialize`] takes the result in place of the moments."""
        ...

    def initialize(self, substitutes: Mapping[str, nn.Module], moments: Any | None = None) -> None:
        """Fill substitutes with the closed form, from the weights alone or from moments, prepared or not."""
        ...


@dataclass(frozen=True)
class AttentionSite:
    """An attention module: the choices `qk` and `vo` are ranks per head."""

    view: AttentionView
    kind: ClassVar[str] = "attention"
    replacement: ClassVar[type[nn.Module]] = LowRankAttention

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def moments_path(self) -> str:
        return self.view.name

    @property
    def choices(self) -> dict[str, int]:
        return {"qk": self.view.head_dim, "vo": self.view.head_dim}

    def entry(self, ranks: Mapping[str, int | None]) -> dict[str, int] | None:
        return {choice: ranks[choice] for choice in self.choices if ranks.get(choice) is not None} or None

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        chosen = isinstance(entry, Mapping) and any(rank is not None for rank in entry.values())
        if not chosen or set(entry) - set(self.choices):
            raise RankPlanError(
                f"{self.name} is an attention module: its ranks must be {{'qk': r, 'vo': r}} (one may be left out), "
                f"got {entry!r}."
            )
        for choice, rank in entry.items():
            if rank is not None:
                limit = self.view.query.in_features if wider else self.view.head_dim
                check_rank(f"{self.name}, {choice}", rank, limit, "the head dimension")
        return {choice: entry.get(choice) for choice in self.choices}

    def saved_parameters(self, choice: str, rank: int | None) -> int:
        if rank is None:
            return 0
        view, heads = self.view, self.view.num_heads
        cut = heads * (view.head_dim - rank)
        if choice == "qk":
            biases = (cut if view.query.bias is not None else 0) + _numel(view.key.bias)
            return cut * (view.query.in_features + view.key.in_features) + biases
        new_bias = view.output.out_features if view.output.bias is None else 0
        return cut * (view.value.in_features + view.output.out_features) + _numel(view.value.bias) - new_bias

    def saved_macs(self, choice: str, rank: int | None, tokens: Tokens) -> int:
        if rank is None:
            return 0
        view = self.view
        cut = tokens.calls * view.num_heads * (view.head_dim - rank)
        product = tokens.queries * tokens.keys
        if choice == "qk":
            return cut * (tokens.queries * view.query.in_features + tokens.keys * view.key.in_features + product)
        return cut * (tokens.keys * view.value.in_features + tokens.queries * view.output.out_features + product)

    def dense_modules(self) -> dict[str, nn.Module]:
        outside = {self.view.output_name: self.view.output} if self.view.family.output_in_parent else {}
        return {self.name: self.view.module, **outside}

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        view = self.view
        modules: dict[str, nn.Module] = {view.name: LowRankAttention.from_view(view, ranks.get("qk"), ranks.get("vo"))}
        if view.family.output_in_parent and ranks.get("vo") is not None:
            width = view.num_heads * ranks["vo"]
            modules[view.output_name] = empty_linear(view.output, view.output.out_features, width, True)
        return modules

    def prepare(self, moments: AttentionMoments | None = None) -> AttentionMoments | None:
        return moments

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: AttentionMoments | None = None) -> None:
        view, family = self.view, self.view.family
        attention = substitutes[view.name]
        if attention.qk_rank is not None:
            with _errors_name(f"{self.name}, qk"):
                factors = factorize_qk(
                    self._rows(view.query.weight),
                    self._rows(view.query.bias),
                    self._rows(view.key.weight),
                    attention.qk_rank,
                    moments=moments,
                )
            _fill(getattr(attention, family.query), factors.query_weight, factors.query_bias)
            _fill(getattr(attention, family.key), factors.key_weight, None)
        if attention.vo_rank is not None:
            with _errors_name(f"{self.name}, vo"):
                factors = factorize_vo(
                    self._rows(view.value.weight),
                    self._rows(view.value.bias),
                    view.output.weight.unflatten(1, (view.num_heads, view.head_dim)).transpose(0, 1),
                    view.output.bias,
                    attention.vo_rank,
                    moments=moments,
                )
            _fill(getattr(attention, family.value), factors.value_weight, None)
            output = substitutes[view.output_name] if family.output_in_parent else family.output_of(attention)
            output.weight.copy_(factors.output_weight.transpose(0, 1).flatten(1))
            output.bias.copy_(factors.output_bias)

    def _rows(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (self.view.num_heads, self.view.head_dim))


@dataclass(frozen=True)
class LinearSite:
    """A linear layer: its one choice is the rank of its two factors."""

    name: str
    linear: nn.Linear
    kind: ClassVar[str] = "linear"
    replacement: ClassVar[type[nn.Module]] = LowRankLinear

    @property
    def moments_path(self) -> str:
        return self.name

    @property
    def choices(self) -> dict[str, int]:
        # From here on two factors have no fewer parameters than the dense weight.
        n, m = self.linear.in_features, self.linear.out_features
        return {"rank": -(-n * m // (n + m))}

    def entry(self, ranks: Mapping[str, int | None]) -> int | None:
        return ranks.get("rank")

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        check_rank(self.name, entry, min(self.linear.in_features, self.linear.out_features), "the smaller side")
        return {"rank": entry}

    def saved_parameters(self, choice: str, rank: int | None) -> int:
        if rank is None:
            return 0
        n, m = self.linear.in_features, self.linear.out_features
        return n * m - rank * (n + m) - (m if self.linear.bias is None else 0)

    def saved_macs(self, choice: str, rank: int | None, tokens: Tokens) -> int:
        if rank is None:
            return 0
        n, m = self.linear.in_features, self.linear.out_features
        return tokens.calls * tokens.queries * (n * m - rank * (n + m))

    def dense_modules(self) -> dict[str, nn.Module]:
        return {self.name: self.linear}

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        weight = self.linear.weight
        with torch.device("meta"):
            module = LowRankLinear(
                self.linear.in_features, self.linear.out_features, ranks["rank"], dtype=weight.dtype
            )
        return {self.name: module.to_empty(device=weight.device).train(self.linear.training)}

    def prepare(self, moments: LinearMoments | None = None) -> LinearMoments | None:
        return moments

    @torch.no_grad()
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: LinearMoments | None = None) -> None:
        module = substitutes[self.name]
        with _errors_name(self.name):
            factors = factorize_linear(self.linear.weight, self.linear.bias, module.rank, moments=moments)
        module.first_factor.weight.copy_(factors.first_weight)
        module.weight.copy_(factors.second_weight)
        if factors.bias is None:
            module.bias.zero_()
        else:
            module.bias.copy_(factors.bias)


@dataclass(frozen=True)
class MLPSite:
    """A known MLP: its one choice is its width, how many hidden units are kept."""

    view: MLPView
    kind: ClassVar[str] = "mlp"
    replacement: ClassVar[type[nn.Module]] = NarrowLinear

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def moments_path(self) -> str:
        # What enters the output layer are the hidden units.
        return self.view.output_name

    @property
    def choices(self) -> dict[str, int]:
        return {"width": self.view.width}

    def entry(self, ranks: Mapping[str, int | None]) -> dict[str, int] | None:
        width = ranks.get("width")
        return None if width is None else {"width": width}

    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        if not isinstance(entry, Mapping) or set(entry) != {"width"}:
            raise RankPlanError(f"{self.name} is an MLP: its entry must be {{'width': k}}, got {entry!r}.")
        check_rank(self.name, entry["width"], self.view.width, "its hidden units", "width")
        return {"width": entry["width"]}

    def saved_parameters(self, choice: str, rank: int | None) -> int:
        if rank is None:
            return 0
        view, cut = self.view, self.view.width - rank
        a_unit = sum(first.in_features + (first.bias is not None) for _, first in view.first)
        new_bias = view.output.out_features if view.output.bias is None else 0
        return cut * (a_unit + view.output.out_features) - new_bias

    def saved_macs(self, choice: str, rank: int | None, tokens: Tokens) -> int:
        if rank is None:
            return 0
        view = self.view
        a_unit = sum(first.in_features for _, first in view.first) + view.output.out_features
        return tokens.calls * tokens.queries * (view.width - rank) * a_unit

    def dense_modules(self) -> dict[str, nn.Module]:
        return self.view.layers()

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        view, width = self.view, ranks["width"]
        modules: dict[str, nn.Module] = {
            path: empty_linear(first, width, first.in_features, first.bias is not None, NarrowLinear)
            for path, first in view.first
        }
        modules[view.output_name] = empty_linear(view.output, view.output.out_features, width, True, NarrowLinear)
        return modules

    @torch.no_grad()
    def prepare(self, moments: LinearMoments | HiddenUnits | None = None) -> HiddenUnits:
        if isinstance(moments, HiddenUnits):
            return moments
        scale = torch.ones(self.view.width, dtype=torch.float64, device=self.view.output.weight.device)
        for _, first in self.view.first:
            # A gated unit is a product.
            bias = 0.0 if first.bias is None else first.bias.double().square()
            scale *= (first.weight.double().square().sum(1) + bias).sqrt()
        with _errors_name(self.name):
            return order_units(self.view.output.weight, moments, importance=scale)

    @torch.no_grad()
    def initialize(
        self, substitutes: Mapping[str, nn.Module], moments: LinearMoments | HiddenUnits | None = None
    ) -> None:
        view, output, units = self.view, substitutes[self.view.output_name], self.prepare(moments)
        with _errors_name(self.name):
            factors = narrow_mlp(view.output.weight, view.output.bias, output.in_features, units)
        for path, first in view.first:
            substitutes[path].weight.copy_(first.weight[factors.units])
            if first.bias is not None:
                substitutes[path].bias.copy_(first.bias[factors.units])
        output.weight.copy_(factors.output_weight)
        output.bias.copy_(factors.output_bias)


def check_disjoint(sites: Iterable[Site], entries: Mapping[str, Any]) -> None:
    """Raise RankPlanError if two sites named in a plan replace one module: an MLP's width, and a rank in a layer."""
    owners: dict[str, str] = {}
    for site in sites:
        for path in site.dense_modules():
            other = owners.setdefault(path, site.name)
            if other != site.name:
                raise RankPlanError(
                    f"{other} has the entry {entries[other]!r} and {site.name} the entry {entries[site.name]!r}; both "
                    f"replace {path}, expected a width for the MLP or ranks for its layers. Take one of the two out "
                    "of the plan."
                )


def block_of(name: str) -> str | None:
    """Path of the block that a module lies in, its innermost numbered parent; `None` outside all blocks."""
    match = _BLOCK.match(name.rpartition(".")[0])
    return match[1] if match else None


def check_rank(where: str, rank: Any, limit: int, what: str, choice: str = "rank") -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
        raise RankPlanError(f"{where}: the {choice} must be a whole number from 1 to {limit} ({what}), got {rank!r}.")


@contextmanager
def _errors_name(where: str) -> Iterator[None]:
    try:
        yield
    except InvalidValueError as error:
        raise type(error)(f"{where}: {error}") from error


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight.flatten(0, 1))
    if linear.bias is not None:
        linear.bias.copy_(bias.flatten())
