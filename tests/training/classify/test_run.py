"""Whole compression runs: a small ViT on scikit-learn's digits, in the process and as the script."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Images
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import comcat_hf
from comcat_hf.compression.counting import count_parameters
from comcat_hf.configs import RankPlan
from comcat_hf.errors import BudgetError, CheckpointError, InvalidValueError
from comcat_hf.hub.upload import NOT_UPLOADED, files_to_upload
from comcat_hf.training.classify.run import CompressResult, compress_vit
from comcat_hf.training.classify.settings import CompressSettings, parse_compress_settings
from comcat_hf.training.locks import locked
from tests.helpers import randomize
from tests.processes import in_processes


ROOT = Path(__file__).resolve().parents[3]
TWO = ROOT / "scripts" / "accelerate" / "cpu.yaml"
STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ViT and the digits as parquet files."""
    folder = tmp_path_factory.mktemp("base")
    names = {i: str(i) for i in range(10)}
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.1,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    randomize(ViTForImageClassification(config)).save_pretrained(folder / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "vit")
    digits = load_digits()
    images = [Images.fromarray((image * 15).astype("uint8")).convert("RGB") for image in digits.images[:240]]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names.values()))})
    table = {"image": images, "label": digits.target[:240].tolist()}
    data = Dataset.from_dict(table, features=features)
    data.select(range(192)).to_parquet(folder / "train.parquet")
    data.select(range(192, 240)).to_parquet(folder / "validation.parquet")
    return folder


def flags(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "model_name_or_path": str(base / "vit"),
        "train_file": str(base / "train.parquet"),
        "validation_file": str(base / "validation.parquet"),
        "reduction": 0.4,
        # Measured pass by pass, so that there are places to interrupt it at.
        "strategy": "sensitivity",
        "rank_step": 2,
        "calibration_samples": 48,
        "calibration_batch_size": 16,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 20,
        "max_train_steps": STEPS,
        "checkpointing_steps": "4",
        "eval_steps": "none",
        "random_resized_crop_scale": 0.5,
        "ema_decay": 0.9,
        "seed": 1,
        "report_to": "none",
        "output_dir": str(output),
    }
    return given | changes


def run(base: Path, output: Path, **changes: Any) -> CompressResult:
    return compress_vit(CompressSettings(**flags(base, output, **changes)))


def command(base: Path, output: Path, *further: str, processes: int = 1, **changes: Any) -> list[str]:
    given = [f"--{name}={value}" for name, value in flags(base, output, **changes).items()]
    # As one would type it for a CPU; the file is for two processes.
    how = ["--cpu", "--num_processes=1"] if processes == 1 else ["--config_file", str(TWO)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *how]
    return [*launch, "-m", "comcat_hf.training.classify", *given, *further]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompressResult]:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run(base, folder)


@pytest.fixture(scope="module")
def swept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompressResult]:
    """A run that measures other reductions, and trains nothing."""
    folder = tmp_path_factory.mktemp("swept") / "out"
    stages = "calibrate,allocate,initialize,evaluate,export"
    return folder, run(base, folder, stages=stages, sweep="0.2, 0.6")


@pytest.mark.parametrize("mlp", [None, "rank"])
def test_a_dry_run_foretells_even_ranks(base, tmp_path, mlp):
    given = {"stages": "allocate,initialize,export", "strategy": "uniform", "mlp": mlp}
    foretold = run(base, tmp_path / "dry", dry_run=True, **given).plan
    assert foretold.plan.ranks == run(base, tmp_path / "out", **given).plan.plan.ranks


