"""Reading the classifiers of a run."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ...errors import CheckpointError, ComCATError
from .settings import CompressSettings


__all__ = ["load_classifier", "load_dense", "load_image_processor"]


def load_classifier(
    source: str | Path, flag: str, *, revision: str | None = None, cache_dir: str | None = None, token: Any = None
) -> nn.Module:
    """Read an image classifier, dense or compressed, in float32.

    Args:
        source: folder or Hub id.
        flag: what the user gave it with; errors name it.
        revision, cache_dir, token: as in `from_pretrained`.

    Returns:
        the model in eval mode.

    Raises:
        CheckpointError: there is none that loads.
    """
    try:
        model = AutoModelForImageClassification.from_pretrained(
            source, revision=revision or "main", cache_dir=cache_dir, token=token, dtype="float32"
        )
    except ComCATError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{flag} {source}: expected a folder or Hub id of an image classifier of transformers, found none that "
            f"loads ({error}). Check the path, the revision and the network."
        ) from error
    return model.eval()


def load_dense(settings: CompressSettings) -> nn.Module:
    """The model that is compressed, frozen.

    Raises:
        CheckpointError: there is none that loads.
    """
    where = {"revision": settings.model_revision, "cache_dir": settings.cache_dir, "token": settings.token}
    return load_classifier(settings.model_name_or_path, "--model_name_or_path", **where).requires_grad_(False)


def load_image_processor(settings: CompressSettings) -> Any:
    """The dense model's own image processor.

    Raises:
        CheckpointError: it has none.
    """
    source = settings.model_name_or_path
    try:
        return AutoImageProcessor.from_pretrained(
            source,
            revision=settings.model_revision or "main",
            cache_dir=settings.cache_dir,
            token=settings.token,
            backend="pil",
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"--model_name_or_path {source}: expected an image processor beside the model, found none that loads "
            f"({error}). Save one there (processor.save_pretrained)."
        ) from error
