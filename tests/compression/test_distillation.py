"""The distillation loss against its formulas, and the fine-tuning loop."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import comcat_hf
from comcat_hf.compression.distillation import DistillationLoss, ask_teacher
from comcat_hf.compression.finetuning import finetune, parameter_groups
from comcat_hf.errors import ComCATError, InvalidValueError


CLASSES = 5


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu():
    """The first Accelerator of a process settles the device of all."""
    Accelerator(cpu=True)


def output(seed=0, batch=6, blocks=6, width=8, grad=False):
    """A model's output with `blocks` blocks: embeddings and one state per block."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, CLASSES, generator=generator).requires_grad_(grad)
    states = [torch.randn(batch, 4, width, generator=generator).requires_grad_(grad) for _ in range(blocks + 1)]
    return SimpleNamespace(logits=logits, hidden_states=tuple(states))


def small_vit(layers=3, dropout=0.0, width=32):
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        initializer_range=0.1,
        hidden_dropout_prob=dropout,
    )
    return ViTForImageClassification(config).eval()


def batches(count=3, size=8):
    """Images whose mean says their class, so that there is something to learn."""
    labels = torch.arange(count * size) % CLASSES
    images = 0.3 * torch.randn(count * size, 3, 8, 8) + (labels - 2.0).view(-1, 1, 1, 1)
    pairs = zip(images.split(size), labels.split(size), strict=True)
    return [{"pixel_values": x, "labels": y} for x, y in pairs]


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_what_its_formula_says(kind, temperature):
    student, teacher = output(0), output(1)
    loss = DistillationLoss(0.3, kind, temperature, alignment=2.0)
    parts = loss(student, teacher, LABELS, progress=0.25)

    log_p = student.logits.log_softmax(-1)
    task = -sum(log_p[i, label] for i, label in enumerate(LABELS)) / len(LABELS)
    if kind == "soft":
        p, q = (x.logits.div(temperature).softmax(-1) for x in (student, teacher))
        taught = temperature**2 * (q * (q.log() - p.log())).sum(-1).mean()
    else:
        taught = -sum(log_p[i, row.argmax()] for i, row in enumerate(teacher.logits)) / len(LABELS)
    # Blocks 1, 2, 5 and 6 of six; entry 0 is the embeddings.
    ends = [((student.hidden_states[i] - teacher.hidden_states[i]) ** 2).mean() for i in (1, 2, 5, 6)]
    alignment = sum(ends) / 4
    weight = 2.0 * 0.5 * (1 + math.cos(math.pi / 4))

    torch.testing.assert_close(parts.task, task)
    torch.testing.assert_close(parts.teacher, taught)
    torch.testing.assert_close(parts.alignment, alignment)
    torch.testing.assert_close(parts.total, 0.7 * task + 0.3 * taught + weight * alignment)


def test_the_alignment_fades_along_half_a_cosine():
    loss = DistillationLoss(alignment=3.0)
    shares = [loss.alignment_weight(progress) for progress in (-1, 0, 0.5, 1, 2)]
    assert shares == pytest.approx([3, 3, 1.5, 0, 0])


@pytest.mark.parametrize(("blocks", "aligned"), [(1, (1,)), (3, (1, 2, 3)), (4, (1, 2, 3, 4)), (5, (1, 2, 4, 5))])
def test_each_block_is_aligned_once_however_few_there_are(blocks, aligned):
    student, teacher = output(0, blocks=blocks), output(1, blocks=blocks)
    parts = DistillationLoss(alignment=1.0)(student, teacher, LABELS)
    expected = [F.mse_loss(student.hidden_states[i], teacher.hidden_states[i]) for i in aligned]
    torch.testing.assert_close(parts.alignment, torch.stack(expected).mean())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_only_the_student_gets_gradients(kind):
    student, teacher = output(0, grad=True), output(1, grad=True)
    parts = DistillationLoss(0.5, kind, alignment=1.0)(student, teacher, LABELS)
    parts.total.backward()
    assert student.logits.grad.abs().sum() > 0
    assert [i for i, state in enumerate(student.hidden_states) if state.grad is not None] == [1, 2, 5, 6]
    assert teacher.logits.grad is None
    assert all(state.grad is None for state in teacher.hidden_states)
    assert not any(part.requires_grad for part in (parts.task, parts.teacher, parts.alignment))


