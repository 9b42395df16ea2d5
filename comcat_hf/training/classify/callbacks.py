"""Callbacks for `DistillationTrainer`: the moving average of the weights, signals, and the log as JSON lines."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ...progress import progress_bar
from ...tensor_files import check_shapes, read_safetensors
from ..interruption import Interruption, stopped_by
from .logs import LOG, write_log


__all__ = ["JSONLogCallback", "ProgressBar", "StopOnSignal", "WeightAverageCallback"]

_AVERAGE = "weight_average.safetensors"
_SAME_DECAY = "Resume with the ema_decay that the checkpoint was written with, or start anew."


class WeightAverageCallback(TrainerCallback):
    """Exponential moving average (EMA) of the trained weights: evaluated, saved beside them, and kept at the end.

    The averages are in float32. Buffers and frozen weights are the model's own and are not averaged: of a PEFT model
    the average holds the factors only.

    Args:
        decay: 0 to below 1; the share of the old average in the new one.
    """

    def __init__(self, decay: float) -> None:
        self.resumed: Path | None = None
        self._blend = get_ema_multi_avg_fn(decay)
        self._weights: dict[str, nn.Parameter] = {}
        self._averages: list[Tensor] = []
        self._taken_over = False

    def start(self, model: nn.Module) -> None:
        """Start from a model's weights."""
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = [weight.detach().float().clone() for weight in self._weights.values()]
        self._taken_over = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are."""
        self._blend(self._averages, [weight.detach().float() for weight in self._weights.values()], None)

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Start from the model's weights, or from the checkpoint that the training goes on from."""
        self.start(model)
        if self.resumed is not None:
            self.load(self.resumed)

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take in the weights, unless gradients overflowed in half precision and there was no step."""
        if not getattr(optimizer, "step_was_skipped", False):
            self.update()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Put the averages in the place of the weights, for good."""
        self._put(self._averages)
        self._taken_over = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For a while the model has the averages in place of its weights; afterwards these are back to the bit."""
        if self._taken_over:
            yield
            return
        kept = [weight.detach().clone() for weight in self._weights.values()]
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, whole also where the model is sharded (all processes)."""
        whole = [a.full_tensor() if isinstance(a, DTensor) else a for a in self._averages]
        return dict(zip(self._weights, whole, strict=True))

    @torch.no_grad()
    def load_state_dict(self, averages: Mapping[str, Tensor], source: str | Path = "The moving average") -> None:
        """Take over what [`state_dict`] returned.

        Raises:
            CheckpointError: other names or shapes.
        """
        check_shapes(averages, self._weights, source, _SAME_DECAY)
        for name, average in zip(self._weights, self._averages, strict=True):
            value = averages[name].to(average.device)
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)

    def save(self, folder: Path, averages: Mapping[str, Tensor]) -> None:
        """Write what [`state_dict`] returned into a checkpoint."""
        save_file(dict(averages), folder / _AVERAGE)

    def load(self, folder: Path) -> None:
        """Read the averages of a checkpoint.

        Raises:
            CheckpointError: it has none, or those of another model.
        """
        averages, _ = read_safetensors(folder / _AVERAGE, "averages of the weights", _SAME_DECAY)
        self.load_state_dict(averages, folder / _AVERAGE)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights.values(), values, strict=True):
            weight.copy_(value)


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

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
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

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin with the lines of the checkpoint; those of later steps come again."""
        self._writes = state.is_world_process_zero
        if self._writes:
            write_log(self.path, state.log_history, append=False)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        """Append a line, but for the summary of a `train()`, which is one of several where it was interrupted."""
        if self._writes and "train_runtime" not in logs:
            write_log(self.path, state.log_history[-1:], append=True)


class ProgressBar(TrainerCallback):
    """One bar over all steps, on the main process, in place of those of `Trainer`.

    Args:
        progress: show it; by default where transformers shows its own.
    """

    def __init__(self, name: str, progress: bool | None = None) -> None:
        self.name, self.progress = name, progress
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open it where the training begins."""
        how = {"total": state.max_steps, "initial": state.global_step, "desc": self.name, "unit": "step"}
        self._bar = progress_bar(progress=self.progress, mininterval=0.5, **how)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move it on."""
        self._bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        """Show the loss and the rate."""
        if self._bar is not None and "learning_rate" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.2e}"}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close it."""
        self._bar.close()
