"""Running a host library's own attention with heads of another width.

What stands between the projections and the kernel (norms, masks, reshapes, residuals) stays the host's: a stand-in
of its class runs its `forward`. Replaced are only the projections, the norms of queries and keys, which pass further
columns by, the width and the number of heads.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .families import AttentionFamily, Stream


__all__ = ["Projections", "StandIn", "common_width", "fold_heads", "pad_heads", "split_heads"]


# Under which names diffusers' modules hold input projections a second time, as one: the stream, and the roles.
_FUSED = {
    "to_qkv": (0, ("query", "key", "value")),
    "to_kv": (0, ("key", "value")),
    "to_added_qkv": (1, ("query", "key", "value")),
}


class Projections(Protocol):
    """What a stand-in projects with: `(..., d)` to `(..., H * width)`, and for the output back."""

    def query(self, states: Tensor) -> Tensor: ...

    def key(self, states: Tensor) -> Tensor: ...

    def value(self, states: Tensor) -> Tensor: ...

    def output(self, states: Tensor) -> Tensor: ...

    def fused(self, states: Tensor) -> Tensor: ...


class StandIn(nn.Module):
    """An instance of a subclass of a host's attention class that has no parameters of its own.

    Every attribute that is not replaced is looked up in the host module at every use: it follows changes of the
    processor, of hooks and of the mode.
    """

    _size: tuple[int, int, int | None] | None

    @staticmethod
    def of(
        host: nn.Module,
        family: AttentionFamily,
        projections: Projections,
        cls: type[nn.Module] | None = None,
        further: Sequence[Projections] = (),
    ) -> "StandIn":
        """A stand-in that projects with `projections`; call [`resize`] before its first use.

        Args:
            host: the attention module.
            family: its family.
            projections: what it projects with.
            cls: the host's class whose `forward` is run, by default that of `host`.
            further: what it projects further streams with, and `norm_query` and `norm_key` of each.
        """
        cls = _stand_in_class(cls or type(host))  # type: ignore[arg-type]
        stand_in = cls.__new__(cls)
        own = stand_in.__dict__
        own["_host"], own["_family"], own["_size"] = host, family, None
        for stream, with_it in zip(family.streams_of(host), (projections, *further), strict=True):
            _replace(own, host, stream, with_it)
        if family.scale_of is not None:
            for name, (index, roles) in _FUSED.items():
                if index <= len(further):
                    given = (projections, *further)[index]
                    own[name] = functools.partial(_side_by_side, tuple(getattr(given, role) for role in roles))
        return stand_in

    def resize(self, num_heads: int, width: int, num_kv_heads: int | None = None) -> None:
        """Say how many heads the projections give, and of which width; fewer of keys and values, if given."""
        if self._size == (num_heads, width, num_kv_heads):
            return
        family = self._family
        # A class that reads the number off a configuration takes it from the width of its states.
        if "." not in family.num_heads:
            setattr(self, family.num_heads, num_heads)
        for names, count in zip(family.sizes, (num_heads, num_kv_heads or num_heads), strict=True):
            for name in names:
                setattr(self, name, count * width)
        if family.head_dim is not None:
            setattr(self, family.head_dim, width)
        if family.scale_of is not None:
            setattr(self, family.scaling, width**-0.5)
        if family.output_in_parent:
            # The heads' outputs are given their shape by it.
            self.all_head_size = num_heads * width
        self._size = (num_heads, width, num_kv_heads)

    def __getattr__(self, name: str) -> Any:
        # Reached for what is not in the instance and not in the class.
        host = self.__dict__.get("_host")
        if host is None:
            raise AttributeError(name)
        return getattr(host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would look for its slots, which are the host's.
        object.__setattr__(self, name, value)


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """`(..., H * width)` as `(..., H, width)`."""
    return states.unflatten(-1, (num_heads, -1))


def fold_heads(parts: Sequence[Tensor], width: int) -> Tensor:
    """Parts of heads, `(..., H, any)`, side by side and filled up with zeros, as `(..., H * width)`."""
    filled = sum(part.shape[-1] for part in parts)
    states = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
    return (F.pad(states, (0, width - filled)) if filled < width else states).flatten(-2)


def pad_heads(states: Tensor, num_heads: int, width: int) -> Tensor:
    """`(..., H * narrow)` as `(..., H * width)`, each head filled up with zeros."""
    return fold_heads([split_heads(states, num_heads)], width)


def common_width(query: int, value: int) -> int:
    """One width for query, key and value: with unequal ones SDPA takes the path that holds every score in memory.

    A multiple of 8: GPU kernels ask for it, and those of the CPU are the faster for it.
    """
    return -(-max(query, value) // 8) * 8


def _replace(own: dict[str, Any], host: nn.Module, stream: Stream, projections: Projections) -> None:
    """Put projections and norms in the place of those of one stream of the host."""
    fused = stream.query == stream.key == stream.value
    for role in ("query", "key", "value"):
        own[getattr(stream, role)] = projections.fused if fused else getattr(projections, role)
        name = getattr(stream, f"norm_{role}", None)
        if name is not None and hasattr(projections, f"norm_{role}") and getattr(host, name, None) is not None:
            own[name] = getattr(projections, f"norm_{role}")
    name, _, index = (stream.output or "").partition(".")
    if name and getattr(host, name, None) is not None:
        own[name] = [projections.output, *getattr(host, name)[1:]] if index else projections.output


def _side_by_side(projections: Sequence[Callable[[Tensor], Tensor]], states: Tensor) -> Tensor:
    return torch.cat([project(states) for project in projections], dim=-1)


@functools.cache
def _stand_in_class(host: type[nn.Module]) -> type[StandIn]:
    return type(f"StandIn{host.__name__}", (StandIn, host), {"__module__": __name__})
