"""A classifier in figures: accuracy, parameters, multiply-accumulates and speed, beside the dense model's."""

import copy
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ...compression.budget.timing import device_name
from ...compression.clock import for_seconds, in_turns
from ...compression.counting import count_macs, count_parameters, example_inputs
from ...errors import InvalidValueError, UnsupportedModuleError, brief
from ...hub import write_json_atomic
from ...modeling import eval_mode
from ...reporting.cards import shown_base
from ..flags import FROM_ZERO, NOTHING, check_flags, flag
from ..machine import make_accelerator
from ..recipes import parse_settings
from .augmentation import ImagePreparation
from .data import BrokenImages, open_splits
from .evaluation import evaluate_classifier
from .models import load_dense, load_image_processor
from .settings import ALTERNATIVES, CompressSettings, ImageSettings
from .stream import ImageReader


__all__ = [
    "EvaluateSettings",
    "EvaluationReport",
    "compare_speed",
    "evaluate_models",
    "measure_speed",
    "parse_evaluate_settings",
]

_DTYPES = ("float32", "bfloat16", "float16")
_MODEL, _DENSE = "model", "dense"
# Rounds of a measurement.
_FEWEST, _MOST = 3, 100
# For the report of a run: seconds for each number of images.
_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateSettings(ImageSettings):
    """What an evaluation is told; data flags are those of the training.

    Args:
        model_name_or_path: the classifier; the help texts of the fields say the rest.
    """

    # The models
    model_name_or_path: str | None = flag(
        None, "Folder or Hub id of an image classifier, dense or compressed.", NOTHING
    )
    model_revision: str | None = flag(None, "Branch, tag or commit of it.", NOTHING)
    dense: str | None = flag(None, "Folder or Hub id of the dense model to compare with.", NOTHING)
    # Speed
    batch_sizes: str = flag("1,32", "Images per call when speed is measured, separated by commas.", NOTHING)
    dtypes: str = flag("float32", f"Dtypes in which speed is measured, among {', '.join(_DTYPES)}.", NOTHING)
    throughput_seconds: float = flag(
        5.0, "Time for each batch size and dtype; 0 leaves speed out.", NOTHING, FROM_ZERO
    )
    # Report
    output: str | None = flag(None, "File for the figures as JSON.", NOTHING)

    def check(self) -> None:
        """See whether the values can be used; nothing is read or written.

        Raises:
            InvalidValueError: one cannot.
        """
        if not self.model_name_or_path:
            raise InvalidValueError("--model_name_or_path is needed, got none. Give an image classifier.")
        check_flags(self)
        self.data().check()
        self.batch_size_list()
        unknown = [name for name in self.dtype_names() if name not in _DTYPES]
        if unknown or not self.dtype_names():
            raise InvalidValueError(f"--dtypes must be among {', '.join(_DTYPES)}, got {self.dtypes!r}.")
        if self.output is not None and Path(self.output).expanduser().is_dir():
            raise InvalidValueError(f"--output {self.output}: expected a file, found a folder. Give a file's name.")

    def data(self, source: str | None = None) -> CompressSettings:
        """The settings of a training that would evaluate on the same images, by default of the model itself."""
        shared = {f.name: getattr(self, f.name) for f in fields(ImageSettings)}
        model, revision = (self.model_name_or_path, self.model_revision) if source is None else (source, None)
        return CompressSettings(model_name_or_path=model, model_revision=revision, **shared, stages="evaluate")

    def dtype_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.dtypes.split(",") if name.strip())

    def batch_size_list(self) -> tuple[int, ...]:
        """The batch sizes.

        Raises:
            InvalidValueError: they are no whole numbers from 1.
        """
        words = [word.strip() for word in self.batch_sizes.split(",") if word.strip()]
        if not words or not all(word.isdecimal() and int(word) for word in words):
            raise InvalidValueError(
                f"--batch_sizes must be whole numbers from 1, separated by commas, got {self.batch_sizes!r}."
            )
        return tuple(map(int, words))


