"""Folders and Hub ids as users type them, and what their cards say."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..errors import ComCATError, InvalidValueError
from ..hub import resolve_file
from ..reporting.cards import CARD_NAME


__all__ = ["card_of", "expanded", "needed", "prompts_of"]

# Prompts of a card that are shown, and their longest text.
_PROMPTS, _LONGEST = 6, 300


def needed(source: str | None, what: str) -> str:
    """Strip blanks around a source, and refuse an empty one.

    Args:
        source: folder or Hub id.
        what: kind of model, for the error.

    Raises:
        InvalidValueError: the source is empty.
    """
    source = (source or "").strip()
    if not source:
        raise InvalidValueError(f"Expected a folder or a Hub id of the {what}, found nothing; type one.")
    return source


def expanded(source: str) -> str:
    """Replace `~` in a source by the home folder, which the libraries do not do."""
    return str(Path(source).expanduser()) if source.startswith("~") else source


def card_of(source: str) -> dict[str, Any]:
    """The metadata of a model card; empty where there is no card that can be read.

    Args:
        source: folder or Hub id.

    Returns:
        the fields.
    """
    try:
        text = resolve_file(expanded(source), CARD_NAME).read_text(encoding="utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    # A card is written by anyone; without a readable one the app has less to offer, and works.
    except (ComCATError, OSError, ValueError, yaml.YAMLError):
        return {}


def prompts_of(source: str) -> tuple[str, ...]:
    """Example prompts in the card of an adapter: those of its images, and the prompt that it was trained with.

    Args:
        source: folder or Hub id.

    Returns:
        a few different prompts.
    """
    card = card_of(source)
    widget = card.get("widget")
    texts = [one.get("text") for one in widget if isinstance(one, dict)] if isinstance(widget, list) else []
    texts.append(card.get("instance_prompt"))
    found = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in found if 0 < len(text) <= _LONGEST))[:_PROMPTS]
