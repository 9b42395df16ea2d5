"""Models of any kind made smaller from folder to folder: factors from the weights alone, and a card."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoProcessor

from ...compression.compress import compress
from ...compression.counting import count_macs, count_parameters
from ...configs import RANKS_NAME, RankPlan
from ...errors import ComCATError, InvalidValueError
from ...native import load_model, plan_of
from ...reporting.cards import CardFacts, quoted, write_card
from .outputs import compressed_summary, save_model


__all__ = ["CompressedFolder", "compress_folder"]

_SNIPPET = """
{needed}from {library} import {name}

model = {name}.from_pretrained({repository})
"""


@dataclass(frozen=True)
class CompressedFolder:
    """A small model and its sizes.

    Attributes:
        snippet: Python that loads the model.
        rows: dense against compressed: parameters, and MACs where they can be counted. The first one is the head.
    """

    snippet: str
    rows: tuple[tuple[str, ...], ...]


def compress_folder(
    source: str,
    out: Path,
    how: Mapping[str, Any],
    *,
    plan: str | None = None,
    subfolder: str | None = None,
    overwrite: bool = False,
) -> CompressedFolder:
    """Compress a model of transformers or diffusers that need not classify images.

    Args:
        source: folder or Hub id of the dense model.
        out: folder for the small one, its processor or tokenizer, and a card.
        how: arguments of [`compress`], such as the reduction.
        plan: folder, file or Hub id of a rank plan in their place.
        subfolder: of the source, such as `"unet"` of a pipeline.
        overwrite: replace a model in `out`.

    Raises:
        InvalidValueError: a folder that holds a model, or arguments that do not go together.
        CheckpointError: a model or a plan that cannot be read.
        BudgetError: a reduction out of reach.
    """
    if out.exists() and not out.is_dir():
        raise InvalidValueError(f"{out}: expected a folder to write to, found a file; give another path.")
    if (out / "config.json").exists() and (not overwrite or out.resolve() == Path(source).resolve()):
        raise InvalidValueError(
            f"{out}: expected a folder without a model, found one; give another OUT or --overwrite."
        )
    dense = load_model(source, subfolder=subfolder)
    small = compress(dense, plan=None if plan is None else RankPlan.from_pretrained(plan), progress=True, **how)
    out.mkdir(parents=True, exist_ok=True)
    written = save_model(small, _processor(source, subfolder), out)
    # Of a model that was there: its ranks, and shards with their index, which readers take first.
    for pattern in (RANKS_NAME, "*.safetensors.index.json", "*-of-*.safetensors"):
        for path in out.glob(pattern):
            if path.name not in written:
                path.unlink()
    plain = plan_of(small).layout == "plain"
    library, name = type(dense).__module__.partition(".")[0], type(dense).__name__
    snippet = partial(_SNIPPET.format, needed="" if plain else "import comcat_hf\n", library=library, name=name)
    rows = _rows(dense, small)
    folder = out.resolve().name
    facts = CardFacts(
        title=folder,
        summary=compressed_summary(source, (count_parameters(dense), count_parameters(small)), plain),
        base=source,
        relation="finetune",
        library=library,
        task=None,
        snippet=snippet(repository=quoted(folder)),
        tags=("model-compression",),
        table=rows,
    )
    write_card(out, facts)
    return CompressedFolder(snippet(repository=quoted(str(out))).strip(), rows)


def _processor(source: str, subfolder: str | None) -> Any:
    """The processor, tokenizer or image processor beside a model; `None` where there is none that loads."""
    try:
        return AutoProcessor.from_pretrained(source, subfolder=subfolder or "")
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError):
        return None


def _rows(dense: nn.Module, small: nn.Module) -> tuple[tuple[str, ...], ...]:
    models = {"dense": dense, "compressed": small}
    macs: dict[str, tuple[str, ...]] = dict.fromkeys(models, ())
    with suppress(ComCATError):
        macs = {name: (f"{count_macs(model):,}",) for name, model in models.items()}
    head = ("model", "parameters", *(["MACs"] if macs["dense"] else []))
    return (head, *((name, f"{count_parameters(model):,}", *macs[name]) for name, model in models.items()))
