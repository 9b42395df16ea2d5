"""Parameters and multiply-accumulates of a model, counted, dense or compressed."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import Kind, check, list_of
from ..errors import InvalidValueError
from ..modeling import AttentionFamily, LowRankAttention, LowRankLinear, Tokens, attention_views, meta_copy, unwrapped
from .calibration.inputs import main_input


__all__ = ["Trace", "count_macs", "count_parameters", "example_inputs", "given_inputs", "samples_in", "trace"]


def count_parameters(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Number of parameters by `numel`; shared ones count once.

    Args:
        model: any module.
        names: paths of modules to count; all by default.

    Returns:
        the number.

    Raises:
        InvalidValueError: names that are none of the model's.
    """
    model = unwrapped(model)
    modules = [model] if names is None else [model.get_submodule(name) for name in _known(model, names)]
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """One sample of the model's native size, on the meta device.

    Raises:
        InvalidValueError: the configuration does not say the size.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise InvalidValueError(
            f"{type(model).__name__} has no configuration that says its native size, so one sample's MACs cannot be "
            "counted. Pass inputs= with one sample."
        )
    if hasattr(config, "cross_attention_dim") and not hasattr(model, "main_input_name"):
        return _denoiser_inputs(config)
    main = main_input(model)
    if main == "input_ids":
        length = getattr(config.get_text_config(), "max_position_embeddings", 512)
        text = {"input_ids": torch.zeros(1, min(length, 512), dtype=torch.long, device="meta")}
        # A model of two towers runs both.
        return text | (_image_inputs(model, "pixel_values") if hasattr(config, "vision_config") else {})
    return _image_inputs(model, main)


def given_inputs(model: nn.Module, inputs: Any | None) -> Mapping[str, Any]:
    """Model inputs as a mapping: one sample of native size by default; a tensor is the main input.

    Raises:
        InvalidValueError: something else, or more images for one text than for another.
    """
    if inputs is None:
        return example_inputs(model)
    if isinstance(inputs, Tensor):
        return {main_input(model): inputs}
    if not isinstance(inputs, Mapping):
        raise InvalidValueError(
            f"inputs: expected a mapping of what {type(model).__name__} takes, or a tensor of {main_input(model)!r}, "
            f"found a {type(inputs).__name__}."
        )
    texts, images = (inputs.get(name) for name in ("input_ids", "pixel_values"))
    # A text may have several images, and packed images are rows of patches.
    towers = isinstance(texts, Tensor) and isinstance(images, Tensor) and images.ndim > 2
    if towers and len(images) % max(len(texts), 1):
        raise InvalidValueError(
            f"inputs: expected as many images for each text, found {len(texts)} texts and {len(images)} images. Give "
            "one of each."
        )
    return inputs


def _known(model: nn.Module, names: Collection[str]) -> Collection[str]:
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    names = names if isinstance(names, str) else tuple(names)
    return check(names, list_of(Kind("the path of a module", lambda path: path in paths)), "names")


def _denoiser_inputs(config: Any) -> dict[str, Any]:
    """What a UNet of a text-to-image pipeline is called with, and a prompt of 77 tokens."""
    size, width = config.sample_size, config.cross_attention_dim
    height, width_of_image = size if isinstance(size, (list, tuple)) else (size, size)
    inputs: dict[str, Any] = {
        "sample": torch.empty(1, config.in_channels, height, width_of_image, device="meta"),
        "timestep": torch.zeros(1, dtype=torch.long, device="meta"),
        "encoder_hidden_states": torch.empty(1, 77, width if isinstance(width, int) else width[0], device="meta"),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, device="meta"),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    return inputs


def _image_inputs(model: nn.Module, main: str) -> dict[str, Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        raise InvalidValueError(
            f"{type(model).__name__}: its configuration names no image_size, so one sample's MACs cannot be counted. "
            "Pass inputs= with one sample."
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return {main: torch.empty(1, *frames, channels, height, width, device="meta")}


@torch.no_grad()
def count_macs(model: nn.Module, names: Collection[str] | None = None, inputs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulates of linear and convolution layers and of both attention products, for one sample.

    Counted by running a copy of the model without weights.

    Args:
        model: a dense or compressed transformers model.
        names: paths of modules to count; all by default.
        inputs: model inputs; one sample of native size by default.

    Returns:
        the number of one sample; a multiplication and an addition count as one.

    Raises:
        InvalidValueError: names that are none of the model's, or those of [`trace`].
        UnsupportedModuleError: attention that is not known.
    """
    model = unwrapped(model)
    names = None if names is None else _known(model, names)
    macs = trace(model, inputs, whole=names is None).macs
    if names is not None:
        macs = {path: n for path, n in macs.items() if any(path == m or path.startswith(f"{m}.") for m in names)}
    return sum(macs.values())


@dataclass(frozen=True)
class Trace:
    """What one sample does in a model: multiply-accumulates and token counts, by module path."""

    macs: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)

    def add_call(self, name: str, queries: int, keys: int, seen: int | None = None) -> None:
        calls = self.tokens[name].calls if name in self.tokens else 0
        self.tokens[name] = Tokens(queries, keys, calls + 1, seen)


