"""What a training of an adapter on a subject is told: flags named as in diffusers' DreamBooth scripts."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...configs.adapter import ComCATConfig
from ...errors import InvalidValueError
from ..flags import ABOVE_ZERO, BELOW_ONE, COUNT, FINITE, FROM_ZERO, NOTHING, flag
from ..recipes import parse_settings
from ..settings import TRAINING, RunSettings


__all__ = ["CustomizeSettings", "parse_customize_settings"]

Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

_PROMPTS = ("instance_prompt", "class_prompt", "validation_prompt")
# What a setting decides, for its flag. Images are compared by their names and prompts, wherever they came from.
IMAGES, CLASS_IMAGES = ("images",), ("class images",)


@dataclass(frozen=True, kw_only=True)
class CustomizeSettings(RunSettings):
    """Everything about one training run.

    Args:
        pretrained_model_name_or_path: the pipeline; the help texts of the fields say the rest.
        qk_rank, vo_rank: ranks per head; `None`, 0 or `"none"` leaves that pair as it is.

    Raises:
        InvalidValueError: a rank that is none. Other values are checked by [`check`].
    """

    # The model
    pretrained_model_name_or_path: str | None = flag(None, "Folder or Hub id of a text-to-image pipeline.", TRAINING)
    revision: str | None = flag(None, "Branch, tag or commit of the pipeline.", TRAINING)
    variant: str | None = flag(None, "Variant of the pipeline's files, for example fp16.", TRAINING)
    cache_dir: str | None = flag(None, "Where downloads are kept.", NOTHING)
    # The subject
    instance_data_dir: str | None = flag(
        None, "Folder with images of the subject, captions beside them optional.", IMAGES
    )
    dataset_name: str | None = flag(None, "Data set with images of the subject, on the Hub or a folder.", IMAGES)
    dataset_config_name: str | None = flag(None, "Configuration of the data set.", IMAGES)
    image_column: str = flag("image", "Column of the data set that holds the images.", IMAGES)
    caption_column: str | None = flag(None, "Column (data set) or key (metadata.jsonl) that holds captions.", IMAGES)
    instance_prompt: str | None = flag(None, "Prompt with the subject's name, e.g. 'a photo of sks dog'.", IMAGES)
    instance_token: str | None = flag(None, "The subject's name, e.g. sks; prompts must hold it.", NOTHING)
    caption_dropout: float = flag(0.0, "Share of the subject's prompts that are left empty.", TRAINING, BELOW_ONE)
    resolution: int = flag(512, "Side of the training images in pixels.", TRAINING, COUNT)
    aspect_ratio_buckets: str | None = flag(
        None, "Heights and widths, such as 512,512;448,576: images take the nearest in shape.", TRAINING
    )
    center_crop: bool = flag(False, "Crop at the centre instead of anywhere.", TRAINING)
    random_flip: bool = flag(False, "Mirror images half of the time.", TRAINING)
    # The class
    with_prior_preservation: bool = flag(False, "Train on images of the subject's class as well.", TRAINING)
    class_data_dir: str | None = flag(None, "Folder of class images; what is missing is generated.", CLASS_IMAGES)
    class_prompt: str | None = flag(None, "Prompt of the class images, e.g. 'a photo of a dog'.", CLASS_IMAGES)
    prior_loss_weight: float = flag(1.0, "Weight of the loss on class images.", TRAINING, FROM_ZERO)
    num_class_images: int = flag(100, "How many class images there shall be.", CLASS_IMAGES, COUNT)
    sample_batch_size: int = flag(4, "Images generated at once.", CLASS_IMAGES, COUNT)
    prior_generation_precision: Literal["fp32", "fp16", "bf16"] | None = flag(
        None, "Dtype to generate them in.", CLASS_IMAGES
    )
    # The adapter
    qk_rank: str | None = flag(
        "2", "Rank per head of the query/key product; 0 or none leaves it out.", TRAINING, fixed=True
    )
    vo_rank: str | None = flag(
        "2", "Rank per head of the value/output product; 0 or none leaves it out.", TRAINING, fixed=True
    )
    core: bool = flag(
        False,
        "Train a small matrix per head between frozen bases: adapters of tens of kilobytes.",
        TRAINING,
        fixed=True,
    )
    gains: bool = flag(False, "Also train a number per hidden unit of every feed-forward.", TRAINING, fixed=True)
    head_gains: bool = flag(False, "Also train a number per column of keys and values.", TRAINING, fixed=True)
    adapter_name: str = flag("default", "Name of the adapter.", NOTHING)
    train_text_encoder: bool = flag(False, "Adapt the text encoders as well.", TRAINING, fixed=True)
    # The training
    seed: int | None = flag(
        None, "Makes the run repeatable; default: that of the resumed run, else 42.", TRAINING, FROM_ZERO
    )
    train_batch_size: int = flag(4, "Images of the subject per step and process.", TRAINING, COUNT)
    num_train_epochs: int = flag(1, "Times through the data, where max_train_steps is not given.", TRAINING, COUNT)
    cache_latents: bool = flag(
        False, "Encode images (cropped at the centre) and texts once, before training.", TRAINING
    )
    dataloader_num_workers: int = flag(0, "Processes that read images; 0 reads in the main one.", NOTHING, FROM_ZERO)
    # Loss and optimizer
    snr_gamma: float | None = flag(
        None, "Min-SNR loss weights with this gamma; 5.0 is recommended.", TRAINING, ABOVE_ZERO
    )
    weighting_scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = flag(
        "logit_normal", "Flow matching: how noise levels are drawn and weighted.", TRAINING
    )
    logit_mean: float = flag(0.0, "Flow matching: mean of logit_normal.", TRAINING, FINITE)
    logit_std: float = flag(1.0, "Flow matching: standard deviation of logit_normal.", TRAINING, ABOVE_ZERO)
    guidance_scale: float = flag(3.5, "Guidance that a distilled transformer (FLUX) is told.", TRAINING, FROM_ZERO)
    learning_rate: float = flag(2.5e-3, "Highest learning rate.", TRAINING, ABOVE_ZERO)
    gains_lr_ratio: float | None = flag(
        None,
        "Learning rate of gains, as a multiple of the others'; default: 3, and 1 with prodigy.",
        TRAINING,
        ABOVE_ZERO,
    )
    scale_lr: bool = flag(False, "Multiply the rate by processes, accumulation steps and batch size.", TRAINING)
    lr_scheduler: Schedule = flag("linear", "How the learning rate changes.", TRAINING)  # noqa: RUF009
    lr_warmup_steps: int = flag(0, "Steps in which the rate rises.", TRAINING, FROM_ZERO)
    lr_num_cycles: int = flag(1, "Restarts of cosine_with_restarts.", TRAINING, COUNT)
    lr_power: float = flag(1.0, "Power of polynomial.", TRAINING, ABOVE_ZERO)
    optimizer: Literal["adamw", "prodigy"] = flag(
        "adamw", "prodigy finds its rate by itself: give --learning_rate 1.", TRAINING
    )
    use_8bit_adam: bool = flag(False, "Adam of bitsandbytes.", TRAINING)
    adam_weight_decay: float = flag(1e-2, "Weight decay.", TRAINING, FROM_ZERO)
    # Checkpoints, validation, reports
    save_precision: Literal["fp32", "fp16", "bf16"] = flag(
        "fp32", "Dtype of the adapter's weights in its file.", NOTHING
    )
    checkpointing_steps: int = flag(500, "Write checkpoint-N in output_dir every so many steps.", NOTHING, COUNT)
    validation_prompt: str | None = flag(None, "Generate images for this prompt during training.", NOTHING)
    num_validation_images: int = flag(4, "How many.", NOTHING, COUNT)
    validation_steps: int = flag(100, "Generate them every so many steps, and at the end.", NOTHING, COUNT)
    num_inference_steps: int = flag(25, "Denoising steps of class and validation images.", CLASS_IMAGES, COUNT)

    def __post_init__(self) -> None:
        for name in ("qk_rank", "vo_rank"):
            object.__setattr__(self, name, _rank(name, getattr(self, name)))

    def check(self) -> None:
        """See whether the values can be used, each by itself and together; nothing is read or written.

        Raises:
            InvalidValueError: one cannot.
        """
        super().check()
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
        if self.qk_rank is None and self.vo_rank is None and not (self.gains or self.head_gains):
            raise InvalidValueError(
                "--qk_rank and --vo_rank are both none, which leaves nothing to train. Give one, --gains or "
                "--head_gains."
            )
        if self.optimizer == "prodigy" and self.use_8bit_adam:
            raise InvalidValueError("--use_8bit_adam is for --optimizer adamw, got prodigy. Leave one of them out.")
        if self.optimizer == "prodigy" and self.gains_lr_ratio not in (None, 1):
            raise InvalidValueError(
                f"--gains_lr_ratio: prodigy has one rate for all, got {self.gains_lr_ratio}. Leave it out."
            )
        if self.buckets and self.with_prior_preservation:
            raise InvalidValueError(
                "--aspect_ratio_buckets: class images are square, so they cannot stand in a batch with images of "
                "other shapes. Leave the buckets or --with_prior_preservation out."
            )
        self._check_class()
        self._check_prompts()

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The heights and widths of `aspect_ratio_buckets`."""
        pairs = (self.aspect_ratio_buckets or "").split(";") if self.aspect_ratio_buckets else ()
        found = [re.fullmatch(r"\s*([1-9]\d{0,4})\s*,\s*([1-9]\d{0,4})\s*", pair) for pair in pairs]
        if not all(found):
            raise InvalidValueError(
                f"--aspect_ratio_buckets: expected heights and widths such as 512,512;448,576, got "
                f"{self.aspect_ratio_buckets!r}."
            )
        return tuple((int(match[1]), int(match[2])) for match in found)

    @property
    def class_folder(self) -> Path:
        return Path(self.class_data_dir).expanduser()

    def adapter_config(self) -> ComCATConfig:
        """The configuration of the adapter that is trained."""
        return ComCATConfig(
            mode="customize",
            # Numbers, since they were checked.
            qk_rank=self.qk_rank,  # type: ignore[arg-type]
            vo_rank=self.vo_rank,  # type: ignore[arg-type]
            core=self.core,
            gains=self.gains,
            head_gains=self.head_gains,
            base_model_name_or_path=self.pretrained_model_name_or_path,
            revision=self.revision,
        )

    def check_prompt(self, prompt: str, place: str) -> None:
        """See whether a prompt holds the instance token, where that is known.

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
        if self.class_folder.is_file():
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
