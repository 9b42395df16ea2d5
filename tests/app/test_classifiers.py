"""Two classifiers on one image: their answers are the models' own, and what is missing is said."""

import copy
import shutil

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import comcat_hf
from comcat_hf.app import classify, load_pair
from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError


@pytest.fixture(scope="module")
def pair(classifiers):
    return load_pair(str(classifiers["dense"]), str(classifiers["compressed"]))


def test_answers_are_those_of_the_models(pair, classifiers, image):
    answers = classify(pair, image, repeats=3)
    for answer, folder in zip(answers, classifiers.values(), strict=True):
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(image.convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**inputs).logits[0].softmax(-1)
        names = ("crane (0)", "cat", "dog", "crane (3)", "newt")
        assert dict(answer.labels) == dict(zip(names, probabilities.tolist(), strict=True))
        assert [p for _, p in answer.labels] == probabilities.sort(descending=True).values.tolist()
        assert 0 < answer.latency < 5


def test_sizes_are_counted(pair):
    for side in (pair.dense, pair.compressed):
        assert side.parameters == comcat_hf.count_parameters(side.model)
        assert side.macs == comcat_hf.count_macs(side.model)
    assert 0.55 < pair.compressed.parameters / pair.dense.parameters <= 0.6


def test_what_cannot_be_counted_is_left_out(pair, classifiers, monkeypatch):
    def refuse(model):
        raise InvalidValueError("unknown attention")

    monkeypatch.setattr("comcat_hf.app.classifiers.count_macs", refuse)
    assert load_pair(str(classifiers["dense"]), str(classifiers["compressed"])).dense.macs is None


def test_the_base_is_read_from_the_compressed_model(classifiers, tmp_path, monkeypatch):
    dense = AutoModelForImageClassification.from_pretrained(classifiers["dense"])
    # A folder of this machine is not written down.
    comcat_hf.compress(dense, 0.4).save_pretrained(tmp_path / "orphan")
    dense.name_or_path = "user/dense"
    comcat_hf.compress(dense, 0.4).save_pretrained(tmp_path / "small")
    # What the Hub would give.
    shutil.copytree(classifiers["dense"], tmp_path / "user" / "dense")
    monkeypatch.chdir(tmp_path)
    pair = load_pair("", str(tmp_path / "small"))
    assert pair.dense.source == "user/dense"
    # No image processor of its own either.
    assert pair.compressed.processor is pair.dense.processor
    with pytest.raises(InvalidValueError, match="give the dense model too"):
        load_pair("", str(tmp_path / "orphan"))
    with pytest.raises(InvalidValueError, match="expected the name of its base in the compressed model, found none"):
        load_pair("", str(classifiers["dense"]))


def test_models_that_do_not_load(classifiers, base, tmp_path):
    dense, compressed = map(str, classifiers.values())
    with pytest.raises(
        CheckpointError, match=r"compressed model .*expected a folder or Hub id of an image classifier"
    ):
        load_pair(dense, str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"dense model .*image classifier"):
        load_pair(str(base), compressed)
    with pytest.raises(InvalidValueError, match="of the compressed model, found nothing"):
        load_pair(dense, " ")
    for kind in ("dense", "compressed"):
        damaged = tmp_path / f"damaged_{kind}"
        shutil.copytree(classifiers[kind], damaged)
        weights = damaged / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(CheckpointError, match="whole safetensors file"):
            load_pair(str(damaged) if kind == "dense" else dense, str(damaged) if kind == "compressed" else compressed)
    for kind, folder in classifiers.items():
        shutil.copytree(folder, tmp_path / kind, ignore=shutil.ignore_patterns("preprocessor_config.json"))
    with pytest.raises(CheckpointError, match="expected an image processor"):
        load_pair(str(tmp_path / "dense"), str(tmp_path / "compressed"))


def test_what_is_missing_is_said(pair, image):
    with pytest.raises(InvalidValueError, match="load them first"):
        classify(None, image)
    with pytest.raises(InvalidValueError, match="found none; drop one"):
        classify(pair, None)
    for repeats in (0, 201, 1.5, None):
        with pytest.raises(InvalidValueError, match="repeats: expected a whole number"):
            classify(pair, image, repeats)


def test_an_image_processor_of_another_size_is_said(classifiers, image, tmp_path):
    shutil.copytree(classifiers["compressed"], tmp_path / "small")
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "small")
    pair = load_pair(str(classifiers["dense"]), str(tmp_path / "small"))
    with pytest.raises(ComCATError, match=r"small: expected a model that takes what its image processor makes"):
        classify(pair, image)


def test_a_copy_is_the_pair_itself(pair):
    assert copy.deepcopy(pair) is pair


def test_an_elastic_model_is_opened_and_resized(classifiers, elastic, image):
    pair = load_pair("", str(elastic))
    assert (pair.dense.source, pair.compressed.source, pair.reduction) == (str(elastic), str(elastic), 0.4)
    smaller = pair.with_reduction(0.6)
    small = comcat_hf.Elastic.from_pretrained(elastic, reduction=0.6).model.eval()
    pixels = pair.dense.processor(image.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(smaller.compressed.model(**pixels).logits, small(**pixels).logits)
    assert smaller.compressed.parameters == comcat_hf.count_parameters(small) < pair.compressed.parameters
    assert smaller.dense is pair.dense and classify(smaller, image, repeats=1)[0] != classify(smaller, image)[1]
    with pytest.raises(InvalidValueError, match=r"a share from 0.2 to 0.6"):
        pair.with_reduction(0.9)
    with pytest.raises(InvalidValueError, match="expected an elastic model, found one of a fixed size"):
        load_pair(str(classifiers["dense"]), str(classifiers["compressed"])).with_reduction(0.5)


def test_a_model_in_the_plain_layout_is_opened(classifiers, image, tmp_path):
    dense = AutoModelForImageClassification.from_pretrained(classifiers["dense"])
    comcat_hf.compress(dense, 0.4, layout="plain").save_pretrained(tmp_path / "plain")
    with pytest.raises(InvalidValueError, match="give the dense model too"):
        load_pair("", str(tmp_path / "plain"))
    (tmp_path / "plain" / "README.md").write_text(f"---\nbase_model: {classifiers['dense']}\n---\n")
    pair = load_pair("", str(tmp_path / "plain"))
    assert pair.dense.source == str(classifiers["dense"]) and pair.compressed.parameters < pair.dense.parameters
    assert all(answer.latency > 0 for answer in classify(pair, image, repeats=1))