@torch.no_grad()
def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None, *, whole: bool = True) -> Trace:
    """Run a copy of a model without weights and record what one sample does in it.

    Args:
        model: a dense or compressed transformers model.
        inputs: model inputs; one sample of native size by default.
        whole: attention that is not known is an error, since its products cannot be counted; else it is passed over.

    Raises:
        InvalidValueError: inputs that do not fit the model, or none given and none that could be made up.
        UnsupportedModuleError: attention that is not known.
    """
    given = given_inputs(model, inputs)
    # Where samples are packed one behind the other, what says their sizes is looked into.
    packed = _is_packed(given) and not next(model.parameters()).is_meta
    # A mask saves nothing in the products, and transformers would look into it, which has no values here.
    given = {
        k: v.to("meta") if isinstance(v, Tensor) and not packed else v
        for k, v in given.items()
        if k != "attention_mask" and not k.startswith("label")
    }
    batch = samples_in(given)
    skeleton = (copy.deepcopy if packed else meta_copy)(model).eval()
    result = Trace()
    views = _attention_families(skeleton, whole)
    for name, module in skeleton.named_modules():
        counter = next((count for cls, count in _COUNTERS if isinstance(module, cls)), None)
        if counter is not None:
            module.register_forward_hook(partial(_record, result, name, batch, counter))
        if name in views:
            _count_products(result, name, module, views[name], batch)
    try:
        skeleton(**given)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.items() if isinstance(v, Tensor))
        raise InvalidValueError(
            f"{type(model).__name__} could not be run on one sample to count its MACs ({shapes or 'no tensors'}): "
            f"{error}. Pass inputs= with everything that its forward needs."
        ) from error
    return result


def samples_in(inputs: Mapping[str, Any]) -> int:
    """How many samples model inputs are; packed patches are one."""
    first = _first(inputs)
    if first is None:
        return 0
    if _is_packed(inputs):
        return 1
    if first.shape == (1,):
        # One time step for all samples.
        return max((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 2), default=1)
    return len(first)


def _is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether each row of the inputs is a patch, and whole images lie one behind the other."""
    first = _first(inputs)
    return first is not None and first.ndim == 2 and first.is_floating_point()


def _first(inputs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in inputs.values() if isinstance(value, Tensor) and value.ndim), None)


def _attention_families(model: nn.Module, whole: bool) -> dict[str, AttentionFamily]:
    low_rank = {name: m._family for name, m in model.named_modules() if isinstance(m, LowRankAttention)}
    views = attention_views(model, refuse=lambda path: whole)
    return low_rank | {name: view.family for name, view in views.items()}


def _weight_macs(module: nn.Module, args: tuple, output: Tensor) -> int:
    # Every output element is a dot product with one row of the weight.
    return output.numel() * module.weight[0].numel()


def _transposed_macs(module: nn.Module, args: tuple, output: Tensor) -> int:
    # Every input element is multiplied by one row of the weight.
    return args[0].numel() * module.weight[0].numel()


def _low_rank_macs(module: nn.Module, args: tuple, output: Tensor) -> int:
    # The first factor is a linear layer of its own.
    return output.numel() * module.rank


def _torch_attention_macs(module: nn.MultiheadAttention, args: tuple, output: tuple) -> int:
    # It calls none of its projections as modules.
    samples, tokens = (0, 1) if module.batch_first else (1, 0)
    width, queries, keys = module.embed_dim, args[0].shape[tokens], args[1].shape[tokens]
    projections = width * (2 * queries * width + keys * (module.kdim + module.vdim))
    return args[0].shape[samples] * (projections + 2 * queries * keys * width)


_COUNTERS: tuple[tuple[Any, Callable[..., int]], ...] = (
    (nn.MultiheadAttention, _torch_attention_macs),
    (LowRankLinear, _low_rank_macs),
    ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), _weight_macs),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed_macs),
)


def _record(
    result: Trace, name: str, batch: int, counter: Callable[..., int], module: nn.Module, args: tuple, output: Any
) -> None:
    result.macs[name] = result.macs.get(name, 0) + counter(module, args, output) // batch
    if isinstance(output, Tensor):
        rows = output[..., 0].numel() // batch
        result.add_call(name, rows, rows)


def _count_products(result: Trace, name: str, module: nn.Module, family: AttentionFamily, batch: int) -> None:
    shapes: dict[str, tuple[int, int, int]] = {}

    def note(roles: Mapping[str, int], module: nn.Module, args: tuple, output: Tensor) -> None:
        rows = output[..., 0].numel()
        # Of one window, where a sample has several.
        seen = rows // len(output) if output.ndim > 2 else rows
        for role, width in roles.items():
            before = shapes.get(role, (0, 0, 0))
            # Of several streams the tokens add up.
            shapes[role] = (before[0] + rows // batch, before[1] + seen, width or output.shape[-1])

    for layer, roles in _widths(module, family).items():
        getattr(module, layer).register_forward_hook(partial(note, roles))
    for stream in form.further if (form := family.form_of(module)) else ():
        for role in ("query", "key", "value"):
            if (linear := getattr(module, getattr(stream, role), None)) is not None:
                linear.register_forward_hook(partial(note, {role: 0}))

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        (queries, _, width), (keys, seen, _), (_, _, value_width) = (shapes[r] for r in ("query", "key", "value"))
        result.macs[name] = result.macs.get(name, 0) + queries * seen * (width + value_width)
        result.add_call(name, queries, keys, seen)
        shapes.clear()

    module.register_forward_hook(hook)


def _widths(module: nn.Module, family: AttentionFamily) -> dict[str, dict[str, int]]:
    """What each input projection gives, by attribute name, with the width of each; 0 is the whole of its output."""
    if not family.fused:
        return {getattr(family, role): {role: 0} for role in ("query", "key", "value")}
    heads, dense = family.heads_of(module), getattr(module, "dense_width", None)
    ranks = getattr(module, "qk_rank", None), getattr(module, "vo_rank", None)
    qk, vo = (heads * (rank or dense or family.head_dim_of(module)) for rank in ranks)
    return {family.query: {"query": qk, "key": qk, "value": vo}}
