"""Calibration batches as keyword arguments of a model."""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InvalidValueError


__all__ = [
    "Batch",
    "all_counts",
    "check_any",
    "cut_batch",
    "main_input",
    "prepare_batch",
    "read_batches",
    "run_batch",
    "several",
]

Batch: TypeAlias = Mapping[str, Any] | Tensor


def run_batch(model: nn.Module, inputs: Mapping[str, Any], index: int) -> Any:
    """The model's output; inputs that it does not take give one InvalidValueError naming the batch."""
    try:
        return model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise InvalidValueError(
            f"Calibration batch {index} does not fit {type(model).__name__}: {error} (inputs: {_describe(inputs)})"
        ) from error


def read_batches(batches: Iterable[Batch] | None) -> list[Batch]:
    """Keep batches that are gone through more than once; raises InvalidValueError where there are none."""
    kept = [] if batches is None else list(several(batches))
    check_any(len(kept))
    return kept


def several(batches: Iterable[Batch]) -> Iterable[Batch]:
    """The batches, after a check that they are not a single one, whose rows or names would be taken for batches."""
    iterable = any(hasattr(batches, name) for name in ("__iter__", "__getitem__"))
    if isinstance(batches, (Tensor, Mapping, str)) or not iterable:
        raise InvalidValueError(
            f"batches: expected several, such as a DataLoader or [batch], found one {type(batches).__name__}."
        )
    return batches


def check_any(count: int) -> None:
    """Raise InvalidValueError where there is no batch."""
    if count == 0:
        raise InvalidValueError("The calibration batches are empty: expected at least one batch, got none.")


def all_counts(
    accelerator: Any, counts: Iterable[float], error: Exception | None, what: str, device: torch.device
) -> list[float]:
    """Counts summed over all processes. Every process must come here, also one that failed: the others wait for it.

    Raises:
        InvalidValueError: another process failed; in that one its own error is raised.
    """
    told = torch.tensor([float(error is not None), *counts], dtype=torch.float64, device=device)
    failed, *totals = accelerator.reduce(told, "sum").tolist()
    if error is not None:
        raise error
    if failed:
        raise InvalidValueError(
            f"{what} could not be gathered in {failed:.0f} of {accelerator.num_processes} processes; their own errors "
            "say why."
        )
    return totals


def prepare_batch(model: nn.Module, batch: Batch, index: int, device: torch.device) -> dict[str, Any]:
    """A batch as keyword arguments of the model, on its device, without labels."""
    main = main_input(model)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        if main == "input_ids" and any(_is_mask(value, batch[0]) for value in batch[1:]):
            raise InvalidValueError(
                f"Batch {index}: expected {main!r}, and labels that are left out, found a further tensor that may be "
                "the attention mask. Give mappings with 'input_ids' and 'attention_mask'."
            )
        batch = batch[0]
    inputs = {main: batch} if isinstance(batch, Tensor) else batch
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get(main), Tensor):
        found = sorted(inputs) if isinstance(inputs, Mapping) else type(batch).__name__
        raise InvalidValueError(
            f"Batch {index} has no tensor {main!r}, the main input of {type(model).__name__}; found {found}. "
            f"Give mappings with {main!r}, or tensors of it."
        )
    if inputs[main].ndim < 2 or len(inputs[main]) == 0:
        raise InvalidValueError(
            f"Batch {index}: {main!r} must have a batch dimension and samples, got the shape "
            f"{tuple(inputs[main].shape)}."
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items() if not k.startswith("label")}


def _is_mask(value: Any, texts: Any) -> bool:
    """Whether a tensor says of every token that it is real, 1, or padding, 0."""
    tensors = isinstance(value, Tensor) and isinstance(texts, Tensor)
    return tensors and value.shape == texts.shape and bool(((value == 0) | (value == 1)).all())


def cut_batch(inputs: Mapping[str, Any], main: str, pieces: int) -> list[dict[str, Any]]:
    """A prepared batch in so many parts of its samples; whole where its tensors disagree on how many there are.

    The tensors are copies: of those made in inference mode no gradients could be computed.
    """
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    lengths = {name: len(value) for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    # Two towers may see different numbers of samples; a single row is one for all.
    if pieces <= 1 or any(length not in (1, lengths[main]) for length in lengths.values()):
        return [inputs]
    split = {n: inputs[n].tensor_split(pieces) for n, length in lengths.items() if length == lengths[main]}
    return [inputs | {name: values[index] for name, values in split.items()} for index in range(pieces)]


def main_input(model: nn.Module) -> str:
    """Name of the input that a batch cannot lack."""
    taken = signature(model.forward).parameters.values()
    names = [one.name for one in taken if one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    named = getattr(model, "main_input_name", "pixel_values" if isinstance(model, PreTrainedModel) else None)
    # diffusers says it by its place alone, and what a tower of transformers inherits may be that of texts.
    return named if named in names or not names else names[0]


def _describe(inputs: Mapping[str, Any]) -> str:
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in inputs.items()}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
