"""Classifiers whose weights, labels or image processors do not make a whole are refused, wherever they come in."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Images
from transformers import AutoModelForImageClassification, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import comcat_hf
from comcat_hf.app import load_pair
from comcat_hf.errors import CheckpointError, InvalidValueError
from comcat_hf.training.classify.data import open_splits
from comcat_hf.training.classify.evaluation_report import EvaluateSettings, evaluate_models
from comcat_hf.training.classify.models import load_classifier, load_teacher
from comcat_hf.training.classify.run import compress_vit
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.images import BrokenImageError
from tests.helpers import small_vit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier of five labels, its backbone, what `compress` makes of both, and images."""
    root = tmp_path_factory.mktemp("models")
    model = small_vit()[0]
    for name, module in (("dense", model), ("headless", model.vit)):
        module.save_pretrained(root / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / name)
    comcat_hf.compress(model, 0.4).save_pretrained(root / "small")
    comcat_hf.compress(model.vit, 0.4).save_pretrained(root / "small_headless")
    images = [Images.new("RGB", (32, 32), (number * 20, 0, 0)) for number in range(10)]
    table = {"image": images, "label": [number % 5 for number in range(10)]}
    Dataset.from_dict(table, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
        root / "images.parquet"
    )
    return root


def settings(folders, tmp_path, **changes):
    given = {"model_name_or_path": str(folders / "dense"), "train_file": str(folders / "images.parquet")}
    given |= {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "reduction": 0.4}
    given |= {"report_to": "none", "max_train_steps": 1, "calibration_samples": 4, "eval_steps": "none"}
    return CompressSettings(**(given | changes))


def changed(folders, tmp_path, **changes):
    """The dense classifier with another configuration."""
    folder = shutil.copytree(folders / "dense", tmp_path / "changed")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def named(*labels):
    return {"id2label": dict(labels), "label2id": {name: number for number, name in labels}}


LACKING = r"expected all weights of ViTForImageClassification, .*classifier\.bias \(found none\), classifier\.weight"


@pytest.mark.parametrize("name", ["headless", "small_headless"])
def test_a_head_that_is_missing_is_named(folders, name):
    with pytest.raises(CheckpointError, match=rf"^--teacher .*{name}: {LACKING}"):
        load_classifier(folders / name, "--teacher")


def test_a_head_of_another_size_is_named(folders, tmp_path):
    labels = named(*((number, f"class {number}") for number in range(3)))
    for name in ("dense", "small"):
        folder = shutil.copytree(folders / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | labels))
        with pytest.raises(CheckpointError, match=r"classifier\.weight of shape \(3, 48\) \(found \(5, 48\)\)"):
            load_classifier(folder, "--model_name_or_path")


def test_weights_of_another_model_are_named(folders, tmp_path):
    other = small_vit(num_hidden_layers=5)[0]
    folder = shutil.copytree(folders / "dense", tmp_path / "deeper")
    other.config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"vit\.encoder\.layer\.2.* and \d+ more|vit\.layers\.2.* and \d+ more"):
        load_classifier(folder, "--model_name_or_path")


def test_every_entry_refuses_a_model_without_a_head(folders, tmp_path):
    headless, dense, small = (str(folders / name) for name in ("headless", "dense", "small"))
    given = settings(folders, tmp_path)
    for entry in (
        lambda: compress_vit(replace(given, model_name_or_path=headless)),
        lambda: compress_vit(replace(given, teacher=headless)),
        lambda: evaluate_models(EvaluateSettings(headless, validation_file=given.train_file)),
        lambda: evaluate_models(EvaluateSettings(dense, dense=headless, validation_file=given.train_file)),
        lambda: load_pair(headless, small),
    ):
        with pytest.raises(CheckpointError, match=LACKING):
            entry()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([(1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "e")], "expected the numbers from 0 to 4 .*found 1, 2, 3, 4, 5"),
        ([(0, "a"), (1, "b"), (2, "c"), (3, "d"), (5, "e")], "expected the numbers from 0 to 4 .*found 0, 1, 2, 3, 5"),
    ],
)
def test_labels_that_are_not_numbered_from_0(folders, tmp_path, labels, says):
    folder = changed(folders, tmp_path, **named(*labels))
    given = settings(folders, tmp_path, model_name_or_path=str(folder))
    with pytest.raises(InvalidValueError, match=f"--model_name_or_path {folder}: {says}"):
        compress_vit(given)
    with pytest.raises(InvalidValueError, match=says):
        load_pair(str(folder), str(folders / "small"))


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_models_without_single_labels_are_refused_by_name(folders, tmp_path, kind):
    folder = changed(folders, tmp_path, problem_type=kind)
    says = f"expected a classifier that gives each image one of several labels .*found problem_type {kind}"
    given = settings(folders, tmp_path, model_name_or_path=str(folder))
    for entry in (
        lambda: compress_vit(given),
        lambda: load_teacher(settings(folders, tmp_path, teacher=str(folder)), small_vit()[0]),
        lambda: load_pair(str(folder), str(folders / "small")),
        lambda: evaluate_models(EvaluateSettings(str(folder), validation_file=given.train_file)),
    ):
        with pytest.raises(InvalidValueError, match=says):
            entry()
    # From the weights alone no label is read.
    alone = {"train_file": None, "weights_only": True, "strategy": "uniform", "stages": "allocate,initialize"}
    compress_vit(replace(given, **alone))
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "initial").config.problem_type == kind


