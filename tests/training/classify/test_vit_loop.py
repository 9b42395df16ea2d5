"""The fine-tuning loop on real ViTs of small size: exactness, processes, checkpoints, and what goes wrong."""

import copy
import errno
import json
import math
import os
import random
import re
import shutil
import signal
from pathlib import Path
from types import MethodType

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification
from transformers.trainer_pt_utils import safe_globals

from comcat_hf.compression.distillation import DistillationLoss, OwnBase, ask_teacher
from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError
from comcat_hf.training.checkpoints import Progress, last_checkpoint, list_checkpoints
from comcat_hf.training.classify.callbacks import WeightAverageCallback
from comcat_hf.training.classify.logs import LOG, LossMeter, read_log, write_log
from comcat_hf.training.classify.loop import TrainRun, finetune_model
from comcat_hf.training.classify.planning import learning_rates, rate_at, warmup_steps
from comcat_hf.training.classify.routes import finished, make_student
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.interruption import Interruption
from comcat_hf.training.machine import tracker_of
from tests.processes import forked, in_processes, until
from tests.training.classify.conftest import CLASSES, SIZE
from tests.training.conftest import Recorder


BATCH, STEPS = 4, 6


def batch_at(position, size=BATCH):
    """Images by position, whose mean says their class."""
    generator = torch.Generator().manual_seed(position)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator) + labels.view(-1, 1, 1, 1)
    return {"pixel_values": images, "labels": labels}


def batches(start, count):
    return (batch_at(position) for position in range(start, start + count))


DEFAULTS = {
    "model_name_or_path": "vit",
    "per_device_train_batch_size": BATCH,
    "learning_rate": 3e-3,
    "min_learning_rate": 1e-4,
    "logging_steps": 2,
    "checkpointing_steps": None,
    "eval_steps": None,
    "alignment": 1.0,
}


def prepare(folder, output_dir, kind="wet", steps=STEPS, accelerator=None, **changes):
    """A fine-tuning; fields of `TrainRun` and of the settings may be given."""
    own = {name: changes.pop(name) for name in list(changes) if name in TrainRun.__dataclass_fields__}
    settings = CompressSettings(**(DEFAULTS | {"output_dir": str(output_dir)} | changes))
    dense = ViTForImageClassification.from_pretrained(folder / kind / "dense").requires_grad_(False).eval()
    accelerator = (
        Accelerator(cpu=True, mixed_precision=settings.mixed_precision) if accelerator is None else accelerator
    )
    student = make_student(settings, dense, folder / kind / "small")
    given = {"seed": 3, "plan": "a plan", "batches": batches, "steps": steps, "steps_per_epoch": 4}
    return TrainRun(settings=settings, accelerator=accelerator, student=student, **(given | own))


def train(*args, **changes):
    run = prepare(*args, **changes)
    return run, finetune_model(run)


def weights(run):
    return {name: value.clone() for name, value in run.student.model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / LOG).read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in lines(folder)]


def forget():
    """What another process would not know either."""
    AcceleratorState._reset_state(reset_partial_state=True)
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)


def stopping(step, accumulated=1):
    """Batches behind the first of which SIGTERM comes to this process."""

    def give(start, count):
        for position in range(start, start + count):
            if position == step * accumulated - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch_at(position)

    return give


# Learning


@pytest.mark.parametrize("route", ["full", "peft"])
def test_the_student_comes_to_answer_as_its_teacher(folder, tmp_path, route):
    how = {"kind": "dry", "steps": 40, "route": route, "distillation_alpha": 1.0, "logging_steps": 10}
    run = prepare(folder, tmp_path, **how)
    pixels = batch_at(0)["pixel_values"]
    # Far from the teacher, so that what is learnt stands out from one batch to the next.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.student.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        before = run.student.model.eval()(pixels).logits
    result = finetune_model(run)
    said = lines(tmp_path)
    assert result.step == 40 and result.interrupted is None
    assert [line["step"] for line in said] == [10, 20, 30, 40]
    assert said[-1]["teacher"] < 0.5 * said[0]["teacher"] and said[-1]["alignment"] < said[0]["alignment"]
    assert all(line["images_per_second"] > 0 for line in said) and said[1]["epoch"] == 5.0
    assert not run.student.model.training
    small = finished(run.student.model)
    small.save_pretrained(tmp_path / "model")
    again = ViTForImageClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(pixels).logits, small(pixels).logits)
    taught = ViTForImageClassification.from_pretrained(folder / "dry" / "dense")(pixels).logits
    assert torch.dist(small(pixels).logits, taught) < 0.5 * torch.dist(before, taught)


