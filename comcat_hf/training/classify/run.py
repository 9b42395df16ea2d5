"""A compression run: from settings to a folder with a small model."""

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

from accelerate import Accelerator
from torch import nn

from ...configs import RankPlan
from ...hub import write_json_atomic
from ..checkpoints import Progress, find_checkpoint
from ..interruption import Interrupted, Interruption, on_main, until_stopped
from ..locks import locked
from ..machine import make_accelerator
from ..seeds import choose_seed
from .artefacts import Artefacts, digest_of, whole_folder
from .augmentation import ImagePreparation, Mixing
from .data import BrokenImages, open_splits
from .evaluation import Changes, Watch, evaluate_classifier
from .evaluation_report import compare_speed
from .loop import TrainResult, TrainRun, finetune_model
from .models import load_classifier, load_dense, load_image_processor, load_teacher
from .outputs import push_model, read_results, read_sweep, save_model, write_model_card
from .planning import Setting
from .reporting import CompressResult, SweepPoint, draw_ranks, write_run_report
from .routes import Student, finished, make_student
from .settings import CompressSettings
from .stages import allocate, allocated, calibrate, factorised, initialize
from .stream import Batches


__all__ = ["CompressResult", "compress_vit"]

logger = logging.getLogger(__name__)

# By name; loaded when they are asked for.
Models = Mapping[str, Callable[[], nn.Module]]


def compress_vit(
    settings: CompressSettings,
    *,
    report: Callable[[str], None] | None = None,
    accelerator: Accelerator | None = None,
) -> CompressResult:
    """Compress an image classifier: statistics, ranks, factors, fine-tuning, evaluation, export.

    Every stage is done once; a run that is started again in the same folder goes on where it was. SIGTERM, or the
    first Ctrl-C, ends the run: what was finished is kept, and the state of the search and of the fine-tuning saved. A
    run that was interrupted and resumed with the same settings ends with the same model as one that was not: on a CPU
    to the bit.

    Args:
        report: called on the main process with lines that a user wants to read.
        accelerator: by default one that the settings describe.

    Returns:
        what became of it; after a dry run only the plan is filled in.

    Raises:
        InvalidValueError: settings or data that cannot be used, a folder that another run writes to.
        CheckpointError: a model, a plan or a checkpoint that cannot be read.
        BudgetError: a reduction out of reach.
        ComCATError: the loss is not finite, or a checkpoint cannot be written.
    """
    settings.check()
    result = CompressResult(settings.output_path)
    with ExitStack() as stack, Interruption() as interruption:
        try:
            with interruption.at_once():
                run = _prepare(settings, report, accelerator, interruption, stack)
                plan = run.describe()
            result = replace(result, plan=plan, step=plan.first_step)
            run.say(plan.describe())
            return result if settings.dry_run else _carry_out(run, result)
        except Interrupted as stopped:
            return replace(result, interrupted=str(stopped))


def _prepare(
    settings: CompressSettings,
    report: Callable[[str], None] | None,
    accelerator: Accelerator | None,
    interruption: Interruption,
    stack: ExitStack,
) -> Setting:
    """Read what the stages need. The folder is locked first, so that what is found there stays as it is."""
    accelerator = make_accelerator(settings) if accelerator is None else accelerator
    accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps
    artefacts = Artefacts(settings.output_path)
    if not settings.dry_run:
        on_main(accelerator, lambda: stack.enter_context(locked(artefacts.folder, "output_dir")))
    # Checkpoints of a fine-tuning that ended may stay.
    over = settings.overwrite_output_dir or artefacts.was_done("finetune")
    checkpoint = find_checkpoint(artefacts.folder, settings.resume_from_checkpoint, over)
    accelerator.wait_for_everyone()
    if settings.overwrite_output_dir and checkpoint is None and not settings.dry_run:
        on_main(accelerator, artefacts.clear)
    done = None if checkpoint is None else Progress.read(checkpoint)
    seed = choose_seed(settings.seed, artefacts.seed() if done is None else done.seed)
    with accelerator.main_process_first():
        dense = load_dense(settings)
        processor = load_image_processor(settings)
        splits = open_splits(settings, dense.config, seed)
    preparation = ImagePreparation.of(settings, processor)
    if settings.has_source:
        preparation.check(dense, f"--model_name_or_path {settings.model_name_or_path}")
        if settings.teacher is not None:
            # Needed after hours only, but what is wrong with it is said before.
            preparation.check(load_teacher(settings, dense), f"--teacher {settings.teacher}")
    return Setting(
        settings=settings,
        accelerator=accelerator,
        artefacts=artefacts,
        dense=dense,
        processor=processor,
        splits=splits,
        preparation=preparation,
        broken=BrokenImages.of(settings, splits.train),
        seed=seed,
        say=report if report is not None and accelerator.is_main_process else lambda text: None,
        interruption=interruption,
        checkpoint=checkpoint,
        first_step=0 if done is None else done.step,
    )


