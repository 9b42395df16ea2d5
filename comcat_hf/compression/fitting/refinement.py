"""Label-free training of compressed factors: the hidden states of every block, and the output, follow the dense ones.

The closed forms and compensation solve one layer after the other. Here the factors are trained together, for some
hundreds of steps on the calibration inputs (docs/method.md). What is trained is a copy in float32; at the end the
weights that drift least on samples kept apart are written into the model.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from ...checks import above, check, whole
from ...errors import InvalidValueError
from ...modeling import measuring, unwrapped
from ...modeling.sites import block_of
from ...progress import progress_bar
from ..calibration.inputs import cut_batch, main_input, prepare_batch, read_batches, run_batch
from ..calibration.outputs import main_output
from ..calibration.statistics import TokenMask, token_mask
from ..request import check_merged
from .calls import Calls, blocks_between, record_calls
from .descent import Descent, Errors, Refinement
from .whitening import input_moments


__all__ = ["Refinement", "refine"]

# One mini-batch in so many is kept apart; about so many samples at most.
_APART, _MOST_APART = 8, 256

# Inputs of layers are read on so many mini-batches, for the coordinates in which they are trained.
_READ = 16

# The dense model's states are kept up to this size in bytes; those beyond it are computed again at each step.
_KEPT = 2**31

# Of the learning rate by default. Thousands of steps at higher ones do worse, or lose the start and never find back.
_HIGHEST_RATE = 0.03

State = tuple[Tensor, Tensor | None]


@torch.inference_mode(False)
@torch.enable_grad()
def refine(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    steps: int = 300,
    *,
    learning_rate: float | None = None,
    batch_size: int = 32,
    by_block: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Refinement:
    """Train the factors of a compressed model, in place, so that its hidden states follow the dense model's.

    No labels. AdamW, in coordinates in which the inputs of a layer are white, with a learning rate that rises and then
    falls along a cosine, dropout off. Trained are the layers whose shapes compression changed, with their biases;
    everything else stays. One mini-batch in eight is kept apart. Of the start and ten measurements on those, the
    weights with the least drift are kept, so the model is never worse there than before. On an error the model is as
    it was; after Ctrl-C it has the best weights so far.

    Memory: a copy of the compressed model in float32, gradients, coordinates and two moments per trained weight,
    `d_in^2` numbers per trained layer, the activations of one mini-batch, and in the CPU's memory up to 2 GiB of the
    dense model's states (those beyond are computed again at each step).

    Args:
        model: what [`compress`] returned for the dense model, or the same loaded from its folder.
        dense: the dense model, on the same device; it is left as it was.
        batches: calibration inputs, read once: at least two samples, better as many as `steps` mini-batches hold. What
            no step would come to is not run.
        steps: optimizer steps.
        learning_rate: the highest, relative to the root mean square of a layer's weights in these coordinates and to
            the root of the drift at the start; by default 0.00075 times the root of the steps, so that few steps are
            careful ones, and at most 0.03.
        batch_size: samples per step; larger batches are split.
        by_block: train one block after the other, each for so many steps, on what the refined blocks before it give.
            For models too large to be trained as a whole: memory for the gradients of one block, and for the hidden
            states of two on all batches. Layers outside of blocks stay. The drift is that of the last block.
        seed: of the order of the samples.
        progress: show a bar with the drift; by default where transformers shows its own.

    Returns:
        the drift before and after.

    Raises:
        InvalidValueError: an argument out of range, models that do not belong together, a model without compressed
            layers, batches that do not fit or hold a single sample.
        ComCATError: no gradients, or states that are not finite.
    """
    check(steps, whole(1), "steps")
    check(batch_size, whole(1), "batch_size")
    check(seed, whole(), "seed")
    usual = min(0.00075 * steps**0.5, _HIGHEST_RATE)
    learning_rate = check(usual if learning_rate is None else learning_rate, above(0), "learning_rate")
    model, dense = unwrapped(model), unwrapped(dense)
    names = _factors(model, dense)
    parts = _mini_batches(model, read_batches(batches), batch_size)
    apart = _apart(parts, main_input(model))
    parts = [parts[index] for index in (*apart, *_learned(len(parts), apart, steps, seed))]
    measured = len(apart)
    descent = Descent(steps, learning_rate, seed, range(measured, len(parts)), range(measured))
    found = {block for name in names if (block := _block_of(name))}
    # Without lists of layers within a block.
    outer = {one for one in found if not any(one.startswith(f"{other}.") for other in found)}
    blocks = blocks_between(model, outer)
    task = _Task(model, dense, names, blocks, parts, descent, progress)
    with measuring(dense), measuring(model):
        return _by_block(task) if by_block else _whole(task)


@dataclass(frozen=True)
class _Task:
    """What is refined: parameters by name, the blocks whose states are followed, and the mini-batches."""

    model: nn.Module
    dense: nn.Module
    names: Sequence[str]
    blocks: Sequence[str]
    parts: Sequence[Mapping[str, Any]]
    descent: Descent
    progress: bool | None

    def bar(self, total: int) -> Any:
        return progress_bar(total=total, desc="Refining", unit="step", progress=self.progress)


def _factors(model: nn.Module, dense: nn.Module) -> list[str]:
    """Names of the parameters to train: of layers whose shapes differ. A layer at full rank is exact as it is."""
    check_merged(model)
    if type(model) is not type(dense):
        raise InvalidValueError(
            f"dense: expected the {type(model).__name__} that model was compressed from, found {type(dense).__name__}."
        )
    here, there = (next(one.parameters()).device for one in (model, dense))
    if here != there:
        raise InvalidValueError(f"dense: expected a model on {here}, where the compressed one is, found {there}.")
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    found: list[str] = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        if any(shapes.get(name) != parameter.shape for name, parameter in own.items()):
            found += own
    if not found:
        raise InvalidValueError(
            f"model: expected compressed layers, found none in {type(model).__name__}. Give what compress() returned."
        )
    return found


def _block_of(name: str) -> str | None:
    """The block that a parameter lies in; a linear layer in a list is no block of its own factors."""
    return block_of(name.rpartition(".")[0].removesuffix(".first_factor"))


def _mini_batches(model: nn.Module, batches: list[Any], size: int) -> list[dict[str, Any]]:
    """The samples in parts of at most this size, in `_APART` parts at least where there are as many samples."""
    device, main = next(model.parameters()).device, main_input(model)
    prepared = [prepare_batch(model, batch, index, device) for index, batch in enumerate(batches)]
    least, parts = math.ceil(_APART / len(prepared)), []
    for batch in prepared:
        count = len(batch[main])
        pieces = max(math.ceil(count / size), min(least, count))
        parts += cut_batch(batch, main, pieces)
    if len(parts) == 1:
        raise InvalidValueError(
            "batches: expected at least two samples, one of them to be kept apart and measured on, found one, or one "
            "batch whose tensors disagree on how many samples there are. Give several batches."
        )
    return parts


def _apart(parts: Sequence[Mapping[str, Any]], main: str) -> list[int]:
    """Which parts are kept apart: evenly spread, since neighbours may be alike."""
    stride = max(_APART, math.ceil(sum(len(part[main]) for part in parts) / _MOST_APART))
    return list(range(min(stride // 2, len(parts) - 1), len(parts), stride))


def _learned(count: int, apart: Sequence[int], steps: int, seed: int) -> list[int]:
    """Which of the other parts are trained on: all, or a choice of as many as there are steps."""
    others = [index for index in range(count) if index not in apart]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return sorted(others[place] for place in order[:steps])


class _States:
    """What the blocks of a model, and the model itself, give for a mini-batch."""

    def __init__(self, model: nn.Module, blocks: Iterable[str], stack: ExitStack) -> None:
        self.model = model
        devices = {parameter.device for parameter in model.parameters()}
        self.devices = {device.type for device in devices}
        self.gpus = sorted(device.index for device in devices if device.type == "cuda")
        self.seen: list[State] = []
        self.mask = stack.enter_context(token_mask(model))
        for path in blocks:
            stack.callback(model.get_submodule(path).register_forward_hook(self._on_block).remove)

    def run(self, part: Mapping[str, Any], index: int) -> list[State]:
        self.seen = []
        with torch.random.fork_rng(self.gpus):
            # A model that draws random numbers, such as a random mask, draws the same ones as the other model. On GPUs
            # not by torch.manual_seed, which would seed those of others.
            (torch.default_generator if self.devices <= {"cpu", "cuda"} else torch).manual_seed(index)
            for gpu in self.gpus:
                torch.cuda.default_generators[gpu].manual_seed(index)
            output = run_batch(self.model, part, index)
        for states in main_output(output).values():
            self._add(states)
        return self.seen

    def _on_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._add(output[0] if isinstance(output, tuple) else output)

    def _add(self, states: Tensor) -> None:
        mask = self.mask.mask
        self.seen.append((states, mask if mask is not None and mask.shape == states.shape[:-1] else None))


class _Targets:
    """The dense model's states by mini-batch, from when they are first asked for kept as far as there is room."""

    def __init__(self, states: _States, parts: Sequence[Mapping[str, Any]], apart: Iterable[int]) -> None:
        self._states, self._parts = states, parts
        # None is for a mini-batch that was seen when there was no room.
        self._kept: dict[int, list[State] | None] = {}
        self._room = _KEPT
        self._scale = _scale([_squares(self._of(index)) for index in apart])

    def errors(self, found: Sequence[State], index: int) -> Tensor:
        return _errors(found, self._of(index), self._scale)

    @torch.no_grad()
    def _of(self, index: int) -> list[State]:
        if (kept := self._kept.get(index)) is not None:
            return kept
        found = self._states.run(self._parts[index], index)
        if index not in self._kept:
            _check_finite(_squares(found))
            self._kept[index] = self._keep(found)
        return found

    def _keep(self, states: Sequence[State]) -> list[State] | None:
        size = sum(one.nbytes for one, _ in states)
        if size > self._room:
            return None
        self._room -= size
        return [(one.cpu(), mask) for one, mask in states]


