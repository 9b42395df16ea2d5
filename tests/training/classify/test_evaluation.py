"""Accuracy by hand and by many processes, the metric for `evaluate`, and the program that evaluates."""

import io
import json
import os
import random
import sys

import numpy
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import comcat_hf
from comcat_hf.errors import CheckpointError, InvalidValueError
from comcat_hf.metrics import TOP_ACCURACY
from comcat_hf.training.classify.evaluate import main
from comcat_hf.training.classify.evaluation import evaluate_classifier
from comcat_hf.training.classify.evaluation_report import EvaluateSettings, evaluate_models, parse_evaluate_settings
from tests.helpers import randomize, small_deit_distilled, small_vit
from tests.processes import in_processes


CLASSES = ("red", "green", "blue", "grey", "white", "black", "pink")


def cpu():
    return Accelerator(cpu=True)


def batches(sizes=(4, 4, 3), classes=5, invalid=()):
    """Batches of random images; `invalid` are rows, counted through, that do not count."""
    generator = torch.Generator().manual_seed(3)
    made, row = [], 0
    for size in sizes:
        made.append(
            {
                "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
                "labels": torch.randint(classes, (size,), generator=generator),
                "valid": torch.tensor([row + i not in invalid for i in range(size)]),
            }
        )
        row += size
    return made


def by_hand(model, given):
    """Labels and logits of the rows that count."""
    with torch.no_grad():
        logits = torch.cat([model(batch["pixel_values"]).logits for batch in given])
    counts = torch.cat([batch["valid"] for batch in given])
    return torch.cat([batch["labels"] for batch in given])[counts], logits[counts]


# evaluate_classifier


def test_counts_are_those_by_hand():
    model, _ = small_vit(num_labels=12)
    given = batches(sizes=(16, 16, 7), classes=12, invalid=(2, 17, 38))
    found = evaluate_classifier(model, given, cpu())
    labels, logits = by_hand(model, given)
    first = (logits.argmax(dim=-1) == labels).double().mean().item()
    better = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert found["samples"] == 36 and found["broken"] == 0
    assert found["top1"] == pytest.approx(first, abs=1e-12)
    assert found["top5"] == pytest.approx((better < 5).double().mean().item(), abs=1e-12)
    assert 0 < found["top1"] < found["top5"] < 1
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_rows_that_do_not_count_change_nothing():
    model, _ = small_vit()
    given = batches(invalid=(1, 10))
    before = evaluate_classifier(model, given, cpu())
    given[0]["labels"][1], given[2]["labels"][2] = 99, -1
    given[0]["pixel_values"][1] = 7
    assert evaluate_classifier(model, given, cpu()) == before


def test_without_marks_every_row_counts():
    model, _ = small_vit()
    given = batches()
    plain = [{name: value for name, value in batch.items() if name != "valid"} for batch in given]
    assert evaluate_classifier(model, plain, cpu()) == evaluate_classifier(model, given, cpu())


@pytest.mark.parametrize("classes", [2, 4])
def test_top_five_is_of_all_classes_where_there_are_fewer(classes):
    model, _ = small_vit(num_labels=classes)
    found = evaluate_classifier(model, batches(classes=classes), cpu())
    assert found["top5"] == 1 and found["top1"] < 1


