"""Where a model came from, as files say it that others may read: by a Hub id, never by a folder of this machine."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


__all__ = ["hub_id", "shareable"]

# Where PEFT, diffusers and we ourselves keep it.
_FIELDS = ("base_model_name_or_path", "_name_or_path")


def hub_id(source: Any) -> str | None:
    """The Hub id that a source is; `None` for a folder, by its form or because there is one, and for no source."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    local = not isinstance(source, str) or source.startswith(".") or Path(source).exists()
    return None if local else source


def shareable(path: Path) -> bytes | None:
    """What to upload in the place of a file that names folders of this machine as sources; `None` for other files.

    Libraries write such files, too: PEFT into configurations and cards of adapters, diffusers into those of all parts
    of a pipeline.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            cleaned = _cleaned(content)
            return None if cleaned == content else json.dumps(cleaned, indent=2, ensure_ascii=False).encode()
        return _cleaned_card(path) if path.name == "README.md" else None
    # What cannot be read names nothing; the Hub's client raises what its YAML parser raises, too.
    except Exception:
        return None


def _cleaned(content: Any) -> Any:
    if isinstance(content, list):
        return [_cleaned(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {key: hub_id(value) if key in _FIELDS else _cleaned(value) for key, value in content.items()}


def _cleaned_card(path: Path) -> bytes | None:
    card = ModelCard(path.read_bytes().decode(), ignore_metadata_errors=True)
    fields = card.data.to_dict()
    bases = fields.get("base_model") or []
    local = [base for base in ([bases] if isinstance(bases, str) else bases) if hub_id(base) is None]
    if not local:
        return None
    named = tuple(f":{base}" for base in local)
    card.data.base_model = [base for base in bases if base not in local] if isinstance(bases, list) else None
    card.data.tags = [tag for tag in card.data.tags or () if not str(tag).endswith(named)]
    return str(card).encode()
