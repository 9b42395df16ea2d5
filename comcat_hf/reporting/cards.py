"""Model cards: what was measured, as the Hub reads it, beside whatever a person has written."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import CheckpointError
from ..hub import hub_id, write_text_atomic


__all__ = ["CARD_NAME", "CardFacts", "Measured", "code_span", "markdown_table", "quoted", "shown_base", "write_card"]

CARD_NAME = "README.md"
# What stands between these is ours, and is replaced when a card is written again. Of two beginnings the second counts:
# behind the first somebody may have taken the end away and written.
_BEGIN, _END = "<!-- comcat_hf: begin -->", "<!-- comcat_hf: end -->"
_OURS = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)


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
        task: its `pipeline_tag`, if it has one.
        snippet: Python that uses it; its first line imports comcat_hf.
        tags: beside `comcat`.
        dataset: Hub id of what it was trained and measured on, if there is one. A folder is not named.
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
    task: str | None
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
    line_break = "\n"
    if path.is_file():
        card, line_break = _read(path)
        written = _put(ours, card.text.strip("\n"))
        kept = {name: value for name, value in card.data.to_dict().items() if name not in ("tags", "model-index")}
        data = _metadata(facts, card.data.get("tags") or ())
        # What says what the files are is ours to say; the rest is kept.
        content = kept | data.to_dict()
    else:
        written, content = ours, _metadata(facts).to_dict()
    head = ModelCardData(**_as_arguments(content)).to_yaml()
    return write_text_atomic(path, f"---\n{head}\n---\n\n{written.strip()}\n".replace("\n", line_break))


def shown_base(base: str | None) -> str:
    """A base model as a card names it: a Hub id as it is, of a folder the last part."""
    if not base or hub_id(base):
        return base or "an unnamed model"
    # Windows' rules know both kinds of slashes.
    name = PureWindowsPath(base).name
    return name if name.strip(".") else Path(base).expanduser().resolve().name


def quoted(text: str) -> str:
    """A text as a string of Python in double quotes, for snippets."""
    return json.dumps(text, ensure_ascii=False)


def code_span(text: str) -> str:
    """A name as code within a line of Markdown, whatever it holds."""
    text = " ".join(text.split())
    padding = " " if "`" in text else ""
    return f"{_fence(text, 1)}{padding}{text}{padding}{_fence(text, 1)}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the first one its head; nothing for no rows."""
    if not rows:
        return ""
    rows = [[_line(cell).replace("|", "\\|") for cell in cells] for cells in rows]
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _put(ours: str, text: str) -> str:
    """A card's text with our part in its place, or below; copies of it go."""
    first = _OURS.search(text)
    if first is None:
        return f"{text}\n\n{ours}"
    return text[: first.start()] + ours + _OURS.sub("", text[first.end() :])


def _text(facts: CardFacts) -> str:
    parts = [f"# {_line(facts.title)}\n\n{facts.summary}\n", _fenced(facts.snippet, "python")]
    if facts.table:
        parts.append(markdown_table(facts.table))
    parts += [f"![{_line(caption)}]({name})\n" for caption, name in facts.pictures]
    if facts.gallery:
        parts.append("<Gallery />\n")
    if facts.details:
        parts.append(f"## How it was made\n\n{_fenced(facts.details)}")
    text = "\n".join(parts)
    return text.replace(_BEGIN, "(comcat_hf: begin)").replace(_END, "(comcat_hf: end)")


def _line(text: str) -> str:
    """A text, such as a prompt, on one line, where it opens no tag and no comment."""
    return " ".join(text.split()).replace("<", "&lt;")


def _fenced(text: str, language: str = "") -> str:
    text = text.strip()
    return f"{_fence(text, 3)}{language}\n{text}\n{_fence(text, 3)}\n"


def _fence(text: str, shortest: int) -> str:
    """So many backticks as the text holds nowhere in a row."""
    return "`" * max(shortest, 1 + max(map(len, re.findall("`+", text)), default=0))


def _metadata(facts: CardFacts, tags: Sequence[str] = ()) -> ModelCardData:
    results = []
    dataset = hub_id(facts.dataset)
    for one in facts.measured if dataset else ():
        results.append(
            EvalResult(
                task_type=facts.task,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=one.metric,
                metric_name=one.name,
                metric_value=round(one.value, 6),
            )
        )
    base = hub_id(facts.base)
    extra = dict(facts.extra or {})
    if base is not None:
        extra["base_model_relation"] = facts.relation
    if facts.gallery:
        extra["widget"] = [{"text": prompt, "output": {"url": name}} for prompt, name in facts.gallery]
    return ModelCardData(
        base_model=base,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=list(dict.fromkeys([*tags, *([facts.task] if facts.task else []), "comcat", *facts.tags])),
        datasets=[dataset] if dataset else None,
        model_name=facts.title if results else None,
        eval_results=results or None,
        **extra,
    )


def _as_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value is not None}


def _read(path: Path) -> tuple[ModelCard, str]:
    """A card, and how its lines end."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
        line_break = "\r\n" if "\r\n" in content else "\n"
        return ModelCard(content.replace(line_break, "\n"), ignore_metadata_errors=False), line_break
    # The Hub's client raises what its YAML parser raises, too.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a model card with YAML metadata between lines of three dashes, found one that cannot "
            f"be read ({type(error).__name__}). Repair it, or move it away."
        ) from error