def test_the_model_is_left_in_its_mode_and_dropout_is_off():
    model, _ = small_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = evaluate_classifier(model, batches(), cpu())
    model.train()
    model.classifier.eval()
    assert evaluate_classifier(model, batches(), cpu()) == expected
    modes = {name: module.training for name, module in model.named_modules()}
    assert not modes.pop("classifier") and all(modes.values())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_two_heads_and_a_half_model():
    distilled, _ = small_deit_distilled()
    labels, logits = by_hand(distilled, batches())
    found = evaluate_classifier(distilled, batches(), cpu())
    assert found["top1"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    half, _ = small_vit()
    close = evaluate_classifier(half, batches(), cpu())["loss"]
    assert evaluate_classifier(half.bfloat16(), batches(), cpu())["loss"] == pytest.approx(close, rel=0.05)


def test_generators_are_left_alone():
    model, _ = small_vit()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    evaluate_classifier(model, batches(), cpu(), progress="Evaluating")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_images_that_could_not_be_read_are_counted():
    class Broken:
        count = 4

    def reading():
        for batch in batches(invalid=(0, 5)):
            Broken.count += 1
            yield batch

    model, _ = small_vit()
    found = evaluate_classifier(model, reading(), cpu(), broken=Broken)
    assert (found["samples"], found["broken"]) == (9, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "expected images, found none"),
        (batches(invalid=range(11)), "expected images, found none"),
        (batches(classes=60), "labels from 0 to 4, the model's classes"),
        ([batch | {"labels": batch["labels"] - 1} for batch in batches(classes=2)], "found -1"),
    ],
    ids=["no batch", "none counts", "too large", "negative"],
)
def test_what_cannot_be_evaluated_is_said(given, said):
    model, _ = small_vit()
    with pytest.raises(InvalidValueError, match=said):
        evaluate_classifier(model, given, cpu())


# The metric


def load_and_count(home):
    """In a process that has neither loaded `evaluate` nor a cache."""
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate"]:
        del sys.modules[name]
    os.environ["HF_HOME"] = str(home)
    import evaluate

    label, expected = ((0, {"top1": 0.5, "top5": 0.75}), (6, {"top1": 0.25, "top5": 0.5}))[int(os.environ["RANK"])]
    for _ in range(3):
        metric = evaluate.load(TOP_ACCURACY)
        metric.add_batch(predictions=[[1, 2, 3, 4, 5, 6], [2, 1, 0, 4, 5, 6]], references=[1, 6])
        metric.add_batch(predictions=[[0, 2, 3, 4, 5, 6]] * 2, references=[5, label])
        assert metric.compute() == expected


def test_evaluate_loads_the_metric_offline_in_processes_side_by_side(tmp_path):
    in_processes(load_and_count, tmp_path)
    assert list(tmp_path.iterdir())


