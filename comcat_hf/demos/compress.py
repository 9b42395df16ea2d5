"""The demo: a small ViT on scikit-learn's digits, compressed, fine-tuned, saved and loaded again."""

import copy
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from ..compression.budget.allocation import allocate_ranks
from ..compression.calibration.statistics import collect_statistics
from ..compression.clock import in_turns
from ..compression.compress import compress
from ..compression.counting import count_macs, count_parameters
from ..compression.distillation import DistillationLoss
from ..errors import ComCATError, InvalidValueError
from ..hub import write_bytes_atomic, write_json_atomic
from ..native import plan_of
from ..reporting.plots import plot_compression
from ..tensor_files import write_safetensors
from ..training.classify.callbacks import ProgressBar
from ..training.classify.planning import rate_at
from ..training.classify.trainer import DistillationTrainer
from ..training.seeds import random_states, set_random_states
from .shared import check_settings, missing, quiet, threads


__all__ = ["DemoResult", "DemoSettings", "Row", "run_demo", "train_classifier"]

BATCH = 64

# What the new process runs: folder, file with images and logits, number of threads.
_RELOAD = """
import sys
import torch
import comcat_hf
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.utils import logging

logging.disable_progress_bar()
folder, file, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
held_out = load_file(file)
with torch.inference_mode():
    logits = AutoModelForImageClassification.from_pretrained(folder)(held_out["pixel_values"]).logits
if not torch.equal(logits, held_out["logits"]):
    sys.exit(f"The logits differ by up to {(logits - held_out['logits']).abs().max().item()}.")
"""


@dataclass(frozen=True)
class DemoSettings:
    """How the demo runs.

    Attributes:
        reduction: share of the parameters to remove, 0 to 1.
        epochs: for which the dense model is trained.
        finetune_epochs: for which the compressed one is fine-tuned, and the dense one trained further.
        seed: of the initial weights, the order of the batches and the augmentation. The split is always the same.
        repeats: timed runs of each model.
        threads: for torch. One serves so small a model, and more of them wait for each other on a busy machine.
        width, layers: of the dense model; heads are 16 wide.
    """

    reduction: float = 0.5
    epochs: int = 30
    finetune_epochs: int = 10
    seed: int = 0
    repeats: int = 30
    threads: int = 1
    width: int = 64
    layers: int = 4


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: which model.
        accuracy: on the held-out third, 0 to 1.
        parameters: by `numel`.
        macs: multiply-accumulates of one image.
        latency: median seconds for a batch of 64 images.
    """

    name: str
    accuracy: float
    parameters: int
    macs: int
    latency: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies.

    Attributes:
        rows: the table.
        model, image, plot: the compressed model's folder, a digit to try it on and the picture of ranks and spectra.
        settings: how it ran.
        seconds: for everything.
    """

    rows: tuple[Row, ...]
    model: Path
    image: Path
    plot: Path
    settings: DemoSettings
    seconds: float


