"""Where a sibling projects what attention gives, what adapters add to the projection goes there beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...modeling.stand_in import split_heads


__all__ = ["Handover", "MergedHandover", "hand_over"]


class Handover:
    """A forward hook of a projection that adds what its attention module has computed for it.

    The projection keeps its place, its input and its name, so adapters of other methods go into it as ever. The
    attention module always runs before, in the same block; a hook with nothing to add changes nothing.
    """

    def __init__(self) -> None:
        self.pending: Tensor | None = None

    @staticmethod
    def at(linear: nn.Module) -> "Handover":
        """The one of this projection: at most one is put there."""
        found = next((hook for hook in linear._forward_hooks.values() if isinstance(hook, Handover)), None)
        if found is None:
            found = Handover()
            linear.register_forward_hook(found)
        return found

    def leave(self, linear: nn.Module) -> None:
        """Take the hook off a projection."""
        for key in [key for key, hook in linear._forward_hooks.items() if hook is self]:
            del linear._forward_hooks[key]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        pending, self.pending = self.pending, None
        return None if pending is None else output + pending.to(output.dtype)


def hand_over(
    handover: Handover, output: Any, split: Callable[[Tensor], tuple[Tensor, Tensor | None]], alone: bool
) -> Any:
    """Give the wider heads' outputs of a module back as those of its dense heads, and the rest to its sibling.

    Args:
        handover: of the sibling.
        output: of the module: a tensor, or a tuple.
        split: gives the dense heads' part of `(..., H * width)`, and what is to be added to its projection.
        alone: whether only the first of a tuple is such a tensor; else the sibling gets all, one behind the other.
    """
    parts = output if isinstance(output, tuple) else (output,)
    count = 1 if alone else len(parts)
    pairs = [split(part) for part in parts[:count]]
    if pairs[0][1] is not None:
        added = [further for _, further in pairs]
        handover.pending = added[0] if count == 1 else torch.cat(added, dim=1)
    own = tuple(part for part, _ in pairs)
    return (*own, *parts[count:]) if isinstance(output, tuple) else own[0]


class MergedHandover:
    """A forward hook of an attention module whose heads are wider, with what adapters add to its sibling in it.

    Args:
        linear: the sibling.
        num_heads: of the heads that the module gives.
        p: how many columns of each the sibling knows.
        alone: as for [`hand_over`].
    """

    def __init__(self, linear: nn.Module, num_heads: int, p: int, alone: bool) -> None:
        self.handover, self.num_heads, self.p, self.alone = Handover.at(linear), num_heads, p, alone

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        def split(states: Tensor) -> tuple[Tensor, Tensor | None]:
            heads = split_heads(states, self.num_heads)
            further, own = module.further_output, heads[..., : self.p].flatten(-2)
            if further is None:
                return own, None
            columns = further.in_features // self.num_heads
            return own, further(heads[..., self.p : self.p + columns].flatten(-2))

        return hand_over(self.handover, output, split, self.alone)
