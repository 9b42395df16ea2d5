"""What the recipes of DeiT come to on one A100: estimated, not measured.

`probe` measures on a CPU what does not depend on the device: multiply-accumulates, the bytes that a training step
keeps for the backward pass, and the processor time of reading an image. `estimates` multiplies.
"""

import io
import time
from collections.abc import Mapping
from typing import Any

import torch
from _measuring import Kept
from _report import DEIT
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import comcat_hf
from comcat_hf.training.classify.augmentation import ImagePreparation
from comcat_hf.training.classify.settings import parse_compress_settings
from comcat_hf.training.images import read_image
from comcat_hf.training.seeds import seeded


TRAINING, VALIDATION = 1_281_167, 50_000
# Floating-point operations per second of an A100, by its data sheet, and the share that is assumed to be reached.
BF16, FP32 = 0.35 * 312e12, 0.5 * 19.5e12
# Passes over the calibration images by stage, as benchmarks/results/calibration-base.json has them; curvature is
# gathered with the statistics, and ranks need no further pass.
PASSES = {"calibrate": 5.8, "allocate": 0, "initialize": 9.5}
IMAGES = 24


def probe(recipe: str) -> dict[str, float]:
    """What a recipe needs per image, measured on a CPU with random weights."""
    settings = parse_compress_settings([recipe])
    torch.manual_seed(0)
    dense = ViTForImageClassification(ViTConfig(num_labels=1000, **DEIT[recipe.replace("_", "-")])).eval()
    small = comcat_hf.compress(dense, settings.reduction, mlp="width").train()
    kept = [_kept_bytes(small, count) for count in (1, 3)]
    preparation = ImagePreparation.of(settings, ViTImageProcessorPil(size={"height": 224, "width": 224}))
    generator = seeded(0, "augmentation", 0)
    return {
        "epochs": settings.num_train_epochs,
        "batch": settings.per_device_train_batch_size,
        "workers": settings.dataloader_num_workers,
        "calibration_samples": settings.calibration_samples,
        "dense_macs": comcat_hf.count_macs(dense),
        "macs": comcat_hf.count_macs(small),
        "dense_parameters": comcat_hf.count_parameters(dense),
        "parameters": comcat_hf.count_parameters(small),
        "kept_bytes_per_image": (kept[1] - kept[0]) / 2,
        "train_image_seconds": _seconds(lambda image: preparation.train(image, generator)),
        "eval_image_seconds": _seconds(preparation.evaluate),
    }


def _kept_bytes(model: nn.Module, count: int) -> int:
    """Bytes that a training step in bf16 keeps for the backward pass."""
    with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16):
        logits = model(pixel_values=torch.randn(count, 3, 224, 224), output_hidden_states=True).logits
        F.cross_entropy(logits.float(), torch.zeros(count, dtype=torch.long))
    return kept.bytes


def _seconds(prepare: Any) -> float:
    """Processor seconds of decoding and preparing an image of ImageNet's usual size."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((500, 375), 40).convert("RGB").save(file, "jpeg", quality=90)
    prepare(read_image({"bytes": file.getvalue()}, "probe"))
    began = time.process_time()
    for _ in range(IMAGES):
        prepare(read_image({"bytes": file.getvalue()}, "probe"))
    return (time.process_time() - began) / IMAGES


def estimates(rehearsal: Mapping[str, Any], recipe: str) -> dict[str, tuple[str, str]]:
    """Hours and GiB on the GPU by stage.

    Times are sums of arithmetic and of reading, whichever is longer, and of the processor time that the rehearsal
    took, which stands for closed forms and for starting. Memory is what the dry run counts, with the bytes that are
    kept for the backward pass; before fine-tuning, what the rehearsal's process took over its start, scaled by the
    parameters.
    """
    of, taken = rehearsal["probe"][recipe], rehearsal["stages"]
    scale = of["dense_parameters"] / rehearsal["probe"]["deit_base"]["dense_parameters"]
    start = taken["start"]
    found = {}
    for stage, passes in PASSES.items():
        arithmetic = passes * of["calibration_samples"] * 2 * of["dense_macs"] / FP32
        fixed = scale * max(taken[stage]["cpu_seconds"] - start["cpu_seconds"], 0) + start["cpu_seconds"]
        peak = scale * (taken[stage]["peak_bytes"] - start["peak_bytes"])
        found[stage] = arithmetic + fixed, peak
    epoch = max(
        TRAINING * 2 * (of["dense_macs"] + 3 * of["macs"]) / BF16,
        TRAINING * of["train_image_seconds"] / of["workers"],
    )
    reading = VALIDATION * of["eval_image_seconds"] / of["workers"]
    each = max(VALIDATION * 2 * of["macs"] / FP32, reading)
    # Small model with gradients, two moments and its average, and the dense teacher, in float32.
    state = 4 * (of["dense_parameters"] + 5 * of["parameters"])
    found["finetune"] = of["epochs"] * (epoch + each), state + of["batch"] * of["kept_bytes_per_image"]
    dense = max(VALIDATION * 2 * of["dense_macs"] / FP32, reading)
    shown = {stage: (f"{seconds / 3600:.2g}", f"{size / 2**30:.1f}") for stage, (seconds, size) in found.items()}
    return shown | {"evaluate": (f"{(dense + 2 * each) / 3600:.2g}", "")}
