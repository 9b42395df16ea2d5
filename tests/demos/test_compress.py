"""The demo as a user runs it, with few epochs, and its parts."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner

import comcat_hf
from comcat_hf import cli
from comcat_hf.compression.counting import count_macs, count_parameters
from comcat_hf.compression.distillation import DistillationLoss
from comcat_hf.compression.finetuning import finetune
from comcat_hf.demos import compress as demo
from comcat_hf.errors import ComCATError, InvalidValueError


pytestmark = pytest.mark.processes
TRAINED = ("Dense", "Compressed", "Dense, further")
ROWS = ("dense", "dense, trained further", "weights only", "with images", "fine-tuned")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What one run of the command printed, and its folder; it leaves the global state as it was."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads, digits = torch.get_num_threads(), demo.load_digits()
    few = replace(digits, train_images=digits.train_images[:256], train_labels=digits.train_labels[:256])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_digits", lambda: few)
        patch.setattr(demo, "DemoSettings", partial(demo.DemoSettings, repeats=3))
        done = CliRunner().invoke(
            cli.app, ["demo", "--output", str(folder), "--epochs", "1", "--finetune-epochs", "1"]
        )
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    return done, folder


def test_it_ends_well_and_prints_one_table(finished):
    done, folder = finished
    assert done.exit_code == 0, done.output
    assert "\nLoading the saved model in a new process\n" in done.stdout
    lines = done.stdout.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("model ")))
    assert lines[table].split() == ["model", "accuracy", "parameters", "MACs", "latency"]
    assert tuple(line[:24].strip() for line in lines[table + 2 : table + 7]) == ROWS
    assert "bit for bit the same logits" in done.stdout
    assert f'pipeline("image-classification", "{folder}/compressed")("{folder}/digit.png")' in done.stdout


def test_bars_are_the_only_noise(finished):
    done, _ = finished
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert {bar.split(":")[0] for bar in bars} == {*TRAINED, "Statistics", "Curvature", "Compressing"}


def test_the_files_are_there(finished):
    _, folder = finished
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert files == {
        *(f"dense/{name}" for name in model),
        *(f"compressed/{name}" for name in model | {"comcat_ranks.json"}),
        *("digit.png", "held_out.safetensors", "ranks.png", "results.json"),
    }
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_numbers_are_those_of_the_saved_models(finished):
    _, folder = finished
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert tuple(rows) == ROWS
    held_out = load_file(folder / "held_out.safetensors")
    assert len(held_out["labels"]) == 599
    for name, row in (("dense", "dense"), ("compressed", "fine-tuned")):
        model = AutoModelForImageClassification.from_pretrained(folder / name)
        with torch.inference_mode():
            right = model(held_out["pixel_values"]).logits.argmax(-1) == held_out["labels"]
        assert rows[row]["accuracy"] == pytest.approx(right.double().mean().item(), abs=2e-3)
        assert rows[row]["parameters"] == count_parameters(model)
        assert rows[row]["macs"] == count_macs(model)
    assert all(row["latency"] > 0 for row in rows.values())
    removed = 1 - rows["fine-tuned"]["parameters"] / rows["dense"]["parameters"]
    assert 0.5 <= removed <= 0.505
    assert comcat_hf.plan_of(model).reduction == 0.5


def test_the_saved_model_works_in_a_pipeline_on_an_image(finished):
    _, folder = finished
    answers = pipeline("image-classification", str(folder / "compressed"))(str(folder / "digit.png"))
    held_out = load_file(folder / "held_out.safetensors")
    scores = held_out["logits"][0].softmax(-1)
    assert answers[0]["label"] == str(scores.argmax().item())
    assert answers[0]["score"] == pytest.approx(scores.max().item(), abs=1e-4)


def test_the_processor_gives_what_the_model_was_trained_on(finished):
    from PIL import Image

    _, folder = finished
    processor = AutoImageProcessor.from_pretrained(folder / "compressed")
    pixels = processor(Image.open(folder / "digit.png"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, demo.load_digits().held_images[:1])


def test_the_split_is_fixed_stratified_and_disjoint():
    one, two = demo.load_digits(), demo.load_digits()
    assert torch.equal(one.held_images, two.held_images)
    assert one.train_images.shape == (1198, 3, 8, 8) and one.held_images.shape == (599, 3, 8, 8)
    assert one.train_images.min() == -1 and one.train_images.max() == 1
    shares = [torch.bincount(labels) / len(labels) for labels in (one.train_labels, one.held_labels)]
    torch.testing.assert_close(*shares, atol=2e-3, rtol=0)
    train = {image.numpy().tobytes() for image in one.train_images}
    assert not any(image.numpy().tobytes() in train for image in one.held_images)


def test_images_are_shifted_by_a_pixel_at_most():
    image = torch.arange(2 * 16).view(1, 2, 4, 4).float()
    shifted = demo.shift(image.repeat(400, 1, 1, 1))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)[0]
    windows = {(y, x): padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)}
    counts = {move: sum(torch.equal(window, got) for got in shifted) for move, window in windows.items()}
    assert sum(counts.values()) == 400 and min(counts.values()) > 0
    assert 180 <= counts[1, 1] <= 270


def test_a_reload_that_differs_fails_loudly(tmp_path):
    data = demo.load_digits()
    settings = demo.DemoSettings(width=16, layers=1)
    dense = demo.build_vit(settings).eval()
    small = comcat_hf.compress(dense, reduction=0.3)
    small.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        small.classifier.bias[3] += 1e-6
    with pytest.raises(ComCATError, match=r"model: loading it in a new process failed: .* differ by up to"):
        demo.check_reload(small, tmp_path / "model", data, tmp_path / "held_out.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [{"reduction": 0}, {"reduction": 1}, {"epochs": 0}, {"repeats": 0}, {"threads": 0}, {"layers": 0}, {"width": 40}],
)
def test_settings_out_of_range_are_named(tmp_path, wrong):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        demo.run_demo(tmp_path, demo.DemoSettings(**wrong))


@pytest.mark.parametrize("taught", [False, True])
def test_it_trains_as_the_plain_loop_to_the_bit(taught):
    """The figures in the README and in the benchmarks were measured with the loop."""
    data = demo.load_digits()
    few = replace(data, train_images=data.train_images[:200], train_labels=data.train_labels[:200])
    torch.manual_seed(0)
    settings = demo.DemoSettings(width=16, layers=2)
    teacher = demo.build_vit(settings).eval() if taught else None
    model = demo.build_vit(settings)
    plain, state = copy.deepcopy(model), torch.get_rng_state()
    demo.train_classifier(model, teacher, few, 3, 2e-3)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    loss = DistillationLoss(0.5, temperature=2.0, alignment=1.0) if taught else DistillationLoss(alpha=0)
    finetune(plain, teacher, demo._loader(few), 3, 2e-3, loss=loss, accelerator=Accelerator(cpu=True), progress=False)
    assert torch.equal(torch.get_rng_state(), drawn) and not model.training
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
