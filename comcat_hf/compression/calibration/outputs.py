"""How far a model's main output moves when something inside it changes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidValueError


__all__ = ["Movement", "main_output"]

# Tasks whose logits are no distribution.
_NOT_CLASSES = ("regression", "multi_label_classification")


def main_output(output: Any) -> dict[str, Tensor]:
    """What a model is run for: its logits, else its embeddings, else its last hidden state, else what comes first.

    What comes first may be several tensors: the feature maps of a backbone. A loss is none of these.

    Raises:
        InvalidValueError: the model returns no tensor of floats, or a loss alone.
    """
    found = {name: tensors for name, value in _items(output) if (tensors := dict(_tensors(name, value)))}
    embeddings = [name for name in found if name.endswith("_embeds")]
    for names in (["logits"], embeddings, ["last_hidden_state"], list(found)[:1]):
        if names and all(name in found for name in names):
            return {name: tensor for entry in names for name, tensor in found[entry].items()}
    raise InvalidValueError(
        f"{type(output).__name__} holds no tensor of floats whose movement could be measured; found "
        f"{', '.join(name for name, _ in _items(output)) or 'nothing'}. Give a model with logits or hidden states."
    )


def _items(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    if isinstance(output, list | tuple):
        return [(str(index), value) for index, value in enumerate(output)]
    return [("output", output)]


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of floats within a value, by name; numbers alone are losses."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim:
            yield name, value
    elif isinstance(value, Mapping | list | tuple) or is_dataclass(value):
        for part, item in _items(value):
            yield from _tensors(f"{name}.{part}", item)


class Movement:
    """Adds up over batches how far outputs lie from those expected; no unit, 0 where nothing moved.

    Logits over classes or words: the mean Kullback-Leibler divergence, in nats, of what is found from what is
    expected. Everything else: the mean squared difference relative to the mean square. Padded tokens do not count.
    Several outputs (two towers): the mean of theirs.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        words = {getattr(part, "vocab_size", None) for part in (config, text)}
        # YOLOS and DETR have one class more: no object.
        self._classes = {labels, labels and labels + 1, *words} - {None, 1}
        self._distribution = getattr(config, "problem_type", None) not in _NOT_CLASSES
        self._sums: dict[str, Tensor] = {}

    def add(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], mask: Tensor | None = None) -> None:
        for name, wanted in expected.items():
            divergence = name == "logits" and self.is_distribution(wanted)
            compare = _divergence if divergence else _squares
            sums = torch.stack(compare(_rows(wanted, mask), _rows(found[name], mask)))
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def total(self) -> float:
        shares: Iterable[Tensor] = [moved / whole.clamp(min=1e-300) for moved, whole in self._sums.values()]
        return float(torch.stack(list(shares)).mean())

    def is_distribution(self, logits: Tensor) -> bool:
        """Whether logits are of classes or words, one of which is right."""
        return self._distribution and logits.ndim in (2, 3) and logits.shape[-1] in self._classes


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    tensor = tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
    if mask is not None and tensor.ndim == 3 and mask.shape == tensor.shape[:2]:
        return tensor[mask.to(tensor.device, torch.bool)]
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[:, None]


def _divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    target, log = F.log_softmax(expected, -1), F.log_softmax(found, -1)
    return F.kl_div(log, target, reduction="sum", log_target=True).clamp(min=0), expected.new_tensor(len(expected))


def _squares(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    return (found - expected).square().sum(), expected.square().sum()
