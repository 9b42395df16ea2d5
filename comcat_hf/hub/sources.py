"""Names of base models in files for others: a Hub id, never a local folder."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


__all__ = ["hub_id", "shareable", "shareable_folder"]

# Fields in which PEFT, diffusers and this package name a base model.
_FIELDS = ("base_model_name_or_path", "_name_or_path")


def hub_id(source: Any) -> str | None:
    """The source if it is a Hub id; `None` for no source, for an existing folder, and for text that is no Hub id."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    local = not isinstance(source, str) or source.startswith(".") or Path(source).exists()
    return None if local else source


def shareable(path: Path) -> bytes | None:
    """The content of a file without local folders as base models; `None` if it names none.

    Libraries write such names, too: PEFT into configurations and cards of adapters, diffusers into the configurations
    of all parts of a pipeline.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            cleaned = _cleaned(content)
            return None if cleaned == content else json.dumps(cleaned, indent=2, ensure_ascii=False).encode()
        return _cleaned_card(path) if path.name == "README.md" else None
    # An unreadable file names no base. The Hub's client passes on errors of its YAML parser.
    except Exception:
        return None


@contextmanager
def shareable_folder(folder: str | os.PathLike) -> Iterator[str]:
    """A temporary folder with links to the files of another one, and with what [`shareable`] makes of them.

    Times of files and folders are kept: transformers uploads those that changed.
    """

    def place(source: str, target: str) -> None:
        content = shareable(Path(source))
        if content is None:
            os.symlink(os.path.abspath(source), target)
        else:
            Path(target).write_bytes(content)
            shutil.copystat(source, target)

    with TemporaryDirectory() as parent:
        yield shutil.copytree(folder, f"{parent}/folder", copy_function=place, ignore_dangling_symlinks=True)


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
