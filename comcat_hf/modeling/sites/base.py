"""What every kind of site has."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import InvalidValueError, RankPlanError
from ..rows import Rows


_BLOCK = re.compile(r"^((?:.*\.)?\d+)(?:\.|$)")

Entry = int | Mapping[str, int]
Ranks = Mapping[str, int | None]


@dataclass(frozen=True)
class Tokens:
    """How many tokens one sample sends through a site in a call: as queries (or rows of a linear layer), and as keys.

    `calls`: how often; more than once where blocks share a module. `seen`: how many keys a query attends to, where it
    attends within a window.
    """

    queries: int
    keys: int
    calls: int = 1
    seen: int | None = None


class Site(ABC):
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
        return self.name

    @property
    @abstractmethod
    def moments_shape(self) -> tuple[int, ...]:
        """Shape of its second moments."""

    @property
    @abstractmethod
    def choices(self) -> dict[str, int]:
        """What can be chosen here, each with the rank (or width) from which on the weights better stay dense."""

    @property
    def full_ranks(self) -> dict[str, int]:
        """The rank (or width) of the dense weights, by choice."""
        return self.choices

    @property
    @abstractmethod
    def input_width(self) -> int:
        """Width of the hidden states that enter it."""

    @property
    @abstractmethod
    def output_layer(self) -> tuple[str, nn.Linear]:
        """Path and module of the linear layer that it ends in."""

    @property
    def input_layers(self) -> list[nn.Linear | Rows]:
        """The layers that read hidden states, where there are others behind them in this site; by default none."""
        return []

    def entry(self, ranks: Ranks) -> Entry | None:
        """Write chosen ranks as a plan has them; `None` if everything stays dense."""
        return {choice: ranks[choice] for choice in self.choices if ranks.get(choice) is not None} or None

    @abstractmethod
    def ranks(self, entry: Any, *, wider: bool = False) -> dict[str, int | None]:
        """Read an entry of a plan; raises RankPlanError if it does not fit this site.

        With `wider` heads may be wider than the dense ones, as those are that adapters were merged into.
        """

    @abstractmethod
    def saved_parameters(self, choice: str, rank: int) -> int:
        """How many parameters this choice at this rank removes."""

    @abstractmethod
    def saved_macs(self, choice: str, rank: int, tokens: Tokens) -> int:
        """How many multiply-accumulates per sample this choice at this rank removes."""

    @abstractmethod
    def signature(self, tokens: Tokens) -> str:
        """All that its time depends on, in words; sites that agree in it are timed once."""

    @abstractmethod
    def dense_modules(self) -> dict[str, nn.Module]:
        """The modules that can be replaced here, by path."""

    @abstractmethod
    def substitutes(self, ranks: Ranks) -> dict[str, nn.Module]:
        """Empty modules that replace the dense ones, by path; device and dtype are those of the dense ones."""

    @abstractmethod
    def run(self, modules: Mapping[str, nn.Module], states: Tensor, config: Any = None) -> Any:
        """Run its modules, dense or not, on hidden states `(batch, tokens, input_width)`; `config` is the model's."""

    def prepare(self, moments: Any | None = None) -> Any:
        """Do once what all ranks have in common; methods that take moments take the result in their place."""
        return moments

    @abstractmethod
    def initialize(self, substitutes: Mapping[str, nn.Module], moments: Any | None = None) -> None:
        """Fill substitutes with the closed form, from the weights alone or from moments."""

    def spectrum(self, choice: str, moments: Any | None = None) -> Tensor:
        """Singular values `(..., n)` of what a rank truncates, of the weights or as the data sees them; ranks only."""
        raise NotImplementedError

    @torch.no_grad()
    def discarded(self, choice: str, moments: Any | None = None) -> Tensor:
        """The share of a choice's energy that each rank from 0 on discards, float64 on the CPU; not increasing.

        For a rank the squared tail of the spectrum, summed over heads, relative to the whole.

        Raises:
            InvalidValueError: weights that are not finite or have no data, moments of another shape.
        """
        with errors_name(f"{self.name}, {choice}"):
            spectrum = self.spectrum(choice, moments)
        energy = spectrum.cpu().square().reshape(-1, spectrum.shape[-1]).sum(0)
        tail = energy.flip(0).cumsum(0).flip(0)
        return tail / tail[0] if tail[0] > 0 else torch.zeros_like(tail)

    def to_singular_basis(self, choice: str, moments: Any | None = None) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """Write the weights in their singular basis, in place; for ranks only.

        Returns:
            the module whose output channels are the singular values, in order, in each head; and, by path, modules to
            put in the place of dense ones.
        """
        raise NotImplementedError


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
def errors_name(where: str) -> Iterator[None]:
    """Within it an InvalidValueError says where."""
    try:
        yield
    except InvalidValueError as error:
        raise type(error)(f"{where}: {error}") from error


def biases_of(layers: Iterable[nn.Linear]) -> str:
    """Which of these layers have a bias, as `"bb-b"`."""
    return "".join("b" if linear.bias is not None else "-" for linear in layers)
