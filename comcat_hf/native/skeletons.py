"""The structure of a dense model, built from its configuration alone: no weights are fetched or held."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..configs.ranks import RankPlan
from ..errors import CheckpointError, brief
from ..hub import read_json, resolve_file


__all__ = ["dense_skeleton"]

_CONFIG = "config.json"


def dense_skeleton(
    plan: RankPlan, source: str | Path | None = None, *, revision: str | None = None, **kwargs: Any
) -> nn.Module:
    """The model that a plan is for, on the meta device.

    Args:
        plan: its `architecture` says which class, where it is known.
        source: folder or Hub id with a `config.json`, of the dense or the compressed model; default: the plan's base.
        revision: of the source.
        **kwargs: `token`, `cache_dir`, `subfolder`, `local_files_only`.

    Raises:
        CheckpointError: there is no configuration, or none of a class of transformers or diffusers.
    """
    place = source or plan.base_model_name_or_path
    if place is None:
        raise CheckpointError(
            "The plan: expected the name of its base model, found none; give the folder or Hub id of the model that "
            "it is for"
        )
    path = resolve_file(place, _CONFIG, revision=revision if source else revision or plan.revision, **kwargs)
    fields = {name: value for name, value in read_json(path).items() if name != "quantization_config"}
    build = _of_diffusers if "_class_name" in fields else _of_transformers
    try:
        with torch.device("meta"):
            model = build(fields, plan.architecture)
    # What a damaged configuration makes a library stumble over is of many kinds.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected the configuration of a model, found one that its library cannot use "
            f"({brief(error)}). Save or download the model again."
        ) from error
    if model is None:
        wanted = f", a {plan.architecture}," if plan.architecture else ""
        found = fields.get("_class_name") or fields.get("architectures") or fields.get("model_type")
        raise CheckpointError(
            f"{place}: expected the {_CONFIG} of a model of transformers or diffusers{wanted} found {found}; give the "
            "model that the plan is for"
        )
    return model


def _of_transformers(fields: Mapping[str, Any], architecture: str | None) -> nn.Module | None:
    kind = fields.get("model_type")
    cls = getattr(transformers, architecture or next(iter(fields.get("architectures") or ()), ""), None)
    if kind not in transformers.CONFIG_MAPPING or not isinstance(cls, type):
        return None
    config = transformers.CONFIG_MAPPING[kind].from_dict(dict(fields))
    of_class: Any = cls
    return of_class(config) if isinstance(config, of_class.config_class or ()) else None


def _of_diffusers(fields: Mapping[str, Any], architecture: str | None) -> nn.Module | None:
    if find_spec("diffusers") is None:
        return None
    import diffusers

    cls = getattr(diffusers, architecture or fields["_class_name"], None)
    return cls.from_config(dict(fields)) if fields["_class_name"] == getattr(cls, "__name__", None) else None
