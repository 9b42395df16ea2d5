"""Top-1 and top-5 accuracy, for `evaluate.load(comcat_hf.metrics.TOP_ACCURACY)`."""

import datasets
import evaluate


# No names of other modules of the package here: `evaluate` copies this file alone.
_DESCRIPTION = """Share of images whose label is the likeliest class (top1), or among the five likeliest (top5)."""

_INPUTS = """
Args:
    predictions: `(images, k)` class indices, the likeliest first; only the first five count.
    references: `(images,)` class indices.
Returns:
    top1: share of images whose label stands first, 0 to 1.
    top5: share of images whose label is among the first five, or among all k where there are fewer.
"""


class TopAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy of ranked classes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        count = len(references)
        first = sum(label in ranked[:1] for ranked, label in zip(predictions, references, strict=True))
        five = sum(label in ranked[:5] for ranked, label in zip(predictions, references, strict=True))
        return {"top1": first / count, "top5": five / count}
