"""Model cards: measured results as Hub metadata, and text that keeps what a person wrote."""

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
# Our part of a card is between these marks, and is replaced when the card is written again. Of two begin marks the
# second counts: a person may have removed the end mark behind the first and written there.
_BEGIN, _END = "<!-- comcat_hf: begin -->", "<!-- comcat_hf: end -->"
_OURS = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """One result of an evaluation.

    Attributes:
        metric: type of the metric on the Hub, such as `"accuracy"`.
        name: name of the metric for readers.
        value: the result; an accuracy is a share, 0 to 1.
    """

    metric: str
    name: str
    value: float


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    Attributes:
        title: the heading.
        summary: a sentence or two below the heading.
        base: Hub id or folder of the base model. A folder appears only in the text, by its last part.
        relation: relation of the model to its base on the Hub: `"finetune"` or `"adapter"`.
        library: library that loads the model: `"transformers"`, `"diffusers"` or `"peft"`.
        task: the `pipeline_tag`, if there is one.
        snippet: Python code that uses the model; its first line imports comcat_hf.
        tags: tags besides `comcat`.
        dataset: Hub id of the training and evaluation data, if there is one. A folder is not named.
        measured: results of the evaluation on `dataset`; they make the `model-index`.
        table: rows of a comparison; the first row is the head.
        pictures: captions and file names, in the card's folder.
        gallery: prompts and file names of images that a pipeline drew.
        details: lines on how the model was made.
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
    """Write the model card `README.md` into a folder. Call it last: PEFT also writes a card, with its own tags.

    An existing card keeps its text and its metadata. Our part of it is replaced, or added below.

    Args:
        folder: folder of the model or the adapter.
        facts: content of the card.

    Returns:
        the card's path.

    Raises:
        CheckpointError: an existing card has unreadable metadata; it is left as it was.
    """
    path = Path(folder) / CARD_NAME
    ours = f"{_BEGIN}\n{_text(facts)}{_END}"
    line_break = "\n"
    if path.is_file():
        card, line_break = _read(path)
        written = _put(ours, card.text.strip("\n"))
        kept = {name: value for name, value in card.data.to_dict().items() if name not in ("tags", "model-index")}
        data = _metadata(facts, card.data.get("tags") or ())
        # Metadata about the files is ours; other metadata is kept.
        content = kept | data.to_dict()
    else:
        written, content = ours, _metadata(facts).to_dict()
    head = ModelCardData(**{name: value for name, value in content.items() if value is not None}).to_yaml()
    return write_text_atomic(path, f"---\n{head}\n---\n\n{written.strip()}\n".replace("\n", line_break))


def shown_base(base: str | None) -> str:
    """The name of a base model in a card: a Hub id as it is, or the last part of a folder."""
    if not base or hub_id(base):
        return base or "an unnamed model"
    # The rules of Windows accept both kinds of slashes.
    name = PureWindowsPath(base).name
    return name if name.strip(".") else Path(base).expanduser().resolve().name


def quoted(text: str) -> str:
    """A text as a Python string in double quotes, for snippets."""
    return json.dumps(text, ensure_ascii=False)


def code_span(text: str) -> str:
    """A text as inline code in Markdown, also if it contains backticks."""
    text = " ".join(text.split())
    padding = " " if "`" in text else ""
    return f"{_fence(text, 1)}{padding}{text}{padding}{_fence(text, 1)}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the first row as head; empty text without rows."""
    if not rows:
        return ""
    rows = [[_line(cell).replace("|", "\\|") for cell in cells] for cells in rows]
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _put(ours: str, text: str) -> str:
    """A card's text with our part replaced, or added below; further copies of our part are removed."""
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
    """A text, such as a prompt, on one line and without opening HTML tags or comments."""
    return " ".join(text.split()).replace("<", "&lt;")


def _fenced(text: str, language: str = "") -> str:
    text = text.strip()
    return f"{_fence(text, 3)}{language}\n{text}\n{_fence(text, 3)}\n"


def _fence(text: str, shortest: int) -> str:
    """A fence of backticks, longer than any run of backticks in the text."""
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


def _read(path: Path) -> tuple[ModelCard, str]:
    """A card, and its line break."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
        line_break = "\r\n" if "\r\n" in content else "\n"
        return ModelCard(content.replace(line_break, "\n"), ignore_metadata_errors=False), line_break
    # The Hub's client passes on errors of its YAML parser.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a model card with YAML metadata between lines of three dashes, found one that cannot "
            f"be read ({type(error).__name__}). Repair it, or move it away."
        ) from error