# The script


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A dense and a compressed classifier with image processors, and images as parquet, three of them broken."""
    folder = tmp_path_factory.mktemp("evaluation")
    names = dict(enumerate(CLASSES))
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    torch.manual_seed(0)
    dense = randomize(ViTForImageClassification(config)).eval()
    small = comcat_hf.compress(dense, reduction=0.4)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    for name, model in {"dense": dense, "small": small}.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_images(folder / "images.parquet", 43, broken=())
    write_images(folder / "broken.parquet", 43, broken=(1, 20, 42))
    return folder


def write_images(path, count, broken):
    """Images of 40 x 36 random pixels; labels by name."""
    noise = numpy.random.default_rng(0)
    rows = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (36, 40, 3), dtype="uint8")).save(file, "PNG")
        content = file.getvalue() if number not in broken else file.getvalue()[:60]
        rows.append({"image": {"bytes": content, "path": None}, "label": CLASSES[number % len(CLASSES)]})
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")})
    data = Dataset.from_list(rows, features=plain)
    kinds = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=list(CLASSES))})
    data.cast(kinds).to_parquet(path)


def flags(case, **changes):
    given = {
        "model_name_or_path": case / "small",
        "validation_file": case / "images.parquet",
        "per_device_eval_batch_size": 8,
        "throughput_seconds": 0,
    }
    return [f"--{name}={value}" for name, value in (given | changes).items() if value is not None]


def run_program(*arguments):
    sys.argv = ["program", *arguments]
    assert main() == 0


def test_a_compressed_model_beside_its_dense_one(case, tmp_path):
    file = tmp_path / "made" / "figures.json"
    settings = parse_evaluate_settings(
        flags(
            case,
            dense=case / "dense",
            throughput_seconds=0.01,
            batch_sizes="1,3",
            dtypes="float32,bfloat16",
            output=file,
        )
    )
    report = evaluate_models(settings, accelerator=cpu())
    model, dense = report.models["model"], report.models["dense"]
    assert model["samples"] == dense["samples"] == 43 and model["broken"] == 0
    assert model["parameters"] <= 0.6 * dense["parameters"] and model["macs"] < dense["macs"]
    assert model["loss"] != dense["loss"]
    assert [(row["batch_size"], row["dtype"]) for row in report.throughput] == [
        (1, "float32"),
        (3, "float32"),
        (1, "bfloat16"),
        (3, "bfloat16"),
    ]
    assert all(row["images_per_second"]["model"] > 0 and row["faster"] > 0 for row in report.throughput)
    assert json.loads(file.read_text()) == json.loads(json.dumps(report.to_dict()))
    lines = report.describe().splitlines()
    assert lines[0].split() == ["model", "dense", "dense", "/", "model"]
    assert any(line.startswith("images/s, batch 3, bfloat16") and "times faster" in line for line in lines)
    assert f"{dense['parameters']:,}" in report.describe()


def test_one_and_two_processes_count_the_same(case, tmp_path, capfd):
    """43 images in batches of 8: with two processes the last rows are filled up."""
    given = {"validation_file": case / "broken.parquet", "max_broken_images": 3, "output": tmp_path / "two.json"}
    in_processes(run_program, *flags(case, **given))
    assert capfd.readouterr().out.count("top-1") == 1
    two = json.loads((tmp_path / "two.json").read_text())["models"]["model"]
    alone = parse_evaluate_settings(flags(case, **(given | {"output": None})))
    one = dict(evaluate_models(alone, accelerator=cpu()).models["model"])
    assert one["samples"] == 40 and one["broken"] == 3
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert one == two


def test_bad_input_ends_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", *flags(case, validation_file=tmp_path / "nothing.parquet")])
    assert main() == 2
    out, said = capsys.readouterr()
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "nothing.parquet" in line and "expected a data set" in line and "Traceback" not in out + said


BAD = {
    "no model": ({"model_name_or_path": None}, "--model_name_or_path is needed"),
    "no data": ({"validation_file": None}, "Give one of --dataset_name"),
    "two sources": ({"validation_dir": "x"}, "Give one of --dataset_name"),
    "batch": ({"batch_sizes": "1,0"}, "--batch_sizes must be whole numbers from 1"),
    "no batch": ({"batch_sizes": ","}, "--batch_sizes must be whole numbers from 1"),
    "dtype": ({"dtypes": "float32,int8"}, "--dtypes must be among float32, bfloat16, float16"),
    "seconds": ({"throughput_seconds": -1}, "--throughput_seconds must be a number from 0"),
    "samples": ({"max_eval_samples": 0}, "--max_eval_samples must be a whole number from 1"),
    "unknown": ({"batch_size": 4}, "unrecognized arguments: --batch_size .did you mean batch_sizes"),
    "output": ({"output": "/"}, "--output /: expected a file, found a folder"),
    "column": ({"image_column_name": "img"}, "--image_column_name 'img'"),
    "too many broken": ({"validation_file": "broken.parquet"}, "3 images cannot be read|images cannot be read"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_said(case, changes, said):
    changes = {name: case / value if value == "broken.parquet" else value for name, value in changes.items()}
    with pytest.raises(InvalidValueError, match=said):
        evaluate_models(parse_evaluate_settings(flags(case, **changes)), accelerator=cpu())


def test_models_that_cannot_be_read_are_said(case, tmp_path):
    for flag in ("model_name_or_path", "dense"):
        with pytest.raises(CheckpointError, match=f"--{flag} {tmp_path}"):
            evaluate_models(parse_evaluate_settings(flags(case, **{flag: tmp_path})), accelerator=cpu())


def test_an_output_that_cannot_be_written_is_said(case, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidValueError, match="expected a file that can be written"):
        evaluate_models(
            parse_evaluate_settings(flags(case, output=tmp_path / "file" / "figures.json")), accelerator=cpu()
        )


def test_data_settings_are_those_of_the_training(case):
    settings = EvaluateSettings(model_name_or_path="small", model_revision="v1", dense="dense", validation_dir="x")
    assert settings.data().model_revision == "v1" and settings.data().validation_dir == "x"
    other = settings.data("dense")
    assert (other.model_name_or_path, other.model_revision, other.stage_names) == ("dense", None, ("evaluate",))