def test_a_student_equal_to_its_teacher_has_only_the_task_left():
    same = output(0)
    parts = DistillationLoss(0.5, temperature=2.0, alignment=1.0)(same, same, LABELS)
    torch.testing.assert_close(parts.total, 0.5 * F.cross_entropy(same.logits, LABELS))


def test_labels_may_be_probabilities():
    student, probabilities = output(0), F.one_hot(LABELS, CLASSES).float()
    loss = DistillationLoss(alpha=0)
    torch.testing.assert_close(loss(student, None, probabilities).total, loss(student, None, LABELS).total)


def test_without_a_teachers_share_no_teacher_is_needed():
    loss = DistillationLoss(alpha=0)
    assert not loss.needs_teacher
    parts = loss(output(0), None, LABELS)
    torch.testing.assert_close(parts.total, parts.task)
    with pytest.raises(InvalidValueError, match="needs the teacher's output, got None"):
        DistillationLoss()(output(0), None, LABELS)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": math.nan},
        {"kind": "medium"},
        {"temperature": 0},
        {"temperature": math.inf},
        {"alignment": -1},
        {"blocks": 0},
        {"blocks": True},
    ],
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(InvalidValueError, match=next(iter(settings))):
        DistillationLoss(**settings)


def test_outputs_that_do_not_fit_say_what_differs():
    loss = DistillationLoss(alignment=1.0)
    with pytest.raises(InvalidValueError, match="output_hidden_states=True"):
        loss(output(0), SimpleNamespace(logits=output(1).logits, hidden_states=None), LABELS)
    with pytest.raises(InvalidValueError, match="6 blocks and the teacher 4"):
        loss(output(0), output(1, blocks=4), LABELS)
    with pytest.raises(InvalidValueError, match="hidden states of block 0"):
        loss(output(0), output(1, width=4), LABELS)
    with pytest.raises(InvalidValueError, match="logits"):
        loss(output(0), SimpleNamespace(logits=torch.zeros(6, CLASSES + 1), hidden_states=None), LABELS)


def test_the_teacher_answers_in_eval_mode_and_keeps_its_own():
    teacher = small_vit(dropout=0.5)
    inputs = {"pixel_values": batches()[0]["pixel_values"]}
    expected = teacher(**inputs).logits
    teacher.train()
    teacher.classifier.eval()
    answer = ask_teacher(teacher, inputs)
    torch.testing.assert_close(answer.logits, expected)
    assert not answer.logits.requires_grad
    assert teacher.training and not teacher.classifier.training
    assert not torch.equal(teacher(**inputs).logits, expected)


