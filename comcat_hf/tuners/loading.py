"""The tensors of an adapter and its configuration belong together, whichever library loads them."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from torch import nn

from ..modeling import replace_module
from ..tensor_files import check_shapes
from .layer import ComCATLayer


__all__ = ["check_adapter", "take_out", "watch_loading"]

_PREFIX = "base_model.model."
# Where adapters keep tensors of their own: factors, and modules that are trained as they are.
_OWN = ("comcat_factors", "modules_to_save")


def check_adapter(model: nn.Module, adapter_name: str, found: Mapping[str, Any]) -> None:
    """See that tensors are those which an adapter in a model has by its configuration; else it is taken out.

    Args:
        model: with the adapter.
        adapter_name: which.
        found: tensors, or what has their shapes, by their names in the model, with or without what PEFT puts before.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    state = model.state_dict()
    expected = {key: tensor for key, tensor in state.items() if any(f".{o}.{adapter_name}." in key for o in _OWN)}
    given = {key if key in state else key.removeprefix(_PREFIX): tensor for key, tensor in found.items()}
    # PEFT puts embeddings of another size beside an adapter, which are the base's.
    given = {key: tensor for key, tensor in given.items() if key in expected or not _is_embedding(model, key)}
    try:
        check_shapes(
            given,
            expected,
            f"The adapter {adapter_name!r}, by its configuration",
            "The files do not belong together or are damaged: download or save the adapter again.",
        )
    except BaseException:
        take_out(model, adapter_name)
        raise


def take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, and the layers that have no other."""
    for layer in [module for module in model.modules() if isinstance(module, ComCATLayer)]:
        if adapter_name in layer.comcat_factors:
            layer.set_adapter([name for name in layer.active_adapters if name != adapter_name])
            layer.delete_adapter(adapter_name)
        if not layer.comcat_factors:
            replace_module(model, layer, layer.released())
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and not isinstance(model, PeftModel) and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False


def watch_loading(model: nn.Module, adapter_name: str) -> None:
    """Check an adapter that was just put into a model of transformers when that library loads its tensors.

    transformers gives PEFT the empty adapter only, and warns of what it found no place for.
    """
    if hasattr(type(model), "_load_pretrained_model"):
        # A partial, since that can be copied and pickled.
        model._load_pretrained_model = partial(_load_checked, adapter_name)


def _load_checked(adapter_name: str, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    del model._load_pretrained_model
    info, offloaded = model._load_pretrained_model(model, *args, **kwargs)
    found: dict[str, Any] = {key: t for key, t in model.state_dict().items() if key not in info.missing_keys}
    if found and not any(f".{own}.{adapter_name}." in key for own in _OWN for key in found):
        # The adapter had its tensors from elsewhere; these are of another one.
        return info, offloaded
    found |= {key: SimpleNamespace(shape=there) for key, there, _ in info.mismatched_keys}
    found |= {key: SimpleNamespace(shape=("unknown",)) for key in info.unexpected_keys}
    check_adapter(model, adapter_name, found)
    return info, offloaded


def _is_embedding(model: nn.Module, key: str) -> bool:
    module: Any = dict(model.named_modules()).get(key.rpartition(".")[0])
    return isinstance(module, nn.Embedding)
