"""The demo from end to end: a base that knows nine digits, four ways of teaching it the tenth, and the table."""

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...errors import InvalidValueError
from ...hub import write_json_atomic
from ...reporting.plots import plot_image_grid
from ..compress import Digits, load_digits
from ..shared import check_settings, missing, quiet, threads
from .base import (
    BASE_FOLDER,
    HELD_OUT,
    NAMES,
    NEW,
    OLD,
    OLD_DIGITS,
    Bar,
    build_pipeline,
    embed,
    encode,
    noise_loss,
    train_base,
    upsample,
)
from .judge import Judge, train_judge
from .methods import METHODS, Lesson, Method, teach


__all__ = ["CustomizeDemoResult", "CustomizeDemoSettings", "CustomizeRow", "run_customize_demo"]

BASE = "base, untouched"
_SHOWN_NEW = 6
_BATCH = 64  # images drawn at once
# Noise of the images that a learning rate is chosen by, of those reported, and of those that every method sees.
_CHOICE, _REPORT, _PRIOR = 1, 2, 3


@dataclass(frozen=True)
class CustomizeDemoSettings:
    """How the demo runs.

    Attributes:
        steps: for which every method learns the new digit, at each of its learning rates.
        base_steps, vae_steps: for which the base's UNet with its text encoder, and its autoencoder, are trained.
        judge_epochs: for which the judge is trained.
        images: of the new digit to learn from.
        prior: images of each old caption, drawn by the base, which every method sees beside them.
        samples: `V*` images to judge a method by.
        caption_samples: images of each old caption to judge it by.
        sampling_steps, guidance: of every image that is drawn.
        seed: of all weights, batches and noise. The split of the images is always the same.
        threads: for torch. More than one wait for each other on a busy machine.
    """

    steps: int = 100
    base_steps: int = 1200
    vae_steps: int = 400
    judge_epochs: int = 40
    images: int = 16
    prior: int = 8
    samples: int = 200
    caption_samples: int = 20
    sampling_steps: int = 20
    guidance: float = 2.0
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class CustomizeRow:
    """One line of the table.

    Attributes:
        name: which method.
        size: bytes of what it saved.
        parameters: that it trained.
        steps, rate, seconds: of its training, at the learning rate that was chosen.
        new: share of the `V*` images that the judge reads as the new digit.
        old: share of the images of old captions that it reads as what these say.
        tried: by learning rate, the same two shares of the images that it was chosen by.
    """

    name: str
    size: int
    parameters: int
    steps: int
    rate: float | None
    seconds: float
    new: float
    old: float
    tried: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class CustomizeDemoResult:
    """What the demo found and where it lies.

    Attributes:
        rows: the table; the untouched base is first.
        new: the digit that was taught.
        accuracy, recall: the judge's on real images that it was not trained on: of all digits, of the new one.
        base, adapter, image: the base's folder, the full ComCAT adapter's and the picture of what was drawn.
        settings: how it ran.
        seconds: for everything.
    """

    rows: tuple[CustomizeRow, ...]
    new: str
    accuracy: float
    recall: float
    base: Path
    adapter: Path
    image: Path
    settings: CustomizeDemoSettings
    seconds: float


