"""What a training of an adapter on a subject is told: flags named as in diffusers' DreamBooth scripts."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...configs.adapter import ComCATConfig
from ...errors import InvalidValueError
from ...training.recipes import parse_settings


__all__ = ["CustomizeSettings", "parse_customize_settings"]

Precision = Literal["no", "fp16", "bf16"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

_COUNTS = (
    "num_class_images",
    "sample_batch_size",
    "resolution",
    "train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "gradient_accumulation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "num_validation_images",
    "validation_steps",
    "lr_num_cycles",
)
_ABOVE_ZERO = ("learning_rate", "snr_gamma", "max_grad_norm", "adam_epsilon", "lr_power")
_FROM_ZERO = ("prior_loss_weight", "lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers", "seed")
_PROMPTS = ("instance_prompt", "class_prompt", "validation_prompt")
_SHARES = ("adam_beta1", "adam_beta2")


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class CustomizeSettings:
    """Everything about one training run.

    Args:
        pretrained_model_name_or_path: the pipeline; the help texts of the fields say the rest.
        qk_rank, vo_rank: ranks per head; `None`, 0 or `"none"` leaves that pair as it is.

    Raises:
        InvalidValueError: a rank that is none. Other values are checked by [`check`].
    """

    # The model
    pretrained_model_name_or_path: str | None = _flag(None, "Folder or Hub id of a text-to-image pipeline.")
    revision: str | None = _flag(None, "Branch, tag or commit of the pipeline.")
    variant: str | None = _flag(None, "Variant of the pipeline's files, for example fp16.")
    cache_dir: str | None = _flag(None, "Where downloads are kept.")
    # The subject
    instance_data_dir: str | None = _flag(None, "Folder with images of the subject, captions beside them optional.")
    dataset_name: str | None = _flag(None, "Data set with images of the subject, on the Hub or a folder.")
    dataset_config_name: str | None = _flag(None, "Configuration of the data set.")
    image_column: str = _flag("image", "Column of the data set that holds the images.")
    caption_column: str | None = _flag(None, "Column (data set) or key (metadata.jsonl) that holds captions.")
    instance_prompt: str | None = _flag(None, "Prompt with the subject's name, e.g. 'a photo of sks dog'.")
    instance_token: str | None = _flag(None, "The subject's name, e.g. sks; prompts must hold it.")
    resolution: int = _flag(512, "Side of the training images in pixels.")
    center_crop: bool = _flag(False, "Crop at the centre instead of anywhere.")
    random_flip: bool = _flag(False, "Mirror images half of the time.")
    # The class
    with_prior_preservation: bool = _flag(False, "Train on images of the subject's class as well.")
    class_data_dir: str | None = _flag(None, "Folder of class images; what is missing is generated.")
    class_prompt: str | None = _flag(None, "Prompt of the class images, e.g. 'a photo of a dog'.")
    prior_loss_weight: float = _flag(1.0, "Weight of the loss on class images.")
    num_class_images: int = _flag(100, "How many class images there shall be.")
    sample_batch_size: int = _flag(4, "Images generated at once.")
    prior_generation_precision: Literal["fp32", "fp16", "bf16"] | None = _flag(None, "Dtype to generate them in.")
    # The adapter
    qk_rank: str | None = _flag("2", "Rank per head of the query/key product; 0 or none leaves it out.")
    vo_rank: str | None = _flag("2", "Rank per head of the value/output product; 0 or none leaves it out.")
    core: bool = _flag(False, "Train a small matrix per head between frozen bases: adapters of tens of kilobytes.")
    adapter_name: str = _flag("default", "Name of the adapter.")
    train_text_encoder: bool = _flag(False, "Adapt the text encoders as well.")
    # The training
    output_dir: str = _flag("comcat-model", "Where the adapter and the checkpoints go.")
    overwrite_output_dir: bool = _flag(False, "Remove the checkpoints of an earlier run from output_dir.")
    seed: int | None = _flag(None, "Makes the run repeatable; default: that of the resumed run, else 42.")
    train_batch_size: int = _flag(4, "Images of the subject per step and process.")
    num_train_epochs: int = _flag(1, "Times through the data, where max_train_steps is not given.")
    max_train_steps: int | None = _flag(None, "Optimizer steps.")
    gradient_accumulation_steps: int = _flag(1, "Batches per optimizer step.")
    gradient_checkpointing: bool = _flag(False, "Less memory, slower steps.")
    mixed_precision: Precision | None = _flag(None, "Dtype of the frozen base; default: accelerate's.")  # noqa: RUF009
    cache_latents: bool = _flag(False, "Encode images (cropped at the centre) and texts once, before training.")
    dataloader_num_workers: int = _flag(0, "Processes that read images; 0 reads in the main one.")
    # Loss and optimizer
    snr_gamma: float | None = _flag(None, "Min-SNR loss weights with this gamma; 5.0 is recommended.")
    learning_rate: float = _flag(2.5e-3, "Highest learning rate.")
    scale_lr: bool = _flag(False, "Multiply the rate by processes, accumulation steps and batch size.")
    lr_scheduler: Schedule = _flag("linear", "How the learning rate changes.")  # noqa: RUF009
    lr_warmup_steps: int = _flag(0, "Steps in which the rate rises.")
    lr_num_cycles: int = _flag(1, "Restarts of cosine_with_restarts.")
    lr_power: float = _flag(1.0, "Power of polynomial.")
    use_8bit_adam: bool = _flag(False, "Adam of bitsandbytes.")
    adam_beta1: float = _flag(0.9, "First decay rate of Adam.")
    adam_beta2: float = _flag(0.999, "Second decay rate of Adam.")
    adam_weight_decay: float = _flag(1e-2, "Weight decay.")
    adam_epsilon: float = _flag(1e-8, "Epsilon of Adam.")
    max_grad_norm: float = _flag(1.0, "Gradients are scaled down to this norm.")
    # Checkpoints, validation, reports
    checkpointing_steps: int = _flag(500, "Write checkpoint-N in output_dir every so many steps.")
    checkpoints_total_limit: int | None = _flag(None, "Keep so many checkpoints, the latest.")
    resume_from_checkpoint: str | None = _flag(None, "Path of a checkpoint, its name in output_dir, or latest.")
    validation_prompt: str | None = _flag(None, "Generate images for this prompt during training.")
    num_validation_images: int = _flag(4, "How many.")
    validation_steps: int = _flag(100, "Generate them every so many steps, and at the end.")
    num_inference_steps: int = _flag(25, "Denoising steps of class and validation images.")
    report_to: str = _flag("none", "Tracker: tensorboard, wandb, comet_ml, ..., all or none.")
    logging_dir: str = _flag("logs", "Where a tracker writes, in output_dir.")
    push_to_hub: bool = _flag(False, "Upload the adapter when it is trained.")
    hub_model_id: str | None = _flag(None, "Repository to upload to; default: the name of output_dir.")
    hub_token: str | None = _flag(None, "Token for the upload.")
    hub_private: bool = _flag(False, "Make the repository private.")
    dry_run: bool = _flag(False, "Say what would be trained, and stop before.")

    def __post_init__(self) -> None:
        for name in ("qk_rank", "vo_rank"):
            object.__setattr__(self, name, _rank(name, getattr(self, name)))

    def check(self) -> None:
        """See whether the values can be used, each by itself and together; nothing is read or written.

        Raises:
            InvalidValueError: one cannot.
        """
        _check_numbers(self)
        for name in _PROMPTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidValueError(f"--{name} must be one text, got {value!r}.")
        given = {name: getattr(self, name) for name in ("pretrained_model_name_or_path", "instance_prompt")}
        for name, value in given.items():
            if not value or not value.strip():
                raise InvalidValueError(
                    f"--{name} is needed, got {value!r}. Give it on the command line or in a recipe."
                )
        if (self.instance_data_dir is None) == (self.dataset_name is None):
            found = "neither" if self.instance_data_dir is None else "both"
            raise InvalidValueError(f"Give one of --instance_data_dir and --dataset_name, got {found}.")
        if self.qk_rank is None and self.vo_rank is None:
            raise InvalidValueError("--qk_rank and --vo_rank are both none, which leaves nothing to train. Give one.")
        if Path(self.output_dir).expanduser().is_file():
            raise InvalidValueError(f"--output_dir {self.output_dir}: expected a folder, found a file. Give another.")
        self._check_class()
        self._check_prompts()

    def adapter_config(self) -> ComCATConfig:
        """The configuration of the adapter that is trained."""
        return ComCATConfig(
            mode="customize",
            qk_rank=self.qk_rank,
            vo_rank=self.vo_rank,
            core=self.core,
            base_model_name_or_path=self.pretrained_model_name_or_path,
            revision=self.revision,
        )

    def check_prompt(self, prompt: str, place: str) -> None:
        """See whether a prompt holds the instance token, where that is known.

        Args:
            prompt: the prompt or caption.
            place: where it stands; the error names it.

        Raises:
            InvalidValueError: it does not.
        """
        if self.instance_token is not None and not self._has_token(prompt):
            raise InvalidValueError(
                f"{place}: expected the instance token {self.instance_token!r} in the prompt, found {prompt!r}, so "
                "the images would not teach it. Write the token into the prompt, or give the right --instance_token."
            )

    def _check_class(self) -> None:
        if not self.with_prior_preservation:
            return
        for name, example in (("class_data_dir", "a folder"), ("class_prompt", "a prompt such as 'a photo of a dog'")):
            if not getattr(self, name):
                raise InvalidValueError(
                    f"--with_prior_preservation needs --{name}, found none. Give {example}, or leave prior "
                    "preservation out."
                )
        if Path(self.class_data_dir).expanduser().is_file():
            raise InvalidValueError(f"--class_data_dir {self.class_data_dir}: expected a folder, found a file.")

    def _check_prompts(self) -> None:
        self.check_prompt(self.instance_prompt, "--instance_prompt")
        if self.validation_prompt is not None:
            self.check_prompt(self.validation_prompt, "--validation_prompt")
        if self.with_prior_preservation and self.instance_token is None:
            known = set(self.class_prompt.lower().split())
            if not set(self.instance_prompt.lower().split()) - known:
                raise InvalidValueError(
                    f"--instance_prompt: expected an instance token, a word that --class_prompt {self.class_prompt!r} "
                    f"has not, found {self.instance_prompt!r}. Name the subject, as in 'a photo of sks dog'."
                )
        if self.with_prior_preservation and self._has_token(self.class_prompt):
            raise InvalidValueError(
                f"--class_prompt: expected a prompt without the instance token {self.instance_token!r}, found "
                f"{self.class_prompt!r}, so the class would be taught as the subject. Name the class only."
            )

    def _has_token(self, prompt: str) -> bool:
        if self.instance_token is None:
            return False
        # The same letters may be written composed or not; the tokenizers compose them.
        token, text = (unicodedata.normalize("NFC", one) for one in (self.instance_token, prompt))
        return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text, flags=re.IGNORECASE) is not None


def parse_customize_settings(arguments: Sequence[str]) -> CustomizeSettings:
    """Read the command line: flags, with a recipe as the first argument or behind `--config`.

    Raises:
        InvalidValueError: an unknown flag or key, a value of the wrong kind, a recipe that cannot be read.
    """
    description = "Train a ComCAT adapter on images of a subject, DreamBooth style."
    ranks = ("qk_rank", "vo_rank")
    # A flag for a source of images displaces the whole source of a recipe.
    alternatives = {("instance_data_dir", "dataset_name"): ("dataset_config_name", "image_column", "caption_column")}
    return parse_settings(
        CustomizeSettings,
        arguments,
        kind="customize",
        description=description,
        nullable=("rank", *ranks),
        joint={"rank": ranks},
        alternatives=alternatives,
    )


def _rank(name: str, value: Any) -> int | None:
    text = str(value).strip().lower()
    if text in ("none", "0", ""):
        return None
    if isinstance(value, bool) or not text.isdecimal():
        raise InvalidValueError(f"--{name} must be a whole number from 1, or 0 or none for no rank, got {value!r}.")
    return int(text)


def _check_numbers(settings: CustomizeSettings) -> None:
    rules = (
        (_COUNTS, lambda value: value >= 1, "a whole number from 1"),
        (_ABOVE_ZERO, lambda value: 0 < value < math.inf, "a number above 0"),
        (_FROM_ZERO, lambda value: 0 <= value < math.inf, "a number from 0"),
        (_SHARES, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    )
    for names, holds, wanted in rules:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise InvalidValueError(f"--{name} must be {wanted}, got {value!r}.")
