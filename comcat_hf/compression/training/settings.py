"""What a compression run is told: flags named as in the image classification scripts of transformers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ...errors import InvalidValueError
from ...training.recipes import parse_settings


__all__ = ["ALTERNATIVES", "STAGES", "CompressSettings", "parse_compress_settings"]

STAGES = ("calibrate", "allocate", "initialize", "finetune", "evaluate", "export", "push")

# A flag for a source of images, or for what is removed, displaces all that a recipe says of it.
ALTERNATIVES = MappingProxyType(
    {
        ("dataset_name", "train_file", "validation_file", "train_dir", "validation_dir"): (
            *("dataset_config_name", "train_split_name", "validation_split_name", "streaming"),
            *("image_column_name", "label_column_name"),
        ),
        ("reduction", "plan"): (),
    }
)

Precision = Literal["no", "fp16", "bf16"]
Strategy = Literal["uniform", "spectrum", "sensitivity", "search"]

_COUNTS = (
    *("calibration_samples", "calibration_batch_size", "search_epochs", "search_batch_size", "rank_step"),
    *("max_train_samples", "max_eval_samples", "repeated_augmentation", "alignment_blocks", "max_train_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps"),
    "checkpoints_total_limit",
)
_ABOVE_ZERO = ("search_learning_rate", "search_beta", "learning_rate", "max_grad_norm", "adam_epsilon")
_ABOVE_ZERO = (*_ABOVE_ZERO, "distillation_temperature", "num_train_epochs")
_FROM_ZERO = (
    *("warmup_steps", "min_learning_rate", "weight_decay", "dataloader_num_workers", "seed", "max_broken_images"),
    *("mixup_alpha", "cutmix_alpha", "rand_augment_num_ops", "rand_augment_magnitude", "alignment", "color_jitter"),
)
_BELOW_ONE = ("adam_beta1", "adam_beta2", "ema_decay", "label_smoothing", "search_share", "warmup_ratio", "reduction")
_PROBABILITIES = ("mixup_prob", "mixup_switch_prob", "random_erasing", "horizontal_flip", "distillation_alpha")
_PROBABILITIES = (*_PROBABILITIES, "random_resized_crop_scale")
_INTERVALS = ("checkpointing_steps", "eval_steps")


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class CompressSettings:
    """Everything about one compression run.

    Args:
        model_name_or_path: the dense classifier; the help texts of the fields say the rest.
    """

    # The models
    model_name_or_path: str | None = _flag(None, "Folder or Hub id of the dense image classifier.")
    model_revision: str | None = _flag(None, "Branch, tag or commit of it.")
    cache_dir: str | None = _flag(None, "Where downloads are kept.")
    token: str | None = _flag(None, "Token for gated or private repositories.")
    teacher: str | None = _flag(None, "Folder or Hub id of the teacher; default: the dense model itself.")
    # What becomes of it
    reduction: float | None = _flag(None, "Share to remove, of the whole model or of the scope's own.")
    scope: Literal["model", "attention", "mlp"] = _flag("model", "What may be compressed.")
    target_modules: str | None = _flag(
        None, "Modules to compress, by path or its end, such as layers.0,layers.1; the reduction is then of these."
    )
    exclude_modules: str | None = _flag(None, "Modules to leave as they are, written alike.")
    metric: Literal["params", "macs", "latency"] = _flag("params", "What the reduction is of.")
    strategy: Strategy = _flag("sensitivity", "How ranks are chosen; search is the paper's.")  # noqa: RUF009
    mlp: Literal["width", "rank", "mixed"] | None = _flag(None, "How MLPs shrink; default: width, rank with search.")
    rank_step: int | None = _flag(None, "Steps of candidate ranks; default: 8 for heads of 64 and more, else 4.")
    plan: str | None = _flag(None, "Folder, file or Hub id of a rank plan; then none is made.")
    weights_only: bool = _flag(False, "Factors from the weights alone, as the paper does, not from statistics.")
    compensate: bool = _flag(True, "Factorise layer by layer on what the compressed layers before produce.")
    sweep: str | None = _flag(
        None, "Other reductions, such as 0.3,0.7, to measure without fine-tuning; the report draws them."
    )
    calibration_samples: int = _flag(256, "Training images for statistics, sensitivity and compensation.")
    calibration_batch_size: int = _flag(32, "Images per calibration batch.")
    search_epochs: int = _flag(5, "Times through the search split.")
    search_share: float = _flag(0.1, "Share of the training images that is cut off for the search.")
    search_batch_size: int = _flag(64, "Images per search step, over all processes.")
    search_learning_rate: float = _flag(1e-2, "Learning rate of the search.")
    search_beta: float = _flag(1.5, "Exponent of the cost over its target.")
    stages: str = _flag(
        ",".join(STAGES),
        "Stages to run, separated by commas; what one left out would make is read if it is there.",
    )
    # Data
    dataset_name: str | None = _flag(None, "Data set on the Hub, or a folder.")
    dataset_config_name: str | None = _flag(None, "Configuration of the data set.")
    train_file: str | None = _flag(None, "Training images as a parquet file, or several by a pattern.")
    validation_file: str | None = _flag(None, "Validation images likewise.")
    train_dir: str | None = _flag(None, "Folder with a folder of training images per class.")
    validation_dir: str | None = _flag(None, "Validation images likewise.")
    train_split_name: str = _flag("train", "Split of the data set to train on.")
    validation_split_name: str | None = _flag(None, "Split to evaluate on; default: validation, else test.")
    image_column_name: str = _flag("image", "Column with the images.")
    label_column_name: str = _flag("label", "Column with the labels.")
    streaming: bool = _flag(False, "Read the data set while training, not before.")
    max_train_samples: int | None = _flag(None, "Use so many training images only.")
    max_eval_samples: int | None = _flag(None, "Use so many validation images only.")
    max_broken_images: float = _flag(0.01, "Stop when more images cannot be read: a count, or a share below 1.")
    dataloader_num_workers: int = _flag(0, "Processes that read images; 0 reads in the main one.")
    # Augmentation
    random_resized_crop_scale: float = _flag(0.08, "Least share of an image's area that is cropped; 1 leaves it out.")
    horizontal_flip: float = _flag(0.5, "Probability of mirroring.")
    color_jitter: float = _flag(0.0, "Strength of colour jitter; 0 leaves it out.")
    rand_augment_num_ops: int = _flag(0, "Operations of RandAugment per image; 0 leaves it out.")
    rand_augment_magnitude: int = _flag(9, "Magnitude of RandAugment, 0 to 30.")
    random_erasing: float = _flag(0.0, "Probability of erasing a rectangle.")
    mixup_alpha: float = _flag(0.0, "Mixup; 0 leaves it out.")
    cutmix_alpha: float = _flag(0.0, "CutMix; 0 leaves it out.")
    mixup_prob: float = _flag(1.0, "Probability of mixing a batch at all.")
    mixup_switch_prob: float = _flag(0.5, "Probability of CutMix where both are on.")
    label_smoothing: float = _flag(0.0, "Share of the label that is spread over all classes.")
    repeated_augmentation: int = _flag(1, "How often an image occurs in a round, each time augmented anew.")
    # Distillation
    distillation_type: Literal["none", "soft", "hard"] = _flag("soft", "Loss toward the teacher.")
    distillation_alpha: float = _flag(0.5, "Share of the loss toward the teacher.")
    distillation_temperature: float = _flag(1.0, "Temperature of the soft loss.")
    distillation_without_token: bool = _flag(False, "Teach the class token where there is a distillation token, too.")
    alignment: float = _flag(0.0, "Weight of the alignment of hidden states at the start; falls to 0.")
    alignment_blocks: int = _flag(2, "Blocks at either end that are aligned.")
    # Training
    route: Literal["full", "peft"] = _flag(
        "full", "full trains the stand-alone small model; peft only the factors, beside one copy of the dense model."
    )
    modules_to_save: str | None = _flag("classifier", "Modules that route peft trains as well, separated by commas.")
    output_dir: str = _flag("comcat-vit", "Where the model goes, with checkpoint-N folders beside it.")
    overwrite_output_dir: bool = _flag(False, "Remove what an earlier run left in output_dir.")
    seed: int | None = _flag(None, "Makes the run repeatable; default: that of the earlier run, else 42.")
    num_train_epochs: float = _flag(3.0, "Times through the training images, where max_train_steps is not given.")
    max_train_steps: int | None = _flag(None, "Optimizer steps.")
    per_device_train_batch_size: int = _flag(64, "Images per step and process.")
    per_device_eval_batch_size: int = _flag(64, "Images per evaluation step and process.")
    gradient_accumulation_steps: int = _flag(1, "Batches per optimizer step.")
    gradient_checkpointing: bool = _flag(False, "Less memory, slower steps.")
    mixed_precision: Precision | None = _flag(None, "Dtype of the forward pass; default: accelerate's.")  # noqa: RUF009
    torch_compile: bool = _flag(False, "Compile the model.")
    learning_rate: float = _flag(1e-4, "Highest learning rate.")
    scale_lr: bool = _flag(False, "Multiply the rate by the images per optimizer step / 512.")
    min_learning_rate: float = _flag(1e-6, "Rate at the end of the cosine; scaled with the highest.")
    warmup_steps: int = _flag(0, "Steps in which the rate rises.")
    warmup_ratio: float = _flag(0.0, "The same as a share of all steps.")
    weight_decay: float = _flag(0.05, "Weight decay of matrices; norms and biases have none.")
    adam_beta1: float = _flag(0.9, "First decay rate of AdamW.")
    adam_beta2: float = _flag(0.999, "Second decay rate of AdamW.")
    adam_epsilon: float = _flag(1e-8, "Epsilon of AdamW.")
    max_grad_norm: float = _flag(1.0, "Gradients are scaled down to this norm.")
    ema_decay: float | None = _flag(None, "Keep a moving average of the weights; it is evaluated and saved.")
    # Checkpoints, evaluation, reports
    checkpointing_steps: str | None = _flag("epoch", "Write checkpoint-N every so many steps, or every epoch.")
    checkpoints_total_limit: int | None = _flag(None, "Keep so many checkpoints, the latest.")
    resume_from_checkpoint: str | None = _flag(None, "Path of a checkpoint, its name in output_dir, or latest.")
    eval_steps: str | None = _flag("epoch", "Evaluate every so many steps, every epoch, or none.")
    logging_steps: int = _flag(10, "Log the losses every so many steps.")
    report_to: str = _flag("auto", "Tracker: tensorboard, wandb, ..., all, none; auto: tensorboard if installed.")
    logging_dir: str = _flag("logs", "Where a tracker writes, in output_dir.")
    push_to_hub: bool = _flag(False, "Upload the model at the end.")
    hub_model_id: str | None = _flag(None, "Repository to upload to; default: the name of output_dir.")
    hub_token: str | None = _flag(None, "Token for the upload.")
    hub_private: bool = _flag(False, "Make the repository private.")
    dry_run: bool = _flag(False, "Say what would be done, and stop before training.")

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir).expanduser()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages asked for, in their order."""
        asked = [name.strip() for name in self.stages.split(",") if name.strip()]
        return tuple(name for name in STAGES if name in asked)

    @property
    def sweep_reductions(self) -> tuple[float, ...]:
        """The reductions of `sweep`.

        Raises:
            InvalidValueError: one is no share above 0 and below 1.
        """
        try:
            found = tuple(float(one) for one in (self.sweep or "").split(",") if one.strip())
        except ValueError:
            found = (math.nan,)
        if not all(0 < one < 1 for one in found):
            raise InvalidValueError(
                f"--sweep must be shares above 0 and below 1, such as 0.3,0.7, got {self.sweep!r}."
            )
        return found

    @property
    def needs_images(self) -> bool:
        """Whether any stage reads training or validation images."""
        from_data = not self.weights_only or self.strategy in ("sensitivity", "search")
        return from_data or "finetune" in self.stage_names or bool(self.sweep_reductions)

    def interval(self, name: str, epoch: int) -> int | None:
        """The steps between two checkpoints or evaluations; `None` for never.

        Args:
            name: `"checkpointing_steps"` or `"eval_steps"`.
            epoch: steps per epoch.
        """
        value = getattr(self, name)
        if value is None or value == "none":
            return None
        return epoch if value == "epoch" else int(value)

    def check(self) -> None:
        """See whether the values can be used, each by itself and together; nothing is read or written.

        Raises:
            InvalidValueError: one cannot.
        """
        _check_numbers(self)
        if not self.model_name_or_path:
            raise InvalidValueError("--model_name_or_path is needed, got none. Give the dense image classifier.")
        unknown = [name.strip() for name in self.stages.split(",") if name.strip() and name.strip() not in STAGES]
        if unknown or not self.stage_names:
            raise InvalidValueError(f"--stages must be among {', '.join(STAGES)}, got {self.stages!r}.")
        if (self.reduction is None) == (self.plan is None) and "allocate" in self.stage_names:
            found = "neither" if self.plan is None else "both"
            raise InvalidValueError(f"Give one of --reduction and --plan, got {found}.")
        if self.plan is not None and (self.target_modules or self.exclude_modules):
            raise InvalidValueError("--plan names its modules: leave out --target_modules and --exclude_modules.")
        if self.reduction is not None and self.reduction == 0:
            raise InvalidValueError("--reduction must be a share above 0 and below 1, got 0.")
        if self.strategy == "search" and self.mlp in ("width", "mixed"):
            raise InvalidValueError(f"--strategy search chooses ranks only, got --mlp {self.mlp}. Give --mlp rank.")
        if self.strategy == "search" and self.metric == "latency":
            raise InvalidValueError(
                "--strategy search counts parameters or MACs, got --metric latency. Take another strategy or metric."
            )
        if self.strategy == "search" and self.sweep_reductions:
            raise InvalidValueError(
                "--sweep measures reductions one after the other, got --strategy search, which would be run for each. "
                "Leave --sweep out, or take another strategy."
            )
        if self.output_path.is_file():
            raise InvalidValueError(f"--output_dir {self.output_dir}: expected a folder, found a file. Give another.")
        self._check_sources()

    @property
    def where(self) -> dict[str, Any]:
        """What may be compressed, as the functions of this package take it."""
        names = {name: getattr(self, name) for name in ("target_modules", "exclude_modules")}
        return {"scope": self.scope} | {name: value.split(",") for name, value in names.items() if value}

    @property
    def has_source(self) -> bool:
        """Whether images are named at all."""
        return any(self._sources.values())

    @property
    def _sources(self) -> dict[str, str | None]:
        return {
            "--dataset_name": self.dataset_name,
            "--train_file": self.train_file or self.validation_file,
            "--train_dir": self.train_dir or self.validation_dir,
        }

    def _check_sources(self) -> None:
        given = [name for name, value in self._sources.items() if value]
        if len(given) > 1 or (not given and self.needs_images):
            raise InvalidValueError(
                f"Give one of {', '.join(self._sources)} (with their validation counterparts), got "
                f"{' and '.join(given) or 'none'}."
            )