def test_both_routes_take_the_same_way_where_they_train_the_same(folder, tmp_path):
    """The full route with everything but the factors frozen is the PEFT route."""
    how = {"kind": "dry", "steps": 4, "alignment": 0.0}
    peft = prepare(folder, tmp_path / "peft", route="peft", **how)
    trained = {
        name.removeprefix("base_model.model.")
        .replace(".comcat_factors.default.", ".")
        .replace(".modules_to_save.default.", ".")
        for name, parameter in peft.student.model.named_parameters()
        if parameter.requires_grad
    }
    full = prepare(folder, tmp_path / "full", **how)
    for name, parameter in full.student.model.named_parameters():
        parameter.requires_grad_(name in trained)
    finetune_model(peft), finetune_model(full)
    ours, theirs = finished(peft.student.model).state_dict(), full.student.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert untimed(tmp_path / "peft") == [
        {k: pytest.approx(v, abs=1e-5) for k, v in line.items()} for line in untimed(tmp_path / "full")
    ]


def test_a_base_is_its_own_teacher_without_being_touched(folder, tmp_path):
    run = prepare(folder, tmp_path, route="peft")
    model, inputs = run.student.model, {"pixel_values": batch_at(0)["pixel_values"]}
    assert run.student.teacher is None
    model.train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    modes = {name: module.training for name, module in model.named_modules()}
    expected = ask_teacher(model, inputs, adapters=False)
    found = OwnBase(model)(**inputs)
    assert torch.equal(found.logits, expected.logits) and not found.logits.requires_grad
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not torch.equal(model.eval()(**inputs).logits, expected.logits)
    base = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    finetune_model(run)
    assert base and all(torch.equal(run.student.model.state_dict()[name], value) for name, value in base.items())


def test_a_small_model_of_another_dense_one_is_refused(folder, tmp_path):
    shutil.copytree(folder / "dry", tmp_path / "dry")
    model = ViTForImageClassification.from_pretrained(tmp_path / "dry" / "small")
    place = "vit.layers.1.layernorm_before"
    model.get_submodule(place).weight.data.add_(1)
    model.save_pretrained(tmp_path / "dry" / "small")
    with pytest.raises(CheckpointError, match=rf"small: expected the dense model's {place}.weight, which route peft"):
        prepare(tmp_path, tmp_path, "dry", route="peft")
    prepare(tmp_path, tmp_path, "dry", route="peft", modules_to_save="classifier,layernorm_before")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "route": "peft"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "route": "peft", "ema_decay": 0.9},
        {"distillation_type": "none", "alignment": 0.0},
        {"distillation_type": "none"},
        {"distillation_type": "hard", "route": "peft"},
        {"torch_compile": True, "mixed_precision": "bf16"},
        {"torch_compile": True, "route": "peft"},
    ],
    ids=str,
)
def test_the_ways_to_train(folder, tmp_path, changes, monkeypatch):
    if changes.get("torch_compile"):
        # Traces as the real one does, without its compiler.
        real = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
        torch._dynamo.reset()
    run, result = train(folder, tmp_path, kind="dry", steps=2, **changes)
    train(folder, tmp_path / "plain", kind="dry", steps=2, route=changes.get("route", "full"))
    said = lines(tmp_path)[0]
    assert result.step == 2 and math.isfinite(said["loss"])
    assert (said["teacher"] == 0) == (changes.get("distillation_type") == "none")
    assert (said["alignment"] == 0) == (changes.get("alignment") == 0.0)
    assert {value.dtype for value in weights(run).values()} == {torch.float32}
    if "distillation_type" not in changes:
        expected = lines(tmp_path / "plain")[0]
        close = 0.05 if "mixed_precision" in changes else 1e-4
        for name in ("loss", "task", "teacher", "alignment"):
            assert said[name] == pytest.approx(expected[name], rel=close), name


def test_without_a_teacher_in_the_loss_none_is_run(folder, tmp_path):
    run = prepare(folder, tmp_path, distillation_type="none", alignment=0.0)
    assert run.student.teacher is None
    run = prepare(folder, tmp_path, distillation_type="none", alignment=0.5)
    assert run.student.teacher is not None


