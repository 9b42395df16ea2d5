"""How far a model's main output moves when something inside it changes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidValueError


__all__ = ["Movement", "main_output"]

# Tasks whose logits are no distribution.
_NOT_CLASSES = ("regression", "multi_label_classification")


def main_output(output: Any) -> dict[str, Tensor]:
    """What a model is run for: its logits, else its embeddings, else its last hidden state, else the first tensor.

    Raises:
        InvalidValueError: the model returns no tensor of floats.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    items = output.items() if isinstance(output, Mapping) else ((str(i), value) for i, value in enumerate(output))
    tensors = {name: value for name, value in items if isinstance(value, Tensor) and value.is_floating_point()}
    embeddings = {name: value for name, value in tensors.items() if name.endswith("_embeds")}
    for names in (["logits"], list(embeddings), ["last_hidden_state"], list(tensors)[:1]):
        if names and all(name in tensors for name in names):
            return {name: tensors[name] for name in names}
    raise InvalidValueError(
        f"{type(output).__name__} holds no tensor of floats whose movement could be measured; found "
        f"{sorted(output) if isinstance(output, Mapping) else 'none'}. Give a model with logits or hidden states."
    )


class Movement:
    """Adds up over batches how far outputs lie from those expected; no unit, 0 where nothing moved.

    Logits over classes or words: the mean Kullback-Leibler divergence, in nats, of what is found from what is
    expected. Everything else: the mean squared difference relative to the mean square. Padded tokens do not count.
    Several outputs (two towers): the mean of theirs.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", None)
        # YOLOS and DETR have one class more: no object.
        self._classes = {labels, labels and labels + 1, getattr(config, "vocab_size", None)} - {None, 1}
        self._distribution = getattr(config, "problem_type", None) not in _NOT_CLASSES
        self._sums: dict[str, Tensor] = {}

    def add(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], mask: Tensor | None = None) -> None:
        for name, wanted in expected.items():
            divergence = name == "logits" and self._is_distribution(wanted)
            compare = _divergence if divergence else _squares
            sums = torch.stack(compare(_rows(wanted, mask), _rows(found[name], mask)))
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def total(self) -> float:
        shares: Iterable[Tensor] = [moved / whole.clamp(min=1e-300) for moved, whole in self._sums.values()]
        return float(torch.stack(list(shares)).mean())

    def _is_distribution(self, logits: Tensor) -> bool:
        return self._distribution and logits.ndim in (2, 3) and logits.shape[-1] in self._classes


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    tensor = tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
    if mask is not None and tensor.ndim == 3 and mask.shape == tensor.shape[:2]:
        return tensor[mask.to(tensor.device, torch.bool)]
    return tensor.flatten(0, -2)


def _divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    target, log = F.log_softmax(expected, -1), F.log_softmax(found, -1)
    return F.kl_div(log, target, reduction="sum", log_target=True).clamp(min=0), expected.new_tensor(len(expected))


def _squares(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    return (found - expected).square().sum(), expected.square().sum()