class TestASweep:
    def test_measures_what_a_run_of_that_reduction_measures(self, base, swept, tmp_path):
        folder, result = swept
        assert [point.reduction for point in result.sweep] == [0.2, 0.6]
        assert all(0 <= point.reached - point.reduction <= 0.005 for point in result.sweep)
        alone = run(base, tmp_path / "out", stages="calibrate,allocate,initialize,evaluate", reduction=0.6)
        assert result.sweep[1].top1 == alone.metrics["initial"]["top1"]
        assert result.sweep[1].top5 == alone.metrics["initial"]["top5"]
        written = json.loads((folder / "sweep_results.json").read_text())["points"]
        assert [point["top1"] for point in written] == [point.top1 for point in result.sweep]

    def test_leaves_the_runs_own_result_as_it_was(self, base, swept, tmp_path):
        folder, _ = swept
        run(base, tmp_path / "out", stages="calibrate,allocate,initialize,export")
        assert same(folder, tmp_path / "out")
        assert not (folder / ".sweep").exists()

    def test_stands_in_the_report(self, swept):
        folder, result = swept
        page = (folder / "report.html").read_text()
        for point in result.sweep:
            assert f"{point.reached:.2%}" in page
        assert "before fine-tuning" not in page

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"sweep": "0.3,x"}, "--sweep must be shares above 0 and below 1"),
            ({"sweep": "30"}, "--sweep must be shares above 0 and below 1"),
            ({"sweep": "0.3", "strategy": "search"}, "--sweep .* got --strategy search"),
            ({"sweep": "0.999"}, "out of reach"),
        ],
    )
    def test_that_cannot_be_measured_is_said(self, base, tmp_path, changes, says):
        with pytest.raises((InvalidValueError, BudgetError), match=says):
            run(base, tmp_path / "out", stages="calibrate,allocate,initialize,evaluate", **changes)


class TestWithoutImages:
    NONE: ClassVar = {"train_file": None, "validation_file": None, "weights_only": True, "strategy": "uniform"}

    def test_weights_alone_make_a_model_and_a_report(self, base, tmp_path):
        result = run(base, tmp_path / "out", stages="allocate,initialize,evaluate,export", **self.NONE)
        assert not result.metrics
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        dense = AutoModelForImageClassification.from_pretrained(base / "vit")
        expected = comcat_hf.compress(dense, plan=result.plan.plan).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert f"{count_parameters(model):,}" in (tmp_path / "out" / "report.html").read_text()

    @pytest.mark.parametrize(
        "changes", [{"weights_only": False}, {"strategy": "sensitivity"}, {"stages": "allocate,initialize,finetune"}]
    )
    def test_what_needs_images_asks_for_them(self, base, tmp_path, changes):
        given = {"stages": "allocate,initialize,export"} | self.NONE | changes
        with pytest.raises(InvalidValueError, match="Give one of --dataset_name, --train_file, --train_dir"):
            run(base, tmp_path / "out", **given)


