"""DreamBooth training of an adapter: from settings to a folder with the adapter."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...customization.parts import state_of
from ...customization.pipelines import WEIGHTS
from ...errors import ComCATError
from ...tensor_files import check_shapes, read_safetensors
from ..checkpoints import (
    Progress,
    find_checkpoint,
    new_checkpoint,
    remove_checkpoints,
    restore_random_states,
    restore_states,
    warn_of_later,
    write_states,
)
from ..interruption import Interrupted, Interruption, end_if_stopped, on_main, stopped_by
from ..locks import locked
from ..machine import start_trackers
from ..programs import RunResult
from ..seeds import choose_seed, seeded
from .captions import BESIDE, TABLES, warn_of_unread_captions
from .data import Example, class_examples, instance_examples
from .families import Denoiser, load_pipeline
from .losses import DiffusionLoss, FlowLoss, Loss
from .optimizers import check_extras, make_optimizer, make_scheduler
from .outputs import push_outputs, remove_pictures, save_adapter, write_outputs
from .planning import CustomizePlan
from .preparing import (
    DTYPES,
    PreparedRun,
    add_adapters,
    gathered,
    make_accelerator,
    make_sources,
    modules,
    with_class_images,
)
from .sampling import compare, validate
from .settings import CustomizeSettings
from .sources import Latents, Texts
from .stream import ExampleStream


__all__ = ["CustomizeResult", "customize"]


@dataclass(frozen=True)
class CustomizeResult(RunResult):
    """What became of a training; `loss` is of the last step."""

    plan: CustomizePlan | None = None
    loss: float | None = None


def customize(
    settings: CustomizeSettings,
    *,
    report: Callable[[str], None] | None = None,
    accelerator: Accelerator | None = None,
) -> CustomizeResult:
    """Train an adapter on images of a subject.

    SIGTERM, or the first Ctrl-C, ends it, once it trains with a checkpoint. A training that was interrupted and
    resumed with the same settings ends with the same adapter as one that was not: on a CPU to the bit.

    Args:
        report: called on the main process with lines that a user wants to read.
        accelerator: by default one that the settings describe.

    Returns:
        what became of it; after a dry run only the plan is filled in.

    Raises:
        InvalidValueError: settings, images or prompts that cannot be used, a folder that another run writes to;
            nothing was written.
        CheckpointError: the pipeline or the checkpoint cannot be read.
        ComCATError: the loss is not finite.
    """
    settings.check()
    check_extras(settings)
    result = CustomizeResult(settings.output_path)
    with ExitStack() as stack, Interruption() as interruption:
        try:
            with interruption.at_once():
                prepared = _prepare(settings, accelerator, stack)
                loss, plan = _make_loss(prepared), prepared.plan()
            result = replace(result, plan=plan, step=plan.first_step, checkpoint=prepared.checkpoint)
            told = [*_compare(prepared, plan), plan.describe()]
            for text in told if report is not None and prepared.accelerator.is_main_process else ():
                report(text)
            return result if settings.dry_run else _carry_out(prepared, result, loss, interruption)
        except Interrupted as stopped:
            return replace(result, interrupted=str(stopped))


def _prepare(settings: CustomizeSettings, accelerator: Accelerator | None, stack: ExitStack) -> PreparedRun:
    """Read what the training needs. The output folder is locked before it is looked at, and keeps nothing of that."""
    images = tuple(instance_examples(settings))
    classes: tuple[Example, ...] = ()
    if settings.with_prior_preservation:
        folder = settings.class_folder
        warn_of_unread_captions(folder, (*BESIDE, *TABLES), "all class images get the --class_prompt")
        classes = tuple(class_examples(settings))
    output_dir = settings.output_path
    accelerator = make_accelerator(settings) if accelerator is None else accelerator
    accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps
    if not settings.dry_run:
        on_main(accelerator, lambda: stack.enter_context(locked(output_dir, "output_dir")))
    checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint, settings.overwrite_output_dir)
    done = None if checkpoint is None else Progress.read(checkpoint)
    if checkpoint is not None and accelerator.is_main_process:
        warn_of_later(checkpoint)
    if done is not None and "gains_lr_ratio" not in done.facts and settings.gains_lr_ratio is None:
        # Earlier versions had one rate for all.
        settings = replace(settings, gains_lr_ratio=1.0)
    seed = choose_seed(settings.seed, None if done is None else done.seed)
    # Every process has looked into the folders before one of them writes there.
    accelerator.wait_for_everyone()
    pipeline, family = load_pipeline(settings, DTYPES[accelerator.mixed_precision])
    if family.denoiser == "transformer" and accelerator.ddp_handler is not None:
        # The last block's text output is dropped, so that its factors get no gradient.
        accelerator.ddp_handler.find_unused_parameters = True
    parts = add_adapters(settings, pipeline, family, seed)
    return PreparedRun(settings, accelerator, pipeline, family, parts, images, classes, seed, checkpoint, done)


def _compare(prepared: PreparedRun, plan: CustomizePlan) -> list[str]:
    """See that the checkpoint is of this training; returns what is to be said of where it starts."""
    settings = prepared.settings
    if prepared.done is None:
        latest = settings.resume_from_checkpoint == "latest"
        return [f"No checkpoint in {settings.output_dir} yet: starting from the beginning."] if latest else []
    prepared.done.compare(prepared.facts(plan.steps), prepared.checkpoint, settings, "finetune", plan.steps)
    return [f"Going on from {prepared.checkpoint}."]


@dataclass(frozen=True)
class _Run:
    """A training that is ready to go."""

    prepared: PreparedRun
    plan: CustomizePlan
    model: nn.Module
    optimizer: Any
    scheduler: Any
    loss: Loss
    stream: ExampleStream
    latents: Latents
    texts: Texts
    interruption: Interruption

    def loss_of(self, items: Sequence[Mapping[str, Any]], batch: int) -> Tensor:
        """The loss of a batch.

        Args:
            items: of the subject, then of the class.
            batch: its number in this process; with the seed it says which noise is added.
        """
        accelerator = self.prepared.accelerator
        place = batch * accelerator.num_processes + accelerator.process_index
        generator = seeded(self.prepared.seed, "noise", place)
        latents, time_ids = self.latents(items, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        levels = self.loss.levels(len(items), generator).to(latents.device)
        noisy, steps = self.loss.noisy(latents, noise, levels)
        dtype = self.prepared.denoiser.dtype
        told = {"time_ids": time_ids.to(dtype)} if self.prepared.family.time_ids else {}
        predicted = self.model(noisy.to(dtype), steps, **self.texts([item["prompt"] for item in items]), **told)
        return self.loss(predicted, latents, noise, levels)

    def states(self) -> dict[str, Any]:
        found = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.prepared.accelerator.scaler}
        return {name: state for name, state in found.items() if state is not None}

    def save(self, step: int) -> Path:
        """Write a checkpoint: all that an exact continuation needs, and never the base; all processes together."""
        prepared, settings = self.prepared, self.prepared.settings
        progress = Progress(step, prepared.seed, prepared.facts(self.plan.steps))
        accelerator, limit = prepared.accelerator, settings.checkpoints_total_limit
        with new_checkpoint(accelerator, settings.output_path, progress, limit, prepared.checkpoint) as folder:
            if accelerator.is_main_process:
                save_adapter(settings, prepared.pipeline, folder)
                write_states(folder, self.states())
        return folder

    @torch.no_grad()
    def restore(self, checkpoint: Path) -> None:
        """Put everything back as it was when a checkpoint was written.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit.
        """
        for name, model in self.prepared.parts.items():
            file, own = checkpoint / name / WEIGHTS, state_of(model, self.prepared.settings.adapter_name)
            saved, _ = read_safetensors(file, "an adapter", "Give another checkpoint.")
            check_shapes(saved, own, file, "Give a checkpoint of this base and of these ranks.")
            for key, tensor in own.items():
                tensor.copy_(saved[key])
        restore_states(checkpoint, self.states())
        restore_random_states(self.prepared.accelerator, checkpoint)

    def validate(self, step: int) -> str | None:
        """Draw the validation prompt, after the last step without the adapter too; a signal that came meanwhile."""
        prepared, settings, seed = self.prepared, self.prepared.settings, self.prepared.seed
        pipeline, accelerator = prepared.pipeline, prepared.accelerator

        def draw() -> None:
            denoiser = accelerator.unwrap_model(self.model)
            with gathered(pipeline, accelerator.device):
                drawn = validate(pipeline, denoiser, settings, seed, step, accelerator.trackers)
                if step == self.plan.steps:
                    compare(pipeline, denoiser, settings, seed, drawn)

        try:
            if settings.validation_prompt is not None:
                on_main(accelerator, draw, self.interruption)
        except Interrupted as stopped:
            return str(stopped)
        return None


def _carry_out(
    prepared: PreparedRun, result: CustomizeResult, loss: Loss, interruption: Interruption
) -> CustomizeResult:
    settings, accelerator, output_dir = prepared.settings, prepared.accelerator, result.output_dir
    for model in modules(prepared.pipeline):
        model.to(accelerator.device)
    if settings.with_prior_preservation:
        prepared = with_class_images(prepared, interruption)
    end_if_stopped(accelerator, interruption)
    run = _make_run(prepared, result.plan, loss, interruption)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_checkpoints(output_dir, unfinished_only=settings.resume_from_checkpoint is not None)
        if result.plan.first_step == 0:
            remove_pictures(output_dir)
    start_trackers(accelerator, "comcat-dreambooth", settings)
    result = _train(run, result)
    if result.interrupted is None:
        on_main(accelerator, lambda: write_outputs(settings, prepared.pipeline, result.plan))
        if settings.push_to_hub:
            commit = on_main(accelerator, lambda: push_outputs(settings, prepared.parts), interruption)
            result = replace(result, commit=commit)
    # The wrapped model goes first: freed behind its process group, it may wait for that for ever.
    del run
    accelerator.free_memory()
    accelerator.end_training()
    return result


def _train(run: _Run, result: CustomizeResult) -> CustomizeResult:
    settings, accelerator, plan = run.prepared.settings, run.prepared.accelerator, run.plan
    step, batches = plan.first_step, settings.gradient_accumulation_steps
    loader = run.stream.loader(step * batches, max(plan.steps - step, 0) * batches, accelerator.process_index)
    run.model.train()
    loss, seen = None, []
    quiet = not accelerator.is_main_process
    with tqdm(total=plan.steps, initial=step, desc="Training", unit="step", mininterval=0.5, disable=quiet) as bar:
        for batch, items in enumerate(loader, start=step * batches):
            seen.append(_learn(run, items, batch))
            if not accelerator.sync_gradients:
                continue
            step, loss, seen = step + 1, _mean_loss(accelerator, seen, step + 1), []
            rate = run.scheduler.get_last_lr()[0]
            accelerator.log({"loss": loss, "lr": rate}, step=step)
            bar.set_postfix({"loss": f"{loss:.4f}", "lr": f"{rate:.2e}"}, refresh=False)
            bar.update()
            signal = stopped_by(accelerator, run.interruption) if step < plan.steps else None
            result = replace(result, step=step, loss=loss)
            if signal is not None or step % settings.checkpointing_steps == 0:
                result = replace(result, checkpoint=run.save(step))
            if signal is None and (step % settings.validation_steps == 0 or step == plan.steps):
                signal = run.validate(step)
                if signal is not None and step % settings.checkpointing_steps:
                    result = replace(result, checkpoint=run.save(step))
            if signal is not None:
                return replace(result, interrupted=signal)
    return replace(result, checkpoint=None)


def _learn(run: _Run, items: Sequence[Mapping[str, Any]], batch: int) -> Tensor:
    accelerator = run.prepared.accelerator
    with accelerator.accumulate(run.model):
        loss = run.loss_of(items, batch)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
            accelerator.clip_grad_norm_(trained, run.prepared.settings.max_grad_norm)
        run.optimizer.step()
        if accelerator.sync_gradients and not run.optimizer.step_was_skipped:
            run.scheduler.step()
        run.optimizer.zero_grad()
    return loss.detach()


def _mean_loss(accelerator: Accelerator, seen: list[Tensor], step: int) -> float:
    loss = accelerator.reduce(torch.stack(seen).mean(), reduction="mean").item()
    if not math.isfinite(loss):
        raise ComCATError(
            f"The loss of step {step} is not finite. Take a lower --learning_rate, or --mixed_precision no or bf16 if "
            "it was fp16; the last checkpoint is as it was."
        )
    return loss


def _make_loss(prepared: PreparedRun) -> Loss:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    settings, config = prepared.settings, prepared.pipeline.scheduler.config
    prior_weight = settings.prior_loss_weight if settings.with_prior_preservation else None
    if prepared.family.denoiser == "unet":
        return DiffusionLoss(DDPMScheduler.from_config(config), settings.snr_gamma, prior_weight)
    schedule = FlowMatchEulerDiscreteScheduler.from_config(config)
    return FlowLoss(schedule, settings.weighting_scheme, settings.logit_mean, settings.logit_std, prior_weight)


def _make_run(prepared: PreparedRun, plan: CustomizePlan, loss: Loss, interruption: Interruption) -> _Run:
    settings, accelerator = prepared.settings, prepared.accelerator
    pipeline, family, parts = prepared.pipeline, prepared.family, prepared.parts
    if settings.gradient_checkpointing:
        prepared.denoiser.enable_gradient_checkpointing()
        for name in family.encoders if settings.train_text_encoder else ():
            parts[name].activation_checkpointing_enable({"use_reentrant": False})
    stream, latents, texts = make_sources(prepared, interruption)
    optimizer = make_optimizer(settings, parts.values(), plan.learning_rate)
    scheduler = make_scheduler(settings, optimizer, plan.steps)
    denoiser = Denoiser(pipeline, family, settings.train_text_encoder, settings.guidance_scale)
    # The schedule stays out: prepared, it would take a step for every process.
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    run = _Run(prepared, plan, model, optimizer, scheduler, loss, stream, latents, texts, interruption)
    if prepared.checkpoint is not None:
        run.restore(prepared.checkpoint)
    return run
