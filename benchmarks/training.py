"""The training loop of scripts/compress_vit.py: its speed against a bare PyTorch loop, and the memory of its routes.

The claims:

- `throughput`: optimizer steps of `finetune_model` run at no less than 0.95 of the speed of a bare loop (forward,
  loss, backward, clipping, AdamW, cosine) on the same compressed model and the same batches. Both sides run in turns;
  a round's time is that between the first batch after the warm-up and the last one, so that neither pays for setting
  up.
- `memory`: route `peft` holds one copy of the dense model. Against a second copy as the teacher (`two copies`) it
  saves the bytes of the dense model; route `full` (small model and dense teacher) is shown beside them. Each side runs
  in a process of its own. Counted: bytes of all parameters and buffers, each storage once. Measured: what the process
  takes at its peak while it trains, less what it had before beside the weights (on a GPU: what was allocated).

Weights are random, and so are images: neither times nor bytes depend on their values.
"""

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _report
import torch
from _measuring import apart, peak_since, ratio, seconds_of, start_peak
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging as of_transformers

import comcat_hf
from comcat_hf.compression.finetuning import parameter_groups
from comcat_hf.training.classify.loop import TrainRun, finetune_model
from comcat_hf.training.classify.routes import make_student
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.interruption import Interruption


LEAST = 0.95
# Of a second copy's bytes, the share that the peak must fall by; the rest is left to the allocator.
SAVED = 0.9
MODELS: Mapping[str, Mapping[str, int]] = {
    "cifar": {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "image_size": 32,
        "patch_size": 4,
    },
    "deit-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    **_report.DEIT,
}
WARMUP = 3
SIDES = ("peft", "two copies", "full")