def test_gradients_accumulate_to_the_same_steps(folder, tmp_path):
    def halves(start, count):
        for position in range(start, start + count):
            whole, half = batch_at(position // 2), slice(BATCH // 2 * (position % 2), BATCH // 2 * (position % 2 + 1))
            yield {name: value[half] for name, value in whole.items()}

    one, _ = train(folder, tmp_path / "one", kind="dry")
    how = {"per_device_train_batch_size": BATCH // 2, "batches": halves, "kind": "dry"}
    two, _ = train(folder, tmp_path / "two", gradient_accumulation_steps=2, **how)
    three, _ = train(folder, tmp_path / "three", **how)
    ours, theirs, other = weights(two), weights(one), weights(three)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in ours)
    assert max((other[name] - theirs[name]).abs().max() for name in ours) > 1e-3
    assert lines(tmp_path / "two")[-1]["loss"] == pytest.approx(lines(tmp_path / "one")[-1]["loss"], abs=1e-5)


def test_gradients_are_clipped(folder, tmp_path):
    class Recorder(Accelerator):
        def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
            parameters = [p for p in parameters if p.grad is not None]
            before = super().clip_grad_norm_(parameters, max_norm, norm_type)
            norms.append((before.item(), torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()))
            return before

    norms = []
    train(folder, tmp_path, max_grad_norm=0.01, accelerator=Recorder(cpu=True), gradient_accumulation_steps=2)
    assert len(norms) == STEPS
    assert all(before > 0.1 and after == pytest.approx(0.01, rel=1e-3) for before, after in norms)


def test_parameters_that_no_gradient_reaches_are_left_alone(folder, tmp_path):
    run = prepare(folder, tmp_path)
    unused = torch.nn.Parameter(torch.ones(3, 3))
    run.student.model.vit.embeddings.mask_token = unused
    state = torch.get_rng_state()
    finetune_model(run)
    assert not unused.requires_grad and torch.equal(unused, torch.ones(3, 3))
    assert state is not None and "vit.embeddings.mask_token" in run.student.model.state_dict()


# The rate


def test_the_rate_follows_the_step():
    rates = [rate_at(step, 1.0, 0.1, steps=12, rising=4) for step in (*range(13), 99)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates[4:12] == pytest.approx(falling)
    assert rates[12] == rates[13] == pytest.approx(0.1)


def test_rates_and_warmups_by_their_flags():
    settings = CompressSettings(learning_rate=1e-3, min_learning_rate=1e-4)
    assert learning_rates(settings, 1024) == (1e-3, 1e-4)
    assert learning_rates(CompressSettings(learning_rate=1e-3, scale_lr=True), 1024) == (2e-3, 2e-6)
    assert warmup_steps(settings, 10) == 0
    assert warmup_steps(CompressSettings(warmup_ratio=0.25), 10) == 2
    assert warmup_steps(CompressSettings(warmup_steps=3), 10) == 3
    with pytest.raises(InvalidValueError, match="--min_learning_rate must be at most"):
        learning_rates(CompressSettings(learning_rate=1e-3, min_learning_rate=1e-2), 1)
    with pytest.raises(InvalidValueError, match="Give one of --warmup_steps and --warmup_ratio"):
        warmup_steps(CompressSettings(warmup_steps=1, warmup_ratio=0.1), 10)
    with pytest.raises(InvalidValueError, match="which has 10 steps, got 10"):
        warmup_steps(CompressSettings(warmup_steps=10), 10)


def test_a_step_that_was_skipped_leaves_the_rate_and_the_average(folder, tmp_path):
    """As the scaler of half precision does when gradients overflow."""

    class Skipping(Accelerator):
        def prepare(self, *args, **kwargs):
            model, optimizer = super().prepare(*args, **kwargs)
            step, taken = optimizer.step, []

            def skip(self, closure=None):
                taken.append(optimizer.param_groups[0]["lr"])
                optimizer._is_overflow = len(taken) in (2, 3)
                if not optimizer._is_overflow:
                    step(closure)

            optimizer.step = MethodType(skip, optimizer)
            rates.append(taken)
            return model, optimizer

    rates, averaged = [], []
    real = WeightAverageCallback.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightAverageCallback, "update", lambda self: (averaged.append(1), real(self)))
        train(folder, tmp_path, accelerator=Skipping(cpu=True), ema_decay=0.5)
    expected = [rate_at(step, 3e-3, 1e-4, STEPS) for step in (0, 1, 1, 1, 2, 3)]
    assert rates[0] == pytest.approx(expected, rel=1e-12)
    assert len(averaged) == 4


# The average


def test_the_average_is_evaluated_and_saved_in_place_of_the_weights(folder, tmp_path):
    """Against weights averaged by hand from the checkpoints of every step."""
    seen = []

    def evaluate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"loss": 0.0}

    how = {"ema_decay": 0.8, "checkpointing_steps": "1", "eval_steps": "1"}
    run = prepare(folder, tmp_path, evaluate=evaluate, **how)
    average = {name: value.clone() for name, value in run.student.model.state_dict().items()}
    finetune_model(run)
    for step in range(1, STEPS + 1):
        raw = ViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict()
        average = {name: 0.8 * value + 0.2 * raw[name] for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(seen[step - 1][name], value, atol=1e-5, rtol=1e-5)
    assert same(weights(run), seen[-1])
    assert max((raw[name] - average[name]).abs().max() for name in raw) > 1e-4
    # Evaluating leaves no trace in the training.
    other, _ = train(folder, tmp_path / "unseen", ema_decay=0.8)
    assert same(weights(other), weights(run))


def test_the_average_of_a_peft_student_holds_what_is_trained(folder, tmp_path):
    run = prepare(folder, tmp_path, route="peft")
    trained = {name for name, parameter in run.student.model.named_parameters() if parameter.requires_grad}
    average = WeightAverageCallback(0.9)
    average.start(run.student.model)
    assert set(average.state_dict()) == trained
    assert any("classifier" in name for name in trained)
    with pytest.raises(CheckpointError, match=r"expected .*classifier.* of shape \(.*found None.*ema_decay"):
        average.load_state_dict({})


def test_averages_are_kept_in_full_precision():
    model = torch.nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    average = WeightAverageCallback(0.999)
    average.start(model)
    torch.nn.init.zeros_(model.weight)
    for _ in range(3):
        average.update()
    kept = average.state_dict()["weight"]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, torch.full((2, 2), 0.999**3))
    with average.applied():
        assert model.weight[0, 0] > 0.9
    assert torch.equal(model.weight, torch.zeros(2, 2, dtype=torch.bfloat16))


