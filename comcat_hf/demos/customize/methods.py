"""What the demo compares: ways of teaching a UNet a new image, how their results are saved, and loaded again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from ...configs.adapter import ComCATConfig
from ...customization import load_comcat_weights, save_comcat_weights
from ...tuners.groups import GAINS_LR_RATIO, parameter_groups
from .base import BASE_FOLDER, Bar, Loss


__all__ = ["METHODS", "Lesson", "Method", "teach"]

ADAPTER = "digit"
QK_RANK = VO_RANK = 1
CORE_RANK = 4
# The smallest there is, and on these bases as good as larger ones (docs/benchmarks.md).
LORA_RANK = 1
_LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Lesson:
    """What every method learns from.

    Attributes:
        latents, told: of the images of the new class, and what the UNet is told of each.
        prior_latents, prior_told: of images that the base drew from the old captions, and these.
        steps: of training.
        batch: images of the new class in a batch, and beside them as many of the old ones.
        loss: that the base minimises.
        seed: of the order, the noise and the noise levels.
    """

    latents: Tensor
    told: Tensor
    prior_latents: Tensor
    prior_told: Tensor
    steps: int
    batch: int
    loss: Loss
    seed: int


@dataclass(frozen=True)
class Method:
    """One way of teaching.

    Attributes:
        name: in the table.
        rates: learning rates to try.
        attach: makes a frozen UNet's parameters to train.
        save: writes what was learned to a folder.
        load: puts it into a pipeline of the base.
    """

    name: str
    rates: tuple[float, ...]
    attach: Callable[[nn.Module], None]
    save: Callable[[Any, Path], None]
    load: Callable[[Any, Path], None]


def teach(
    unet: nn.Module, lesson: Lesson, rate: float, bar: Bar, name: str, gains_lr_ratio: float = GAINS_LR_RATIO
) -> None:
    """Train what is trainable of a UNet; the same batches, noise and noise levels whatever that is.

    Args:
        unet: after `attach`.
        lesson: what to learn.
        rate: the learning rate at the start; it falls to zero along a cosine.
        bar: counts the steps.
        name: of the bar.
        gains_lr_ratio: the rate of gains, as a multiple of the others'.
    """
    drawn = torch.Generator().manual_seed(lesson.seed)
    groups = parameter_groups(unet, learning_rate=rate, gains_lr_ratio=gains_lr_ratio)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lesson.steps)
    unet.train()
    for _ in bar(lesson.steps, name):
        new = torch.randperm(len(lesson.latents), generator=drawn)[: lesson.batch]
        old = torch.randperm(len(lesson.prior_latents), generator=drawn)[: len(new)]
        clean = torch.cat([lesson.latents[new], lesson.prior_latents[old]])
        told = torch.cat([lesson.told[new], lesson.prior_told[old]])
        optimizer.zero_grad(set_to_none=True)
        lesson.loss(unet, clean, told, drawn).backward()
        optimizer.step()
        schedule.step()
    unet.eval()


def _comcat(**ranks: Any) -> Callable[[nn.Module], None]:
    return lambda unet: unet.add_adapter(ComCATConfig(mode="customize", **ranks), adapter_name=ADAPTER)


def _save_comcat(pipeline: Any, folder: Path) -> None:
    # By its name beside the adapter, so that the size of the files does not hang on where they are.
    save_comcat_weights(pipeline, folder, adapter_name=ADAPTER, base_model_name_or_path=BASE_FOLDER)


def _load_comcat(pipeline: Any, folder: Path) -> None:
    load_comcat_weights(pipeline, folder, adapter_name=ADAPTER)


def _attach_lora(unet: nn.Module) -> None:
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(_LORA_LAYERS))
    unet.add_adapter(config, adapter_name=ADAPTER)


def _save_lora(pipeline: Any, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet, adapter_name=ADAPTER))
    pipeline.save_lora_weights(folder, unet_lora_layers=state)


def _load_lora(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(folder, adapter_name=ADAPTER)


def _thaw(unet: nn.Module) -> None:
    unet.requires_grad_(True)


def _save_unet(pipeline: Any, folder: Path) -> None:
    pipeline.unet.register_to_config(_name_or_path=BASE_FOLDER)
    pipeline.unet.save_pretrained(folder)


def _load_unet(pipeline: Any, folder: Path) -> None:
    pipeline.unet = type(pipeline.unet).from_pretrained(folder).eval()


# Of wider grids, half a decade apart, those around the best at 100 steps: no method is held back by its rates.
METHODS = (
    Method("ComCAT, full", (1e-2, 3e-2, 1e-1), _comcat(qk_rank=QK_RANK, vo_rank=VO_RANK), _save_comcat, _load_comcat),
    Method(
        "ComCAT, core",
        (1e-1, 3e-1, 1.0),
        _comcat(qk_rank=CORE_RANK, vo_rank=CORE_RANK, core=True, gains=True),
        _save_comcat,
        _load_comcat,
    ),
    Method("LoRA", (1e-2, 3e-2, 1e-1), _attach_lora, _save_lora, _load_lora),
    Method("full fine-tuning", (3e-4, 1e-3, 3e-3), _thaw, _save_unet, _load_unet),
)