class Stopwatch:
    """Hands out batches and takes the time between the first one after the warm-up and the end."""

    def __init__(self, batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self.seconds = math.nan

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        start = math.nan
        try:
            for index, batch in enumerate(self._batches):
                if index == WARMUP:
                    start = self._now()
                yield batch
        # The loop has asked for more, or lets go of the batches: the last step has been taken.
        finally:
            self.seconds = self._now() - start

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps of the loop and of a bare one, in turns."""
    accelerator = make_accelerator(args)
    rows = []
    for name in args.models:
        batches = make_batches(name, args, WARMUP + args.steps)
        with tempfile.TemporaryDirectory() as folder:
            dense, initial = make_models(name, args, Path(folder))
            settings = make_settings(args, folder, distillation_type="none")
            ours = partial(our_loop, settings, accelerator, dense, initial)
            bare = partial(bare_loop, settings, accelerator, dense, initial)
            rounds = in_turns({"ours": ours, "bare": bare}, batches, accelerator.device, args.repeats)
        images = {side: args.steps * args.batch_size / seconds_of(rounds, side) for side in rounds[0]}
        share = ratio(rounds, "bare", "ours")
        rows.append({"model": name, "images_per_second": images, "ratio": share, "holds": share >= LEAST})
    _report.print_table(
        [
            [
                row["model"],
                row["images_per_second"]["bare"],
                row["images_per_second"]["ours"],
                row["ratio"],
                row["holds"],
            ]
            for row in rows
        ],
        ["training", "bare loop, images/s", "finetune_model, images/s", "of the bare loop's speed", f">= {LEAST}"],
    )
    return {"rows": rows}


def in_turns(
    sides: Mapping[str, Callable[[Iterable[Any]], None]], batches: list[Any], device: torch.device, repeats: int
) -> list[dict[str, float]]:
    """Seconds of every side by round; the order alternates, and the first round does not count."""
    rounds = []
    for index in range(repeats + 1):
        taken = {}
        for name in list(sides)[:: 1 if index % 2 else -1]:
            watch = Stopwatch(batches, device)
            sides[name](watch)
            taken[name] = watch.seconds
        rounds.append(taken)
    return rounds[1:]


def our_loop(
    settings: CompressSettings, accelerator: Accelerator, dense: nn.Module, initial: Path, batches: Iterable[Any]
) -> None:
    train(settings, accelerator, make_student(settings, dense, initial), batches)


def train(settings: CompressSettings, accelerator: Accelerator, student: Any, batches: Iterable[Any]) -> None:
    """`finetune_model` on batches that are there."""
    steps = settings.max_train_steps
    with Interruption() as interruption:
        result = finetune_model(
            TrainRun(
                settings=settings,
                accelerator=accelerator,
                student=student,
                seed=0,
                plan="benchmark",
                batches=lambda start, count: batches,
                steps=steps,
                steps_per_epoch=steps,
                evaluate=None,
                interruption=interruption,
                say=lambda text: None,
                checkpoint=None,
            )
        )
    assert result.step == steps


def bare_loop(
    settings: CompressSettings, accelerator: Accelerator, dense: nn.Module, initial: Path, batches: Iterable[Any]
) -> None:
    """The same training, written out in plain PyTorch."""
    device, dtype = (
        accelerator.device,
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision),
    )
    model = make_student(settings, dense, initial).model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.max_train_steps)
    for batch in batches:
        pixels, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(pixel_values=pixels).logits
        F.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the routes, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(args.memory_model, args, Path(folder))
        for side in SIDES:
            found = [apart(measure_side, args, side, folder) for _ in range(args.memory_repeats)]
            rows.append(found[0] | {"peak": statistics.median(one["peak"] for one in found)})
    by_side = {row["side"]: row for row in rows}
    one, two, base = by_side["peft"], by_side["two copies"], by_side["peft"]["dense"]
    saved = {key: two[key] - one[key] for key in ("held", "peak")}
    holds = saved["held"] >= base and saved["peak"] >= SAVED * base
    _report.print_table(
        [[row["side"], *(f"{row[key] / 2**20:,.1f}" for key in ("held", "peak"))] for row in rows],
        [f"training {args.memory_model}", "parameters and buffers, MiB", "peak, MiB"],
    )
    print(
        f"A copy of the dense model: {base / 2**20:,.1f} MiB. Route peft saves {saved['held'] / 2**20:,.1f} MiB of "
        f"weights and {saved['peak'] / 2**20:,.1f} MiB of the peak; one copy: {holds}\n"
    )
    return {"model": args.memory_model, "rows": rows, "saved": saved, "holds": holds}


def measure_side(args: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    """Train one side for a few steps in this process, and see what it takes."""
    set_up(args)
    accelerator = make_accelerator(args)
    args.batch_size, args.steps = args.memory_batch_size, 0
    # The weights that the small model was made from: route peft compares them.
    torch.manual_seed(0)
    settings = make_settings(args, folder, route="full" if side == "full" else "peft")
    dense = ViTForImageClassification(make_config(args.memory_model)).eval().requires_grad_(False)
    size = held_bytes(dense)
    teacher = copy.deepcopy(dense) if side == "two copies" else None
    student = make_student(settings, dense, Path(folder) / "initial")
    if teacher is not None:
        student = replace(student, teacher=teacher)
    del dense, teacher
    held = held_bytes(student.model, *([] if student.teacher is None else [student.teacher]))
    batches = make_batches(args.memory_model, args, WARMUP)
    before = start_peak(accelerator.device)
    if args.device == "cpu":
        # The weights are there already, and count.
        before -= held
    train(settings, accelerator, student, batches)
    return {"side": side, "dense": size, "held": held, "peak": peak_since(accelerator.device) - before}


def held_bytes(*models: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = itertools.chain.from_iterable((*model.parameters(), *model.buffers()) for model in models)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def set_up(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    of_transformers.disable_progress_bar()


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    return Accelerator(cpu=args.device == "cpu", mixed_precision=args.mixed_precision)


def make_config(name: str) -> ViTConfig:
    return ViTConfig(num_labels=1000 if name != "cifar" else 10, **MODELS[name])


def make_models(name: str, args: argparse.Namespace, folder: Path) -> tuple[nn.Module, Path]:
    """A dense model, and the folder of the model that it was compressed to."""
    torch.manual_seed(0)
    dense = ViTForImageClassification(make_config(name)).eval().requires_grad_(False)
    comcat_hf.compress(dense, reduction=args.reduction).save_pretrained(folder / "initial")
    return dense, folder / "initial"


def make_settings(args: argparse.Namespace, folder: str, **changes: Any) -> CompressSettings:
    return CompressSettings(
        model_name_or_path="benchmark",
        output_dir=str(Path(folder) / "out"),
        overwrite_output_dir=True,
        per_device_train_batch_size=args.batch_size,
        max_train_steps=WARMUP + args.steps,
        checkpointing_steps="none",
        eval_steps="none",
        report_to="none",
        **changes,
    )


def make_batches(name: str, args: argparse.Namespace, count: int) -> list[dict[str, Tensor]]:
    config, generator = make_config(name), torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, config.image_size, config.image_size)
    return [
        {
            "pixel_values": torch.randn(shape, generator=generator),
            "labels": torch.randint(config.num_labels, (args.batch_size,), generator=generator),
        }
        for _ in range(count)
    ]


PARTS = {"throughput": throughput, "memory": memory}


def main() -> None:
    parser = _report.parser(__doc__, threads=2, batch_size=32)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["cifar", "deit-tiny"], help="of throughput")
    parser.add_argument("--memory-model", choices=MODELS, default="deit-base")
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--memory-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="that are timed in a round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--memory-repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"))
    args = parser.parse_args()
    set_up(args)
    _report.write(args, {name: PARTS[name](args) for name in args.parts}, hidden=("parts",))


if __name__ == "__main__":
    main()