# Interrupting and resuming

EXACT = [
    {"ema_decay": 0.9, "gradient_accumulation_steps": 2, "warmup_steps": 2, "route": "full"},
    {"route": "peft", "mixed_precision": "bf16", "modules_to_save": "classifier,layernorm_before"},
]


@pytest.mark.parametrize("changes", EXACT, ids=["full", "peft"])
def test_sigterm_saves_and_the_rest_gives_the_same_bits(folder, tmp_path, changes):
    """With dropout, in the middle of an interval of the log, before and behind evaluations."""

    def evaluate(model):
        torch.rand(3), random.random()
        with torch.no_grad():
            return {"loss": model(batch_at(999)["pixel_values"]).logits.square().mean().item()}

    how = changes | {"evaluate": evaluate, "eval_steps": "2", "logging_steps": 3}
    whole, _ = train(folder, tmp_path / "whole", checkpointing_steps="1", **how)
    for step in (1, 3, 4):
        forget()
        output = tmp_path / f"stopped-{step}"
        with Interruption() as interruption:
            give = stopping(step, changes.get("gradient_accumulation_steps", 1))
            stopped = prepare(folder, output, interruption=interruption, **how | {"batches": give})
            result = finetune_model(stopped)
        assert (result.step, result.interrupted) == (step, "SIGTERM")
        assert result.checkpoint == output / f"checkpoint-{step}" and result.checkpoint.is_dir()
        forget()
        run, result = train(folder, output, checkpoint=result.checkpoint, **how)
        assert result.step == STEPS and result.interrupted is None
        assert same(weights(run), weights(whole)), step
        assert untimed(output) == untimed(tmp_path / "whole"), step
    file = "model.safetensors" if changes["route"] == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / "whole" / f"checkpoint-{n}" / file) for n in (1, 2))
    assert not same(ours, theirs)


def edit_state(checkpoint, change):
    file = checkpoint / "training_state.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return checkpoint


def earlier(checkpoint):
    """As versions before wrote it: its state says neither its digest nor its files."""

    def change(content):
        del content["digest"], content["files"]
        content["version"] = content.pop("format_version")

    return edit_state(checkpoint, change)


def test_dropout_goes_on_where_it_was(folder, tmp_path):
    """The test above would pass without it, were there no dropout."""
    how = {"checkpointing_steps": "3"}
    whole, _ = train(folder, tmp_path / "a", **how)
    checkpoint = earlier(tmp_path / "a" / "checkpoint-3")
    shutil.copy(tmp_path / "a" / "checkpoint-6" / "rng_state.pth", checkpoint)
    run, _ = train(folder, tmp_path / "b", checkpoint=checkpoint, **how)
    assert not same(weights(run), weights(whole))


