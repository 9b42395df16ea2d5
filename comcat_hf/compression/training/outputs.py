"""What a run leaves behind: the small model, a card, results, and a copy on the Hub."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...transport import push_folder, write_json_atomic, write_text_atomic
from .planning import CompressPlan
from .settings import CompressSettings


__all__ = ["push_model", "save_model", "write_card", "write_results"]

Metrics = Mapping[str, Mapping[str, float]]

_CARD = """---
base_model: {base}
base_model_relation: finetune
library_name: transformers
pipeline_tag: image-classification
tags:
- image-classification
- comcat
- model-compression
{datasets}---

# {title}

`{base}` compressed with ComCAT: {dense:,} parameters became {small:,} ({share:+.1%}).

```python
import comcat_hf
from transformers import pipeline

classify = pipeline("image-classification", "{repository}")
```

{table}
## Training

```
{plan}
```
"""
_NAMES = {"dense": "dense", "initial": "compressed, before fine-tuning", "final": "compressed"}


def save_model(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write a model and its image processor into a folder that may hold other files.

    Files appear under their names when they are whole, the weights last.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        # A process that is killed in between leaves the weights and the configuration of one model, or none.
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            path.replace(folder / path.name)


def write_results(path: Path, metrics: Metrics) -> None:
    """Write what was measured."""
    write_json_atomic(path, {name: dict(values) for name, values in metrics.items()})


def write_card(folder: Path, settings: CompressSettings, plan: CompressPlan, metrics: Metrics) -> None:
    """Write a model card from what was measured; a card that is there is left as it is."""
    path = folder / "README.md"
    if path.is_file():
        return
    dense, small = plan.parameters
    name = settings.hub_model_id or folder.resolve().name
    write_text_atomic(
        path,
        _CARD.format(
            base=settings.model_name_or_path,
            datasets=f"datasets:\n- {settings.dataset_name}\n" if settings.dataset_name else "",
            title=name.rpartition("/")[-1],
            dense=dense,
            small=small,
            share=small / dense - 1,
            repository=name,
            table=_table(metrics),
            plan=plan.describe(),
        ),
    )


def push_model(folder: Path, settings: CompressSettings) -> str:
    """Upload the model, its plan, its card and its results: no checkpoint, no log, no statistics.

    Returns:
        the commit's address.
    """
    with tempfile.TemporaryDirectory() as staging:
        for path in folder.iterdir():
            wanted = path.suffix in (".safetensors", ".json", ".md") and path.name != "comcat_stages.json"
            if path.is_file() and wanted and not path.name.startswith("."):
                shutil.copy2(path, staging)
        return push_folder(
            staging,
            settings.hub_model_id or folder.resolve().name,
            private=settings.hub_private or None,
            commit_message="Compress with comcat_hf",
            token=settings.hub_token,
        )


def _table(metrics: Metrics) -> str:
    if not metrics:
        return ""
    rows = [
        f"| {_NAMES.get(name, name)} | {values['top1']:.2%} | {values['top5']:.2%} | {values['samples']:,.0f} |"
        for name, values in metrics.items()
    ]
    return "\n".join(["| model | top-1 | top-5 | images |", "| --- | --- | --- | --- |", *rows, ""]) + "\n"
