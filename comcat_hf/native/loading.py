"""Models of any kind by where they lie: the class is the one that their configuration names."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..errors import CheckpointError, ComCATError
from ..hub import read_json, resolve_file


__all__ = ["class_name", "is_image_classifier", "load_model"]

# How the names of other parts of a pipeline end; a part that is left out has none.
_NO_MODELS = ("Extractor", "None", "Processor", "Scheduler", "Tokenizer", "TokenizerFast")


def class_name(source: str | Path, *, subfolder: str | None = None) -> str | None:
    """The class that the configuration of a model names; `None` where there is none.

    Raises:
        CheckpointError: a whole pipeline; the error names its parts.
    """
    try:
        fields = read_json(resolve_file(source, "config.json", subfolder=subfolder))
    except CheckpointError:
        if parts := _parts(source):
            raise CheckpointError(
                f"{source}: expected a model, found a whole pipeline. Give one of its parts with --subfolder: "
                f"{', '.join(parts)}."
            ) from None
        return None
    found = fields.get("_class_name") or next(iter(fields.get("architectures") or ()), None)
    return found if isinstance(found, str) else None


def is_image_classifier(name: str | None) -> bool:
    """Whether a class is an image classifier of transformers."""
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return any(name == one or (isinstance(one, tuple) and name in one) for one in known)


def load_model(source: str | Path, *, subfolder: str | None = None) -> nn.Module:
    """Read a model, of transformers in the dtype of its file, of diffusers in float32.

    Args:
        source: folder or Hub id.
        subfolder: where in it, such as `"unet"` of a pipeline.

    Returns:
        the model in eval mode.

    Raises:
        CheckpointError: there is none that loads.
    """
    name = class_name(source, subfolder=subfolder) or "AutoModel"
    how: dict[str, Any] = {"dtype": "auto"}
    library: Any = transformers
    if not hasattr(transformers, name) and find_spec("diffusers") is not None:
        import diffusers

        library, how = diffusers, {}
    if not hasattr(library, name):
        raise CheckpointError(
            f"{source}: expected a model of transformers or diffusers, found the class {name}, which the installed "
            "versions do not have. Update them, or compress the model in Python with comcat_hf.compress."
        )
    try:
        model = getattr(library, name).from_pretrained(source, subfolder=subfolder or "", **how)
    except ComCATError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{source}: expected a folder or Hub id of a model ({name}), found none that loads ({error}). Check the "
            "path and the network."
        ) from error
    return model.eval()


def _parts(source: str | Path) -> list[str]:
    try:
        index = read_json(resolve_file(source, "model_index.json"))
    except CheckpointError:
        return []
    classes = {name: str(about[-1]) for name, about in index.items() if isinstance(about, list) and about[-1:]}
    return [name for name, cls in classes.items() if not cls.endswith(_NO_MODELS)]
