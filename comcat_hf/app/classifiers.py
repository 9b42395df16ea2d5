"""Compares a dense and a compressed image classifier on one image: labels and latency."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from ..compression.clock import in_turns
from ..compression.counting import count_macs, count_parameters
from ..errors import CheckpointError, ComCATError, InvalidValueError, brief
from ..native import plan_of
from ..training.classify.augmentation import process_image
from ..training.classify.labels import model_labels
from ..training.classify.models import load_classifier
from ..training.images import read_image
from .devices import best_device
from .sources import expanded, needed


if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST_REPEATS", "Answer", "Classifier", "Pair", "classify", "load_pair"]

MOST_REPEATS = 200
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Classifier:
    """An image classifier, ready to run.

    Attributes:
        source: folder or Hub id.
        model: in eval mode, on its device.
        processor: image processor that makes the model's inputs.
        parameters: counted by `numel`.
        macs: multiply-accumulates for one image, `None` if they cannot be counted.
    """

    source: str
    model: nn.Module
    processor: Any
    parameters: int
    macs: int | None


@dataclass(frozen=True, eq=False)
class Pair:
    """A dense and a compressed classifier. Nothing changes them, so `copy.deepcopy` returns the pair itself."""

    dense: Classifier
    compressed: Classifier

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pair":
        return self


@dataclass(frozen=True)
class Answer:
    """The result of a classifier on one image.

    Attributes:
        labels: the most probable labels with their probabilities; labels with equal names get their number.
        latency: median seconds of the forward pass for this image.
    """

    labels: tuple[tuple[str, float], ...]
    latency: float


def load_pair(dense: str, compressed: str) -> Pair:
    """Read both classifiers and their image processors.

    Args:
        dense: folder or Hub id; empty for the base that the compressed model names.
        compressed: folder or Hub id. Without an image processor of its own it uses the dense model's.

    Returns:
        the pair.

    Raises:
        CheckpointError: a model or a processor that does not load.
        InvalidValueError: a source that is missing, or a model that does not give each image one label.
    """
    compressed = needed(compressed, "compressed model")
    small = _read(compressed, "compressed model")
    dense = (dense or "").strip() or _base_of(small, compressed)
    large = _read(dense, "dense model")
    processor = _processor(dense)
    own = _processor(compressed) or processor
    if own is None:
        raise CheckpointError(
            f"{compressed}: expected an image processor beside the compressed or the dense model, found none that "
            "loads. Save one there (processor.save_pretrained)."
        )
    return Pair(_classifier(dense, large, processor or own), _classifier(compressed, small, own))


def classify(pair: Pair | None, image: "Image | str | Path | None", repeats: int = 10) -> tuple[Answer, Answer]:
    """Classify an image with both models. They are timed in turns, so that a busy machine slows both.

    Args:
        pair: the classifiers.
        image: a Pillow image, or the path of an image.
        repeats: timed runs of each model.

    Returns:
        the answers of the dense and of the compressed model.

    Raises:
        InvalidValueError: no classifiers, no image, or repeats out of range.
        BrokenImageError: the image cannot be read.
        ComCATError: a classifier does not take what its image processor makes.
    """
    if pair is None:
        raise InvalidValueError("Expected a dense and a compressed model, found none; load them first.")
    if image is None:
        raise InvalidValueError("Expected an image, found none; drop one into the field.")
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        raise InvalidValueError(f"repeats: expected a whole number from 1 to {MOST_REPEATS}, found {repeats!r}.")
    both = (pair.dense, pair.compressed)
    image = read_image(image, "The image")
    inputs = [_inputs(classifier, image) for classifier in both]
    runs = [lambda c=c, x=x: c.model(x).logits for c, x in zip(both, inputs, strict=True)]
    with torch.inference_mode():
        logits = [_logits(classifier, run) for classifier, run in zip(both, runs, strict=True)]
        taken = in_turns(dict(enumerate(runs)), inputs[0].device, range(repeats))
    dense, compressed = (
        Answer(_most_probable(classifier.model, scores), median(seconds))
        for classifier, scores, seconds in zip(both, logits, taken.values(), strict=True)
    )
    return dense, compressed


def _inputs(classifier: Classifier, image: "Image") -> Tensor:
    values = process_image(classifier.processor, image)
    weight = next(classifier.model.parameters())
    return values.to(weight.device, weight.dtype)


def _logits(classifier: Classifier, run: Callable[[], Tensor]) -> Tensor:
    try:
        return run()[0]
    except (ValueError, RuntimeError) as error:
        raise ComCATError(
            f"{classifier.source}: expected a model that takes what its image processor makes, found an error "
            f"({brief(error)}). Save the processor that it was trained with beside it."
        ) from error


def _most_probable(model: nn.Module, scores: Tensor) -> tuple[tuple[str, float], ...]:
    probabilities, places = scores.float().softmax(-1).topk(min(_SHOWN, len(scores)))
    names, _ = model_labels(model.config, "The model")
    often = Counter(names)
    return tuple(
        (f"{names[place]} ({place})" if often[names[place]] > 1 else names[place], probability)
        for place, probability in zip(places.tolist(), probabilities.tolist(), strict=True)
    )


def _read(source: str, what: str) -> nn.Module:
    model = load_classifier(expanded(source), what)
    model_labels(model.config, f"{what} {source}")
    return model


def _base_of(model: nn.Module, source: str) -> str:
    base = plan_of(model).base_model_name_or_path
    if not base:
        raise InvalidValueError(
            f"{source}: expected the name of its base in the compressed model, found none; give the dense model too."
        )
    return base


def _processor(source: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(expanded(source), backend="pil")
    except (OSError, ValueError, ImportError):
        return None


def _classifier(source: str, model: nn.Module, processor: Any) -> Classifier:
    try:
        macs = count_macs(model)
    except ComCATError:
        macs = None
    return Classifier(source, model.to(best_device()), processor, count_parameters(model), macs)
