"""What a run leaves behind: the small model, a card, results, and a copy on the Hub."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import CheckpointError
from ...hub import read_json
from ...reporting.cards import CardFacts, Measured, code_span, quoted, shown_base, write_card
from ..settings import push_result
from .planning import CompressPlan
from .reporting import NAMES, Metrics, SweepPoint, comparison
from .settings import CompressSettings


__all__ = [
    "compressed_summary",
    "push_model",
    "read_results",
    "read_sweep",
    "save_model",
    "write_model_card",
]


_SNIPPET = """
{needed}from transformers import pipeline

classify = pipeline("image-classification", {repository})
"""
_ORDINARY = "An ordinary model of its library: it loads without comcat_hf and needs no rank file."
_METRICS = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
_MEASURED = {"top1", "top5", "samples"}
_PUSHED = (".safetensors", ".json", ".md", ".png", ".html")
_RANKS = "Ranks and widths kept of every layer, and the spectra of the attention products"


def save_model(model: nn.Module, processor: Any, folder: Path) -> set[str]:
    """Write a model and its processor, if it has one, into a folder that may hold other files.

    Files appear under their names when they are whole, the weights last. Returns their names.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as staging:
        model.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        written = {path.name for path in Path(staging).iterdir()}
        # A process that is killed in between leaves the weights and the configuration of one model, or none.
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.replace(folder / path.name)
    return written


def read_results(path: Path) -> Metrics:
    """What a run measured; nothing where nothing was measured.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.is_file():
        return {}
    found = read_json(path)
    if not NAMES.keys() <= found.keys() or not all(
        isinstance(values, Mapping) and values.keys() >= _MEASURED for values in found.values()
    ):
        raise CheckpointError(
            f"{path}: expected {', '.join(sorted(_MEASURED))} of {', '.join(NAMES)}, found something else. Run the "
            "stage evaluate again."
        )
    return found


def read_sweep(path: Path) -> tuple[SweepPoint, ...]:
    """What a run measured of other reductions; nothing where nothing was measured.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.is_file():
        return ()
    try:
        return tuple(SweepPoint(**point) for point in read_json(path)["points"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected points of a sweep, found something else. Run the stage evaluate with --sweep again."
        ) from error


def compressed_summary(base: str, parameters: tuple[int, int], plain: bool) -> str:
    """What a card says first of a small model, from its parameters and the dense model's."""
    dense, small = parameters
    words = f"{code_span(shown_base(base))} compressed with ComCAT: {dense:,} parameters became {small:,} "
    return f"{words}({small / dense - 1:+.1%}).{' ' + _ORDINARY if plain else ''}"


def write_model_card(plan: CompressPlan, metrics: Metrics, picture: Path | None) -> Path:
    """Write the card of a compressed model from what was measured; a person's words in a card that is there are kept.

    Args:
        metrics: of the dense, the initial and the final model; those of the final one make the card's results.
        picture: of ranks and spectra, in the same folder.
    """
    settings, name = plan.settings, plan.settings.repository
    final = metrics.get("final", {})
    return write_card(
        settings.output_path,
        CardFacts(
            title=name.rpartition("/")[-1],
            summary=compressed_summary(settings.model_name_or_path, plan.parameters, plan.is_plain),
            base=settings.model_name_or_path,
            relation="finetune",
            library="transformers",
            task="image-classification",
            snippet=_SNIPPET.format(repository=quoted(name), needed="" if plan.is_plain else "import comcat_hf\n"),
            tags=("model-compression",),
            dataset=settings.dataset_name,
            measured=[Measured("accuracy", _METRICS[key], final[key]) for key in _METRICS if key in final],
            table=comparison(plan, metrics),
            pictures=[(_RANKS, picture.name)] if picture is not None else [],
            details=plan.describe(),
        ),
    )


def push_model(settings: CompressSettings) -> str:
    """Upload the model, its plan, its card, its results and the report: no checkpoint, no log, no statistics.

    Returns:
        the commit's address.
    """
    # The record of the stages and a report that shows images, push_folder leaves here.
    names = [path.name for path in settings.output_path.iterdir() if path.is_file() and path.suffix in _PUSHED]
    return push_result(settings, "Compress with comcat_hf", names)