def test_sigkill_loses_the_steps_since_the_last_checkpoint_only(folder, tmp_path):
    how = {"ema_decay": 0.9, "checkpointing_steps": "2", "steps": 40, "logging_steps": 1}
    killed = tmp_path / "killed"

    def start():
        forget()
        run, _ = train(folder, killed, checkpoint=last_checkpoint(killed), **how)
        save_file(weights(run), killed / "weights.safetensors")

    for goal in (2, 6, 10, None):
        with forked(start) as process:
            until((killed / f"checkpoint-{goal}").is_dir, process)
            # Anywhere behind it: in a step, or while the next checkpoint is being written.
            process.join(random.Random(goal).random() * 0.05)
        assert (process.exitcode == 0) == (killed / "weights.safetensors").exists() == (goal is None)
    whole, _ = train(folder, tmp_path / "whole", **how)
    assert same(load_file(killed / "weights.safetensors"), weights(whole))
    assert untimed(killed) == untimed(tmp_path / "whole") and len(lines(killed)) == 40
    assert not list(killed.glob(".*"))


def test_what_a_checkpoint_holds_and_how_many_are_kept(folder, tmp_path):
    # What was left of one that was not finished, by this or an earlier version.
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "student.safetensors").touch()
    run, result = train(folder, tmp_path, checkpointing_steps="1", checkpoints_total_limit=2, route="peft")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    assert result.checkpoint == tmp_path / "checkpoint-6"
    names = {path.name for path in result.checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "training_state.json"} <= names
    # The former is a pickle, which may hold a token.
    assert not {"training_args.bin", "student.safetensors"} & names
    saved = load_file(result.checkpoint / "adapter_model.safetensors")
    trained = {name for name, parameter in run.student.model.named_parameters() if parameter.requires_grad}
    assert len(saved) == len(trained) and not any("base_layer" in name for name in saved)
    # A finished training that is resumed has nothing to do.
    before = weights(run)
    run, result = train(folder, tmp_path, route="peft", checkpoint=result.checkpoint)
    assert result.step == STEPS and same(weights(run), before)


def test_a_checkpoint_of_an_epoch_or_of_none(folder, tmp_path):
    train(folder, tmp_path / "epoch", checkpointing_steps="epoch")
    assert [path.name for path in list_checkpoints(tmp_path / "epoch")] == ["checkpoint-4", "checkpoint-6"]
    train(folder, tmp_path / "none", checkpointing_steps="none")
    assert list_checkpoints(tmp_path / "none") == []


def test_checkpoints_that_do_not_fit_are_refused_by_name(folder, tmp_path, caplog):
    train(folder, tmp_path, checkpointing_steps="2")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    checkpoint = tmp_path / "checkpoint-2"
    for changes, says in (
        ({"plan": "another"}, "expected a training with --plan another, found one with a plan"),
        ({"route": "peft"}, "--route peft, found one with full"),
        ({"ema_decay": 0.5}, "--ema_decay 0.5, found one with None"),
        ({"model_name_or_path": "deit"}, "--model_name_or_path deit, found one with vit"),
    ):
        with pytest.raises(InvalidValueError, match=re.escape(says)):
            train(folder, tmp_path, checkpoint=checkpoint, **changes)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    train(folder, tmp_path / "other", checkpoint=checkpoint, learning_rate=1e-2)
    assert "learning_rate was 0.003 and is 0.01 now" in caplog.text
    caplog.clear()
    train(
        folder,
        tmp_path / "two",
        checkpoint=edit_state(earlier(checkpoint), lambda c: c["facts"].update(num_processes=2)),
    )
    assert "num_processes was 2 and is 1 now" in caplog.text


