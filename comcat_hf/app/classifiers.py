"""Compares a dense and a compressed image classifier on one image: labels and latency."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from ..checks import check, whole
from ..compression.clock import in_turns
from ..compression.counting import count_macs, count_parameters
from ..compression.elastic import ELASTIC_NAME, Elastic
from ..errors import CheckpointError, ComCATError, InvalidValueError, brief
from ..hub import resolve_file
from ..native import plan_of
from ..training.classify.augmentation import process_image
from ..training.classify.labels import model_labels
from ..training.classify.models import load_classifier
from ..training.images import read_image
from .devices import best_device
from .sources import card_of, expanded, needed


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
    """A dense and a compressed classifier. Nothing changes them, so `copy.deepcopy` returns the pair itself.

    Attributes:
        dense, compressed: the classifiers.
        elastic: what the compressed model of another reduction is made from, if there is something.
        reduction: the reduction of the compressed model that was made so.
    """

    dense: Classifier
    compressed: Classifier
    elastic: Elastic | None = None
    reduction: float | None = None

    def with_reduction(self, reduction: float) -> "Pair":
        """The pair with a compressed model of another reduction.

        Args:
            reduction: a share in the range of the elastic model.

        Returns:
            a new pair; this one stays as it is.

        Raises:
            InvalidValueError: the model is not elastic, or the reduction is outside of its range.
            BudgetError: no equal widths reach the reduction, in the plain layout.
        """
        if self.elastic is None:
            raise InvalidValueError(
                f"{self.compressed.source}: expected an elastic model, found one of a fixed size; save one with "
                "comcat_hf.compress(model, batches=..., elastic=(0.3, 0.7))."
            )
        small = self.elastic.set_reduction(reduction).eval()
        made = _classifier(self.compressed.source, small, self.compressed.processor)
        return replace(self, compressed=made, reduction=reduction)

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
        dense: folder or Hub id; empty for the base that the compressed model, its rank plan or its card, names.
        compressed: folder or Hub id; of an elastic model the middle of its range. Without an image processor of its
            own it uses the dense model's.

    Returns:
        the pair.

    Raises:
        CheckpointError: a model or a processor that does not load.
        InvalidValueError: a source that is missing, or a model that does not give each image one label.
    """
    compressed = needed(compressed, "compressed model")
    elastic = _elastic(compressed)
    # The folder of an elastic model holds the dense one.
    small = _read(compressed, "compressed model")
    dense = (dense or "").strip() or (compressed if elastic else _base_of(small, compressed))
    large = small if dense == compressed else _read(dense, "dense model")
    processor = _processor(dense)
    own = _processor(compressed) or processor
    if own is None:
        raise CheckpointError(
            f"{compressed}: expected an image processor beside the compressed or the dense model, found none that "
            "loads. Save one there (processor.save_pretrained)."
        )
    pair = Pair(_classifier(dense, large, processor or own), _classifier(compressed, small, own), elastic)
    return pair if elastic is None else pair.with_reduction(round((elastic.low + elastic.high) / 2, 2))


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
    check(repeats, whole(1, MOST_REPEATS), "repeats")
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


def _elastic(source: str) -> Elastic | None:
    try:
        resolve_file(expanded(source), ELASTIC_NAME)
    except CheckpointError:
        return None
    return Elastic.from_pretrained(expanded(source))


def _base_of(model: nn.Module, source: str) -> str:
    try:
        base = plan_of(model).base_model_name_or_path
    except InvalidValueError:
        # A model in the plain layout is an ordinary one, whose card may name its base.
        base = card_of(source).get("base_model")
    if not base or not isinstance(base, str):
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
