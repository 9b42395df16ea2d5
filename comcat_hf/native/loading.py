"""Models of any kind by where they lie: the class is the one that their configuration names."""

from collections.abc import Mapping
from importlib.util import find_spec
from inspect import isclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..checks import some_of
from ..errors import CheckpointError, ComCATError, brief
from ..hub import read_json, resolve_file


__all__ = ["check_whole", "class_name", "is_image_classifier", "load_model", "load_pipeline"]

_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError),
    # A part's class that is not installed or not known to this version.
    *(AttributeError, ImportError, SafetensorError),
)
# How the names of other parts of a pipeline end; a part that is left out has none.
_NO_MODELS = ("Extractor", "None", "Processor", "Scheduler", "Tokenizer", "TokenizerFast")


def class_name(source: str | Path, *, subfolder: str | None = None, **where: Any) -> str | None:
    """The class that the configuration of a model names; `None` where there is none.

    Args:
        source: folder or Hub id.
        subfolder: where in it.
        **where: `revision`, `token`, `cache_dir` and `local_files_only`, as elsewhere on the Hub.

    Raises:
        CheckpointError: a whole pipeline; the error names its parts.
    """
    try:
        fields = read_json(resolve_file(source, "config.json", subfolder=subfolder, **where))
    except CheckpointError:
        if parts := _parts(source, **where):
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


def load_model(source: str | Path, *, subfolder: str | None = None, **where: Any) -> nn.Module:
    """Read a model, of transformers in the dtype of its file, of diffusers in float32.

    Args:
        source: folder or Hub id.
        subfolder: where in it, such as `"unet"` of a pipeline.
        **where: `revision`, `token`, `cache_dir` and `local_files_only`, as elsewhere on the Hub.

    Returns:
        the model in eval mode.

    Raises:
        CheckpointError: there is none that loads, or it lacks weights.
    """
    where = {key: value for key, value in where.items() if value is not None}
    name = class_name(source, subfolder=subfolder, **where) or "AutoModel"
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
        model, loading = getattr(library, name).from_pretrained(
            source, subfolder=subfolder or "", output_loading_info=True, **where, **how
        )
    except ComCATError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{source}: expected a folder or Hub id of a model ({name}), found none that loads "
            f"({brief(error)}). Check the path and the network."
        ) from error
    check_whole(model, loading, str(source))
    return model.eval()


def load_pipeline(
    source: str | Path,
    *,
    dtype: torch.dtype,
    variant: str | None = None,
    fix: str = "Check the path, the files and the network.",
    **how: Any,
) -> Any:
    """Read a pipeline of diffusers with all weights of its models, which diffusers itself fills up with random ones.

    Args:
        source: folder or Hub id.
        dtype: of all models.
        variant: of their files, where they have it.
        fix: what to do where none loads, for the error.
        **how: `revision`, `cache_dir`, and parts to use in place of its own.

    Raises:
        CheckpointError: there is none that loads, or a model lacks weights.
        ComCATError: diffusers is not installed.
    """
    if find_spec("diffusers") is None:
        raise ComCATError(
            "Pipelines need diffusers, which is not installed. Install it with: pip install 'comcat_hf[diffusers]'"
        )
    try:
        return _load_pipeline(source, dtype, variant, how)
    except (ComCATError, torch.OutOfMemoryError):
        raise
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{source}: expected a folder or Hub id of a pipeline of diffusers, found none that loads "
            f"({brief(error)}). {fix}"
        ) from error


def _load_pipeline(source: str | Path, dtype: torch.dtype, variant: str | None, how: Mapping[str, Any]) -> Any:
    import diffusers

    where = {key: value for key, value in how.items() if key in ("cache_dir", "revision") and value is not None}
    libraries: dict[Any, Any] = {"diffusers": diffusers, "transformers": transformers}
    parts = {}
    for name, entry in diffusers.DiffusionPipeline.load_config(source, **where).items():
        library, cls = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
        known = getattr(libraries.get(library), str(cls), None)
        if name in how or not (isclass(known) and issubclass(known, nn.Module)):
            continue
        load: Any = known.from_pretrained  # type: ignore[attr-defined]
        asked = {**where, "subfolder": name, "dtype": dtype, "output_loading_info": True}
        try:
            parts[name], loading = load(source, variant=variant, **asked)
        except OSError:
            # As in diffusers, a model without the variant has its own files.
            if variant is None:
                raise
            parts[name], loading = load(source, **asked)
        check_whole(parts[name], loading, f"{source}, {name}")
    return diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variant, **{**parts, **how})


def check_whole(
    model: nn.Module, loading: Mapping[str, Any], place: str, fix: str = "Save or download it again."
) -> None:
    """Refuse random weights, of which the libraries only warn.

    Args:
        model: what `from_pretrained` made.
        loading: its loading info.
        place: where the model comes from; the error names it.
        fix: what to do, for the error.

    Raises:
        CheckpointError: weights are missing or of another shape.
    """
    learned = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    problems = [f"{name} (found none)" for name in sorted(learned.intersection(loading["missing_keys"]))]
    problems += [
        f"{name} of shape {tuple(wanted)} (found {tuple(found)})"
        for name, found, wanted in sorted(loading["mismatched_keys"])
    ]
    if problems:
        raise CheckpointError(
            f"{place}: expected all weights of {type(model).__name__}, found none that fit for "
            f"{some_of(problems)}. {fix}"
        )


def _parts(source: str | Path, **where: Any) -> list[str]:
    try:
        index = read_json(resolve_file(source, "model_index.json", **where))
    except CheckpointError:
        return []
    classes = {name: str(about[-1]) for name, about in index.items() if isinstance(about, list) and about[-1:]}
    return [name for name, cls in classes.items() if not cls.endswith(_NO_MODELS)]