FILES = ("optimizer.pt", "rng_state.pth", "model.safetensors")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    train(folder, output, checkpointing_steps="2")
    return output


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["missing", "junk", "other"])
def test_a_checkpoint_is_read_as_a_whole(folder, trained, checkpoint, name, content):
    if content == "other":
        shutil.copy(trained / "checkpoint-4" / name, checkpoint)
    elif content == "junk":
        (checkpoint / name).write_bytes(b"junk")
    else:
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: expected the file that was written with this checkpoint"):
        train(folder, checkpoint.parent / "out", checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": 4}, "step: expected 2, as its folder says, found 4"),
        ({"step": 999}, "step: expected 2, as its folder says, found 999"),
        ({"step": -1}, "step: expected a whole number from 0, found -1"),
        ({"step": 3.7}, "step: expected a whole number from 0, found 3.7"),
        ({"step": True}, "step: expected a whole number"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"facts": []}, "facts: expected a mapping"),
        ({"colour": "red"}, "unknown 'colour'"),
    ],
)
def test_a_state_that_cannot_be_is_refused(folder, checkpoint, changes, says):
    edit_state(checkpoint, lambda content: content.update(changes))
    for change, words in ((lambda path: path, ""), (earlier, says)):
        with pytest.raises(CheckpointError, match=f"training_state.json.*{words}"):
            train(folder, checkpoint.parent / "out", checkpoint=change(checkpoint))


def test_a_checkpoint_under_another_name_and_of_an_earlier_version_is_resumed(folder, trained, checkpoint, tmp_path):
    named = earlier(checkpoint).rename(tmp_path / "best")
    train(folder, tmp_path / "out", checkpoint=named, checkpointing_steps="2")
    for name in FILES[1:]:
        ours, theirs = (path / "checkpoint-6" / name for path in (trained, tmp_path / "out"))
        assert ours.read_bytes() == theirs.read_bytes()
    edit_state(named, lambda content: content.update(step=7))
    with pytest.raises(CheckpointError, match="step: expected at most 6, found 7"):
        train(folder, tmp_path / "out", checkpoint=named)


def written_by_the_loop(checkpoint, model):
    """The files of versions that did not train with `Trainer`, from those of `Trainer`."""
    step = int(checkpoint.name.partition("-")[2])
    if (checkpoint / "model.safetensors").is_file():
        model = ViTForImageClassification.from_pretrained(checkpoint)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    states = {"optimizer": torch.load(checkpoint / "optimizer.pt"), "schedule": {"taken": step}}
    for name, file in (("losses", "losses"), ("average", "weight_average")):
        if (path := checkpoint / f"{file}.safetensors").is_file():
            states[name] = load_file(path)
    with safe_globals():
        rng = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    kind, keys, *rest = rng["numpy"]
    numbers = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    facts = json.loads((checkpoint / "training_state.json").read_text())["facts"]
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    save_file(trained, checkpoint / "student.safetensors")
    torch.save(states, checkpoint / "optimizer.pt")
    torch.save({"python": rng["python"], "numpy": numbers, "torch": rng["cpu"]}, checkpoint / "random_states_0.pt")
    Progress(step, 3, facts).write(checkpoint)


@pytest.mark.parametrize("changes", EXACT, ids=["full", "peft"])
def test_a_checkpoint_of_the_loop_of_earlier_versions_is_resumed_to_the_bit(folder, tmp_path, changes):
    how = changes | {"logging_steps": 2}
    whole, _ = train(folder, tmp_path / "whole", **how)
    with Interruption() as interruption:
        give = stopping(3, changes.get("gradient_accumulation_steps", 1))
        stopped = prepare(folder, tmp_path / "out", interruption=interruption, **how | {"batches": give})
        checkpoint = finetune_model(stopped).checkpoint
    written_by_the_loop(checkpoint, stopped.student.model)
    forget()
    run, _ = train(folder, tmp_path / "out", checkpoint=checkpoint, **how)
    assert same(weights(run), weights(whole)) and untimed(tmp_path / "out") == untimed(tmp_path / "whole")
    (checkpoint / "student.safetensors").rename(checkpoint / "model.bin")
    with pytest.raises(CheckpointError, match=r"checkpoint-3: expected trainer_state.json.*An earlier version wrote"):
        train(folder, tmp_path / "out", checkpoint=earlier(checkpoint), **how)


def test_a_checkpoint_of_a_model_of_other_shapes_names_the_weight(folder, tmp_path):
    train(folder, tmp_path, checkpointing_steps="2")
    run = prepare(folder, tmp_path, checkpoint=tmp_path / "checkpoint-2")
    run.student.model.classifier = torch.nn.Linear(32, CLASSES, bias=False)
    with pytest.raises(CheckpointError, match=r"expected classifier.bias of shape None, found \(4,\)"):
        finetune_model(run)


