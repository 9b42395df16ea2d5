"""What the blocks of a model are called with, recorded once so that each can be run again alone."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.inputs import run_batch
from ..calibration.statistics import token_mask


__all__ = ["Calls", "Reached", "blocks_between", "record_calls", "stop"]


class Reached(Exception):
    """The module that a run is for has been called."""


def stop(module: nn.Module, *args: Any) -> None:
    """A hook that ends the run."""
    raise Reached


@dataclass
class Calls:
    """The calls of one block, one a batch: arguments, token masks, hidden states in and out of either model.

    `chained`: it takes what the block before it gives, so that its inputs need not be kept.
    """

    chained: bool = False
    arguments: list[tuple[tuple, dict]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    dense_in: list[Tensor] = field(default_factory=list)
    dense_out: list[Tensor] = field(default_factory=list)
    small_in: list[Tensor] = field(default_factory=list)
    small_out: list[Tensor] = field(default_factory=list)

    def follow(self, before: "Calls | None") -> None:
        """Take what the block before gives, in either model; both take the same where it does not give it."""
        if self.chained:
            self.dense_in, self.small_in = before.dense_out, before.small_out
        else:
            self.small_in = self.dense_in

    def run(self, block: nn.Module, states: Tensor, index: int) -> Tensor:
        """The hidden states that the block gives for those, called as it was with a batch."""
        args, kwargs = self.arguments[index]
        output = block(states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def blocks_between(model: nn.Module, blocks: Collection[str]) -> list[str]:
    """These blocks and, since what was compressed before drifts through them, those between them; in order."""
    names = [name for name, _ in model.named_modules()]
    order: list[str] = []
    for stack in {path.rpartition(".")[0] for path in blocks}:
        found = [n for n in names if n.rpartition(".")[0] == stack and n.rpartition(".")[2].isdigit()]
        places = [index for index, name in enumerate(found) if name in blocks]
        order += found[places[0] : places[-1] + 1]
    return [name for name in names if name in order]


def record_calls(model: nn.Module, paths: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> dict[str, Calls]:
    """Run the dense model and keep what its blocks are called with.

    Where each block of the first batch takes the output of the one before and otherwise the same objects as the first
    block, so it is for all batches, and these run up to the first block alone.
    """
    calls = {path: Calls() for path in paths}
    gave: dict[str, Tensor] = {}
    alike = False

    def before(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        record, kwargs = calls[path], dict(kwargs)
        states = args[0] if args else kwargs.pop(next(iter(signature(module.forward).parameters)))
        record.dense_in.append(states)
        record.arguments.append((args[1:], kwargs))
        mask = holder.mask
        fits = isinstance(mask, Tensor) and mask.shape == states.shape[:-1]
        record.masks.append(mask if fits else None)

    def after(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        gave[path] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        holder = stack.enter_context(token_mask(model))
        for path in paths:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(after, path)).remove)
        for index, batch in enumerate(inputs):
            if alike:
                with suppress(Reached):
                    run_batch(model, batch, index)
                for path in paths[1:]:
                    calls[path].arguments.append(calls[paths[0]].arguments[-1])
                    calls[path].masks.append(calls[paths[0]].masks[-1])
                continue
            run_batch(model, batch, index)
            for previous, path in pairwise(path for path in paths if path in gave):
                record = calls[path]
                record.chained = record.chained if index else torch.equal(gave[previous], record.dense_in[0])
                if record.chained:
                    record.dense_in.clear()
            if index == 0 and paths and all(_alike(calls[path], calls[paths[0]]) for path in paths[1:]):
                alike = True
                # Behind the hook that keeps the call.
                stack.callback(model.get_submodule(paths[0]).register_forward_pre_hook(stop).remove)
    return calls


def _alike(one: Calls, first: Calls) -> bool:
    """Whether a block was called once, in a chain, with the very objects that the first block was called with."""
    if not (one.chained and len(one.arguments) == len(first.arguments) == 1):
        return False
    (args, kwargs), (others, named) = one.arguments[0], first.arguments[0]
    return (
        len(args) == len(others)
        and all(map(_same, args, others))
        and kwargs.keys() == named.keys()
        and all(_same(kwargs[name], named[name]) for name in kwargs)
        and _same(one.masks[0], first.masks[0])
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, (int, float, str)) and type(one) is type(other) and one == other)
