"""What a training leaves behind: the adapter, a card, and a copy on the Hub."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...transport import push_folder, write_text_atomic
from ..pipelines import save_comcat_weights
from .planning import CustomizePlan
from .settings import CustomizeSettings


__all__ = ["push_outputs", "write_outputs"]

_CARD = """---
base_model: {base}
library_name: diffusers
tags:
- text-to-image
- diffusers
- comcat
- peft
instance_prompt: {prompt}
---

# ComCAT adapter: {prompt}

A ComCAT adapter for `{base}`, trained DreamBooth style on {images} images of the subject. {parameters:,} parameters.

```python
import torch
from diffusers import DiffusionPipeline
from comcat_hf.customization import load_comcat_weights

pipe = DiffusionPipeline.from_pretrained("{base}")
load_comcat_weights(pipe, "{repository}")
image = pipe({prompt!r}).images[0]
```

## Training

```
{plan}
```
"""


def write_outputs(settings: CustomizeSettings, pipeline: Any, plan: CustomizePlan) -> Path:
    """Write the adapter and its card into the output folder.

    Args:
        settings: where to.
        pipeline: with the adapter.
        plan: what the card tells.
    """
    folder = Path(settings.output_dir).expanduser()
    save_comcat_weights(
        pipeline,
        folder,
        settings.adapter_name,
        base_model_name_or_path=settings.pretrained_model_name_or_path,
        revision=settings.revision,
    )
    card = _CARD.format(
        base=settings.pretrained_model_name_or_path,
        prompt=settings.instance_prompt,
        images=plan.images,
        parameters=sum(plan.parameters.values()),
        repository=settings.hub_model_id or folder.name,
        plan=plan.describe(),
    )
    write_text_atomic(folder / "README.md", card)
    return folder


def push_outputs(settings: CustomizeSettings, parts: Iterable[str]) -> str:
    """Upload what was trained, without checkpoints and logs.

    Args:
        settings: from where and to which repository.
        parts: names of those that are adapted.

    Returns:
        the commit's address.
    """
    folder = Path(settings.output_dir).expanduser()
    wanted = {*parts, "validation"}
    with tempfile.TemporaryDirectory() as staging:
        for path in folder.iterdir():
            if path.is_dir() and path.name in wanted:
                shutil.copytree(path, Path(staging, path.name))
            elif path.name in ("README.md", "comcat_adapter.json"):
                shutil.copy2(path, staging)
        return push_folder(
            staging,
            settings.hub_model_id or folder.resolve().name,
            commit_message="Train with comcat_hf",
            token=settings.hub_token,
        )