def run_customize_demo(
    output: str | Path,
    settings: CustomizeDemoSettings | None = None,
    *,
    report: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> CustomizeDemoResult:
    """Train a small Stable Diffusion, teach it a digit it has not seen, and compare; global state stays as it was.

    Args:
        output: folder for the results, made if absent; its files of an earlier run are replaced.
        settings: how to run.
        report: is told what happens, a line at a time.
        progress: show progress bars.

    Raises:
        InvalidValueError: a setting out of range.
        ComCATError: a package of the extras `demo` and `diffusers` is missing.
    """
    settings, output = settings or CustomizeDemoSettings(), Path(output)
    _check(settings, output)
    started, data = time.perf_counter(), load_digits()
    with quiet("transformers", "diffusers"), threads(settings.threads), torch.random.fork_rng(devices=[]):
        studio = _open_studio(data, output / BASE_FOLDER, settings, report, progress)
        rows, grid = [], {}
        for name, row, images in _rows(studio, data, output, report):
            rows.append(row)
            grid[name] = images
    picture = _plot(grid, studio.judge, output / "samples.png")
    seconds = time.perf_counter() - started
    judge = {"accuracy": studio.judge.accuracy, "recall": studio.judge.recall}
    record = {"settings": asdict(settings), "judge": judge, "rows": [asdict(row) for row in rows], "seconds": seconds}
    write_json_atomic(output / "results.json", record)
    return CustomizeDemoResult(
        rows=tuple(rows),
        new=NAMES[HELD_OUT],
        accuracy=studio.judge.accuracy,
        recall=studio.judge.recall[HELD_OUT],
        base=output / BASE_FOLDER,
        adapter=output / _folder(METHODS[0]),
        image=picture,
        settings=settings,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Studio:
    """The base, its judge, and what both are used with.

    Attributes:
        folder: of the base.
        told: what the UNet is told of the old captions, of the new one and of none, in this order.
    """

    folder: Path
    judge: Judge
    told: Tensor
    settings: CustomizeDemoSettings
    bar: Bar

    def open(self) -> Any:
        """The base, loaded from its folder."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.eval().requires_grad_(False)
        return pipeline

    def draw(self, pipeline: Any, captions: Sequence[int], purpose: int, latents: bool = False) -> Tensor:
        """Images `(n, 3, 16, 16)` from -1 to 1, or latents, of captions by their number; the same noise every time."""
        settings, drawn = self.settings, torch.Generator().manual_seed(8 * self.settings.seed + purpose)
        told = self.told[list(captions)]
        parts = []
        for some in told.split(_BATCH):
            images = pipeline(
                prompt_embeds=some,
                negative_prompt_embeds=self.told[-1:].expand_as(some),
                height=16,
                width=16,
                num_inference_steps=settings.sampling_steps,
                guidance_scale=settings.guidance,
                generator=drawn,
                output_type="latent" if latents else "pt",
            ).images
            parts.append(images if latents else images * 2 - 1)
        return torch.cat(parts)

    def judged(self, pipeline: Any, purpose: int) -> tuple[float, float, Tensor]:
        """The two shares, and the images for the picture."""
        count, each = self.settings.samples, self.settings.caption_samples
        images = self.draw(pipeline, [len(OLD)] * count + [i for i in range(len(OLD)) for _ in range(each)], purpose)
        wanted = torch.tensor([HELD_OUT] * count + [digit for digit in OLD_DIGITS for _ in range(each)])
        right = (self.judge.read(images) == wanted).float()
        shown = torch.cat([images[:count][:_SHOWN_NEW], images[count::each]])
        return right[:count].mean().item(), right[count:].mean().item(), shown


def _open_studio(
    data: Digits, folder: Path, settings: CustomizeDemoSettings, report: Callable[[str], None], progress: bool
) -> _Studio:
    def bar(total: int, name: str) -> Iterator[int]:
        return iter(tqdm(range(total), desc=name, disable=not progress, leave=True))

    torch.manual_seed(settings.seed)
    report(f"Training the judge on {len(data.held_labels)} images that nothing else sees")
    judge = train_judge(data, settings.judge_epochs, bar)
    report(f"Training the base on {int((data.train_labels != HELD_OUT).sum())} images of nine digits")
    pipeline = build_pipeline()
    train_base(pipeline, data, settings.vae_steps, settings.base_steps, bar)
    pipeline.save_pretrained(folder)
    with torch.no_grad():
        told = embed(pipeline, [*OLD, NEW, ""])
    return _Studio(folder, judge, told, settings, bar)


def _rows(
    studio: _Studio, data: Digits, output: Path, report: Callable[[str], None]
) -> Iterator[tuple[str, CustomizeRow, Tensor]]:
    settings, base = studio.settings, studio.open()
    new, old, images = studio.judged(base, _REPORT)
    yield BASE, CustomizeRow(BASE, 0, 0, 0, None, 0.0, new, old, {}), images
    lesson = _lesson(studio, base, data)
    for method in METHODS:
        report(f"Teaching {NEW!r} by {method.name}, at learning rates {', '.join(f'{r:g}' for r in method.rates)}")
        rate, taught, seconds, tried = _teach_best(studio, base, method, lesson)
        pipeline = studio.open()
        pipeline.unet = taught
        folder = output / _folder(method)
        method.save(pipeline, folder)
        # Judged is what lies on the disk.
        loaded = studio.open()
        method.load(loaded, folder)
        new, old, images = studio.judged(loaded, _REPORT)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        count = sum(p.numel() for p in taught.parameters() if p.requires_grad)
        yield (
            method.name,
            CustomizeRow(method.name, size, count, settings.steps, rate, seconds, new, old, tried),
            images,
        )


def _lesson(studio: _Studio, base: Any, data: Digits) -> Lesson:
    """What every method learns from: the first images of the new digit, and what the base draws of the old ones."""
    settings = studio.settings
    images = upsample(data.train_images[data.train_labels == HELD_OUT][: settings.images])
    captions = [i for i in range(len(OLD)) for _ in range(settings.prior)]
    return Lesson(
        latents=encode(base, images),
        told=studio.told[[len(OLD)] * len(images)],
        prior_latents=studio.draw(base, captions, _PRIOR, latents=True),
        prior_told=studio.told[captions],
        steps=settings.steps,
        batch=settings.images,
        loss=noise_loss(base.scheduler),
        seed=settings.seed,
    )


def _teach_best(
    studio: _Studio, base: Any, method: Method, lesson: Lesson
) -> tuple[float, nn.Module, float, dict[str, tuple[float, float]]]:
    """Teach at every learning rate; the best by the sum of both shares, on images that are not those reported."""
    best, tried = None, {}
    pipeline = copy.copy(base)
    for rate in method.rates:
        torch.manual_seed(studio.settings.seed)
        pipeline.unet = copy.deepcopy(base.unet)
        method.attach(pipeline.unet)
        started = time.perf_counter()
        teach(pipeline.unet, lesson, rate, studio.bar, f"{method.name}, {rate:g}")
        seconds = time.perf_counter() - started
        new, old, _ = studio.judged(pipeline, _CHOICE)
        tried[f"{rate:g}"] = (new, old)
        if best is None or new + old > best[0]:
            best = (new + old, rate, pipeline.unet, seconds)
    return *best[1:], tried


def _plot(grid: dict[str, Tensor], judge: Judge, path: Path) -> Path:
    """Rows are methods; columns are `V*` images and one of each old caption, with what the judge read in them."""
    columns = ["V*"] * _SHOWN_NEW + [NAMES[digit] for digit in OLD_DIGITS]
    wanted = torch.tensor([HELD_OUT] * _SHOWN_NEW + list(OLD_DIGITS))
    read = {name: judge.read(images) for name, images in grid.items()}
    return plot_image_grid(
        {name: (images.mean(dim=1) + 1) / 2 for name, images in grid.items()},
        path,
        columns=columns,
        notes={name: [str(digit) for digit in digits.tolist()] for name, digits in read.items()},
        right={name: (digits == wanted).tolist() for name, digits in read.items()},
        title=f"V* was taught with images of {NAMES[HELD_OUT]!r}; the digit is what the judge reads",
    )


def _folder(method: Method) -> str:
    return method.name.replace(",", "").replace(" ", "-").lower()


def _check(settings: CustomizeDemoSettings, output: Path) -> None:
    for package in ("diffusers", "matplotlib"):  # scikit-learn is missed before anything is trained
        if importlib.util.find_spec(package) is None:
            raise missing(package, "demo,diffusers")
    least = {field.name: 1 for field in fields(settings) if field.name != "guidance"}
    least |= {"samples": _SHOWN_NEW, "base_steps": 2, "vae_steps": 2, "seed": 0}
    check_settings(settings, least, output)
    if not settings.guidance > 1:
        raise InvalidValueError(f"guidance must be a number above 1, got {settings.guidance!r}.")
