"""Reading the classifiers of a run."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ...checks import some_of
from ...errors import CheckpointError, ComCATError, InvalidValueError, brief
from ...native import check_whole
from .labels import model_labels
from .settings import CompressSettings


__all__ = ["load_classifier", "load_dense", "load_image_processor", "load_teacher"]


def load_classifier(
    source: str | Path, flag: str, *, revision: str | None = None, cache_dir: str | None = None, token: Any = None
) -> nn.Module:
    """Read an image classifier, dense or compressed, in float32, with all its weights.

    Args:
        flag: what the user gave it with; errors name it.

    Returns:
        the model in eval mode.

    Raises:
        CheckpointError: there is none that loads, or it lacks weights, such as those of the classification head.
    """
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            source,
            revision=revision or "main",
            cache_dir=cache_dir,
            token=token,
            dtype="float32",
            # Else transformers' error names no weights.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ComCATError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{flag} {source}: expected whole safetensors files, found {error}. One was cut short or is damaged; "
            "download or save the model again."
        ) from error
    # What a damaged file makes transformers stumble over is of many kinds.
    except Exception as error:
        raise CheckpointError(
            f"{flag} {source}: expected a folder or Hub id of an image classifier of transformers, found none that "
            f"loads ({brief(error)}). Check the path, the revision and the network."
        ) from error
    check_whole(model, loading, f"{flag} {source}", "Give a checkpoint that was trained as an image classifier.")
    return model.eval()


def load_dense(settings: CompressSettings, flag: str = "--model_name_or_path") -> nn.Module:
    """The model that the settings name, frozen; errors name it by the flag.

    Raises:
        CheckpointError: there is none that loads.
    """
    where = {"revision": settings.model_revision, "cache_dir": settings.cache_dir, "token": settings.token}
    return load_classifier(settings.model_name_or_path, flag, **where).requires_grad_(False)


def load_teacher(settings: CompressSettings, dense: nn.Module) -> nn.Module:
    """The model that teaches, frozen: the dense one where no other is named.

    Raises:
        CheckpointError: there is none that loads.
        InvalidValueError: its labels are not the dense model's.
    """
    if settings.teacher is None:
        return dense.requires_grad_(False).eval()
    teacher = load_classifier(settings.teacher, "--teacher", cache_dir=settings.cache_dir, token=settings.token)
    theirs, _ = model_labels(teacher.config, f"--teacher {settings.teacher}")
    ours, _ = model_labels(dense.config, f"--model_name_or_path {settings.model_name_or_path}")
    if len(theirs) != len(ours) or (theirs != ours and sorted(theirs) == sorted(ours)):
        raise InvalidValueError(
            f"--teacher {settings.teacher}: expected the labels of --model_name_or_path in their order ({len(ours)}: "
            f"{some_of(ours, 5)}), found {len(theirs)}: {some_of(theirs, 5)}. Take a teacher of the same labels."
        )
    return teacher.requires_grad_(False)


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
            f"({brief(error)}). Save one there (processor.save_pretrained)."
        ) from error