class TestAWholeRun:
    def test_leaves_a_model_that_auto_model_opens(self, base, whole):
        folder, result = whole
        model = AutoModelForImageClassification.from_pretrained(folder)
        dense = AutoModelForImageClassification.from_pretrained(base / "vit")
        removed = 1 - count_parameters(model) / count_parameters(dense)
        assert 0.4 <= removed <= 0.405
        assert comcat_hf.plan_of(model).ranks == RankPlan.from_pretrained(folder).ranks == result.plan.plan.ranks
        AutoImageProcessor.from_pretrained(folder, backend="pil")
        assert not same(folder, folder / "initial")

    def test_says_what_it_measured(self, whole):
        folder, result = whole
        assert set(result.metrics) == {"dense", "initial", "final"}
        assert all(found["samples"] == 48 for found in result.metrics.values())
        assert json.loads((folder / "eval_results.json").read_text()) == result.metrics
        assert f"{result.metrics['final']['top1']:.2%}" in (folder / "README.md").read_text()

    def test_says_how_many_images_it_could_not_read(self, base, tmp_path):
        rows = Dataset.from_parquet(str(base / "validation.parquet")).cast_column("image", Image(decode=False))
        images = [{"bytes": b"damaged", "path": None}, *rows["image"][1:]]
        table = {"image": images, "label": rows["label"]}
        Dataset.from_dict(table, features=rows.features).to_parquet(tmp_path / "damaged.parquet")
        how = {"validation_file": str(tmp_path / "damaged.parquet"), "max_broken_images": 1, "strategy": "uniform"}
        found = run(base, tmp_path / "out", stages="allocate,initialize,evaluate", weights_only=True, **how).metrics
        assert [(one["broken"], one["samples"]) for one in found.values()] == [(1, 47)] * 3

    def test_leaves_a_report_and_a_picture_for_the_card(self, whole):
        folder, result = whole
        page = (folder / "report.html").read_text()
        dense, small = result.plan.parameters
        for text in (f"{dense:,}", f"{small:,}", f"{result.metrics['final']['top1']:.2%}", "classifier"):
            assert text in page
        # Sizes, accuracy against reduction, fine-tuning, ranks and spectra.
        assert page.count("data:image/svg+xml;base64,") == 5
        with Images.open(folder / "ranks.png") as picture:
            assert picture.format == "PNG"
        assert "](ranks.png)" in (folder / "README.md").read_text()

    def test_shows_images_whose_class_changed(self, base, tmp_path, caplog):
        data = Dataset.from_parquet(str(base / "validation.parquet"))
        processor = AutoImageProcessor.from_pretrained(base / "vit", backend="pil")
        given = processor(list(data["image"]), return_tensors="pt")
        dense = AutoModelForImageClassification.from_pretrained(base / "vit")
        with torch.no_grad():
            # Random weights give all images one class; this model tells them apart.
            dense.classifier.bias -= dense(**given).logits.mean(0)
        for saved in (dense, processor):
            saved.save_pretrained(tmp_path / "vit")
        how = {"stages": "calibrate,allocate,initialize,evaluate,export", "strategy": "uniform"}
        folder = tmp_path / "out"
        run(base, folder, model_name_or_path=str(tmp_path / "vit"), **how)
        small = AutoModelForImageClassification.from_pretrained(folder)
        dense, small = (model(**given).logits.argmax(-1).tolist() for model in (dense, small))
        changed = [i for i in range(48) if dense[i] != small[i]]
        page = (folder / "report.html").read_text()
        assert f"gives {len(changed)} of 48 images another class" in page and len(changed) > 3
        shown = re.findall(r'png;base64,([^"]+)" alt=""><figcaption>dense: (\d)\ncompressed: (\d)\nlabel: (\d)<', page)
        expected = [(str(dense[i]), str(small[i]), str(data["label"][i])) for i in changed[:12]]
        assert [tuple(classes) for _, *classes in shown] == expected
        for (png, *_), index in zip(shown, changed, strict=False):
            with Images.open(BytesIO(b64decode(png))) as image:
                assert image.tobytes() == data["image"][index].tobytes()
        # Images of a data set do not go onto the Hub unasked.
        uploaded = set(files_to_upload(folder, "user/made", None, NOT_UPLOADED))
        assert "report.html" not in uploaded and "report.html shows images" in caplog.text
        assert {"model.safetensors", "comcat_ranks.json", "README.md", "ranks.png"} <= uploaded

    def test_leaves_nothing_half_written(self, whole):
        assert [path.name for path in whole[0].rglob("*.tmp")] == []
        names = {path.name for path in whole[0].iterdir()}
        assert {"checkpoint-4", "checkpoint-8", "model.safetensors", "config.json", "comcat_ranks.json"} <= names

    def test_run_again_does_nothing_twice(self, base, whole):
        folder, result = whole
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        said: list[str] = []
        again = compress_vit(CompressSettings(**flags(base, folder)), report=said.append)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
        assert again.metrics == result.metrics
        assert sum("done before" in line for line in said) == 4

    def test_the_same_seed_gives_the_same_model(self, base, whole, tmp_path):
        run(base, tmp_path / "out")
        assert same(tmp_path / "out", whole[0])


