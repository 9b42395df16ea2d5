"""What a compression run is told: flags named as in the image classification scripts of transformers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from ...errors import InvalidValueError
from ..flags import ABOVE_ZERO, BELOW_ONE, COUNT, FROM_ZERO, NOTHING, SHARE, Rule, flag, values_deciding
from ..recipes import parse_settings
from ..settings import TRAINING, RunSettings


__all__ = ["ALTERNATIVES", "MAGNITUDES", "STAGES", "CompressSettings", "ImageSettings", "parse_compress_settings"]

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

Strategy = Literal["uniform", "spectrum", "sensitivity", "curvature", "search"]

_STAGES_KEPT = ("calibrate", "allocate", "initialize", "finetune")
# What a setting decides, for its flag. A stage "by search" depends on it only where ranks are searched.
EVERYTHING = _STAGES_KEPT
SMALL_MODEL = ("calibrate", "allocate", "initialize")
PLAN, FACTORS = ("allocate",), ("initialize",)
SEARCH = ("allocate by search",)
TEACHING = (*SEARCH, *TRAINING)
# The search cuts its images off those of all stages.
SEARCHED_IMAGES = tuple(f"{stage} by search" for stage in _STAGES_KEPT)

MAGNITUDES = 30
MAGNITUDE = Rule(lambda value: 0 <= value <= MAGNITUDES, f"from 0 to {MAGNITUDES}")
INTERVAL = Rule(
    lambda value: value in ("epoch", "none") or (value.isdecimal() and int(value) >= 1),
    "a whole number from 1, epoch, or none",
)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Which images a classifier is measured on, and how they are read; the help texts of the fields say the rest."""

    cache_dir: str | None = flag(None, "Where downloads are kept.", NOTHING)
    token: str | None = flag(None, "Token for gated or private repositories.", NOTHING)
    dataset_name: str | None = flag(None, "Data set on the Hub, or a folder.", EVERYTHING)
    dataset_config_name: str | None = flag(None, "Configuration of the data set.", EVERYTHING)
    validation_file: str | None = flag(None, "Validation images as a parquet file, or several by a pattern.", NOTHING)
    validation_dir: str | None = flag(None, "Folder with a folder of validation images per class.", NOTHING)
    validation_split_name: str | None = flag(None, "Split to evaluate on; default: validation, else test.", NOTHING)
    image_column_name: str = flag("image", "Column with the images.", EVERYTHING)
    label_column_name: str = flag("label", "Column with the labels.", EVERYTHING)
    streaming: bool = flag(False, "Read the data set while training, not before.", EVERYTHING)
    max_eval_samples: int | None = flag(None, "Use so many validation images only.", NOTHING, COUNT)
    max_broken_images: float = flag(
        0.01, "Stop when more images cannot be read: a count, or a share below 1.", NOTHING, FROM_ZERO
    )
    dataloader_num_workers: int = flag(0, "Processes that read images; 0 reads in the main one.", NOTHING, FROM_ZERO)
    per_device_eval_batch_size: int = flag(64, "Images per evaluation step and process.", NOTHING, COUNT)


