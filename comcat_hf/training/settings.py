"""What every training is told: its folder, its checkpoints, its optimizer and its upload."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InvalidValueError
from ..hub import push_folder
from .flags import ABOVE_ZERO, BELOW_ONE, COUNT, NOTHING, check_flags, flag


__all__ = ["TRAINING", "RunSettings", "push_result"]

# What a setting decides, for its flag: the result of the training itself.
TRAINING = ("finetune",)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of one run; the help texts of the fields say the rest."""

    output_dir: str = flag("comcat-model", "Where the result goes, with checkpoint-N folders beside it.", NOTHING)
    overwrite_output_dir: bool = flag(False, "Remove what an earlier run left in output_dir.", NOTHING)
    max_train_steps: int | None = flag(None, "Optimizer steps.", TRAINING, COUNT)
    gradient_accumulation_steps: int = flag(1, "Batches per optimizer step.", TRAINING, COUNT)
    gradient_checkpointing: bool = flag(False, "Less memory, slower steps.", TRAINING)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Dtype of the forward pass and of a frozen base; default: accelerate's.", TRAINING
    )
    adam_beta1: float = flag(0.9, "First decay rate of Adam.", TRAINING, BELOW_ONE)
    adam_beta2: float = flag(0.999, "Second decay rate of Adam.", TRAINING, BELOW_ONE)
    adam_epsilon: float = flag(1e-8, "Epsilon of Adam.", TRAINING, ABOVE_ZERO)
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm.", TRAINING, ABOVE_ZERO)
    checkpoints_total_limit: int | None = flag(None, "Keep so many checkpoints, the latest.", NOTHING, COUNT)
    resume_from_checkpoint: str | None = flag(
        None, "Path of a checkpoint, its name in output_dir, or latest.", NOTHING
    )
    report_to: str = flag("none", "Tracker: tensorboard, wandb, comet_ml, ..., all or none.", NOTHING)
    logging_dir: str = flag("logs", "Where a tracker writes, in output_dir.", NOTHING)
    push_to_hub: bool = flag(False, "Upload the result at the end.", NOTHING)
    hub_model_id: str | None = flag(None, "Repository to upload to; default: the name of output_dir.", NOTHING)
    hub_token: str | None = flag(None, "Token for the upload.", NOTHING)
    hub_private: bool = flag(False, "Make the repository private.", NOTHING)
    dry_run: bool = flag(False, "Say what would be done, and stop before training.", NOTHING)

    @property
    def output_path(self) -> Path:
        return Path(self.output_dir).expanduser()

    @property
    def repository(self) -> str:
        """Where an upload goes."""
        return self.hub_model_id or self.output_path.resolve().name

    def check(self) -> None:
        """See whether the values can be used; nothing is read or written.

        Raises:
            InvalidValueError: one cannot.
        """
        check_flags(self)
        if self.output_path.is_file():
            raise InvalidValueError(f"--output_dir {self.output_dir}: expected a folder, found a file. Give another.")


def push_result(settings: RunSettings, message: str, patterns: Sequence[str]) -> str:
    """Upload the files of the output folder that match a pattern; returns the commit's address."""
    return push_folder(
        settings.output_path,
        settings.repository,
        private=settings.hub_private or None,
        commit_message=message,
        token=settings.hub_token,
        allow_patterns=patterns,
    )