class TestStages:
    def test_one_after_the_other(self, base, whole, tmp_path):
        for stages in ("calibrate", "allocate", "initialize", "evaluate", "finetune", "export"):
            # A stage that is not asked for is not asked which settings it had.
            result = run(base, tmp_path / "out", stages=stages, sweep="0.2")
        assert same(tmp_path / "out", whole[0])
        # What was measured before the fine-tuning is not the final model's.
        assert result.metrics == {} and "top-1" not in (tmp_path / "out" / "README.md").read_text()
        measured = run(base, tmp_path / "out", stages="evaluate", sweep="0.2")
        result = run(base, tmp_path / "out", stages="export")
        assert result.metrics == measured.metrics == whole[1].metrics and result.sweep == measured.sweep != ()
        assert "top-1" in (tmp_path / "out" / "README.md").read_text()
        (tmp_path / "out" / "eval_results.json").write_text('{"dense": {"top1": 1}}')
        with pytest.raises(CheckpointError, match=r"eval_results.json: expected .*Run the stage evaluate again"):
            run(base, tmp_path / "out", stages="export")

    def test_the_initial_model_is_refined_on_the_calibration_images(self, base, whole, tmp_path):
        settings = {"stages": "calibrate,allocate,initialize,export", "compensate": False}
        for steps in (0, 20):
            result = run(base, tmp_path / str(steps), refine_steps=steps, **settings)
            assert result.plan.plan == whole[1].plan.plan
        assert not same(tmp_path / "0", tmp_path / "20")
        assert re.search(r"Refined: +20 steps on 48 images, no labels", (tmp_path / "20" / "README.md").read_text())

    def test_rates_that_rise_are_refused_before_the_first_stage(self, base, tmp_path):
        with pytest.raises(InvalidValueError, match=r"--min_learning_rate must be at most --learning_rate 0\.001"):
            run(base, tmp_path / "out", learning_rate=1e-3, min_learning_rate=2e-3)
        assert not (tmp_path / "out" / "statistics").exists()

    def test_refinement_needs_images(self, base, tmp_path):
        with pytest.raises(InvalidValueError, match="--refine_steps trains the factors on images, got --weights_only"):
            run(base, tmp_path / "out", weights_only=True, refine_steps=2)

    def test_without_fine_tuning(self, base, whole, tmp_path):
        result = run(base, tmp_path / "out", stages="calibrate,allocate,initialize,evaluate,export")
        assert same(tmp_path / "out", whole[0] / "initial")
        assert result.metrics["final"] == result.metrics["initial"] == whole[1].metrics["initial"]

    def test_what_is_missing_is_named(self, base, tmp_path):
        with pytest.raises(CheckpointError, match=r"expected a rank plan of an earlier run.*Add allocate to --stages"):
            run(base, tmp_path / "out", stages="finetune")

    @pytest.mark.parametrize(
        ("stage", "changes"),
        [
            ("allocate", {"reduction": 0.3}),
            ("calibrate", {"calibration_batch_size": 8}),
            ("initialize", {"compensate": False}),
            ("initialize", {"refine_steps": 2}),
            ("finetune", {"label_smoothing": 0.1}),
            ("finetune", {"mixup_alpha": 0.8}),
            ("finetune", {"warmup_steps": 2}),
            ("finetune", {"adam_beta1": 0.8}),
            ("finetune", {"max_grad_norm": 2.0, "resume_from_checkpoint": "latest"}),
        ],
    )
    def test_other_settings_are_not_mixed(self, base, whole, stage, changes):
        name = next(iter(changes))
        asked = re.escape(f"asked for with {changes[name]}")
        with pytest.raises(InvalidValueError, match=rf"the stage {stage} was done with --{name} .* {asked}"):
            run(base, whole[0], **changes)

    def test_a_plan_that_was_edited_is_not_the_one_that_was_used(self, base, whole, tmp_path):
        given = {"reduction": None, "plan": str(tmp_path), "stages": "allocate,initialize"}
        plan = whole[1].plan.plan
        plan.save_pretrained(tmp_path)
        run(base, tmp_path / "out", **given)
        replace(plan, ranks=dict(list(plan.ranks.items())[1:])).save_pretrained(tmp_path)
        with pytest.raises(InvalidValueError, match="was done with another plan than --plan"):
            run(base, tmp_path / "out", **given)

    def test_nothing_is_left_to_train_with_other_settings(self, base, whole, tmp_path):
        """As after SIGKILL between the last checkpoint and the model."""
        shutil.copytree(whole[0], tmp_path / "out")
        (tmp_path / "out" / "comcat_stages.json").write_text(_without(whole[0] / "comcat_stages.json", "finetune"))
        resumed = {"resume_from_checkpoint": "latest"}
        with pytest.raises(InvalidValueError, match="expected a training with --warmup_steps 2, found one with 0"):
            run(base, tmp_path / "out", warmup_steps=2, **resumed)
        run(base, tmp_path / "out", **resumed)
        assert same(tmp_path / "out", whole[0])

    @pytest.mark.parametrize("flags", [{"warmup_steps": 500}, {"warmup_steps": 1, "warmup_ratio": 0.1}])
    def test_a_warmup_that_does_not_fit_is_said_first(self, base, tmp_path, flags):
        for how in ({}, {"dry_run": True}):
            with pytest.raises(InvalidValueError, match=r"warmup must end before|Give one of --warmup_steps"):
                run(base, tmp_path / "out", **flags, **how)
        assert not (tmp_path / "out" / "statistics").exists()

    def test_a_plan_that_is_given(self, base, whole, tmp_path):
        # As a plan edited by hand: what it says it reached is no longer true.
        replace(whole[1].plan.plan, reached=0.9).save_pretrained(tmp_path / "plan")
        settings = {"reduction": None, "plan": str(tmp_path / "plan"), "stages": "allocate,initialize,export"}
        result = run(base, tmp_path / "out", **settings)
        assert result.plan.plan == whole[1].plan.plan

    @pytest.mark.parametrize("changes", [{"strategy": "uniform"}, {"weights_only": True}, {"route": "peft"}])
    def test_other_ways(self, base, tmp_path, changes):
        result = run(base, tmp_path / "out", max_train_steps=3, **changes)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert comcat_hf.plan_of(model).ranks == result.plan.plan.ranks
        assert result.metrics["final"] != result.metrics["initial"]