def parse_evaluate_settings(arguments: Sequence[str]) -> EvaluateSettings:
    """Read the command line: flags, with a YAML file of them as the first argument or behind `--config`.

    Raises:
        InvalidValueError: an unknown flag or key, a value of the wrong kind, a file that cannot be read.
    """
    description = "Evaluate an image classifier: accuracy, parameters, MACs and speed, beside the dense model's."
    return parse_settings(
        EvaluateSettings, arguments, kind="evaluate", description=description, alternatives=ALTERNATIVES
    )


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured; plain numbers and strings.

    Attributes:
        models: by `"model"` and `"dense"`: its `source`, what [`evaluate_classifier`] returns, `parameters`, and
            `macs` of one image, `None` where they cannot be counted.
        throughput: per batch size and dtype the median `images_per_second` of every model and, where there are two,
            `faster`: the median of how many times faster than the dense one the model was, round by round.
        device, threads: what speed was measured on.
    """

    models: Mapping[str, Mapping[str, Any]]
    throughput: tuple[Mapping[str, Any], ...]
    device: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON.

        Raises:
            InvalidValueError: the file cannot be written.
        """
        path = Path(path).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, self.to_dict())
        except OSError as error:
            raise InvalidValueError(
                f"--output {path}: expected a file that can be written, found none ({brief(error)}). Give another."
            ) from error

    def describe(self) -> str:
        """A table: a line per figure, a column per model."""
        names = list(self.models)
        rows = [["", *names, "dense / model"]]
        for title, key, form in _FIGURES:
            values = [self.models[name][key] for name in names]
            ratio = f"{values[-1] / values[0]:.2f}" if key in _RATIOS and all(values) else ""
            rows.append([title, *("unknown" if value is None else form.format(value) for value in values), ratio])
        for row in self.throughput:
            speeds = [f"{row['images_per_second'][name]:.1f}" for name in names]
            faster = f"{row['faster']:.2f} times faster" if "faster" in row else ""
            rows.append([f"images/s, batch {row['batch_size']}, {row['dtype']}", *speeds, faster])
        if len(names) == 1:
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


_FIGURES = (
    ("top-1", "top1", "{:.2%}"),
    ("top-5", "top5", "{:.2%}"),
    ("loss", "loss", "{:.4f}"),
    ("images", "samples", "{:,}"),
    ("images that could not be read", "broken", "{:,}"),
    ("parameters", "parameters", "{:,}"),
    ("MACs per image", "macs", "{:,}"),
)
_RATIOS = ("parameters", "macs")


