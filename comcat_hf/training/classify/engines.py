"""What accelerate's engines must be told of a fine-tuning before they get the model: DeepSpeed and FSDP2."""

from collections.abc import Callable, Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ...errors import InvalidValueError
from .settings import CompressSettings


__all__ = ["blocks_of", "prepare_engine"]


def prepare_engine(accelerator: Accelerator, settings: CompressSettings, model: nn.Module) -> None:
    """Tell the engine that spreads the training over processes, if there is one, what it cannot find out.

    Raises:
        InvalidValueError: settings that the engine does not go together with.
    """
    _ENGINES.get(accelerator.distributed_type, lambda *_: None)(accelerator, settings, model)


def blocks_of(model: nn.Module) -> list[str]:
    """The classes of a model's blocks, without those that hold its input embeddings.

    accelerate shards the classes that the model names as indivisible, then the input embeddings by themselves. A ViT
    names the module around its patch embeddings among them, which would so be sharded twice.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    present = {type(module).__name__ for module in model.modules()}
    around = {
        type(module).__name__ for module in model.modules() if any(child is embeddings for child in module.modules())
    }
    return sorted(set(getattr(model, "_no_split_modules", None) or ()) & present - around)


def _prepare_deepspeed(accelerator: Accelerator, settings: CompressSettings, model: nn.Module) -> None:
    if settings.ema_decay is not None:
        raise InvalidValueError(
            "--ema_decay: expected processes that can read their weights between steps, found DeepSpeed, which keeps "
            "them to itself. Leave the flag out, or launch with FSDP or plain processes."
        )
    # It would read these off a data loader, of which accelerate knows none here.
    accelerator.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm,
    }


def _prepare_fsdp(accelerator: Accelerator, settings: CompressSettings, model: nn.Module) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = blocks_of(model) or None


_ENGINES: Mapping[str, Callable[[Accelerator, CompressSettings, nn.Module], None]] = {
    DistributedType.DEEPSPEED: _prepare_deepspeed,
    DistributedType.FSDP: _prepare_fsdp,
}