def test_finetuning_brings_a_compressed_model_back_and_leaves_the_teacher():
    data = batches(6)
    teacher = small_vit()
    finetune(teacher, None, data, 8, 3e-3, loss=DistillationLoss(alpha=0), progress=False)
    student = comcat_hf.compress(teacher, reduction=0.5)
    before = copy.deepcopy(teacher.state_dict())
    told = []
    loss = DistillationLoss(alignment=1.0)
    history = finetune(student, teacher, data, 4, 2e-3, loss=loss, progress=False, on_epoch=lambda *a: told.append(a))

    assert [sorted(losses) for losses in history] == [["alignment", "task", "teacher", "total"]] * 4
    assert history[-1]["total"] < 0.7 * history[0]["total"]
    assert told == list(enumerate(history, start=1))
    assert not student.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_peft_student_learns_from_its_own_base():
    dense = small_vit()
    plan = comcat_hf.allocate_ranks(dense, 0.5)
    base = copy.deepcopy(dense)
    model = get_peft_model(dense, comcat_hf.ComCATConfig.from_plan(plan))
    data = batches()
    answer = ask_teacher(model, {"pixel_values": data[0]["pixel_values"]}, adapters=False)
    torch.testing.assert_close(answer.logits, base(data[0]["pixel_values"]).logits)

    first = finetune(copy.deepcopy(model), base, data, 2, 1e-3, progress=False)
    second = finetune(model, None, data, 2, 1e-3, progress=False)
    assert second == [pytest.approx(losses, rel=1e-5) for losses in first]
    assert second[-1]["total"] < second[0]["total"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("comcat_" in name for name in trained)


def test_gradients_accumulate_to_the_same_steps():
    halves = batches(2, size=4)
    whole = [{name: torch.cat([batch[name] for batch in halves]) for name in halves[0]}]
    model, loss = small_vit(), DistillationLoss(alpha=0)
    results = []
    for data, accumulated in ((whole, 1), (halves, 2), (halves, 1)):
        trained = copy.deepcopy(model)
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        accelerator = Accelerator(gradient_accumulation_steps=accumulated)
        finetune(trained, None, loader, 2, 1e-3, loss=loss, accelerator=accelerator, progress=False)
        results.append(trained(whole[0]["pixel_values"]).logits)
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)
    assert (results[2] - results[0]).abs().max() > 1e-2


def test_the_loss_is_told_how_much_of_the_training_is_done():
    class Recorder(DistillationLoss):
        def forward(self, student, teacher, labels, progress=0.0):
            told.append(progress)
            return super().forward(student, teacher, labels, progress)

    told = []
    finetune(small_vit(), None, batches(3, size=2), 2, 1e-3, loss=Recorder(alpha=0), progress=False)
    assert told == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine(monkeypatch):
    rates = []

    class Optimizer(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr("comcat_hf.compression.finetuning.AdamW", Optimizer)
    loss = DistillationLoss(alpha=0)
    finetune(small_vit(), None, batches(5, size=2), 2, 0.1, loss=loss, warmup=0.2, progress=False)
    falling = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.05, 0.1, *falling])


def test_only_matrices_decay():
    model = small_vit()
    model.classifier.weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim >= 2 for parameter in matrices["params"])
    assert all(parameter.ndim < 2 for parameter in vectors["params"])
    count = sum(len(group["params"]) for group in (matrices, vectors))
    assert count == len(list(model.parameters())) - 1


def test_bad_arguments_are_refused_before_training():
    student, teacher, data = small_vit(), small_vit(), batches()
    with pytest.raises(InvalidValueError, match="epochs"):
        finetune(student, teacher, data, 0, 1e-3)
    with pytest.raises(InvalidValueError, match="learning_rate"):
        finetune(student, teacher, data, 1, 0)
    with pytest.raises(InvalidValueError, match="length above 0"):
        finetune(student, teacher, iter(data), 1, 1e-3)
    with pytest.raises(InvalidValueError, match="no PEFT model that could be its own"):
        finetune(student, None, data, 1, 1e-3)
    pairs = [tuple(batch.values()) for batch in data]
    with pytest.raises(InvalidValueError, match=r"A batch must map 'labels'.* found a (list|tuple)"):
        finetune(student, teacher, pairs, 1, 1e-3, progress=False)
    with pytest.raises(InvalidValueError, match=r"found \['pixel_values'\]"):
        finetune(student, teacher, [{"pixel_values": data[0]["pixel_values"]}], 1, 1e-3, progress=False)
    with pytest.raises(InvalidValueError, match="no parameter to train"):
        finetune(student.requires_grad_(False), teacher, data, 1, 1e-3)


def test_a_loss_that_is_not_finite_stops_the_training():
    student, data = small_vit(), batches(1)
    data[0]["pixel_values"][0] = math.nan
    with pytest.raises(ComCATError, match="epoch 1 is not finite"):
        finetune(student, None, data, 1, 1e-3, loss=DistillationLoss(alpha=0), progress=False)
