"""Remote code: a module beside the weights that imports this package, so that `trust_remote_code=True` is enough."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import InvalidValueError
from ..hub import write_text_atomic


__all__ = ["forget_remote_code", "host_class", "note_remote_code", "write_remote_code"]

_MODULE = "modeling_comcat"
_TEMPLATE = '''"""Loads this compressed model. It needs the package comcat_hf: `pip install comcat_hf`."""

from comcat_hf.native.remote import host_class


{classes}
'''


def host_class(name: str) -> type:
    """What the module beside a model's weights gives to an auto class: the constructors of the library's own class.

    The auto class must not get that class itself: it would mark it as remote code, whose old tensor names transformers
    does not convert.

    Args:
        name: of a model class of transformers.
    """
    host = getattr(transformers, name)
    constructors = {"from_pretrained": host.from_pretrained, "_from_config": host._from_config}
    return type(name, (), constructors | {"register_for_auto_class": staticmethod(lambda auto_class: None)})


def note_remote_code(model: PreTrainedModel, wanted: bool | None) -> bool:
    """Put the auto classes of a compressed model into its configuration, or take them out.

    Args:
        model: a compressed model.
        wanted: whether to name them; `None` if the configuration already does.

    Returns:
        whether the configuration names them.

    Raises:
        InvalidValueError: no auto class of transformers loads the model's class.
    """
    config = model.config
    named = any(_is_ours(value) for value in (getattr(config, "auto_map", None) or {}).values())
    forget_remote_code(config)
    if not (named if wanted is None else wanted):
        return False
    names = dict(_auto_classes(model))
    if type(model).__name__ not in names.values():
        raise InvalidValueError(
            f"remote_code: expected a model that an auto class of transformers loads, found {type(model).__name__}. "
            f"Save it without; {type(model).__name__}.from_pretrained loads it after `import comcat_hf`."
        )
    config.auto_map = (getattr(config, "auto_map", None) or {}) | {
        auto: f"{_MODULE}.{name}" for auto, name in names.items()
    }
    return True


def forget_remote_code(config: PreTrainedConfig) -> None:
    """Take our module out of a configuration."""
    found = getattr(config, "auto_map", None)
    if found:
        config.auto_map = {auto: value for auto, value in found.items() if not _is_ours(value)}
        if not config.auto_map:
            del config.auto_map


def write_remote_code(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """Write the module that a configuration names into the folder of the weights."""
    names = sorted({value.rpartition(".")[2] for value in config.auto_map.values() if _is_ours(value)})
    classes = "\n".join(f'{name} = host_class("{name}")' for name in names)
    write_text_atomic(Path(folder) / f"{_MODULE}.py", _TEMPLATE.format(classes=classes))


def _is_ours(value: Any) -> bool:
    # From the Hub it is read as "user/name--modeling_comcat.ViTModel".
    return isinstance(value, str) and value.rpartition("--")[2].startswith(f"{_MODULE}.")


def _auto_classes(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Names of the auto classes that load a model, or its backbone, with the class that each of them loads."""
    backbones = {"AutoModel", "AutoBackbone"}
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if not isinstance(auto, type) or not mapping or type(model.config) not in mapping:
            continue
        hosts = mapping[type(model.config)]
        for host in hosts if isinstance(hosts, tuple) else (hosts,):
            if type(model).__name__ == host.__name__ or auto.__name__ in backbones:
                yield auto.__name__, host.__name__