class TestSearch:
    SEARCH = {"strategy": "search", "search_epochs": 2, "search_share": 0.25, "search_batch_size": 8}  # noqa: RUF012
    STAGES = "calibrate,allocate,initialize"

    def test_interrupted_and_resumed(self, base, tmp_path, monkeypatch):
        whole = run(base, tmp_path / "whole", stages=self.STAGES, **self.SEARCH)
        came = iter([None] * 7)
        stop = lambda *_: next(came, "SIGTERM")  # noqa: E731
        monkeypatch.setattr("comcat_hf.training.classify.stages.stopped_by", stop)
        cut = run(base, tmp_path / "cut", stages=self.STAGES, **self.SEARCH)
        assert cut.interrupted == "SIGTERM"
        assert (tmp_path / "cut" / "search_state.pt").is_file()
        assert not (tmp_path / "cut" / "initial").exists()
        monkeypatch.undo()
        with pytest.raises(InvalidValueError, match=r"begun with --distillation_alpha 0\.5, .* 0\.9"):
            run(base, tmp_path / "cut", stages=self.STAGES, **self.SEARCH, distillation_alpha=0.9)
        resumed = run(base, tmp_path / "cut", stages=self.STAGES, **self.SEARCH)
        assert resumed.plan.plan.ranks == whole.plan.plan.ranks
        assert resumed.plan.plan.strategy == "search"
        assert same(tmp_path / "cut" / "initial", tmp_path / "whole" / "initial")
        for name, value in {"distillation_type": "hard", "search_share": 0.5}.items():
            with pytest.raises(InvalidValueError, match=f"was done with --{name} "):
                run(base, tmp_path / "cut", stages=self.STAGES, **self.SEARCH | {name: value})

    def test_of_a_stream_is_refused(self, base, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be split"):
            run(base, tmp_path / "out", streaming=True, **self.SEARCH)


class TestFineTuningThatMakesItWorse:
    def test_is_said_with_the_place_of_the_model_before(self, base, tmp_path, caplog):
        """On labels that the dense model gives: with a rate that ruins what it knows, and one that does nothing."""
        dense = AutoModelForImageClassification.from_pretrained(base / "vit")
        processor = AutoImageProcessor.from_pretrained(base / "vit", backend="pil")
        data = Dataset.from_parquet(str(base / "validation.parquet"), cache_dir=str(tmp_path))
        given = processor(list(data["image"]), return_tensors="pt")
        labels = dense(**given).logits.argmax(-1).tolist()
        data.remove_columns("label").add_column("label", labels).to_parquet(tmp_path / "validation.parquet")
        for rate in (1.0, 1e-9):
            changes = {"learning_rate": rate, "min_learning_rate": 0.0, "max_train_steps": 3, "ema_decay": None}
            folder, data_file = tmp_path / str(rate), str(tmp_path / "validation.parquet")
            metrics = run(base, folder, validation_file=data_file, **changes).metrics
            before, after = (metrics[name]["top1"] for name in ("initial", "final"))
            said = f"top-1 {after:.2%}, before it {before:.2%}. The model before it is in {folder / 'initial'}"
            assert (after < before, said in caplog.text) == (rate == 1.0, rate == 1.0)


class TestAnUploadThatIsOff:
    def test_is_not_listed(self, base, tmp_path):
        given = flags(base, tmp_path / "out", dry_run=True)
        for on in (False, True):
            plan = compress_vit(CompressSettings(**given | {"push_to_hub": on})).plan
            listed = next(line for line in plan.describe().splitlines() if line.startswith("Stages:"))
            assert listed.endswith("export, push" if on else "export")
        with pytest.raises(InvalidValueError, match="--stages push needs --push_to_hub True, got False"):
            run(base, tmp_path / "out", stages="push")


class _Signals:
    """Sends a signal to this process at a forward pass of the whole model, some of them after a line of the report."""

    def __init__(self, line: str, passes: int, number: int) -> None:
        self.line, self.passes, self.number = line, passes, number
        self.after = 0
        self.heard = False

    def hear(self, line: str) -> None:
        self.heard = self.heard or line.startswith(self.line)

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        if self.heard and isinstance(module, ViTForImageClassification):
            self.passes -= 1
            self.after += self.passes < 0
            if self.passes == 0:
                os.kill(os.getpid(), self.number)


class TestSignals:
    """SIGTERM and Ctrl-C in every stage: each ends with that forward pass, and what was done is kept."""

    # After which line of the report, which forward pass, where the run has validation images, and what is done then.
    PLACES = (
        ("Stage calibrate: ", 2, {}, []),
        ("Stage allocate: ", 9, {}, ["calibrate"]),
        ("Stage initialize: ", 2, {}, ["calibrate", "allocate"]),
        ("Sweep: ", 2, {"sweep": "0.2"}, ["calibrate", "allocate", "initialize"]),
        ("Stage finetune: ", 3, {}, ["calibrate", "allocate", "initialize"]),
        ("Going on from ", 6, {"eval_steps": "3"}, ["calibrate", "allocate", "initialize"]),
        ("Going on from ", 1000, {}, ["calibrate", "allocate", "initialize", "finetune"]),
        ("Stage finetune: done", 4, {}, ["calibrate", "allocate", "initialize", "finetune"]),
    )

    def test_end_every_stage(self, base, whole, tmp_path):
        """One run, interrupted and started again until it is through, by the two signals in turns."""
        folder = tmp_path / "out"
        numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT))
        for (line, passes, changes, done), number in zip(self.PLACES, numbers, strict=False):
            signals = _Signals(line, passes, number)
            settings = CompressSettings(**flags(base, folder, resume_from_checkpoint="latest", **changes))
            hook = torch.nn.modules.module.register_module_forward_pre_hook(signals)
            try:
                result = compress_vit(settings, report=signals.hear)
            finally:
                hook.remove()
            if passes == 1000:
                assert result.interrupted is None
            else:
                assert (line, result.interrupted, signals.after) == (line, number.name, 0)
            record = folder / "comcat_stages.json"
            assert list(json.loads(record.read_text())["stages"] if record.is_file() else []) == done
            assert not list(folder.rglob(".*"))
        assert (folder / "checkpoint-3").is_dir()
        assert same(folder, whole[0])
        assert signal.getsignal(number) != signal.SIG_IGN

    def test_while_reading(self, base, tmp_path, monkeypatch):
        """Before there is a plan, and so without one."""

        def load(settings: CompressSettings) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

        monkeypatch.setattr("comcat_hf.training.classify.run.load_dense", load)
        result = run(base, tmp_path / "out")
        assert (result.interrupted, result.plan) == ("SIGTERM", None)
        assert not (tmp_path / "out").exists()