# What goes wrong


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(folder, tmp_path, accumulated):
    def spoiled(start, count):
        for position in range(start, start + count):
            batch = batch_at(position)
            if position == 3 * accumulated:
                batch["pixel_values"][0, 0, 0, 0] = math.inf
            yield batch

    how = {"batches": spoiled, "gradient_accumulation_steps": accumulated, "logging_steps": 100}
    with pytest.raises(ComCATError, match=r"loss of step 4 is not finite.*the last checkpoint is as it was"):
        train(folder, tmp_path, checkpointing_steps="2", **how)
    # Step 4 is not saved, though its loss is looked at only then.
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    train(folder, tmp_path, checkpoint=tmp_path / "checkpoint-2", gradient_accumulation_steps=accumulated)


@pytest.mark.parametrize(("step", "checkpointing", "saved"), [(4, "2", ["checkpoint-2"]), (STEPS, "none", [])])
def test_weights_that_are_not_finite_are_neither_saved_nor_a_result(folder, tmp_path, step, checkpointing, saved):
    """Gradients may overflow where the loss does not."""

    class Overflowing(Accelerator):
        def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
            steps.append(1)
            if len(steps) == step:
                next(iter(parameters)).grad[:] = math.nan
            return torch.zeros(())

    steps = []
    with pytest.raises(ComCATError, match=f"After step {step} some weights are not finite"):
        train(folder, tmp_path, checkpointing_steps=checkpointing, accelerator=Overflowing(cpu=True))
    assert [path.name for path in list_checkpoints(tmp_path)] == saved


@pytest.mark.parametrize("place", ["os.replace", "torch.save"])
def test_a_full_disk_leaves_the_checkpoints_that_are_there(folder, tmp_path, monkeypatch, place):
    module, _, name = place.rpartition(".")
    real = getattr(os if "os" in module else torch, name)

    def full(*args, **kwargs):
        if (tmp_path / "checkpoint-4").is_dir():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os if "os" in module else torch, name, full)
    with pytest.raises(ComCATError, match=r"checkpoint-4: expected to write.*No space left on device.*as they were"):
        train(folder, tmp_path, checkpointing_steps="2", checkpoints_total_limit=1)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-4").exists()
    whole, _ = train(folder, tmp_path / "whole")
    run, _ = train(folder, tmp_path, checkpoint=tmp_path / "checkpoint-2")
    assert same(weights(run), weights(whole))


def test_an_output_folder_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(ComCATError, match=r"file.out: expected to write there"):
        train(folder, tmp_path / "file" / "out")


def test_batches_that_end_too_early(folder, tmp_path):
    with pytest.raises(ComCATError, match="expected batches for 6 steps, found them for 3"):
        train(folder, tmp_path, batches=lambda start, count: batches(start, 3))


def test_trainings_without_anything_to_train(folder, tmp_path):
    run = prepare(folder, tmp_path)
    run.student.model.requires_grad_(False)
    with pytest.raises(InvalidValueError, match="found that all are frozen"):
        finetune_model(run)


# Reports


def test_trackers_are_told_what_the_log_says(folder, tmp_path):
    tracker = Recorder()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    how = {"hub_token": "secret", "token": "secret", "eval_steps": "epoch", "evaluate": lambda model: {"top1": 0.5}}
    train(folder, tmp_path, accelerator=accelerator, **how)
    said = lines(tmp_path)
    assert [step for _, step in tracker.logged] == [line["step"] for line in said] == [2, 4, 4, 6]
    assert tracker.logged[2] == ({"eval_top1": 0.5}, 4) and said[2] == {"step": 4, "epoch": 1.0, "eval_top1": 0.5}
    assert {"loss", "task", "teacher", "alignment", "learning_rate"} <= set(tracker.logged[0][0])
    assert "secret" not in str(tracker.config) and tracker.config["learning_rate"] == 3e-3


def test_which_tracker_is_taken(monkeypatch):
    for installed, auto in (([], None), (["wandb"], None), (["wandb", "tensorboard"], "tensorboard")):
        monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda found=installed: found)
        assert tracker_of("auto") == auto
        assert tracker_of("none") is None and tracker_of("all") == "all"
    assert tracker_of("wandb") == "wandb"
    with pytest.raises(InvalidValueError, match="--report_to mlflow: expected an installed tracker, found wandb"):
        tracker_of("mlflow")
    with pytest.raises(InvalidValueError, match=r"--report_to must be one of .*, all, auto or none, got 'paper'"):
        tracker_of("paper")


def test_the_log_reads_as_one_run(tmp_path):
    path = tmp_path / LOG
    write_log(path, [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5}], append=False)
    write_log(path, [{"step": 3, "eval_top1": 1.0}], append=True)
    with path.open("a") as stream:
        stream.write('{"loss": 1}\n{"step": 2, "lo')
    assert read_log(path, 2) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    assert read_log(path, 3)[2:] == [{"step": 3, "eval_top1": 1.0}] and read_log(tmp_path / "none", 3) == []


