"""Heads with further columns under norms and rotations by positions, which the further columns pass unchanged."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModuleError


__all__ = ["HeadNorm", "WiderTables", "norm_heads", "place", "take"]


def place(own: Tensor, further: Sequence[Tensor], width: int, layout: str = "pairs") -> Tensor:
    """The columns of a head, `(..., p)`, and further ones, filled up with zeros, as `(..., width)`.

    Args:
        own: the columns that a rotation turns.
        further: those that it must not turn.
        width: of the result.
        layout: `"pairs"` puts the further columns behind; `"halves"` half of them behind either half of the head.
    """
    p = own.shape[-1]
    if layout == "pairs":
        states = torch.cat([own, *further], dim=-1) if further else own
        return F.pad(states, (0, width - states.shape[-1])) if states.shape[-1] < width else states
    half = (width - p) // 2
    more = torch.cat([*further, own.new_zeros(*own.shape[:-1], 0)], dim=-1)
    more = F.pad(more, (0, 2 * half - more.shape[-1]))
    return torch.cat([own[..., : p // 2], more[..., :half], own[..., p // 2 :], more[..., half:]], dim=-1)


def take(states: Tensor, p: int, layout: str = "pairs") -> tuple[Tensor, Tensor]:
    """What [`place`] put side by side: the p columns of a head, and the further ones with what fills them up."""
    if layout == "pairs":
        return states[..., :p], states[..., p:]
    first, second = states.chunk(2, dim=-1)
    own, more = ([part[..., at] for part in (first, second)] for at in (slice(p // 2), slice(p // 2, None)))
    return torch.cat(own, dim=-1), torch.cat(more, dim=-1)


def norm_heads(
    norm: Callable[[Tensor], Tensor],
    states: Tensor,
    p: int,
    width: int,
    layout: str,
    factor: float = 1.0,
    change: Callable[[Tensor], Tensor] = lambda own: own,
) -> Tensor:
    """Apply a norm to the heads' own columns.

    Args:
        norm: of one head, or across heads where `states` are `(..., H * width)`.
        states: `(..., width)` or `(..., H * width)`.
        p: columns of a head that are normalised.
        width: columns of a head.
        layout: as for [`place`].
        factor: multiplies the result.
        change: what else is done to the normalised columns, `(..., p)`.
    """
    flat = states.shape[-1] != width
    heads = states.unflatten(-1, (-1, width)) if flat else states
    own, further = take(heads, p, layout)
    own = change(norm(own.flatten(-2)).unflatten(-1, (-1, p)) if flat else norm(own))
    normed = place(own, [further.to(own.dtype)], width, layout)
    normed = normed if factor == 1 else normed * factor
    return normed.flatten(-2) if flat else normed


class HeadNorm(nn.Module):
    """A norm of a module whose heads have been widened, for the columns that it knows.

    Args:
        norm: the dense module's.
        p, width, layout, factor: as for [`norm_heads`].
    """

    def __init__(self, norm: nn.Module, p: int, width: int, layout: str, factor: float) -> None:
        super().__init__()
        self.norm, self.p, self.width, self.layout, self.factor = norm, p, width, layout, factor

    def forward(self, states: Tensor) -> Tensor:
        return norm_heads(self.norm, states, self.p, self.width, self.layout, self.factor)


@dataclass(frozen=True)
class WiderTables:
    """Widens the rotary tables among the arguments of a module whose heads are wider, as a pre-hook or by hand.

    Attributes:
        name: the argument of `forward`.
        place: its place, or `None` where it is given by name alone.
        p, width, layout: as for [`place`].
    """

    name: str
    place: int | None
    p: int
    width: int
    layout: str

    @classmethod
    def of(cls, host: type[nn.Module], name: str, p: int, width: int, layout: str) -> "WiderTables":
        names = list(inspect.signature(host.forward).parameters)[1:]
        return cls(name, names.index(name) if name in names else None, p, width, layout)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.name in kwargs:
            return args, {**kwargs, self.name: self._widen(kwargs[self.name])}
        if self.place is not None and self.place < len(args):
            wider = self._widen(args[self.place])
            return (*args[: self.place], wider, *args[self.place + 1 :]), kwargs
        return args, kwargs

    def _widen(self, tables: Any) -> Any:
        """Tables whose further columns do not rotate: cosines of 1 and sines of 0, or complex numbers of 1."""
        if tables is None:
            return None
        if isinstance(tables, Tensor):
            return self._filled(tables, 1.0)
        if len(tables) == 2 and not any(not isinstance(t, Tensor) or t.is_complex() for t in tables):
            return type(tables)(map(self._filled, tables, (1.0, 0.0)))
        return type(tables)(map(self._widen, tables))

    def _filled(self, table: Tensor, value: float) -> Tensor:
        more = self.width - self.p
        if table.is_complex():
            return torch.cat([table, table.new_full((*table.shape[:-1], more // 2), value)], dim=-1)
        if table.shape[-1] % self.p:
            raise UnsupportedModuleError(
                f"The rotary tables {self.name} are {table.shape[-1]} wide; expected {self.p}, the width of a head, "
                "or a multiple of it. Leave queries, keys and values dense (an adapter with core=True widens no head)."
            )
        heads = table.unflatten(-1, (-1, self.p))
        return place(heads, [heads.new_full((*heads.shape[:-1], more), value)], self.width, self.layout).flatten(-2)