def _carry_out(run: Setting, result: CompressResult) -> CompressResult:
    last = run.settings.stage_names[-1]
    calibrate(run)
    if last == "calibrate":
        return result
    run.end_if_stopped()
    ranks = allocate(run)
    result = replace(result, plan=run.describe(ranks))
    reached = result.plan.plan.reached
    run.say(f"The plan removes {reached:.1%}." if reached is not None else "The plan is read.")
    if last == "allocate":
        return result
    initialize(run, ranks)
    models = {"dense": lambda: run.dense}
    models["initial"] = lambda: load_classifier(run.artefacts.initial, "--output_dir")
    models["final"] = models["initial"]
    # Before fine-tuning, which by route peft makes a small model of the dense one.
    points = _sweep(run)
    run.end_if_stopped()
    if run.done("finetune"):
        models["final"] = lambda: load_classifier(run.artefacts.folder, "--output_dir")
    elif "finetune" in run.settings.stage_names:
        trained, student = _finetune(run, ranks)
        result = replace(result, step=trained.step, checkpoint=trained.checkpoint)
        if trained.interrupted is not None:
            return replace(result, interrupted=trained.interrupted)
        final = finished(student.model)
        on_main(run.accelerator, lambda: _keep(run, final))
        models["final"] = lambda: final
        if run.settings.route == "peft":
            # The dense model has become the small one.
            models["dense"] = lambda: load_dense(run.settings)
    return _conclude(run, replace(result, sweep=points), models)


def _sweep(run: Setting) -> tuple[SweepPoint, ...]:
    """Compress the dense model by each of `sweep_reductions` and evaluate it; nothing is kept but the figures."""
    if "evaluate" not in run.settings.stage_names or not run.settings.sweep_reductions:
        return ()
    if run.splits.validation is None:
        run.say("Sweep: left out, as there are no validation images.")
        return ()
    points = []
    try:
        for reduction in run.settings.sweep_reductions:
            run.say(f"Sweep: {reduction:.0%} of the {run.settings.metric}.")
            reached = run.on_main(partial(_make_other, run, reduction))
            found = _evaluate(run, load_classifier(run.artefacts.sweep, "--output_dir"), f"{reduction:.0%} less")
            points.append(SweepPoint(reduction, reached, found["top1"], found["top5"]))
            run.say(f"Sweep: {reached:.2%} removed, top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}.")
    finally:
        if run.accelerator.is_main_process:
            shutil.rmtree(run.artefacts.sweep, ignore_errors=True)
    written = {"points": [asdict(point) for point in points]}
    on_main(run.accelerator, lambda: write_json_atomic(run.artefacts.sweep_results, written))
    return tuple(points)


def _make_other(run: Setting, reduction: float) -> float:
    plan = allocated(run, reduction)
    with whole_folder(run.artefacts.sweep) as folder:
        factorised(run, plan).save_pretrained(folder)
    return plan.reached