def parse_compress_settings(arguments: Sequence[str]) -> CompressSettings:
    """Read the command line: flags, with a recipe as the first argument or behind `--config`.

    Raises:
        InvalidValueError: an unknown flag or key, a value of the wrong kind, a recipe that cannot be read.
    """
    description = "Compress an image classifier: choose ranks, factorise, fine-tune with distillation, evaluate."
    nullable = ("modules_to_save", "checkpointing_steps", "eval_steps")
    return parse_settings(
        CompressSettings,
        arguments,
        kind="compress",
        description=description,
        nullable=nullable,
        alternatives=ALTERNATIVES,
    )


def _check_numbers(settings: CompressSettings) -> None:
    rules = (
        (_COUNTS, lambda value: value >= 1, "a whole number from 1"),
        (_ABOVE_ZERO, lambda value: 0 < value < math.inf, "a number above 0"),
        (_FROM_ZERO, lambda value: 0 <= value < math.inf, "a number from 0"),
        (_BELOW_ONE, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
        (_PROBABILITIES, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        (_INTERVALS, _is_interval, "a whole number from 1, epoch, or none"),
    )
    for names, holds, wanted in rules:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise InvalidValueError(f"--{name} must be {wanted}, got {value!r}.")


def _is_interval(value: str) -> bool:
    return value in ("epoch", "none") or (value.isdecimal() and int(value) >= 1)