class TestTwoRunsInOneFolder:
    def test_the_second_is_refused_and_changes_nothing(self, base, tmp_path):
        folder = tmp_path / "out"
        with locked(folder, "output_dir"):
            before = sorted(folder.iterdir())
            for changes in ({}, {"overwrite_output_dir": True}, {"strategy": "search"}):
                with pytest.raises(InvalidValueError, match=rf"no other run writes to, found process {os.getpid()} "):
                    run(base, folder, **changes)
            assert run(base, folder, dry_run=True).plan is not None
            assert sorted(folder.iterdir()) == before


class TestDryRun:
    def test_writes_nothing(self, base, tmp_path):
        said: list[str] = []
        result = compress_vit(CompressSettings(**flags(base, tmp_path / "out", dry_run=True)), report=said.append)
        assert not (tmp_path / "out").exists()
        dense, small = result.plan.parameters
        assert 0.4 <= 1 - small / dense <= 0.405
        assert result.plan.steps.total == STEPS
        assert f"{dense:,} -> {small:,}" in said[0]

    def test_uses_a_plan_that_is_there(self, base, whole):
        result = run(base, whole[0], dry_run=True)
        assert result.plan.exact
        assert result.plan.plan.ranks == whole[1].plan.plan.ranks

    def test_takes_the_seed_of_an_earlier_run_else_42(self, base, whole, tmp_path):
        seeds = [run(base, folder, dry_run=True, seed=None).plan.seed for folder in (tmp_path, whole[0])]
        assert seeds == [42, 1]


