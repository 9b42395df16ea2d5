"""Callbacks for `DistillationTrainer`: the moving average of the weights, signals, and the log as JSON lines."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import CheckpointError, brief
from ...progress import progress_bar
from ..interruption import Interruption, stopped_by
from .ema import WeightAverage
from .logs import LOG, write_log


__all__ = ["JSONLogCallback", "ProgressBar", "StopOnSignal", "WeightAverageCallback"]

_AVERAGE = "weight_average.safetensors"


class WeightAverageCallback(TrainerCallback):
    """Exponential moving average (EMA) of the trained weights: evaluated, saved beside them, and kept at the end.

    Args:
        decay: 0 to below 1; the share of the old average in the new one.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.resumed: Path | None = None
        self._average: WeightAverage | None = None
        self._taken_over = False

    def start(self, model: Any) -> None:
        """Start from a model's weights."""
        self._average, self._taken_over = WeightAverage(model, self.decay), False

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Start from the model's weights, or from the checkpoint that the training goes on from."""
        self.start(model)
        if self.resumed is not None:
            self.load(self.resumed)

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take in the weights, unless gradients overflowed in half precision and there was no step."""
        if not getattr(optimizer, "step_was_skipped", False):
            self._average.update()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Put the averages in the place of the weights, for good."""
        self._average.take_over()
        self._taken_over = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For a while the model has the averages in place of its weights."""
        if self._average is None or self._taken_over:
            yield
        else:
            with self._average.applied():
                yield

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters; all processes ask together."""
        return self._average.state_dict()

    def load_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Take over what [`state_dict`] returned."""
        self._average.load_state_dict(averages)

    def save(self, folder: Path, averages: Mapping[str, Tensor]) -> None:
        """Write what [`state_dict`] returned into a checkpoint."""
        save_file(dict(averages), folder / _AVERAGE)

    def load(self, folder: Path) -> None:
        """Read the averages of a checkpoint.

        Raises:
            CheckpointError: it has none, or those of another model.
        """
        try:
            self.load_state_dict(load_file(folder / _AVERAGE))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / _AVERAGE}: expected the moving average of this model's weights, found none that fits "
                f"({brief(error)}). Resume with the ema_decay that the checkpoint was written with, or start anew."
            ) from error


class StopOnSignal(TrainerCallback):
    """End a training after the step at which SIGTERM or Ctrl-C came, with a checkpoint.

    Args:
        interruption: entered by the caller; it notes the signal.
        accelerator: of several processes all stop after the same step; each question waits for all devices.
        every: steps between two questions where there are several processes.
    """

    def __init__(self, interruption: Interruption, accelerator: Any, every: int = 10) -> None:
        self.interruption, self.accelerator, self.every = interruption, accelerator, every
        self.signal: str | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask whether a signal came."""
        if self.accelerator.num_processes > 1 and state.global_step % self.every:
            return control
        self.signal = stopped_by(self.accelerator, self.interruption)
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
        return control


class JSONLogCallback(TrainerCallback):
    """Write every log as a line of JSON to `training_log.jsonl`, which reads as one run however often it stopped."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOG
        self._writes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the lines of the checkpoint; those of later steps come again."""
        self._writes = state.is_world_process_zero
        if self._writes:
            write_log(self.path, state.log_history, append=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line, but for the summary of a `train()`, which is one of several where it was interrupted."""
        if self._writes and "train_runtime" not in (logs or {}):
            write_log(self.path, state.log_history[-1:], append=True)


class ProgressBar(TrainerCallback):
    """One bar over all steps, on the main process, in place of those of `Trainer`.

    Args:
        progress: show it; by default where transformers shows its own.
    """

    def __init__(self, name: str, progress: bool | None = None) -> None:
        self.name, self.progress = name, progress
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open it where the training begins."""
        how = {"total": state.max_steps, "initial": state.global_step, "desc": self.name, "unit": "step"}
        self._bar = progress_bar(progress=self.progress, mininterval=0.5, **how)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move it on."""
        self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and the rate."""
        if self._bar is not None and "learning_rate" in (logs or {}):
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.2e}"}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close it."""
        self._bar.close()
