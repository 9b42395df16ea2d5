"""Fine-tuning with distillation by `DistillationTrainer`, on batches, metrics and an accelerator that are there."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device, set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from ...compression.distillation import DistillationLoss
from ...errors import ComCATError, InvalidValueError
from ...modeling import meta_copy
from ..checkpoints import Progress
from ..interruption import Interrupted, Interruption
from ..machine import start_trackers
from ..seeds import random_states, seeded, set_random_states
from .callbacks import JSONLogCallback, ProgressBar, StopOnSignal, WeightAverageCallback
from .earlier import EarlierCheckpoint, is_earlier
from .logs import cannot_write
from .planning import learning_rates, rate_at, warmup_steps
from .routes import Student, gathered, make_loss, prepare_student
from .settings import CompressSettings
from .trainer import DistillationTrainer


__all__ = ["TrainResult", "TrainRun", "blocks_of", "finetune_model", "prepare_engine"]

Batch = Mapping[str, Any]

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
# Settings that `Trainer` knows by the same names.
_SAME = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "logging_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
# Steps between two questions whether another process was told to stop: each waits for all devices.
_ASK_EVERY = 10


@dataclass(frozen=True)
class TrainRun:
    """A fine-tuning that is ready to go.

    Attributes:
        plan: digest of the rank plan; a checkpoint of another plan is refused.
        batches: from the first batch and a number to so many batches of this process: `"pixel_values"`
            `(B, 3, H, W)` and `"labels"` `(B,)` or `(B, classes)`.
        evaluate: from a model to its metrics; all processes call it together. `None` for no evaluation.
        interruption: notes signals; the caller has entered it.
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

    def facts(self) -> dict[str, Any]:
        """What a continuation must share with the training to be exact."""
        facts = self.settings.facts("finetune", self.seed)
        # It counts in the number of steps.
        del facts["num_train_epochs"]
        return facts | {
            "plan": self.plan,
            "max_train_steps": self.steps,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }


@dataclass(frozen=True)
class TrainResult:
    """What became of a fine-tuning.

    Attributes:
        step: optimizer steps that are done.
        interrupted: the signal that ended it early, or `None`.
        checkpoint: the last one that was written or read.
    """

    step: int
    interrupted: str | None = None
    checkpoint: Path | None = None


def finetune_model(run: TrainRun) -> TrainResult:
    """Train a student in place.

    A training that was interrupted and resumed with the same settings ends with the same weights as one that was not:
    on a CPU to the bit. At the end `run.student.model` is in eval mode, with the moving average in the place of its
    weights if there is one, and without what accelerate put around it.

    Raises:
        InvalidValueError: settings that do not go together, a checkpoint of another plan, model or route.
        CheckpointError: a checkpoint that cannot be read.
        ComCATError: the loss or the weights are not finite, or something cannot be written; the last checkpoint is as
            it was.
    """
    settings, accelerator, student = run.settings, run.accelerator, run.student
    first = _first_step(run)
    accelerator.gradient_accumulation_steps = 1
    loss = make_loss(settings)
    prepare_student(student, settings, loss)
    prepare_engine(accelerator, settings, student.model)
    empty = meta_copy(student.model) if accelerator.distributed_type in _SHARDED else None
    try:
        trainer = _StageTrainer(run, loss, first)
    except OSError as error:
        raise cannot_write(settings.output_path, error) from error
    # What dropout draws, on each process something else.
    start = seeded(run.seed, "dropout", accelerator.process_index, first).initial_seed()
    set_seed(start % 2**32)
    trainer.train(resume_from_checkpoint=None if trainer.earlier else run.checkpoint)
    result = TrainResult(max(trainer.state.global_step, first), trainer.stopper.signal, trainer.checkpoint)
    if result.interrupted is None:
        if empty is not None:
            student.model = gathered(accelerator, trainer.model_wrapped, empty)
        else:
            student.model = accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        student.model.eval()
    return result


