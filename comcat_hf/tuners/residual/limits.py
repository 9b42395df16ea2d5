"""What a customize adapter cannot be put beside, said when it is added and not at the first forward."""

from collections.abc import Mapping

from torch import Tensor, nn

from ...errors import UnsupportedModuleError
from ...modeling.views import AttentionView
from ...modeling.weights import class_path
from ...modeling.wrappers import base_module


__all__ = ["check_adaptable", "check_whole"]

_PAIRS = {"qk": "query/key", "vo": "value/output"}
_INSTEAD = {"qk": "", "vo": ", or use core=True"}
# diffusers' attention backends whose kernels take heads of 64 and 128 columns alone.
_NARROW = "sage"


def check_adaptable(view: AttentionView, ranks: Mapping[str, int | None], core: bool, gains: bool = False) -> None:
    """Raise for a module that factors of these ranks, or gains, cannot be put beside.

    Raises:
        UnsupportedModuleError: naming the module, what it does, and what to do.
    """
    wanted = [choice for choice in _PAIRS if ranks.get(choice) is not None]
    if not wanted and not gains:
        return
    try:
        view.query_factor(view.head_dim)
    except UnsupportedModuleError as error:
        raise UnsupportedModuleError(
            f"{view.name}: {error} exclude_modules leaves single modules out of an adapter."
        ) from error
    for choice in wanted:
        if (reason := _refusal(view, choice, core)) is not None:
            raise UnsupportedModuleError(
                f"{view.name} is a {type(view.module).__name__} whose {_PAIRS[choice]} product cannot be adapted: "
                f"{reason}. Leave that pair out with {choice}_rank=None{_INSTEAD[choice]}."
            )
    for path, linear in view.projections().items():
        check_whole(path, linear)
    if wanted and not core and (backend := _backend(view)).startswith(_NARROW):
        raise UnsupportedModuleError(
            f"{view.name}: the attention backend {backend} takes heads of 64 or 128 columns alone, and full factors "
            "widen them. Use an adapter with core=True, or another backend (model.reset_attention_backend())."
        )


def check_whole(path: str, linear: nn.Module) -> None:
    """Raise for a linear layer whose weights are no tensor, or split over processes."""
    weight = base_module(linear).weight
    # By name: the class is expensive to import.
    if type(weight).__name__ == "DTensor":
        raise UnsupportedModuleError(
            f"{path}: expected whole weights, found a DTensor, split over processes by tensor parallelism. Train "
            "with DDP or FSDP, or leave the module out with exclude_modules."
        )
    if not isinstance(weight, Tensor):
        raise UnsupportedModuleError(
            f"{path}: expected a linear layer whose weights are a tensor, found a "
            f"{class_path(type(base_module(linear)))}. Put the adapter in before you quantise the model."
        )


def _refusal(view: AttentionView, choice: str, core: bool) -> str | None:
    form, family = view.form, view.family
    if choice == "qk" and form.refuse_qk is not None:
        return form.refuse_qk
    if choice == "vo" and core:
        return None
    if not core and family.fixed_width and not any(family.sizes):
        return "its forward takes heads of the dense width alone, and full factors widen them; core=True does not"
    described = family.norms is not None or form.rotary is not None or form.by_itself
    return None if described or family.refuse_qk is None else family.refuse_qk(view.module)


def _backend(view: AttentionView) -> str:
    """The attention backend of diffusers that runs a module, or nothing."""
    processor = getattr(view.module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return ""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(chosen, "value", chosen)).lstrip("_")