def evaluate_models(
    settings: EvaluateSettings,
    *,
    accelerator: Accelerator | None = None,
    report: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Measure a classifier and, where one is given, the dense model beside it; all processes call it together.

    Accuracy is measured in float32 by all processes together, speed by the main process alone on random images, both
    models in turns, so that a machine that slows down does so for both.

    Args:
        accelerator: by default one of all processes that were launched.
        report: called on the main process with lines that a user wants to read.

    Returns:
        the figures; speed only on the main process. `settings.output` is written there too.

    Raises:
        InvalidValueError: settings or data that cannot be used, a batch that the device cannot run.
        CheckpointError: a model that cannot be found or read.
    """
    settings.check()
    accelerator = make_accelerator() if accelerator is None else accelerator
    main = accelerator.is_main_process
    say = report if report is not None and main else lambda text: None
    data = {_MODEL: settings.data()} | ({_DENSE: settings.data(settings.dense)} if settings.dense else {})
    flags = {_MODEL: "--model_name_or_path", _DENSE: "--dense"}
    models = {name: load_dense(one, flags[name]) for name, one in data.items()}
    found = {
        name: {
            "source": shown_base(one.model_name_or_path),
            **_accuracy(models[name], one, accelerator, f"Evaluating {name}"),
            "parameters": count_parameters(models[name]),
            "macs": _macs(models[name], one.model_name_or_path, say),
        }
        for name, one in data.items()
    }
    timed = main and settings.throughput_seconds > 0
    result = EvaluationReport(
        found,
        _throughput(models, settings, accelerator.device) if timed else (),
        device_name(accelerator.device),
        torch.get_num_threads(),
    )
    if main and settings.output is not None:
        result.save(settings.output)
    return result


def _accuracy(model: nn.Module, data: CompressSettings, accelerator: Accelerator, progress: str) -> dict[str, float]:
    split = open_splits(data, model.config, 0).validation
    if split is None:
        raise InvalidValueError(
            "The data set: expected a split to evaluate on, found none. Give --validation_file, --validation_dir or "
            "--validation_split_name."
        )
    preparation = ImagePreparation.of(data, load_image_processor(data))
    preparation.check(model, str(data.model_name_or_path))
    share = accelerator.process_index, accelerator.num_processes
    reader = ImageReader(split, preparation, data, BrokenImages.of(data, split), 0, *share)
    return evaluate_classifier(model, reader.evaluate(), accelerator, progress=progress, broken=reader.broken)


def _macs(model: nn.Module, source: str, say: Callable[[str], None]) -> int | None:
    try:
        return count_macs(model)
    except (UnsupportedModuleError, InvalidValueError) as error:
        say(f"{source}: its MACs cannot be counted ({brief(error)})")
        return None


def _throughput(
    models: Mapping[str, nn.Module], settings: EvaluateSettings, device: torch.device
) -> tuple[Mapping[str, Any], ...]:
    rows, sizes, dtypes = [], settings.batch_size_list(), settings.dtype_names()
    with tqdm(total=len(sizes) * len(dtypes), desc="Speed", unit="setting", disable=None) as bar:
        for dtype in dtypes:
            copies = {name: copy.deepcopy(model).to(getattr(torch, dtype)) for name, model in models.items()}
            for size in sizes:
                try:
                    row = measure_speed(copies, device, size, settings.throughput_seconds)
                except RuntimeError as error:
                    raise InvalidValueError(
                        f"A batch of {size} in {dtype} cannot be run on {device}: {error}. Give other --batch_sizes "
                        "or --dtypes."
                    ) from error
                rows.append(row | {"dtype": dtype})
                bar.update()
    return tuple(rows)


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, nn.Module], device: torch.device, batch_size: int, seconds: float
) -> dict[str, Any]:
    """Time models on the same random images in turns, so that a machine that slows down does so for all.

    Args:
        models: classifiers by name, in the dtype to measure; they are moved to the device.
        device: where they run.
        batch_size: images per call.
        seconds: time to spend; at least three rounds are timed.

    Returns:
        `batch_size`, `rounds`, the median `images_per_second` by name and, where there is a model `"dense"` beside
        another one, `faster`: the median over rounds of how many times faster than the dense one the other was.

    Raises:
        RuntimeError: the device cannot run such a batch.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        calls = {name: _call(model.to(device), batch_size, device) for name, model in models.items()}
        taken = in_turns(calls, device, for_seconds(seconds, _FEWEST, _MOST))
    speeds = {name: batch_size / statistics.median(times) for name, times in taken.items()}
    rounds = len(next(iter(taken.values())))
    row: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "images_per_second": speeds}
    others = [name for name in taken if name != "dense"]
    if "dense" in taken and others:
        pairs = zip(taken["dense"], taken[others[0]], strict=True)
        row["faster"] = statistics.median(dense / other for dense, other in pairs)
    return row


def compare_speed(dense: nn.Module, small: nn.Module, device: torch.device) -> list[dict[str, Any]]:
    """Rows of [`measure_speed`] for `"dense"` and `"compressed"`, with one image and with several.

    A batch that the device cannot run is left out, with a warning.
    """
    rows = []
    for count in (1, 8 if device.type == "cpu" else 64):
        try:
            rows.append(measure_speed({"dense": dense, "compressed": small}, device, count, _SECONDS))
        except RuntimeError as error:
            logger.warning("The speed with batches of %d is not measured: %s", count, brief(error))
    return rows


def _call(model: nn.Module, size: int, device: torch.device) -> Callable[[], Any]:
    shape = example_inputs(model)["pixel_values"].shape[1:]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    pixels = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return lambda: model(pixel_values=pixels)