def _arguments(run: TrainRun, rate: float) -> TrainingArguments:
    """The settings of a run and its highest rate, as `Trainer` takes them."""
    settings, accelerator = run.settings, run.accelerator
    saving = settings.interval("checkpointing_steps", run.steps_per_epoch)
    args = TrainingArguments(
        str(settings.output_path),
        **{name: getattr(settings, name) for name in _SAME},
        max_steps=run.steps,
        learning_rate=rate,
        optim="adamw_torch",
        save_strategy="no" if saving is None else "steps",
        save_steps=saving or 500,
        save_total_limit=settings.checkpoints_total_limit,
        use_cpu=accelerator.device.type == "cpu",
        # DeepSpeed compares them with its own.
        bf16=accelerator.mixed_precision == "bf16",
        fp16=accelerator.mixed_precision == "fp16",
        accelerator_config={"use_configured_state": True},
        # Batches come from where the checkpoint was.
        ignore_data_skip=True,
        disable_tqdm=True,
        report_to="none",
    )
    # One process has one device, whatever else the machine has.
    args._n_gpu = min(args.n_gpu, 1)
    return args


class _StageTrainer(DistillationTrainer):
    """`DistillationTrainer` on what a run brings along."""

    def __init__(self, run: TrainRun, loss: DistillationLoss, first: int) -> None:
        self.run, self.first, self.checkpoint = run, first, run.checkpoint
        settings, accelerator = run.settings, run.accelerator
        self.interval = settings.interval("eval_steps", run.steps_per_epoch)
        batches = accelerator.num_processes * settings.gradient_accumulation_steps
        highest, last = learning_rates(settings, settings.per_device_train_batch_size * batches)
        rising = warmup_steps(settings, run.steps)
        self.share = lambda step: rate_at(step, highest, last, run.steps, rising) / highest
        self.stopper = StopOnSignal(run.interruption, accelerator, min(_ASK_EVERY, settings.logging_steps))
        log = JSONLogCallback(settings.output_path)
        average = [] if settings.ema_decay is None else [WeightAverageCallback(settings.ema_decay)]
        old = run.checkpoint is not None and is_earlier(accelerator.distributed_type, run.checkpoint)
        self.earlier = [EarlierCheckpoint(self, run.checkpoint)] if old else []
        super().__init__(
            model=run.student.model,
            teacher=run.student.teacher,
            args=_arguments(run, highest),
            distillation=loss,
            callbacks=[*average, *self.earlier, self.stopper, log, ProgressBar("Fine-tuning", True), _Flow(self)],
        )
        self.remove_callback(PrinterCallback)
        if self.teacher is not None and settings.torch_compile:
            self.teacher.compile()

    def create_accelerator_and_postprocess(self) -> None:
        """Take the accelerator of the run."""
        self.accelerator = self.run.accelerator
        self.gather_function = self.accelerator.gather_for_metrics
        self.is_deepspeed_enabled = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        if self.is_deepspeed_enabled:
            propagate_args_to_deepspeed(self.accelerator, self.args)

    def get_train_dataloader(self) -> Any:
        """The batches behind those that the checkpoint has seen."""
        return _Remaining(self.run, self.first)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """A rate that rises along a line and falls along half a cosine."""
        self.lr_scheduler = LambdaLR(self.optimizer, self.share)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Batch) -> int:
        """None: `Trainer` would count all parameters in every step, and the figure is one of texts."""
        return 0

    def progress(self) -> Progress:
        """Where the training is, and what a continuation must share with it."""
        return Progress(self.state.global_step, self.run.seed, self.run.facts())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the model, with the averages in the place of its weights; draws nothing that training would draw."""
        device = self.accelerator.device
        drawn = random_states(device)
        model = self.model_wrapped if self.accelerator.distributed_type in _SHARDED else self.model
        model.eval()
        try:
            with nullcontext() if self.average is None else self.average.applied():
                found = self.run.evaluate(model)
        except Interrupted as stopped:
            self.stopper.signal = str(stopped)
            self.control.should_save = self.control.should_training_stop = True
            return {}
        finally:
            set_random_states(drawn, device)
            model.train()
        found = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(found))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.run.say(f"Step {self.state.global_step}: {shown}")
        self.meter.restart_clock()
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the run's trackers, too."""
        if "train_runtime" in logs:
            return
        super().log(logs, start_time)
        told = self.state.log_history[-1]
        self.accelerator.log({k: v for k, v in told.items() if k not in ("step", "epoch")}, step=told["step"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.checkpoint = self.run.settings.output_path / f"checkpoint-{self.state.global_step}"


class _Flow(TrainerCallback):
    """When to log and to evaluate, and the epoch."""

    def __init__(self, trainer: _StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start trackers; a training that ended between a step and its evaluation makes up for it."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        start_trackers(accelerator, "comcat-compress", trainer.run.settings)
        trainer.meter.restart_clock()
        if 0 < state.global_step < state.max_steps and self._is_due(state.global_step):
            logged = [name for line in state.log_history if line["step"] == state.global_step for name in line]
            if not any(name.startswith("eval_") for name in logged):
                trainer.evaluate()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Take no step where a checkpoint has taken all of them."""
        control.should_training_stop |= state.global_step >= state.max_steps
        return control

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Say what is due."""
        state.epoch = round(state.global_step / self.trainer.run.steps_per_epoch, 4)
        last = state.global_step == state.max_steps
        control.should_log |= last
        if last:
            # What ends anyway is not interrupted.
            self.trainer.stopper.signal = None
        control.should_evaluate = self.trainer.stopper.signal is None and self._is_due(state.global_step)
        return control

    def _is_due(self, step: int) -> bool:
        interval = self.trainer.interval
        return self.trainer.run.evaluate is not None and interval is not None and step % interval == 0


@dataclass(frozen=True)
class _Remaining:
    """The batches that are left. Without a length, so that `Trainer` goes through them once."""

    run: TrainRun
    first: int

    def __iter__(self) -> Iterator[Batch]:
        run, first = self.run, self.first
        accumulated = run.settings.gradient_accumulation_steps
        wanted = max(run.steps - first, 0) * accumulated
        given = 0
        for batch in run.batches(first * accumulated, wanted):
            given += 1
            # `Trainer` would wait for the device.
            yield send_to_device(batch, run.accelerator.device, non_blocking=True)
        if given < wanted:
            raise ComCATError(
                f"The training: expected batches for {run.steps} steps, found them for "
                f"{first + given // accumulated}. Give fewer --max_train_steps, or more images."
            )


def _first_step(run: TrainRun) -> int:
    """The steps that the checkpoint has done, if it is one of this training."""
    if run.checkpoint is None:
        return 0
    done = Progress.read(run.checkpoint)
    done.compare(run.facts(), run.checkpoint, run.settings, "finetune", run.steps, ("plan",))
    run.say(f"Going on from {run.checkpoint}.")
    return done.step


def prepare_engine(accelerator: Accelerator, settings: CompressSettings, model: nn.Module) -> None:
    """Tell the engine that spreads the training over processes, if there is one, what it cannot find out.

    Raises:
        InvalidValueError: settings that the engine does not go together with.
    """
    _ENGINES.get(accelerator.distributed_type, lambda *_: None)(accelerator, settings, model)


def blocks_of(model: nn.Module) -> list[str]:
    """The classes of a model's blocks, without those that hold its input embeddings.

    accelerate shards the classes that the model names as indivisible, then the input embeddings by themselves. A ViT
    names the module around its patch embeddings among them, which would so be sharded twice.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    present = {type(module).__name__ for module in model.modules()}
    around = {
        type(module).__name__ for module in model.modules() if any(child is embeddings for child in module.modules())
    }
    return sorted(set(getattr(model, "_no_split_modules", None) or ()) & present - around)


def _prepare_deepspeed(accelerator: Accelerator, settings: CompressSettings, model: nn.Module) -> None:
    if settings.ema_decay is not None:
        raise InvalidValueError(
            "--ema_decay: expected processes that can read their weights between steps, found DeepSpeed, which keeps "
            "them to itself. Leave the flag out, or launch with FSDP or plain processes."
        )
    # It would read these off a data loader, of which accelerate knows none here.
    accelerator.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm,
    }


def _prepare_fsdp(accelerator: Accelerator, settings: CompressSettings, model: nn.Module) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = blocks_of(model) or None


_ENGINES: Mapping[str, Callable[[Accelerator, CompressSettings, nn.Module], None]] = {
    DistributedType.DEEPSPEED: _prepare_deepspeed,
    DistributedType.FSDP: _prepare_fsdp,
}