@pytest.mark.processes
class TestProgram:
    """The program as launched processes: ended wherever it is, and gone on with in this one."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_killed_and_resumed(self, base, whole, tmp_path, number):
        folder = tmp_path / "out"
        process = subprocess.Popen(command(base, folder), stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and not (folder / "checkpoint-4" / "training_state.json").is_file():
            time.sleep(0.01)
        os.killpg(process.pid, number)
        # To the end of what all processes say, which may outlive their launcher.
        process.communicate()
        assert not (folder / "model.safetensors").exists()
        said: list[str] = []
        compress_vit(CompressSettings(**flags(base, folder, resume_from_checkpoint="latest")), report=said.append)
        assert any(line.startswith("Going on from ") for line in said) and same(folder, whole[0])

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_ends_in_a_stage_and_is_alone_in_its_folder(self, base, tmp_path, number):
        folder, slow = tmp_path / "out", {"calibration_batch_size": 1, "stages": "calibrate,allocate"}
        process = subprocess.Popen(
            command(base, folder, **slow), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        next(line for line in process.stderr if "Sensitivity" in line)
        with pytest.raises(InvalidValueError, match=rf"--output_dir {folder}: expected a folder that no other run"):
            run(base, folder, **slow)
        start = time.monotonic()
        os.killpg(process.pid, number)
        rest = process.stderr.read()
        process.wait()
        assert time.monotonic() - start < 30
        assert (f"Stopped by {number.name}" in rest) == (number != signal.SIGKILL)
        assert list(json.loads((folder / "comcat_stages.json").read_text())["stages"]) == ["calibrate"]
        # Also after SIGKILL the folder is free.
        assert run(base, folder, **slow).interrupted is None

    def test_two_processes_equal_one(self, base, tmp_path):
        plain = {"random_resized_crop_scale": 1.0, "horizontal_flip": 0.0, "logging_steps": 1, "ema_decay": 0.5}
        one, two = tmp_path / "one", tmp_path / "two"
        stages = {"stages": "allocate,initialize,finetune,evaluate", "strategy": "uniform", "weights_only": True}
        settings = {**plain, **stages, "model_name_or_path": str(_without_dropout(base, tmp_path))}
        run(base, one, **settings)
        arguments = command(base, two, processes=2, **settings | {"per_device_train_batch_size": 8})
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        losses = [_losses(folder) for folder in (one, two)]
        assert len(losses[0]) == STEPS
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        results = [json.loads((folder / "eval_results.json").read_text()) for folder in (one, two)]
        for name in ("dense", "initial", "final"):
            assert results[0][name]["samples"] == results[1][name]["samples"] == 48
            assert results[0][name]["top1"] == results[1][name]["top1"]

    def test_a_process_that_falls_behind_does_what_the_others_do(self, base, tmp_path):
        """One that reads the plan late finds the next stage finished by the main process."""
        few = {"stages": "allocate,initialize", "strategy": "uniform", "weights_only": True, "rank_step": 4}
        in_processes(_run_late, base, tmp_path / "out", few)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_user_error_is_the_last_line(self, base, tmp_path, processes):
        """Also behind what the launcher of one or two processes has to say."""
        arguments = command(base, tmp_path / "out", reduction=1.0, processes=processes)
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
        *before, last = done.stderr.splitlines()
        assert last == "error: --reduction must be a number from 0 to below 1, got 1.0." and last in before
        assert (done.returncode, "Traceback" in done.stderr) == (1, True)


def _run_late(base: Path, folder: Path, changes: dict[str, Any]) -> None:
    read = RankPlan.from_pretrained

    def late(*args: Any, **kwargs: Any) -> RankPlan:
        time.sleep(3 * int(os.environ["RANK"]))
        return read(*args, **kwargs)

    RankPlan.from_pretrained = late
    run(base, folder, **changes)


def _without(record: Path, stage: str) -> str:
    content = json.loads(record.read_text())
    del content["stages"][stage], content["digest"]
    return json.dumps(content)


def _without_dropout(base: Path, folder: Path) -> Path:
    model = AutoModelForImageClassification.from_pretrained(base / "vit")
    model.config.hidden_dropout_prob = 0.0
    model.save_pretrained(folder / "vit")
    AutoImageProcessor.from_pretrained(base / "vit", backend="pil").save_pretrained(folder / "vit")
    return folder / "vit"


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


class TestBadInput:
    def test_out_of_reach(self, base, tmp_path):
        with pytest.raises(BudgetError):
            run(base, tmp_path / "out", reduction=0.99)

    def test_a_stream_without_an_end(self, base, tmp_path):
        # A cache may know how many images a stream has.
        given = {"streaming": True, "dry_run": True, "cache_dir": str(tmp_path / "cache")}
        with pytest.raises(InvalidValueError, match="--streaming: expected --max_train_steps"):
            run(base, tmp_path / "out", max_train_steps=None, **given)
        plan = run(base, tmp_path / "out", **given).plan
        assert (plan.steps.total, plan.steps.epoch, plan.images) == (STEPS, STEPS, None)

    def test_checkpoints_of_an_earlier_run(self, base, tmp_path):
        (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
        with pytest.raises(InvalidValueError, match="expected no checkpoints, found checkpoint-3"):
            run(base, tmp_path / "out")

    def test_a_folder_that_cannot_be_written(self, base, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidValueError, match="expected a folder that can be written to"):
            run(base, tmp_path / "file" / "out")

    def test_no_such_model(self, base, tmp_path):
        with pytest.raises(CheckpointError, match=r"--model_name_or_path .*none: expected a folder or Hub id"):
            run(base, tmp_path / "out", model_name_or_path=str(tmp_path / "none"))

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ([], "--model_name_or_path is needed"),
            (["--model_name_or_path", "x"], "one of --reduction and --plan, got neither"),
            (["--model_name_or_path", "x", "--reduction", "0.5"], "--dataset_name, --train_file, --train_dir"),
            (["--model_name_or_path", "x", "--reduction", "1"], "--reduction must be a number from 0 to below 1"),
            (["--model_name_or_path", "x", "--reduction", "0.5", "--stages", "fly"], "--stages must be among"),
            (["--model_name_or_path", "x", "--eval_steps", "often"], "--eval_steps must be a whole number"),
        ],
    )
    def test_settings(self, arguments, reason):
        with pytest.raises(InvalidValueError, match=reason):
            parse_compress_settings(arguments).check()