@dataclass(frozen=True)
class Digits:
    """Images `(n, 3, 8, 8)` from -1 to 1 and labels `(n,)`: two thirds to train and calibrate on, one held out."""

    train_images: Tensor
    train_labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def run_demo(
    output: str | Path,
    settings: DemoSettings | None = None,
    *,
    report: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> DemoResult:
    """Train, compress, fine-tune, save and load again; the global random state stays as it was.

    Args:
        output: folder for the results, made if absent; its files of an earlier run are replaced.
        settings: how to run.
        report: is told what happens, a line at a time.
        progress: show progress bars.

    Raises:
        InvalidValueError: a setting out of range.
        BudgetError: a reduction out of reach.
        ComCATError: a package of the extra `demo` is missing, or the reloaded model does not give the same logits.
    """
    settings, output = settings or DemoSettings(), Path(output)
    _check(settings, output)
    started = time.perf_counter()
    processor, data = image_processor(), load_digits()
    with quiet("transformers"), threads(settings.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        models, statistics = _make_models(data, settings, report, progress)
        report("Measuring latency")
        rows = _measure(models, data, settings.repeats)
        small, dense = models["fine-tuned"], models["dense"]
        folder = output / "compressed"
        dense.save_pretrained(output / "dense")
        small.save_pretrained(folder)
        for path in (output / "dense", folder):
            processor.save_pretrained(path)
        report("Loading the saved model in a new process")
        check_reload(small, folder, data, output / "held_out.safetensors")
    name = f"digits ViT, {settings.reduction:.0%} of the parameters removed"
    plot = plot_compression(dense, plan_of(small), output / "ranks.png", statistics=statistics, title=name)
    image = output / "digit.png"
    _write_image(data.held_images[0], image)
    seconds = time.perf_counter() - started
    record = {"settings": asdict(settings), "rows": [asdict(row) for row in rows]}
    write_json_atomic(output / "results.json", {**record, "seconds": seconds})
    return DemoResult(rows, folder, image, plot, settings, seconds)


def _check(settings: DemoSettings, output: Path) -> None:
    check_settings(settings, dict.fromkeys(("epochs", "finetune_epochs", "repeats", "threads", "layers"), 1), output)
    if not 0 < settings.reduction < 1:
        raise InvalidValueError(f"reduction must be a share between 0 and 1, got {settings.reduction!r}.")
    if settings.width < 16 or settings.width % 16:
        raise InvalidValueError(f"width must be a multiple of 16, the width of a head, got {settings.width!r}.")


def load_digits() -> Digits:
    """scikit-learn's digits as the image processor would give them, in a fixed stratified split."""
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise missing("scikit-learn") from error
    bunch = load()
    images = _as_inputs(torch.from_numpy(bunch.images))
    labels = torch.from_numpy(bunch.target).long()
    train, held = train_test_split(range(len(labels)), test_size=1 / 3, stratify=bunch.target, random_state=0)
    return Digits(images[train], labels[train], images[held], labels[held])


def _as_inputs(grey: Tensor) -> Tensor:
    """Grey levels 0 to 16 `(n, 8, 8)` as 8-bit RGB images, the kind that pipelines read, scaled to -1 to 1."""
    levels = (grey * (255 / 16)).round()
    return (levels / 255 * 2 - 1).float().unsqueeze(1).repeat(1, 3, 1, 1)


def image_processor() -> Any:
    """What turns 8×8 images into inputs; made for Pillow, it needs no torchvision."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise missing("Pillow") from error
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def build_vit(settings: DemoSettings) -> ViTForImageClassification:
    """A small ViT: 2×2 patches, so 16 tokens and the class token; heads of 16."""
    names = {i: str(i) for i in range(10)}
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 16,
        intermediate_size=4 * settings.width,
        # The usual 0.02 suits ten times the width; from there so small a model takes three times as long to learn.
        initializer_range=0.05,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    return ViTForImageClassification(config)


def check_reload(model: nn.Module, folder: Path, data: Digits, file: Path) -> None:
    """Load `folder` in a new process and compare its logits on the held-out images with the model's, bit for bit.

    Raises:
        ComCATError: they differ, or the process failed.
    """
    with torch.inference_mode():
        logits = model(data.held_images).logits
    held_out = {"pixel_values": data.held_images, "labels": data.held_labels, "logits": logits}
    write_safetensors(file, held_out)
    command = [sys.executable, "-c", _RELOAD, str(folder), str(file), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ComCATError(f"{folder}: loading it in a new process failed: {done.stderr.strip() or done.returncode}")


def _make_models(
    data: Digits, settings: DemoSettings, report: Callable[[str], None], progress: bool
) -> tuple[dict[str, nn.Module], Mapping[str, Any]]:
    """The models of the table by name, and the statistics of the dense one."""

    def train(model: nn.Module, teacher: nn.Module | None, epochs: int, rate: float, name: str) -> None:
        train_classifier(model, teacher, data, epochs, rate, name, progress)

    dense = build_vit(settings)
    # Before the training, so that a reduction out of reach is said at once: equal shares need no trained weights.
    plan = allocate_ranks(dense, settings.reduction)
    report(f"Training the dense model for {settings.epochs} epochs on {len(data.train_labels)} images")
    train(dense, None, settings.epochs, 2e-3, "Dense")
    report(f"Compressing it by {settings.reduction:.0%}, from its weights alone and with training images")
    plain = compress(dense, plan=plan)
    batches = data.train_images.split(BATCH)
    statistics = collect_statistics(dense, batches, progress=progress)
    fitted = compress(dense, settings.reduction, batches=batches, statistics=statistics, progress=progress)
    report(f"Fine-tuning for {settings.finetune_epochs} epochs with the dense model as the teacher")
    tuned = copy.deepcopy(fitted)
    train(tuned, dense, settings.finetune_epochs, 1e-3, "Compressed")
    report(f"For comparison, training the dense model for {settings.finetune_epochs} epochs more")
    further = copy.deepcopy(dense)
    train(further, None, settings.finetune_epochs, 1e-3, "Dense, further")
    models = {
        "dense": dense,
        "dense, trained further": further,
        "weights only": plain,
        "with images": fitted,
        "fine-tuned": tuned,
    }
    return models, statistics


def train_classifier(
    model: nn.Module,
    teacher: nn.Module | None,
    data: Digits,
    epochs: int,
    rate: float,
    name: str = "Training",
    progress: bool = False,
) -> None:
    """Train in place, on the CPU; torch's random state decides the order and the augmentation.

    Args:
        model: afterwards it is in eval mode.
        teacher: the dense model, or `None` to learn from the labels alone.
        data: whose training images.
        epochs, rate: times through them; the highest rate.
        name, progress: of the bar.
    """
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=rate,
            weight_decay=0.05,
            optim="adamw_torch",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
        )
        before = random_states(device)
        trainer = _OnDigits(
            model=model,
            args=args,
            teacher=teacher,
            distillation=DistillationLoss(alpha=0) if teacher is None else DistillationLoss(0.5, "soft", 2.0, 1.0),
            callbacks=[ProgressBar(name, progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.loader = _loader(data)
        # `Trainer` has seeded all generators.
        set_random_states(before, device)
        trainer.train()
    model.eval()


class _OnDigits(DistillationTrainer):
    """`DistillationTrainer` on batches that are there, with a tenth of the steps to warm up, and a cosine to zero."""

    loader: DataLoader

    def get_train_dataloader(self) -> DataLoader:
        return self.loader

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        rising = max(round(0.1 * num_training_steps), 1)
        share = partial(rate_at, highest=1.0, last=0.0, steps=num_training_steps, rising=rising)
        self.lr_scheduler = LambdaLR(self.optimizer, share)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def _loader(data: Digits) -> DataLoader:
    """Training batches, half of whose images are shifted by a pixel at most."""

    def collate(picks: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": shift(data.train_images[picks]), "labels": data.train_labels[picks]}

    return DataLoader(range(len(data.train_labels)), batch_size=BATCH, shuffle=True, collate_fn=collate)


def shift(images: Tensor) -> Tensor:
    """Move each image `(n, c, h, w)` by up to a pixel either way, with probability one half; what enters is black."""
    count, _, height, width = images.shape
    moves = torch.randint(0, 3, (2, count)).where(torch.rand(count) < 0.5, 1)
    windows = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count), :, moves[0], moves[1]]


def _measure(models: Mapping[str, nn.Module], data: Digits, repeats: int) -> tuple[Row, ...]:
    """Accuracy, sizes and latency of each model."""
    batch, rows = data.held_images[:BATCH], []
    calls = {name: partial(model, batch) for name, model in models.items()}
    with torch.inference_mode():
        times = in_turns(calls, batch.device, range(repeats))
        right = {n: model(data.held_images).logits.argmax(-1) == data.held_labels for n, model in models.items()}
    for name, model in models.items():
        accuracy = right[name].double().mean().item()
        rows.append(Row(name, accuracy, count_parameters(model), count_macs(model), median(times[name])))
    return tuple(rows)


def _write_image(pixels: Tensor, path: Path) -> None:
    from PIL import Image

    levels = ((pixels + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 0)
    payload = io.BytesIO()
    Image.fromarray(levels.numpy()).save(payload, format="png")
    write_bytes_atomic(path, payload.getvalue())