def _finetune(run: Setting, ranks: RankPlan) -> tuple[TrainResult, Student]:
    steps = run.steps
    settings, accelerator = run.settings, run.accelerator
    student = make_student(settings, run.dense, run.artefacts.initial)
    reader = run.reader(run.train_split("fine-tuning"), run.broken)
    mixing = Mixing(settings, run.dense.config.num_labels)
    run.say(f"Stage finetune: {steps.total:,} steps.")
    evaluate = None if run.splits.validation is None else lambda model: _evaluate(run, model)
    trained = finetune_model(
        TrainRun(
            settings=settings,
            accelerator=accelerator,
            student=student,
            seed=run.seed,
            plan=digest_of(ranks),
            batches=partial(reader.train, mixing),
            steps=steps.total,
            steps_per_epoch=steps.epoch,
            evaluate=evaluate,
            interruption=run.interruption,
            say=run.say,
            checkpoint=run.checkpoint,
        )
    )
    if run.broken.count:
        run.say(f"{run.broken.count} images could not be read and were left out: {', '.join(run.broken.places)}.")
    return trained, student


def _conclude(run: Setting, result: CompressResult, models: Models) -> CompressResult:
    names = run.settings.stage_names
    metrics: dict[str, Mapping[str, float]] = {}
    changes = Changes()
    if "evaluate" not in names:
        measured = run.artefacts.results, run.artefacts.sweep_results
        metrics, points = on_main(run.accelerator, lambda: (read_results(measured[0]), read_sweep(measured[1])))
        result = replace(result, sweep=points)
    elif run.splits.validation is None:
        run.say("Stage evaluate: left out, as there are no validation images.")
    else:
        for name, load in models.items():
            # Without fine-tuning the initial model is the final one.
            same = next((metrics[other] for other in metrics if models[other] is load), None)
            metrics[name] = _evaluate(run, load(), name, changes.watch(name == "dense")) if same is None else same
        on_main(run.accelerator, lambda: write_json_atomic(run.artefacts.results, metrics))
        for name, found in metrics.items():
            run.say(f"{name:8} top-1 {found['top1']:.2%}  top-5 {found['top5']:.2%}  of {found['samples']:,} images")
        _warn_if_worse(run, metrics)
    result = replace(result, metrics=metrics)
    if "export" in names:
        run.on_main(lambda: _export(run, result, models, changes))
    if "push" in names:
        result = replace(result, commit=run.on_main(lambda: push_model(run.settings)))
    # Wrapped models go first: freed behind their process group, they may wait for that for ever.
    run.accelerator.free_memory()
    run.accelerator.end_training()
    return result


def _export(run: Setting, result: CompressResult, models: Models, changes: Changes) -> None:
    plan, metrics = result.plan, result.metrics
    dense, small = models["dense"](), models["final"]()
    speed = compare_speed(dense, small, run.accelerator.device) if metrics else []
    dense, small = dense.cpu(), small.cpu()
    if not run.artefacts.was_done("finetune"):
        save_model(small, run.processor, run.artefacts.folder)
    picture = draw_ranks(run, plan, dense)
    # Images of a data set do not go onto the Hub unasked.
    shown = None if "push" in run.settings.stage_names else changes
    write_run_report(run, result, (dense, small), speed, shown)
    write_model_card(plan, metrics, picture)


def _warn_if_worse(run: Setting, metrics: Mapping[str, Mapping[str, float]]) -> None:
    before, after = (metrics[name]["top1"] for name in ("initial", "final"))
    if after < before and run.accelerator.is_main_process:
        logger.warning(
            "Fine-tuning ended below its start: top-1 %.2f%%, before it %.2f%%. The model before it is in %s; train "
            "longer, or with another --learning_rate, in another --output_dir.",
            100 * after,
            100 * before,
            run.artefacts.initial,
        )


def _keep(run: Setting, model: nn.Module) -> None:
    save_model(model.cpu(), run.processor, run.artefacts.folder)
    run.finish("finetune")


def _evaluate(run: Setting, model: nn.Module, name: str | None = None, watch: Watch | None = None) -> dict[str, float]:
    split, accelerator = run.splits.validation, run.accelerator
    reader = run.reader(split, BrokenImages.of(run.settings, split))
    batches = reader.evaluate()
    asking = Batches(lambda: until_stopped(batches, accelerator, run.interruption), batches.count)
    progress = name and f"Evaluating {name}"
    return evaluate_classifier(model, asking, accelerator, progress=progress, broken=reader.broken, watch=watch)
