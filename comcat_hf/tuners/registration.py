"""Makes PEFT know the method."""

from aenum import extend_enum
from peft.utils import PeftType, register_peft_method

from ..configs.adapter import ComCATConfig
from .model import ComCATModel


__all__ = ["register"]


def register() -> None:
    """Register PEFT type COMCAT; done once, when the package is imported."""
    if "COMCAT" not in PeftType.__members__:
        extend_enum(PeftType, "COMCAT", "COMCAT")
        register_peft_method(name="comcat", config_cls=ComCATConfig, model_cls=ComCATModel, prefix=ComCATModel.prefix)
