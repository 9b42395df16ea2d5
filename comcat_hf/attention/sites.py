"""Sites: the places of a model that a rank plan can give a rank to.

A site knows its dense module or modules, which entries of a plan it takes, what those cost, which modules replace the
dense ones and how the replacements get their factors. Everything above (tuner, native loading, allocation) works on
sites alone, so that a further kind of site is a further class here and a row in `_FINDERS`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import InvalidValueError, RankPlanError, UnsupportedModuleError
from ..factorization import AttentionMoments, LinearMoments, factorize_linear, factorize_qk, factorize_vo
from .modules import LowRankAttention, LowRankLinear, low_rank_projection
from .views import AttentionView, attention_paths, attention_views, class_path, is_plain_linear, named_base_modules


__all__ = ["SCOPES", "AttentionSite", "LinearSite", "Site", "find_sites"]

SCOPES = ("model", "attention", "mlp")

_BLOCK = re.compile(r"^((?:.*\.)?\d+)(?:\.|$)")
_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "head", "score")

Entry = int | Mapping[str, int]


@dataclass(frozen=True)
class Tokens:
    """How many tokens one sample sends through a site: as queries (or rows of a linear layer), and as keys."""

    queries: int
    keys: int


class Site(Protocol):
    """One place that a rank can be given to."""

    kind: ClassVar[str]
    name: str

    @property
    def choices(self) -> dict[str, int]:
        """What can be chosen here, each with the rank from which on the weights better stay dense."""
        ...

    def entry(self, ranks: Mapping[str, int | None]) -> Entry | None:
        """Write chosen ranks as a plan has them; `None` if everything stays dense."""
        ...

    def ranks(self, entry: Any) -> dict[str, int | None]:
        """Read an entry of a plan; raises RankPlanError if it does not fit this site."""
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

    def initialize(self, substitutes: Mapping[str, nn.Module], moments: Any | None = None) -> None:
        """Fill substitutes with the closed form, from the weights alone or from moments."""
        ...


@dataclass(frozen=True)
class AttentionSite:
    """An attention module: the choices `qk` and `vo` are ranks per head."""

    view: AttentionView
    kind: ClassVar[str] = "attention"

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def choices(self) -> dict[str, int]:
        return {"qk": self.view.head_dim, "vo": self.view.head_dim}

    def entry(self, ranks: Mapping[str, int | None]) -> dict[str, int] | None:
        return {choice: ranks[choice] for choice in self.choices if ranks.get(choice) is not None} or None

    def ranks(self, entry: Any) -> dict[str, int | None]:
        chosen = isinstance(entry, Mapping) and any(rank is not None for rank in entry.values())
        if not chosen or set(entry) - set(self.choices):
            raise RankPlanError(
                f"{self.name} is an attention module: its ranks must be {{'qk': r, 'vo': r}} (one may be left out), "
                f"got {entry!r}."
            )
        for choice, rank in entry.items():
            if rank is not None:
                _check_rank(f"{self.name}, {choice}", rank, self.view.head_dim, "the head dimension")
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
        cut = view.num_heads * (view.head_dim - rank)
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
            modules[view.output_name] = low_rank_projection(view.output, view.output.out_features, width, True)
        return modules

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
            output = substitutes[view.output_name] if family.output_in_parent else getattr(attention, family.output)
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

    @property
    def choices(self) -> dict[str, int]:
        # From here on two factors have no fewer parameters than the dense weight.
        n, m = self.linear.in_features, self.linear.out_features
        return {"rank": -(-n * m // (n + m))}

    def entry(self, ranks: Mapping[str, int | None]) -> int | None:
        return ranks.get("rank")

    def ranks(self, entry: Any) -> dict[str, int | None]:
        _check_rank(self.name, entry, min(self.linear.in_features, self.linear.out_features), "the smaller side")
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
        return tokens.queries * (n * m - rank * (n + m))

    def dense_modules(self) -> dict[str, nn.Module]:
        return {self.name: self.linear}

    def substitutes(self, ranks: Mapping[str, int | None]) -> dict[str, nn.Module]:
        weight = self.linear.weight
        with torch.device("meta"):
            module = LowRankLinear(
                self.linear.in_features, self.linear.out_features, ranks["rank"], dtype=weight.dtype
            )
        return {self.name: module.to_empty(device=weight.device).train(self.linear.training)}

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


def block_of(name: str) -> str | None:
    """Path of the block that a module lies in, its innermost numbered parent; `None` outside all blocks."""
    match = _BLOCK.match(name.rpartition(".")[0])
    return match[1] if match else None


def _attention_sites(model: nn.Module) -> Iterator[AttentionSite]:
    yield from map(AttentionSite, attention_views(model).values())


def _mlp_sites(model: nn.Module) -> Iterator[LinearSite]:
    """Linear layers of the blocks that hold attention, outside it."""
    attention = attention_paths(model)
    blocks = {block for name in attention if (block := block_of(name))}
    for name, linear in _plain_linears(model):
        if _lies_under(name, blocks) and not _lies_under(name, attention):
            yield LinearSite(name, linear)


def _classifier_sites(model: nn.Module) -> Iterator[LinearSite]:
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for name, linear in _plain_linears(model):
        # SigLIP's text tower names its projection `head`.
        if name in _CLASSIFIERS and labels in (None, linear.out_features):
            yield LinearSite(name, linear)


_FINDERS: dict[str, tuple[Callable[[nn.Module], Iterator[Site]], ...]] = {
    "attention": (_attention_sites,),
    "mlp": (_mlp_sites,),
    "linear": (_mlp_sites, _classifier_sites),
    "model": (_attention_sites, _mlp_sites, _classifier_sites),
}


def find_sites(model: nn.Module, scope: str = "model") -> dict[str, Site]:
    """Every site of a model within a scope, by path, in the order of the model's modules.

    Args:
        model: a transformers model, with or without adapters.
        scope: `"model"` (attention, MLP and classifier), `"attention"`, `"mlp"` or `"linear"` (MLP and classifier).

    Raises:
        InvalidValueError: unknown scope.
        UnsupportedModuleError: the model has no attention that is known, or one that is not known.
    """
    if scope not in _FINDERS:
        raise InvalidValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    sites = {site.name: site for finder in _FINDERS[scope] for site in finder(model)}
    if not sites and scope in SCOPES:
        raise UnsupportedModuleError(
            f"{class_path(type(model))} has nothing to factorise in scope {scope!r}: no known attention module was "
            "found, or all are low-rank already. Models whose attention modules are known are listed in "
            "docs/constraints.md."
        )
    order = {name: index for index, (name, _, _) in enumerate(named_base_modules(model))}
    return dict(sorted(sites.items(), key=lambda item: order[item[0]]))


def _plain_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers whose weight no other module shares."""
    owners: dict[int, int] = {}
    modules = list(named_base_modules(model))
    low_rank = [name for name, module, _ in modules if isinstance(module, LowRankLinear)]
    for _, module, _ in modules:
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module, _ in modules:
        plain = is_plain_linear(module) and owners[id(module.weight)] == 1
        if plain and not _lies_under(name, low_rank):
            yield name, module


def _lies_under(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _check_rank(where: str, rank: Any, limit: int, what: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
        raise RankPlanError(f"{where}: the rank must be a whole number from 1 to {limit} ({what}), got {rank!r}.")


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
