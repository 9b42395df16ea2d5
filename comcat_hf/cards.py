"""Model cards: what was measured, as the Hub reads it, beside whatever a person has written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import CheckpointError
from .transport import write_text_atomic


__all__ = ["CARD_NAME", "CardFacts", "Measured", "markdown_table", "shown_base", "write_card"]

CARD_NAME = "README.md"
# What stands between these is ours, and is replaced when a card is written again.
_BEGIN, _END = "<!-- comcat_hf: begin -->", "<!-- comcat_hf: end -->"
_OURS = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """One result of an evaluation.

    Attributes:
        metric: its type as the Hub knows it, such as `"accuracy"`.
        name: how people call it.
        value: the figure; of accuracies a share, 0 to 1.
    """

    metric: str
    name: str
    value: float


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        title: the heading.
        summary: a sentence or two below it.
        base: Hub id or folder of the base model. A folder is named in the text only, by its last part.
        relation: of the model to its base, one of the Hub's: `"finetune"` or `"adapter"`.
        library: which loads it: `"transformers"`, `"diffusers"` or `"peft"`.
        task: its `pipeline_tag`.
        snippet: Python that uses it; its first line imports comcat_hf.
        tags: beside `comcat`.
        dataset: Hub id of what it was trained and measured on, if there is one.
        measured: results of the evaluation on `dataset`; they make the `model-index`.
        table: rows of a comparison, the first one its head.
        pictures: captions and file names, beside the card.
        gallery: prompts and file names of images that a pipeline drew.
        details: lines on how it was made.
        extra: further metadata, such as `instance_prompt`.
    """

    title: str
    summary: str
    base: str | None
    relation: str
    library: str
    task: str
    snippet: str
    tags: Sequence[str] = ()
    dataset: str | None = None
    measured: Sequence[Measured] = ()
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[tuple[str, str]] = ()
    gallery: Sequence[tuple[str, str]] = ()
    details: str = ""
    extra: Mapping[str, Any] | None = None


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Write `README.md` into a folder, after whatever else writes there: PEFT, for one, writes tags of its own.

    A card that is there keeps its text and its metadata; ours is replaced, or put below what a person wrote.

    Args:
        folder: where the model or the adapter lies.
        facts: what the card says.

    Returns:
        the card's path.

    Raises:
        CheckpointError: a card that is there has metadata that cannot be read; it is left as it was.
    """
    path = Path(folder) / CARD_NAME
    ours = f"{_BEGIN}\n{_text(facts)}{_END}"
    if path.is_file():
        card = _read(path)
        text = card.text.strip("\n")
        written = _OURS.sub(lambda _: ours, text) if _OURS.search(text) else f"{text}\n\n{ours}"
        kept = {name: value for name, value in card.data.to_dict().items() if name not in ("tags", "model-index")}
        data = _metadata(facts, card.data.get("tags") or ())
        # What says what the files are is ours to say; the rest is kept.
        content = kept | data.to_dict()
    else:
        written, content = ours, _metadata(facts).to_dict()
    head = ModelCardData(**_as_arguments(content)).to_yaml()
    return write_text_atomic(path, f"---\n{head}\n---\n\n{written.strip()}\n")


def shown_base(base: str | None) -> str:
    """A base model as a card names it: a Hub id as it is, of a folder the last part."""
    return "an unnamed model" if not base else base if _is_hub_id(base) else Path(base).name


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the first one its head; nothing for no rows."""
    if not rows:
        return ""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _text(facts: CardFacts) -> str:
    parts = [f"# {facts.title}\n\n{facts.summary}\n", f"```python\n{facts.snippet.strip()}\n```\n"]
    if facts.table:
        parts.append(markdown_table(facts.table))
    parts += [f"![{caption}]({name})\n" for caption, name in facts.pictures]
    if facts.gallery:
        parts.append("<Gallery />\n")
    if facts.details:
        parts.append(f"## How it was made\n\n```\n{facts.details.strip()}\n```\n")
    return "\n".join(parts)


def _metadata(facts: CardFacts, tags: Sequence[str] = ()) -> ModelCardData:
    results = []
    for one in facts.measured if facts.dataset else ():
        results.append(
            EvalResult(
                task_type=facts.task,
                dataset_type=facts.dataset,
                dataset_name=facts.dataset,
                metric_type=one.metric,
                metric_name=one.name,
                metric_value=round(one.value, 6),
            )
        )
    base = facts.base if facts.base and _is_hub_id(facts.base) else None
    extra = dict(facts.extra or {})
    if base is not None:
        extra["base_model_relation"] = facts.relation
    if facts.gallery:
        extra["widget"] = [{"text": prompt, "output": {"url": name}} for prompt, name in facts.gallery]
    return ModelCardData(
        base_model=base,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=list(dict.fromkeys([*tags, facts.task, "comcat", *facts.tags])),
        datasets=[facts.dataset] if facts.dataset else None,
        model_name=facts.title if results else None,
        eval_results=results or None,
        **extra,
    )


def _as_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value is not None}


def _read(path: Path) -> ModelCard:
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    # The Hub's client raises what its YAML parser raises, too.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a model card with YAML metadata between lines of three dashes, found one that cannot "
            f"be read ({type(error).__name__}). Repair it, or move it away."
        ) from error


def _is_hub_id(name: str) -> bool:
    if Path(name).expanduser().exists() or name.startswith((".", "~", "/")) or "\\" in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