def test_the_meter_waits_until_it_is_read():
    """No value is fetched from the device per step."""
    meter = LossMeter(Accelerator(cpu=True), batches=2)
    loss = DistillationLoss(alpha=0)
    fetched = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__"):
            patch.setattr(torch.Tensor, name, lambda self, name=name: fetched.append(name))
        for number in (1.0, 2.0, 3.0, 6.0):
            logits = torch.tensor([[0.0, number]])
            output = type("Output", (), {"logits": logits})
            meter.add(loss(output, None, torch.tensor([1])), 1)
    assert fetched == []
    expected = sum(math.log1p(math.exp(-number)) for number in (1.0, 2.0, 3.0, 6.0)) / 4
    found = meter.read(2)
    assert found["loss"] == found["task"] == pytest.approx(expected, rel=1e-5)


# Several processes


def train_together(folder, output, route, stop=0):
    """The process's share of batches of eight; SIGTERM comes to the second process at batch `stop`."""
    accelerator = Accelerator(cpu=True)
    index, size = accelerator.process_index, 8 // accelerator.num_processes

    def share(start, number):
        for position in range(start, start + number):
            if stop and position == stop and index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            whole = batch_at(position, 8)
            yield {name: value[index * size : (index + 1) * size] for name, value in whole.items()}

    with Interruption() as interruption:
        given = {"accelerator": accelerator, "interruption": interruption, "checkpoint": last_checkpoint(output)}
        how = {"ema_decay": 0.9, "checkpointing_steps": "100", "per_device_train_batch_size": size, "route": route}
        _, result = train(folder, output, "dry", steps=16, batches=share, **given, **how)
    if accelerator.is_main_process:
        (output / "result").write_text(f"{accelerator.num_processes} {result.step} {result.interrupted}")


@pytest.mark.parametrize("route", ["full", "peft"])
def test_two_processes_are_one_with_the_same_images(folder, tmp_path, route):
    train_together(folder, tmp_path / "one", route)
    in_processes(train_together, folder, tmp_path / "two", route)
    one, two = untimed(tmp_path / "one"), untimed(tmp_path / "two")
    assert (tmp_path / "two" / "result").read_text() == "2 16 None"
    assert [line["step"] for line in two] == [2, 4, 6, 8, 10, 12, 14, 16]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == {name: pytest.approx(value, abs=1e-4) for name, value in theirs.items()}
    assert one[0]["loss"] - one[-1]["loss"] > 0.05
    if route == "full":
        return
    # A signal to one process stops both behind the same step, and they go on from there.
    in_processes(train_together, folder, tmp_path / "stopped", route, 5)
    assert (tmp_path / "stopped" / "result").read_text() == "2 6 a signal to another process"
    assert len(list((tmp_path / "stopped" / "checkpoint-6").glob("rng_state_*.pth"))) == 2
    in_processes(train_together, folder, tmp_path / "stopped", route)
    for ours, theirs in zip(untimed(tmp_path / "stopped"), two, strict=True):
        assert ours == {name: pytest.approx(value, abs=1e-6) for name, value in theirs.items()}


# Speed


def test_a_step_asks_for_nothing_that_a_bare_one_does_not(folder, tmp_path, monkeypatch):
    """Of the device: between two lines of the log no value is fetched and nothing is reduced."""
    fetched = []
    run = prepare(folder, tmp_path, logging_steps=100, steps=5)
    real = {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__")}
    reduce = run.accelerator.reduce

    def watched(start, count):
        yield batch_at(0)
        # AdamW keeps its steps on the CPU, and reads them there.
        for name in real:
            monkeypatch.setattr(
                torch.Tensor, name, lambda self, name=name: (fetched.append((name, self.ndim)), real[name](self))[1]
            )
        monkeypatch.setattr(
            run.accelerator, "reduce", lambda *args, **kwargs: (fetched.append("reduce"), reduce(*args, **kwargs))[1]
        )
        yield batch_at(1)
        yield batch_at(2)
        counted.append(list(fetched))
        monkeypatch.undo()
        yield from batches(3, 2)

    counted = []
    finetune_model(TrainRun(**{**vars(run), "batches": watched}))
    taken = counted[0]
    assert copy.copy(taken) == [("item", 0)] * len(taken)
