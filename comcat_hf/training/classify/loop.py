"""Fine-tuning with distillation on accelerate: steps, reports, checkpoints, and an exact way back to them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device, set_seed
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...compression.distillation import DistillationLoss, LossParts, OwnBase
from ...errors import ComCATError, InvalidValueError, brief
from ...modeling import meta_copy
from ..checkpoints import Progress, remove_checkpoints
from ..flags import values_deciding
from ..interruption import Interrupted, Interruption, stopped_by
from ..seeds import random_states, seeded, set_random_states
from .checkpoints import MUST, Trained, check_finite, facts_of_training, is_sharded, restore, save_checkpoint
from .ema import WeightAverage
from .engines import prepare_engine
from .logs import LOG, LossMeter, TrainingLog, cannot_write
from .optimizers import Schedule, learning_rates, make_optimizer, warmup_steps
from .routes import Student, freeze_unreached, make_loss
from .settings import CompressSettings


__all__ = ["TrainResult", "TrainRun", "finetune_model"]

Batch = Mapping[str, Any]

# Steps between two questions whether another process was told to stop: each waits for all devices.
_ASK_EVERY = 10
_SECRETS = ("token", "hub_token")


@dataclass(frozen=True)
class TrainRun:
    """A fine-tuning that is ready to go.

    Attributes:
        settings: how.
        accelerator: whose processes train.
        student: what is trained, and its teacher.
        seed: of the run.
        plan: digest of the rank plan; a checkpoint of another plan is refused.
        batches: from the first batch and a number to so many batches of this process: `"pixel_values"`
            `(B, 3, H, W)` and `"labels"` `(B,)` or `(B, classes)`.
        steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps in which all images occur.
        evaluate: from a model to its metrics; all processes call it together. `None` for no evaluation.
        interruption: notes signals; the caller has entered it.
        say: called with lines that a user wants to read.
        checkpoint: what the training goes on from, or `None`.
    """

    settings: CompressSettings
    accelerator: Accelerator
    student: Student
    seed: int
    plan: str
    batches: Callable[[int, int], Iterable[Batch]]
    steps: int
    steps_per_epoch: int
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    interruption: Interruption = field(default_factory=Interruption)
    say: Callable[[str], None] = lambda text: None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """What became of a fine-tuning.

    Attributes:
        step: optimizer steps that are done.
        loss: the mean loss that was logged last; `None` if none was.
        interrupted: the signal that ended it early, or `None`.
        checkpoint: the last one that was written or read.
    """

    step: int
    loss: float | None = None
    interrupted: str | None = None
    checkpoint: Path | None = None


def finetune_model(run: TrainRun) -> TrainResult:
    """Train a student in place.

    A training that was interrupted and resumed with the same settings ends with the same weights as one that was not:
    on a CPU to the bit. At the end `run.student.model` is in eval mode, with the moving average in the place of its
    weights if there is one, and without what accelerate put around it.

    Args:
        run: what, how and on which batches.

    Raises:
        InvalidValueError: settings that do not go together, a checkpoint of another plan, model or route.
        CheckpointError: a checkpoint that cannot be read.
        ComCATError: the loss or the weights are not finite, or something cannot be written; the last checkpoint is as
            it was.
    """
    settings, accelerator = run.settings, run.accelerator
    facts = facts_of_training(settings, accelerator, run.seed, run.plan, run.steps)
    first = 0
    if run.checkpoint is not None:
        done = Progress.read(run.checkpoint)
        first = done.step
        done.compare(facts, run.checkpoint, MUST if first < run.steps else _all_but_length(settings))
        run.say(f"Going on from {run.checkpoint}.")
    folder = _open_folder(run)
    training = _Training(run, folder, facts, first)
    if first < run.steps:
        result = training.train()
        if result.interrupted is not None:
            return result
    else:
        result = TrainResult(first, checkpoint=run.checkpoint)
    training.conclude()
    return result


class _Training:
    """What a step needs, as accelerate wrapped it."""

    def __init__(self, run: TrainRun, folder: Path, facts: Mapping[str, Any], first: int) -> None:
        settings, accelerator, student = run.settings, run.accelerator, run.student
        self.run, self.folder, self.facts, self.step = run, folder, facts, first
        self.accelerator = accelerator
        self.accumulated = accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps
        # accelerate counts batches over all trainings.
        accelerator.step = 0
        images = settings.per_device_train_batch_size * accelerator.num_processes * self.accumulated
        rates = learning_rates(settings, images)
        self.schedule = Schedule(*rates, run.steps, warmup_steps(settings, run.steps))
        self.loss = make_loss(settings)
        _prepare_student(student, settings, self.loss)
        prepare_engine(accelerator, settings, student.model)
        self.empty = meta_copy(student.model) if is_sharded(accelerator) else None
        optimizer = make_optimizer(settings, student.model, self.schedule.rate(0))
        self.model, self.optimizer = accelerator.prepare(student.model, optimizer)
        self.student = accelerator.unwrap_model(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.average = None if settings.ema_decay is None else WeightAverage(self.student, settings.ema_decay)
        self.meter = LossMeter(accelerator, self.accumulated)
        self.teacher = self._make_teacher()
        self.intervals = {n: settings.interval(n, run.steps_per_epoch) for n in ("checkpointing_steps", "eval_steps")}
        self.last_loss: float | None = None
        self.checkpoint = run.checkpoint
        self._start_from(first)
        self.log = TrainingLog(folder / LOG, first, accelerator.is_main_process)
        self._start_trackers()

    def train(self) -> TrainResult:
        """Take the steps that are left."""
        run, accelerator, batches = self.run, self.accelerator, self.accumulated
        quiet = not accelerator.is_main_process
        how = {"desc": "Fine-tuning", "unit": "step", "mininterval": 0.5, "disable": quiet}
        self._evaluate_what_was_missed()
        self.model.train()
        self.meter.restart_clock()
        with tqdm(total=run.steps, initial=self.step, **how) as bar:
            for batch in run.batches(self.step * batches, (run.steps - self.step) * batches):
                self.learn(batch)
                if not accelerator.sync_gradients:
                    continue
                self.step += 1
                bar.update()
                if (signal := self.after_step(bar)) is not None:
                    return TrainResult(self.step, self.last_loss, signal, self.checkpoint)
        if self.step < run.steps:
            raise ComCATError(
                f"The training: expected batches for {run.steps} steps, found them for {self.step}. Give fewer "
                "--max_train_steps, or more images."
            )
        return TrainResult(self.step, self.last_loss, None, self.checkpoint)

    def learn(self, batch: Batch) -> None:
        """Learn from one batch; the optimizer takes a step behind the last of those that are accumulated."""
        accelerator = self.accelerator
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        # Here, as DeepSpeed takes its step within the backward pass.
        self.schedule.set(self.optimizer)
        with accelerator.accumulate(self.model):
            parts = self._losses(batch)
            accelerator.backward(parts.total)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.trained, self.run.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.meter.add(parts, len(batch["labels"]))
        if accelerator.sync_gradients and not self.optimizer.step_was_skipped:
            self.schedule.advance()
            if self.average is not None:
                self.average.update()

    def after_step(self, bar: tqdm) -> str | None:
        """Report, save and evaluate where that is due; returns the signal that ends the training."""
        settings, last = self.run.settings, self.step == self.run.steps
        if last or self.step % settings.logging_steps == 0:
            self._report(bar)
        signal = None if last else self._signal()
        interval = self.intervals["checkpointing_steps"]
        # The last one: what comes behind the training may fail as well.
        due = interval is not None and (last or self.step % interval == 0)
        if signal is not None or due:
            self.save()
        if signal is None and self._evaluation_is_due():
            try:
                self.evaluate()
            except Interrupted as stopped:
                signal = str(stopped)
                if not due:
                    self.save()
        return signal

    def save(self) -> None:
        """Write a checkpoint, if all is finite."""
        run, settings = self.run, self.run.settings
        self.meter.check(self.step)
        check_finite(self.accelerator, self.student, self.step)
        progress = Progress(self.step, run.seed, self.facts)
        limit = settings.checkpoints_total_limit
        self.checkpoint = save_checkpoint(self.accelerator, self.folder, progress, self._states(), limit)
        self.meter.restart_clock()

    def evaluate(self) -> None:
        """Measure the model, with the averages in the place of its weights; draws nothing that training would draw.

        Raises:
            Interrupted: a signal came; the training is as it was before.
        """
        device = self.accelerator.device
        drawn = random_states(device)
        self.model.eval()
        try:
            with nullcontext() if self.average is None else self.average.applied():
                model = self.model if is_sharded(self.accelerator) else self.student
                found = {f"eval_{name}": value for name, value in self.run.evaluate(model).items()}
        finally:
            set_random_states(drawn, device)
            self.model.train()
        self.log.write(step=self.step, epoch=self._epoch(), **found)
        self.accelerator.log(found, step=self.step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.run.say(f"Step {self.step}: {shown}")
        self.meter.restart_clock()

    def conclude(self) -> None:
        """Leave the student as it is to be used."""
        student, accelerator = self.run.student, self.accelerator
        if self.average is not None:
            self.average.take_over()
        if self.empty is not None:
            student.model = _gathered(accelerator, self.model, self.empty)
        else:
            student.model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        student.model.eval()

    def _losses(self, batch: Batch) -> LossParts:
        inputs = {"pixel_values": batch["pixel_values"]}
        if self.loss.needs_hidden_states:
            inputs["output_hidden_states"] = True
        # Before the student runs: where it is its own teacher, its adapters are switched off and on again.
        taught = None if self.teacher is None else self.teacher(**inputs)
        return self.loss(self.model(**inputs), taught, batch["labels"], self.step / self.run.steps)

    def _make_teacher(self) -> Callable[..., Any] | None:
        if not self.loss.needs_teacher:
            return None
        teacher = self.run.student.teacher
        if teacher is None:
            # Past DistributedDataParallel, which would wait for gradients.
            return OwnBase(self.student)
        teacher.to(self.accelerator.device)
        if self.run.settings.torch_compile:
            teacher.compile()
        return partial(_ask, self.accelerator, teacher)

    def _start_from(self, first: int) -> None:
        # What dropout draws, on each process something else.
        start = seeded(self.run.seed, "dropout", self.accelerator.process_index, first).initial_seed()
        set_seed(start % 2**32)
        if self.run.checkpoint is not None:
            restore(self.accelerator, self.run.checkpoint, self._states())

    def _states(self) -> Trained:
        states = {"schedule": self.schedule, "losses": self.meter, "average": self.average}
        states = {name: state for name, state in states.items() if state is not None}
        return Trained(self.student, self.optimizer, self.accelerator.scaler, states)

    def _report(self, bar: tqdm) -> None:
        values = self.meter.read(self.step)
        self.last_loss = values["loss"]
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.log.write(step=self.step, epoch=self._epoch(), **values)
        self.accelerator.log(values, step=self.step)
        shown = {"loss": f"{self.last_loss:.4f}", "lr": f"{values['learning_rate']:.2e}"}
        bar.set_postfix(shown, refresh=False)

    def _signal(self) -> str | None:
        several = self.accelerator.num_processes > 1
        if several and self.step % min(_ASK_EVERY, self.run.settings.logging_steps):
            return None
        return stopped_by(self.accelerator, self.run.interruption)

    def _epoch(self) -> float:
        return round(self.step / self.run.steps_per_epoch, 4)

    def _evaluation_is_due(self) -> bool:
        interval = self.intervals["eval_steps"]
        return self.run.evaluate is not None and interval is not None and self.step % interval == 0

    def _evaluate_what_was_missed(self) -> None:
        """A training that ended between a checkpoint and the evaluation of the same step makes up for it."""
        if self.step == 0 or not self._evaluation_is_due():
            return
        missed = [not self.log.has(self.step, "eval_")]
        if self.accelerator.num_processes > 1:
            missed = broadcast_object_list(missed)
        if missed[0]:
            self.evaluate()

    def _start_trackers(self) -> None:
        if not self.accelerator.log_with:
            return
        shown = {
            name: value for name, value in vars(self.run.settings).items() if isinstance(value, int | float | str)
        }
        config = {name: value for name, value in shown.items() if name not in _SECRETS}
        self.accelerator.init_trackers("comcat-compress", config=config)


def _all_but_length(settings: CompressSettings) -> tuple[str, ...]:
    """What may not differ where nothing is left to train: it would not come to bear."""
    return tuple(name for name in values_deciding(settings, "finetune") if name != "max_train_steps")


def _open_folder(run: TrainRun) -> Path:
    """The output folder, without what was left of checkpoints that were not finished."""
    folder, settings = run.settings.output_path, run.settings
    if run.accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            keep = run.checkpoint is not None or not settings.overwrite_output_dir
            remove_checkpoints(folder, unfinished_only=keep)
        except OSError as error:
            raise cannot_write(folder, error) from error
    run.accelerator.wait_for_everyone()
    return folder


def _prepare_student(student: Student, settings: CompressSettings, loss: DistillationLoss) -> None:
    model = student.model
    freeze_unreached(model, loss)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidValueError(f"{type(model).__name__}: expected parameters to train, found that all are frozen.")
    if settings.gradient_checkpointing:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            plain.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InvalidValueError(
                f"--gradient_checkpointing: expected a model that can do it, found {type(plain).__name__} "
                f"({brief(error)}). Leave the flag out."
            ) from error
    if settings.torch_compile:
        # In place: names, and what accelerate unwraps, stay as they are.
        model.compile()


@torch.no_grad()
def _ask(accelerator: Accelerator, teacher: nn.Module, **inputs: Any) -> Any:
    # It is in eval mode throughout.
    with accelerator.autocast():
        return teacher(**inputs)


def _gathered(accelerator: Accelerator, model: nn.Module, empty: nn.Module) -> nn.Module:
    """A whole copy, on the CPU of every process, of a model that was trained in shards."""
    state: dict[str, Tensor] = accelerator.get_state_dict(model)
    content = [{name: value.cpu() for name, value in state.items()} if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        content = broadcast_object_list(content)
    # Names of a compiled or sharded model are those of the plain one; a miss is an error.
    empty.load_state_dict(content[0], assign=True)
    # Buffers that belong to no state dict are the same on all processes.
    buffers = dict(model.named_buffers())
    for name, buffer in list(empty.named_buffers()):
        if buffer.is_meta:
            path, _, last = name.rpartition(".")
            setattr(empty.get_submodule(path), last, buffers[name].cpu())
    return empty
