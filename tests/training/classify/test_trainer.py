"""`DistillationTrainer` on real ViTs of small size: exactness, whole checkpoints, processes, and bad input."""

import os
import signal

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

import comcat_hf
from comcat_hf import ComCATConfig, DistillationTrainer
from comcat_hf.compression.distillation import DistillationLoss
from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError
from comcat_hf.training.checkpoints import last_checkpoint
from comcat_hf.training.classify.callbacks import JSONLogCallback, StopOnSignal, WeightAverageCallback
from comcat_hf.training.interruption import Interruption
from tests.processes import in_processes
from tests.training.classify.conftest import CLASSES, SIZE, dense_vit
from tests.training.classify.test_vit_loop import STEPS, lines, same, untimed


class Images(Dataset):
    """Images whose mean says their class."""

    def __init__(self, count=24):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % CLASSES
        image = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index)) + label
        return {"pixel_values": image, "labels": label}


def student_and_teacher(route, dropout=0.1):
    dense = dense_vit(dropout)
    plan = comcat_hf.allocate_ranks(dense, 0.4, scope="attention", strategy="uniform")
    if route == "full":
        return comcat_hf.compress(dense, plan=plan).requires_grad_(True), dense
    return get_peft_model(dense, ComCATConfig.from_plan(plan, modules_to_save=["classifier"])), None


def make(output, route="full", *, steps=STEPS, dropout=0.1, decay=0.9, callbacks=(), trainer=None, **changes):
    model, teacher = student_and_teacher(route, dropout)
    given = {"per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 3e-3, "logging_steps": 2}
    given |= {"save_steps": 100, "eval_strategy": "steps", "eval_steps": 3, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(output), **given | {"use_cpu": True} | changes)
    average = [] if decay is None else [WeightAverageCallback(decay)]
    return (trainer or DistillationTrainer)(
        model=model,
        args=args,
        teacher=teacher,
        train_dataset=Images(),
        eval_dataset=Images(8),
        callbacks=[*average, JSONLogCallback(output), *callbacks],
    )


def state(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


class StopAt(TrainerCallback):
    """SIGTERM to this process within a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("route", "changes"),
    [("full", {"gradient_accumulation_steps": 2}), ("peft", {"bf16": True})],
    ids=["full", "peft"],
)
def test_sigterm_saves_and_the_rest_gives_the_same_bits(tmp_path, route, changes):
    """With dropout, a moving average, between two lines of the log and on either side of an evaluation."""
    whole = make(tmp_path / "whole", route, **changes)
    whole.train()
    for step in (1, 3, 4):
        output = tmp_path / f"stopped-{step}"
        with Interruption() as interruption:
            stopped = make(output, route, callbacks=[StopAt(step)], **changes)
            stopper = StopOnSignal(interruption, stopped.accelerator)
            stopped.add_callback(stopper)
            stopped.train()
        assert (stopped.state.global_step, stopper.signal) == (step, "SIGTERM")
        resumed = make(output, route, **changes)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert same(state(resumed), state(whole)), step
        assert untimed(output) == untimed(tmp_path / "whole"), step


@pytest.mark.parametrize("route", ["full", "peft"])
def test_every_tensor_of_a_checkpoint_is_loaded(tmp_path, route):
    """`Trainer` itself passes over 84 of 92 tensors of a ViT, which its checkpoints name otherwise."""
    trainer = make(tmp_path, route, decay=None, save_steps=3, steps=3)
    trainer.train()
    expected = state(trainer)
    other = make(tmp_path / "other", route, decay=None)
    with torch.no_grad():
        for parameter in other.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert same(state(other), expected)
    file = "model.safetensors" if route == "full" else "adapter_model.safetensors"
    assert len(load_file(tmp_path / "checkpoint-3" / file)) > 8


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_best_model_is_kept_at_the_end(tmp_path, decay):
    trainer = make(
        tmp_path,
        decay=decay,
        learning_rate=0.5,
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in lines(tmp_path) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}") and best < STEPS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_no_other_name_is_found_late():
    with pytest.raises(AttributeError, match=r"comcat_hf.*no attribute 'Trainer'"):
        comcat_hf.Trainer  # noqa: B018


# Checkpoints


def test_a_checkpoint_that_was_not_finished_is_not_taken(tmp_path):
    trainer = make(tmp_path, save_steps=2, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    # A pickle with the token of the Hub in it.
    assert not list(tmp_path.rglob("training_args.bin"))
    last = tmp_path / "checkpoint-6"
    for name in ("rng_state.pth", "weight_average.safetensors", "model.safetensors"):
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=rf"{name}: expected the file that was written with this checkpoint"):
            make(tmp_path).train(resume_from_checkpoint=True)
        (last / name).write_bytes(content)
    (last / "training_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6.training_state.json: expected"):
        make(tmp_path).train(resume_from_checkpoint=str(last))
    resumed = make(tmp_path, save_steps=2, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert same(state(resumed), state(trainer))


def test_a_training_that_goes_back_leaves_the_other_behind(tmp_path):
    make(tmp_path, save_steps=2).train()
    again = make(tmp_path, save_steps=2, save_total_limit=2, steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


# Several processes


def train_together(output, size):
    trainer = make(output, dropout=0.0, per_device_train_batch_size=size)
    trainer.train()
    assert trainer.accelerator.num_processes == 8 // size
    if trainer.accelerator.is_main_process:
        torch.save(trainer.model.state_dict(), output / "weights.pt")


def test_two_processes_are_one_with_the_same_images(tmp_path):
    train_together(tmp_path / "1", 8)
    in_processes(train_together, tmp_path / "2", 4)
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    for ours, theirs in zip(lines(tmp_path / "2"), lines(tmp_path / "1"), strict=True):
        assert all(
            ours[k] == pytest.approx(theirs[k], abs=1e-4) for k in theirs if "second" not in k and "run" not in k
        )


# What goes wrong


class Unlabelled(Images):
    def __getitem__(self, index):
        return {"pixel_values": super().__getitem__(index)["pixel_values"]}


def test_bad_arguments_are_refused_by_name(tmp_path):
    model, teacher = student_and_teacher("full")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    cases = [
        ({"model": model}, r"teacher: expected the dense model, found None"),
        ({"model": model, "teacher": model}, r"teacher: expected the dense model, found the student itself"),
        ({"model": model, "teacher": teacher, "compute_loss_func": max}, r"compute_loss_func: expected None"),
        ({"model": None, "teacher": teacher}, r"model: expected a compressed model"),
        ({"model": dense_vit().requires_grad_(False), "teacher": teacher}, r"model: expected parameters to train"),
    ]
    for given, says in cases:
        with pytest.raises(InvalidValueError, match=says):
            DistillationTrainer(args=args, train_dataset=Images(), **given)
    trainer = DistillationTrainer(
        model=model, args=args, distillation=DistillationLoss(alpha=0), train_dataset=Unlabelled()
    )
    with pytest.raises(InvalidValueError, match="expected 'labels' beside the model's inputs"):
        trainer.train()


def test_losses_that_are_not_finite_end_a_training_that_logs_and_saves_nothing(tmp_path):
    class Spoiled(Images):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"pixel_values": torch.full((3, SIZE, SIZE), torch.inf)}

    trainer = make(tmp_path, decay=None, logging_steps=100, save_strategy="no", eval_strategy="no")
    trainer.train_dataset = Spoiled()
    with pytest.raises(ComCATError, match="loss of step 1 is not finite"):
        trainer.train()
