"""Train the small ViT of the CIFAR-10 benchmarks from scratch: one command, one seed, 75 minutes of one core.

    python benchmarks/train_cifar.py OUTPUT --data FOLDER

FOLDER holds `cifar10/{train,validation}.parquet`. OUTPUT becomes a folder of transformers with the model, its image
processor and `training.json`: settings, accuracy of each epoch, versions. The benchmarks read it as
`vit-cifar10` in their `--data` folder.

A plain `ViTForImageClassification` (patches of 4, heads of 64) learns little from 50,000 images in an hour. Four
things help: products of attention that start near the identity, and positions as sines (mimetic initialisation,
Trockman and Kolter, arXiv 2305.09828); Muon for the matrices of the blocks; half of the patches in most epochs (Liu et
al., arXiv 2208.07220); stochastic depth with random crops and flips.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import _report
import torch
from _cases import read_images
from kornia.augmentation import AugmentationSequential, RandomCrop, RandomHorizontalFlip
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HEAD = 64


def build(args: argparse.Namespace) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // HEAD,
        intermediate_size=4 * args.width,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    model = ViTForImageClassification(config)
    for layer in model.vit.layers:
        imitate(layer.attention, args.width)
    side = config.image_size // config.patch_size
    model.vit.embeddings.position_embeddings.data[0, 1:] = sines(side, args.width)
    return model


@torch.no_grad()
def imitate(attention: nn.Module, width: int) -> None:
    """Start as trained attention looks: `W_Q W_K^T` near the identity per head, `W_V W_O` near its negative."""

    def near(identity: float, noise: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width))

    for head in range(width // HEAD):
        left, values, right = near(0.7, 0.7)
        rows, root = slice(head * HEAD, (head + 1) * HEAD), values[:HEAD].sqrt()
        attention.q_proj.weight[rows] = (left[:, :HEAD] * root).T
        attention.k_proj.weight[rows] = right[:HEAD] * root[:, None]
    left, values, right = near(-0.4, 0.4)
    attention.v_proj.weight.copy_((left * values.sqrt()).T)
    attention.o_proj.weight.copy_((values.sqrt()[:, None] * right).T)


def sines(side: int, width: int) -> Tensor:
    """Positions of a square of patches, `(side * side, width)`: sines and cosines of rows and of columns."""
    rates = 1e4 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class Regularised:
    """Training of a ViT on some of the patches, with layers that are left out at random, by hooks.

    Attributes:
        kept: share of the patches that a training step sees.
    """

    def __init__(self, model: ViTForImageClassification, depth: float) -> None:
        self.kept = 1.0
        model.vit.embeddings.register_forward_hook(self._choose)
        for number, layer in enumerate(model.vit.layers, start=1):
            layer.register_forward_hook(self._skip(depth * number / len(model.vit.layers)))

    def _choose(self, module: nn.Module, args: tuple, states: Tensor) -> Tensor:
        if not module.training or self.kept == 1.0:
            return states
        count, patches = len(states), states.shape[1] - 1
        chosen = torch.rand(count, patches).argsort(dim=1)[:, : round(self.kept * patches)] + 1
        rows = torch.cat([chosen.new_zeros(count, 1), chosen], dim=1)
        return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))

    @staticmethod
    def _skip(rate: float):
        def hook(module: nn.Module, args: tuple, states: Tensor) -> Tensor:
            if not module.training:
                return states
            kept = (torch.rand(len(states), 1, 1) >= rate) / (1 - rate)
            return args[0] + kept * (states - args[0])

        return hook


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    inner = {name for name, value in model.named_parameters() if ".layers." in name and value.ndim == 2}
    matrices = [value for name, value in model.named_parameters() if name in inner]
    others = [value for name, value in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.rate / 2, weight_decay=args.decay, fused=True),
    ]


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Epochs without end, cropped and flipped; the last incomplete batch of each is left out."""
    augment = AugmentationSequential(RandomCrop((32, 32), padding=4), RandomHorizontalFlip())
    while True:
        for chosen in torch.randperm(len(images)).split(size):
            if len(chosen) == size:
                yield augment(images[chosen]), labels[chosen]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(part).logits.argmax(-1) for part in images.split(250)])
    model.train()
    return (found == labels).float().mean().item()


def train(model: ViTForImageClassification, data: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train, and say after each epoch what it came to."""
    images, labels = read_images(data / "train.parquet", args.images)
    held, held_labels = read_images(data / "validation.parquet", args.images)
    regularised, chosen = Regularised(model, args.depth), optimizers(model, args)
    per_epoch = len(images) // args.batch
    steps, warm, log = args.epochs * per_epoch, max(1, per_epoch // 2), []

    def factor(step: int) -> float:
        return min((step + 1) / warm, (steps - step) / (steps - warm))

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in chosen]
    stream, start = batches(images, labels, args.batch), time.perf_counter()
    model.train()
    for epoch in range(args.epochs):
        regularised.kept = 1.0 if epoch >= args.epochs - args.whole else 0.5
        total = 0.0
        for _ in range(per_epoch):
            pixels, classes = next(stream)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixels).logits
            loss = F.cross_entropy(logits.float(), classes, label_smoothing=0.1)
            loss.backward()
            for one, schedule in zip(chosen, schedules, strict=True):
                one.step()
                schedule.step()
                one.zero_grad(set_to_none=True)
            total += loss.item()
        row = {"epoch": epoch + 1, "loss": total / per_epoch, "accuracy": accuracy(model, held, held_labels)}
        row["minutes"] = (time.perf_counter() - start) / 60
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        log.append(row)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/{train,validation}.parquet")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--whole", type=int, default=5, help="last epochs, which see all patches")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--depth", type=float, default=0.05, help="rate at which the last layer is left out")
    parser.add_argument("--images", type=int, help="a seeded choice of so many, of training and of validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = build(args)
    log = train(model, args.data / "cifar10", args)
    model.eval().save_pretrained(args.output)
    ViTImageProcessor(size={"height": 32, "width": 32}, resample=2).save_pretrained(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "data")}
    found = {"environment": _report.environment(), "settings": settings, "epochs": log}
    (args.output / "training.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