@dataclass(frozen=True, kw_only=True)
class CompressSettings(ImageSettings, RunSettings):
    """Everything about one compression run.

    Args:
        model_name_or_path: the dense classifier; the help texts of the fields say the rest.
    """

    # The models
    model_name_or_path: str | None = flag(
        None, "Folder or Hub id of the dense image classifier.", EVERYTHING, fixed=True
    )
    model_revision: str | None = flag(None, "Branch, tag or commit of it.", EVERYTHING)
    teacher: str | None = flag(None, "Folder or Hub id of the teacher; default: the dense model itself.", TEACHING)
    # What becomes of it
    reduction: float | None = flag(None, "Share to remove, of the whole model or of the scope's own.", PLAN, BELOW_ONE)
    scope: Literal["model", "attention", "mlp"] = flag("model", "What may be compressed.", SMALL_MODEL)
    target_modules: str | None = flag(
        None,
        "Modules to compress, by path or its end, such as layers.0,layers.1; the reduction is then of these.",
        SMALL_MODEL,
    )
    exclude_modules: str | None = flag(None, "Modules to leave as they are, written alike.", SMALL_MODEL)
    metric: Literal["params", "macs", "latency"] = flag("params", "What the reduction is of.", PLAN)
    strategy: Strategy = flag("curvature", "How ranks are chosen; search is the paper's.", PLAN)  # noqa: RUF009
    mlp: Literal["width", "rank", "mixed"] | None = flag(
        None, "How MLPs shrink; default: width, rank with search.", PLAN
    )
    layout: Literal["free", "plain"] = flag(
        "free",
        "plain gives all layers the same widths, so that the model loads without comcat_hf.",
        (*PLAN, *FACTORS),
    )
    rank_step: int | None = flag(
        None, "Steps of candidate ranks; default: 8 for heads of 64 and more, else 4.", PLAN, COUNT
    )
    plan: str | None = flag(None, "Folder, file or Hub id of a rank plan; then none is made.", PLAN)
    weights_only: bool = flag(
        False, "Factors from the weights alone, as the paper does, not from statistics.", (*PLAN, *FACTORS)
    )
    compensate: bool = flag(True, "Factorise layer by layer on what the compressed layers before produce.", FACTORS)
    refine_steps: int = flag(
        0, "Steps of training without labels on the calibration images, after that; 0 for none.", FACTORS, FROM_ZERO
    )
    sweep: str | None = flag(
        None, "Other reductions, such as 0.3,0.7, to measure without fine-tuning; the report draws them.", NOTHING
    )
    calibration_samples: int = flag(
        256, "Training images for statistics, curvature and compensation.", SMALL_MODEL, COUNT
    )
    calibration_batch_size: int = flag(32, "Images per calibration batch.", SMALL_MODEL, COUNT)
    search_epochs: int = flag(5, "Times through the search split.", SEARCH, COUNT)
    search_share: float = flag(
        0.1, "Share of the training images that is cut off for the search.", SEARCHED_IMAGES, BELOW_ONE
    )
    search_batch_size: int = flag(64, "Images per search step, over all processes.", SEARCH, COUNT)
    search_learning_rate: float = flag(1e-2, "Learning rate of the search.", SEARCH, ABOVE_ZERO)
    search_beta: float = flag(1.5, "Exponent of the cost over its target.", SEARCH, ABOVE_ZERO)
    stages: str = flag(
        ",".join(STAGES),
        "Stages to run, separated by commas; what one left out would make is read if it is there.",
        NOTHING,
    )
    # Data
    train_file: str | None = flag(None, "Training images likewise.", EVERYTHING)
    train_dir: str | None = flag(None, "Training images likewise.", EVERYTHING)
    train_split_name: str = flag("train", "Split of the data set to train on.", EVERYTHING)
    max_train_samples: int | None = flag(None, "Use so many training images only.", EVERYTHING, COUNT)
    # Augmentation
    random_resized_crop_scale: float = flag(
        0.08, "Least share of an image's area that is cropped; 1 leaves it out.", TRAINING, SHARE
    )
    horizontal_flip: float = flag(0.5, "Probability of mirroring.", TRAINING, SHARE)
    color_jitter: float = flag(0.0, "Strength of colour jitter; 0 leaves it out.", TRAINING, FROM_ZERO)
    rand_augment_num_ops: int = flag(0, "Operations of RandAugment per image; 0 leaves it out.", TRAINING, FROM_ZERO)
    rand_augment_magnitude: int = flag(9, "Magnitude of RandAugment, 0 to 30.", TRAINING, MAGNITUDE)
    random_erasing: float = flag(0.0, "Probability of erasing a rectangle.", TRAINING, SHARE)
    mixup_alpha: float = flag(0.0, "Mixup; 0 leaves it out.", TRAINING, FROM_ZERO)
    cutmix_alpha: float = flag(0.0, "CutMix; 0 leaves it out.", TRAINING, FROM_ZERO)
    mixup_prob: float = flag(1.0, "Probability of mixing a batch at all.", TRAINING, SHARE)
    mixup_switch_prob: float = flag(0.5, "Probability of CutMix where both are on.", TRAINING, SHARE)
    label_smoothing: float = flag(0.0, "Share of the label that is spread over all classes.", TRAINING, BELOW_ONE)
    repeated_augmentation: int = flag(
        1, "How often an image occurs in a round, each time augmented anew.", TRAINING, COUNT
    )
    # Distillation
    distillation_type: Literal["none", "soft", "hard"] = flag("soft", "Loss toward the teacher.", TEACHING)
    distillation_alpha: float = flag(0.5, "Share of the loss toward the teacher.", TEACHING, SHARE)
    distillation_temperature: float = flag(1.0, "Temperature of the soft loss.", TEACHING, ABOVE_ZERO)
    distillation_without_token: bool = flag(
        False, "Teach the class token where there is a distillation token, too.", TRAINING
    )
    alignment: float = flag(
        0.0, "Weight of the alignment of hidden states at the start; falls to 0.", TRAINING, FROM_ZERO
    )
    alignment_blocks: int = flag(2, "Blocks at either end that are aligned.", TRAINING, COUNT)
    # Training
    route: Literal["full", "peft"] = flag(
        "full",
        "full trains the stand-alone small model; peft only the factors, beside one copy of the dense model.",
        TRAINING,
        fixed=True,
    )
    modules_to_save: str | None = flag(
        "classifier", "Modules that route peft trains as well, separated by commas.", TRAINING, fixed=True
    )
    output_dir: str = flag("comcat-vit", "Where the model goes, with checkpoint-N folders beside it.", NOTHING)
    seed: int | None = flag(
        None, "Makes the run repeatable; default: that of the earlier run, else 42.", EVERYTHING, FROM_ZERO
    )
    num_train_epochs: float = flag(
        3.0, "Times through the training images, where max_train_steps is not given.", TRAINING, ABOVE_ZERO
    )
    per_device_train_batch_size: int = flag(64, "Images per step and process.", TRAINING, COUNT)
    torch_compile: bool = flag(False, "Compile the model.", TRAINING)
    learning_rate: float = flag(1e-4, "Highest learning rate.", TRAINING, ABOVE_ZERO)
    scale_lr: bool = flag(False, "Multiply the rate by the images per optimizer step / 512.", TRAINING)
    min_learning_rate: float = flag(
        1e-6, "Rate at the end of the cosine; scaled with the highest.", TRAINING, FROM_ZERO
    )
    warmup_steps: int = flag(0, "Steps in which the rate rises.", TRAINING, FROM_ZERO)
    warmup_ratio: float = flag(0.0, "The same as a share of all steps.", TRAINING, BELOW_ONE)
    weight_decay: float = flag(0.05, "Weight decay of matrices; norms and biases have none.", TRAINING, FROM_ZERO)
    ema_decay: float | None = flag(
        None, "Keep a moving average of the weights; it is evaluated and saved.", TRAINING, BELOW_ONE, fixed=True
    )
    # Checkpoints, evaluation, reports
    checkpointing_steps: str | None = flag(
        "epoch", "Write checkpoint-N every so many steps, or every epoch.", NOTHING, INTERVAL
    )
    eval_steps: str | None = flag("epoch", "Evaluate every so many steps, every epoch, or none.", NOTHING, INTERVAL)
    logging_steps: int = flag(10, "Log the losses every so many steps.", NOTHING, COUNT)
    report_to: str = flag(
        "auto", "Tracker: tensorboard, wandb, ..., all, none; auto: tensorboard if installed.", NOTHING
    )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages that are run, in their order: those asked for, without an upload that is switched off."""
        asked = [name for name in self._asked_stages if name != "push" or self.push_to_hub]
        return tuple(name for name in STAGES if name in asked)

    @property
    def _asked_stages(self) -> list[str]:
        return [name.strip() for name in self.stages.split(",") if name.strip()]

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
        from_data = not self.weights_only or self.strategy in ("sensitivity", "curvature", "search")
        return from_data or "finetune" in self.stage_names or bool(self.sweep_reductions)

    def facts(self, stage: str, seed: int) -> dict[str, Any]:
        """What decides the result of a stage, by name; what has no say is `None`."""
        searched = values_deciding(self, f"{stage} by search")
        if self.strategy != "search":
            searched = dict.fromkeys(searched)
        return values_deciding(self, stage) | searched | {"seed": seed}

    def interval(self, name: str, epoch: int) -> int | None:
        """The steps between two checkpoints or evaluations; `None` for never."""
        value = getattr(self, name)
        if value is None or value == "none":
            return None
        return epoch if value == "epoch" else int(value)

    def check(self) -> None:
        """See whether the values can be used, each by itself and together; nothing is read or written.

        Raises:
            InvalidValueError: one cannot.
        """
        super().check()
        if not self.model_name_or_path:
            raise InvalidValueError("--model_name_or_path is needed, got none. Give the dense image classifier.")
        if not self._asked_stages or not set(self._asked_stages) <= set(STAGES):
            raise InvalidValueError(f"--stages must be among {', '.join(STAGES)}, got {self.stages!r}.")
        if not self.stage_names:
            raise InvalidValueError(f"--stages {self.stages} needs --push_to_hub True, got False. Give both.")
        if (self.reduction is None) == (self.plan is None) and "allocate" in self.stage_names:
            found = "neither" if self.plan is None else "both"
            raise InvalidValueError(f"Give one of --reduction and --plan, got {found}.")
        if self.plan is not None and (self.target_modules or self.exclude_modules):
            raise InvalidValueError("--plan names its modules: leave out --target_modules and --exclude_modules.")
        if self.reduction is not None and self.reduction == 0:
            raise InvalidValueError("--reduction must be a share above 0 and below 1, got 0.")
        if self.strategy == "search" and self.mlp in ("width", "mixed"):
            raise InvalidValueError(f"--strategy search chooses ranks only, got --mlp {self.mlp}. Give --mlp rank.")
        free = {"--strategy search": self.strategy == "search", "--route peft": self.route == "peft"}
        free |= {f"--mlp {self.mlp}": self.mlp in ("rank", "mixed")}
        if self.layout == "plain" and (unfit := [words for words, given in free.items() if given]):
            raise InvalidValueError(
                f"--layout plain makes a model without low-rank factors, got {unfit[0]}. Leave one of them out."
            )
        if self.refine_steps and self.weights_only:
            raise InvalidValueError(
                "--refine_steps trains the factors on images, got --weights_only True. Leave one of them out."
            )
        if self.strategy == "search" and self.metric == "latency":
            raise InvalidValueError(
                "--strategy search counts parameters or MACs, got --metric latency. Take another strategy or metric."
            )
        if self.strategy == "search" and self.sweep_reductions:
            raise InvalidValueError(
                "--sweep measures reductions one after the other, got --strategy search, which would be run for each. "
                "Leave --sweep out, or take another strategy."
            )
        given = [name for name, value in self._sources.items() if value]
        if len(given) > 1 or (not given and self.needs_images):
            raise InvalidValueError(
                f"Give one of {', '.join(self._sources)} (with their validation counterparts), got "
                f"{' and '.join(given) or 'none'}."
            )

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