def test_a_single_number_is_a_regression(folders, tmp_path):
    with pytest.raises(InvalidValueError, match="found problem_type regression with num_labels 1"):
        open_splits(settings(folders, tmp_path), ViTConfig(num_labels=1), 0)


def test_a_teacher_of_other_labels_is_refused(folders, tmp_path):
    own = small_vit()[0]
    given = settings(folders, tmp_path, teacher=str(folders / "dense"))
    assert not any(parameter.requires_grad for parameter in load_teacher(given, own).parameters())
    own.config.id2label = dict(enumerate(reversed(own.config.id2label.values())))
    with pytest.raises(InvalidValueError, match=r"--teacher .*in their order \(5: LABEL_4, .*found 5: LABEL_0"):
        load_teacher(given, own)
    with pytest.raises(InvalidValueError, match=r"in their order \(3: .*found 5"):
        load_teacher(given, small_vit(num_labels=3)[0])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("feature", "label"),
    [
        (List(Value("string")), ["a"]),
        (List(Value("int64")), [1]),
        ({"name": Value("string")}, {"name": "a"}),
        (Value("binary"), b"a"),
        (Value("float32"), 0.5),
        (Value("bool"), True),
        (Image(), Images.new("RGB", (2, 2))),
    ],
    ids=["texts", "numbers", "struct", "bytes", "float", "bool", "image"],
)
def test_label_columns_of_other_kinds(folders, tmp_path, feature, label, streaming):
    table = {"image": [Images.new("RGB", (2, 2))] * 2, "label": [label] * 2}
    rows = Dataset.from_dict(table, features=Features({"image": Image(), "label": feature}))
    rows.to_parquet(tmp_path / "odd.parquet")
    given = settings(folders, tmp_path, train_file=str(tmp_path / "odd.parquet"), streaming=streaming)
    with pytest.raises(InvalidValueError, match="expected class names or whole numbers in --label_column_name"):
        open_splits(given, small_vit()[0].config, 0)


def test_processors_and_models_of_other_inputs(folders, tmp_path):
    """One channel, or another size: in a run, in an evaluation and in the app."""
    grey = shutil.copytree(folders / "dense", tmp_path / "grey")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5]).save_pretrained(grey)
    large = shutil.copytree(folders / "dense", tmp_path / "large")
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(large)
    single = small_vit(num_channels=1)[0]
    single.save_pretrained(tmp_path / "single")
    shutil.copy(folders / "dense" / "preprocessor_config.json", tmp_path / "single")
    for folder, says in (
        (grey, "ViTImageProcessorPil: expected an image processor for images in RGB"),
        (large, r"large: expected a model that takes what ViTImageProcessorPil makes, images of \(3, 48, 48\)"),
        (tmp_path / "single", r"single: expected a model that takes .* images of \(3, 32, 32\)"),
    ):
        with pytest.raises(InvalidValueError, match=says):
            compress_vit(settings(folders, tmp_path, model_name_or_path=str(folder)))
        with pytest.raises(InvalidValueError, match=says):
            evaluate_models(EvaluateSettings(str(folder), validation_file=str(folders / "images.parquet")))
    image = Images.new("RGB", (9, 9))
    with pytest.raises(InvalidValueError, match="expected an image processor for images in RGB"):
        comcat_hf.app.classify(load_pair(str(grey), str(folders / "small")), image)
    with pytest.raises(BrokenImageError, match=r"^The image: expected an image"):
        comcat_hf.app.classify(load_pair(str(folders / "dense"), str(folders / "small")), str(grey / "config.json"))


def test_weights_are_read_as_they_are(folders):
    model = load_classifier(folders / "small", "--output_dir")
    again = AutoModelForImageClassification.from_pretrained(folders / "small").eval()
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(pixels).logits, again(pixels).logits)