def _squares(states: Iterable[State]) -> Tensor:
    """`(2, states)`: the sum of the squares of real tokens, and how many numbers these are."""
    found = []
    for values, mask in states:
        real = values if mask is None else values[mask.to(values.device, torch.bool)]
        found.append(torch.stack([real.float().square().sum(), values.new_tensor(real.numel(), dtype=torch.float32)]))
    return torch.stack(found, 1)


def _scale(squares: Sequence[Tensor]) -> Tensor:
    """The mean square of each of the dense model's states."""
    total = torch.stack([one.cpu().double() for one in squares]).sum(0)
    _check_finite(total)
    sums, counts = total
    return (sums / counts.clamp(min=1)).clamp(min=torch.finfo(torch.float32).tiny).float()


def _check_finite(squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise InvalidValueError(
            "The dense model's hidden states are not finite on the calibration batches. Check the inputs, the weights "
            "and, in half precision, the range of the activations."
        )


def _errors(found: Sequence[State], wanted: Sequence[State], scale: Tensor) -> Tensor:
    pairs = zip(found, wanted, strict=True)
    sums, counts = _squares([(one - other.to(one), mask) for (one, _), (other, mask) in pairs])
    return torch.stack([sums / scale.to(sums.device), counts])


def _whole(task: _Task) -> Refinement:
    """Train all factors together."""
    trained = _float_copy(task.model)
    with ExitStack() as stack:
        states = _States(trained, task.blocks, stack)
        targets = _Targets(_States(task.dense, task.blocks, stack), task.parts, task.descent.apart)
        bar = stack.enter_context(task.bar(task.descent.steps))

        def errors(index: int) -> Tensor:
            return targets.errors(states.run(convert_to_fp32(task.parts[index]), index), index)

        return _train(task.model, trained, task.names, errors, states.mask, task.descent, bar)


def _by_block(task: _Task) -> Refinement:
    """Train the factors of one block after the other, on what the refined blocks before it give."""
    model, descent = task.model, task.descent
    with torch.no_grad():
        calls = record_calls(task.dense, task.blocks, task.parts)
    called = [path for path in task.blocks if calls[path].arguments]
    inside = {path: [name for name in task.names if name.startswith(f"{path}.")] for path in called}
    if not any(inside.values()):
        raise InvalidValueError(
            f"by_block=True: expected blocks with compressed layers that {type(model).__name__} calls, found none. "
            "Leave it out."
        )
    original = [model.get_parameter(name).detach().clone() for name in task.names]
    total, before = descent.steps * sum(map(bool, inside.values())), None
    try:
        with task.bar(total) as bar:
            for path, inner in inside.items():
                record = calls.pop(path)
                record.follow(before)
                _run_all(record, task.dense.get_submodule(path), record.dense_in, record.dense_out)
                block = model.get_submodule(path)
                if inner:
                    drift = _train_block(block, [n.removeprefix(f"{path}.") for n in inner], record, descent, bar)
                _run_all(record, block, record.small_in, record.small_out)
                before = record
    except Exception:
        _write(original, [model.get_parameter(name) for name in task.names])
        raise
    return drift


@torch.no_grad()
def _run_all(record: Calls, block: nn.Module, states: Sequence[Tensor], given: list[Tensor]) -> None:
    given += [record.run(block, one, index) for index, one in enumerate(states)]


def _train_block(block: nn.Module, names: Sequence[str], record: Calls, descent: Descent, bar: Any) -> Refinement:
    trained, exact = _float_copy(block), copy.copy(record)
    exact.arguments = convert_to_fp32(record.arguments)
    wanted = list(zip(record.dense_out, record.masks, strict=True))
    scale = _scale([_squares([states]) for states in wanted])
    mask = TokenMask()

    def errors(index: int) -> Tensor:
        mask.mask = record.masks[index]
        found = exact.run(trained, record.small_in[index].float(), index)
        return _errors([(found, None)], [wanted[index]], scale)

    return _train(block, trained, names, errors, mask, descent, bar)


def _float_copy(module: nn.Module) -> nn.Module:
    # Not module.float(): models that a quantizer of transformers has loaded refuse it.
    return nn.Module.float(copy.deepcopy(module)).requires_grad_(False)


def _train(
    model: nn.Module,
    trained: nn.Module,
    names: Sequence[str],
    errors: Errors,
    mask: TokenMask,
    descent: Descent,
    bar: Any,
) -> Refinement:
    """Train parameters of a copy, and write the best values into the model."""
    sources = [trained.get_parameter(name).requires_grad_() for name in names]
    goals = [model.get_parameter(name) for name in names]
    layers: dict[str, list[nn.Parameter]] = {}
    for name, source in zip(names, sources, strict=True):
        layers.setdefault(name.rpartition(".")[0], []).append(source)
    read = descent.learned[:: math.ceil(len(descent.learned) / _READ)]
    moments = input_moments({path: trained.get_submodule(path) for path in layers}, errors, read, mask)
    inputs = [moments.get(path) for path in layers]
    try:
        drift = descent.run(list(layers.values()), inputs, [goal.dtype for goal in goals], errors, bar)
    except KeyboardInterrupt:
        _write(sources, goals)
        raise
    _write(sources, goals)
    return drift


def _write(sources: Sequence[Tensor], goals: Sequence[Tensor]) -> None:
    for source, goal in zip(sources, goals, strict=True):
        # Tensors of inference mode may be changed within it only.
        with torch.inference_mode(goal.is_inference()), torch.no_grad():
            goal.copy_(source)
