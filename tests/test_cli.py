"""The command line: help, errors without tracebacks, exit codes."""

import copy
import json
import re
import runpy
import subprocess
import sys
from textwrap import dedent

import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertForMaskedLM,
    Dinov2Backbone,
    Dinov2Config,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTModel,
    pipeline,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

import comcat_hf
from comcat_hf import ComCATConfig, RankPlan, cli
from comcat_hf.checks import make_document
from comcat_hf.cli import shell
from comcat_hf.demos import customize as demo_customize
from comcat_hf.errors import InvalidValueError
from comcat_hf.hub import write_json_atomic
from tests.customization.pipelines import tiny_unet
from tests.helpers import outputs, small_vit
from tests.original.test_vit import HEADS, release_files
from tests.training.classify.test_run import _without


def run(*arguments):
    return CliRunner().invoke(cli.app, arguments)


def plain(text):
    """Help as one line of words, without the frame."""
    return " ".join(text.replace("│", " ").split())


OF_BOTH = ("--output", "--seed", "--threads", "--no-progress")


@pytest.mark.parametrize(
    ("command", "options", "place"),
    [
        ("demo", ("--reduction", "--epochs", "--finetune-epochs", *OF_BOTH), "comcat_demo"),
        ("demo-customize", ("--steps", "--base-steps", "--samples", *OF_BOTH), "comcat_demo/customize"),
    ],
)
def test_help_names_commands_and_their_options(command, options, place):
    everything, own = run("--help"), run(command, "--help")
    assert everything.exit_code == own.exit_code == 0
    assert command in everything.stdout and "low-rank" in everything.stdout and command in run().output
    assert not [option for option in options if option not in own.stdout]
    assert place in plain(own.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reduction", "1.5"), "reduction must be a share between 0 and 1, got 1.5"),
        (("--reduction", "0.999"), "out of reach"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(tmp_path, arguments, message):
    result = run("demo", "--output", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("comcat demo: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert "Training" not in result.stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("mine")
    result = run("demo", "--output", str(tmp_path / "out"))
    assert (result.exit_code, "found a file" in result.stderr) == (1, True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("demo", ("--epochs 0", "--seed -1", "--threads 0", "--nonsense")),
        ("demo-customize", ("--steps 0", "--base-steps 1", "--samples 5", "--seed -1")),
    ],
)
def test_typer_refuses_what_the_options_do_not_allow(command, refused):
    for arguments in map(str.split, refused):
        result = run(command, *arguments)
        assert result.exit_code == 2 and arguments[0] in result.stderr


SECRET = "hf_aVeryLongSecretOfATest"


def test_a_token_in_the_place_of_a_name_is_not_repeated():
    words = (("push", "a", "b", SECRET), (SECRET,), ("ranks", SECRET), ("info", SECRET), ("push", SECRET, "a/b"))
    for result in (run(*arguments) for arguments in words):
        assert result.exit_code and "***" in result.stderr and SECRET not in result.output


def test_the_demo_of_customizing_is_run_with_its_options(tmp_path, monkeypatch):
    asked = []

    def refuse(output, settings, *, report, progress):
        asked.append((output, settings, progress))
        raise InvalidValueError("enough")

    monkeypatch.setattr(demo_customize, "run_customize_demo", refuse)
    options = ("--steps", "7", "--base-steps", "8", "--samples", "9", "--seed", "3", "--threads", "1", "--no-progress")
    result = run("demo-customize", "--output", str(tmp_path), *options)
    assert (result.exit_code, result.stderr) == (1, "comcat demo-customize: enough\n")
    wanted = demo_customize.CustomizeDemoSettings(steps=7, base_steps=8, samples=9, seed=3, threads=1)
    assert asked == [(tmp_path, wanted, False)]
    run("demo-customize")
    assert asked[1][1:] == (demo_customize.CustomizeDemoSettings(), True)


def test_a_new_command_is_added_by_decorator_and_guarded(monkeypatch):
    app = typer.Typer()
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(shell, "app", app)
    app.callback()(shell.commands)

    @shell.command(app)
    def fail(times: int = 1) -> None:
        """Fails."""
        raise InvalidValueError(f"{times} times")

    @shell.command(app)
    def crash() -> None:
        """A fault of ours, which is not hidden."""
        raise RuntimeError("a bug")

    result = run("fail", "--times", "3")
    assert (result.exit_code, result.stderr) == (1, "comcat fail: 3 times\n")
    assert isinstance(run("crash").exception, RuntimeError)


def test_columns_line_up():
    text = shell.table(("model", "n"), [("dense", "1,000"), ("a longer name", "7")])
    assert text.splitlines() == [
        "model              n",
        "-------------  -----",
        "dense          1,000",
        "a longer name      7",
    ]


@pytest.mark.parametrize("module", ["comcat_hf.cli", "comcat_cli"])
def test_the_module_runs_as_a_program(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "demo", "--reduction", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    said = "comcat demo: reduction must be a share between 0 and 1, got 2.0.\n"
    assert (ended.value.code, *capsys.readouterr()) == (1, "", said)


def program(*arguments):
    """`comcat` as a user starts it: which of torch and `compress` its process has in the end, and what it said."""
    code = (
        f"import sys, comcat_cli\nsys.argv = {['comcat', *arguments]!r}\ntry:\n    comcat_cli.main()\n"
        "finally:\n    print('torch' in sys.modules, hasattr(sys.modules['comcat_hf'], 'compress'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.processes
def test_what_needs_no_model_starts_without_torch(tmp_path):
    plan = save_plan(tmp_path / "plan")
    for arguments, says in (
        (["--help"], "low-rank"),
        (["--version"], f"comcat_hf {comcat_hf.__version__}\n"),
        (["compress", "--help"], "--reduction"),
        (["ranks", "show", plan], "qk 4, vo 6"),
        (["ranks", "compare", plan, plan], "same ranks"),
        (["info", plan], "kind: rank plan"),
        (["pull", plan, str(tmp_path / "copy")], "copy"),
    ):
        loaded, said = program(*arguments)
        assert (loaded, says in said) == ("False False", True), said


@pytest.mark.processes
def test_a_command_that_needs_models_registers_with_the_libraries(tmp_path):
    loaded, said = program("convert", "vit", str(tmp_path), str(tmp_path / "out"))
    assert loaded == "True True" and "comcat convert vit: " in said


def save_plan(folder, **ranks):
    sites = {"vit.layers.0.attention": {"qk": 4, "vo": 6}, "vit.layers.0.mlp": {"width": 24}, "classifier": 3}
    plan = RankPlan(ranks=sites | ranks, architecture="ViTForImageClassification", reached=0.5)
    plan.save_pretrained(folder)
    return str(folder)


def test_ranks_are_shown_and_compared(tmp_path):
    one = save_plan(tmp_path / "one")
    other = save_plan(tmp_path / "other", classifier=5)
    result = run("ranks", "show", one)
    assert result.exit_code == 0
    for words in ("ViTForImageClassification", "50.00%", "qk 4, vo 6", "width 24", "rank 3"):
        assert words in result.stdout
    result = run("ranks", "compare", one, other)
    assert "classifier  rank 3  rank 5" in result.stdout
    assert "1 of 3 sites differ" in result.stdout
    assert "same ranks for all 3" in run("ranks", "compare", one, one).stdout
    result = run("ranks", "show", str(tmp_path))
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert result.stderr.startswith("comcat ranks show: ")


def test_files_of_the_release_are_converted(tmp_path):
    release_files(tmp_path / "release")
    result = run("convert", "vit", str(tmp_path / "release"), str(tmp_path / "out"), "--heads", str(HEADS))
    assert result.exit_code == 0, result.output
    image = Image.effect_mandelbrot((48, 60), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    assert len(pipeline("image-classification", str(tmp_path / "out"))(image)) == 5
    # The release's own transforms: the shorter side to the size, its middle, the mean and deviation of ImageNet.
    found = AutoImageProcessor.from_pretrained(tmp_path / "out")(image, return_tensors="pt")["pixel_values"][0]
    size = found.shape[-1]
    resized = image.resize((size, size * 60 // 48), Image.Resampling.BICUBIC)
    top = (resized.height - size) // 2
    pixels = torch.tensor(np.asarray(resized.crop((0, top, size, top + size)))).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(found, (pixels - mean) / deviation)
    result = run("convert", "vit", str(tmp_path / "none"), str(tmp_path / "no"))
    assert result.exit_code == 1
    assert result.stderr.startswith("comcat convert vit: ")
    assert not (tmp_path / "no").exists()
    for place in ("release/ranks.txt", "release/ranks.txt/below"):
        result = run("convert", "vit", str(tmp_path / "release"), str(tmp_path / place), "--heads", str(HEADS))
        assert result.exit_code == 1
        assert "expected a folder to write to, found the file" in result.stderr
    result = run("convert", "adapter", str(tmp_path / "none.pt"), str(tmp_path / "no"), "--base", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("comcat convert adapter: ")


def test_a_compressed_model_is_exported(tmp_path):
    model, inputs = small_vit()
    small = comcat_hf.compress(model, 0.4)
    small.save_pretrained(tmp_path / "small")
    done = run("export", "torch", str(tmp_path / "small"), str(tmp_path / "out"), "--fp16")
    assert done.exit_code == 0, done.output
    said = re.search(r"out: torch, [\d.]+ KB, largest difference from the model (\S+) of", done.stdout)
    assert float(said[1]) < 1e-2
    snippet = dedent(done.stdout.partition("range.\n")[2])
    found = {}
    exec(snippet, found)
    logits = found["program"](pixel_values=inputs["pixel_values"].half()).logits
    torch.testing.assert_close(logits.float(), outputs(small, inputs)[0], rtol=0, atol=1e-2)
    done = run("export", "onnx", str(tmp_path / "small"), str(tmp_path / "out"))
    assert done.exit_code == 1 and "comcat export onnx: " in done.stderr and "expected an empty folder" in done.stderr


def test_pull_copies_a_folder_and_push_says_what_is_missing(tmp_path):
    save_plan(tmp_path / "plan")
    result = run("pull", str(tmp_path / "plan"), str(tmp_path / "copy"))
    assert result.exit_code == 0
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [
        path.name for path in (tmp_path / "plan").iterdir()
    ]
    result = run("push", str(tmp_path / "plan"), "user/repo")
    assert result.exit_code == 1
    assert "comcat push: user/repo: expected to upload 1 files, but" in result.stderr


def test_info_says_what_a_folder_holds(tmp_path):
    vit, _ = small_vit()
    small = comcat_hf.compress(vit, 0.4)
    small.save_pretrained(tmp_path / "model")
    result = run("info", str(tmp_path / "model"))
    assert result.exit_code == 0, result.output
    for words in (
        f"parameters: {small.num_parameters():,}\n",
        "kind: compressed model",
        "ViTForImageClassification",
        "of the params of the model",
        "model.safetensors",
    ):
        assert words in result.stdout
    assert "kind: rank plan" in run("info", save_plan(tmp_path / "plan")).stdout
    get_peft_model(copy.deepcopy(vit), ComCATConfig(qk_rank=4, vo_rank=5)).save_pretrained(tmp_path / "adapter")
    result = run("info", str(tmp_path / "adapter"))
    assert "kind: adapter, mode compress" in result.stdout
    assert "qk_rank 4, vo_rank 5" in result.stdout
    unet = tiny_unet(attention_head_dim=4, use_linear_projection=False)
    unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, core=True, gains=True))
    comcat_hf.save_comcat_weights({"unet": unet}, tmp_path / "pipeline")
    result = run("info", str(tmp_path / "pipeline"))
    assert "kind: pipeline adapter" in result.stdout
    assert "part unet: qk_rank 2, core, gains" in result.stdout


def test_info_refuses_what_is_not_ours_by_name(tmp_path):
    get_peft_model(small_vit()[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    result = run("info", str(tmp_path / "lora"))
    assert result.exit_code == 1
    assert "found an adapter of PEFT of the method LORA; load it with PeftModel.from_pretrained" in result.stderr
    (tmp_path / "empty").mkdir()
    assert "found none of these" in run("info", str(tmp_path / "empty")).stderr
    (tmp_path / "empty" / "comcat_ranks.json").write_text("[1")
    assert "comcat_ranks.json: expected JSON, found" in run("info", str(tmp_path / "empty")).stderr


def test_info_reads_nothing_outside_of_the_folder(tmp_path):
    for folder in ("outside", "in"):
        write_json_atomic(tmp_path / folder / "adapter_config.json", {"qk_rank": 31415926})
    for name in ("../outside", "/etc", "unet/x"):
        index = {"base_model_name_or_path": None, "revision": None, "parts": {name: {}}}
        write_json_atomic(tmp_path / "in" / "comcat_adapter.json", make_document("comcat_adapter", 1, index))
        result = run("info", str(tmp_path / "in"))
        assert result.exit_code == 1
        assert "expected 'parts' by their names" in result.stderr and "31415926" not in result.output


def test_info_counts_parameters_and_names_a_file_that_it_cannot_read(tmp_path):
    plan = save_plan(tmp_path / "plan")
    assert "parameters" not in run("info", plan).stdout
    (tmp_path / "plan" / "model.safetensors").write_bytes(b"x")
    assert "parameters: unknown, as model.safetensors cannot be read" in run("info", plan).stdout


def test_a_plan_is_drawn_by_what_lies_beside_it_or_by_a_base(tmp_path):
    vit, _ = small_vit()
    vit.save_pretrained(tmp_path / "dense")
    small = comcat_hf.compress(vit, 0.4)
    small.save_pretrained(tmp_path / "small")
    result = run("ranks", "plot", str(tmp_path / "small"), str(tmp_path / "beside.png"))
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "beside.png"))
    with Image.open(tmp_path / "beside.png") as image:
        assert image.format == "PNG"
    file = str(tmp_path / "small" / "comcat_ranks.json")
    comcat_hf.plan_of(small).save_pretrained(tmp_path / "plan")
    assert run("ranks", "plot", file, str(tmp_path / "file.svg")).exit_code == 0
    given = ("--base", str(tmp_path / "dense"))
    assert run("ranks", "plot", str(tmp_path / "plan"), str(tmp_path / "base.svg"), *given).exit_code == 0
    assert (tmp_path / "base.svg").read_bytes() == (tmp_path / "file.svg").read_bytes()
    result = run("ranks", "plot", file, str(tmp_path / "ranks.pdf"))
    assert result.exit_code == 1
    assert "expected a file name that ends in .png or .svg" in result.stderr


@pytest.fixture
def digits_vit(tmp_path):
    """A small classifier with its image processor, and a folder of images by class for each split."""
    vit, _ = small_vit(image_size=8, patch_size=4, num_labels=2, id2label={0: "dark", 1: "light"})
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    for split, count in (("train", 24), ("validation", 6)):
        for label, level in (("dark", 30), ("light", 220)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (level + number, level, level)).save(folder / f"{number}.png")
    return tmp_path


def test_a_classifier_is_compressed_measured_and_reported(digits_vit):
    out = digits_vit / "out"
    options = ("--reduction", "0.4", "--data", str(digits_vit / "data"), "--samples", "16", "--sweep", "0.2")
    result = run("compress", str(digits_vit / "vit"), str(out), *options, "--refine", "3")
    assert result.exit_code == 0, result.output
    assert "Stage initialize: factors, then 3 steps without labels." in result.stdout
    assert "top-1" in result.stdout
    assert re.search(r"Sweep: 2\d\.\d\d% removed, top-1 \d+\.\d\d%, top-5 100\.00%\.\n", result.stdout)
    assert f"Report: {out / 'report.html'}" in result.stdout
    shown = Image.new("RGB", (8, 8), (30, 30, 30))
    assert {found["label"] for found in pipeline("image-classification", str(out))(shown)} == {"dark", "light"}
    assert "kind: compressed model" in run("info", str(out)).stdout
    again = run(
        "compress", str(digits_vit / "vit"), str(out), "--reduction", "0.3", "--data", str(digits_vit / "data")
    )
    assert again.exit_code == 1
    assert "another OUT, or --overwrite" in again.stderr


def test_a_classifier_in_the_plain_layout_is_an_ordinary_model(digits_vit):
    out = digits_vit / "out"
    options = ("--reduction", "0.4", "--layout", "plain", "--data", str(digits_vit / "data"), "--samples", "16")
    result = run("compress", str(digits_vit / "vit"), str(out), *options, "--epochs", "0.3", "--sweep", "0.3")
    assert result.exit_code == 0, result.output
    assert "import comcat_hf" not in result.stdout and "layout plain" in (out / "README.md").read_text()
    assert "loads without comcat_hf" in (out / "README.md").read_text()
    assert "comcat" not in (out / "config.json").read_text()
    config = json.loads((out / "config.json").read_text())
    plan = comcat_hf.RankPlan.from_pretrained(out)
    assert plan.layout == "plain" and plan.ranks["vit.layers.1.mlp"] == {"width": config["intermediate_size"]}
    refused = run("compress", str(digits_vit / "vit"), str(digits_vit / "no"), *options, "--strategy", "search")
    assert "--layout plain makes a model without low-rank factors, got --strategy search" in refused.stderr


def test_the_same_command_goes_on_with_a_fine_tuning(digits_vit):
    out = digits_vit / "out"
    command = ["compress", str(digits_vit / "vit"), str(out), "--reduction", "0.4", "--data", str(digits_vit / "data")]
    command += ["--samples", "16", "--epochs", "2"]
    assert run(*command).exit_code == 0
    weights = (out / "model.safetensors").read_bytes()
    # As after SIGKILL between the last checkpoint and the model.
    (out / "comcat_stages.json").write_text(_without(out / "comcat_stages.json", "finetune"))
    assert list(out.glob("checkpoint-*"))
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors").read_bytes() == weights
    assert run(*command[:4], "0.3", *command[5:], "--overwrite").exit_code == 0


def test_a_model_that_takes_the_place_of_another_keeps_none_of_its_files(tmp_path):
    KINDS["text"]().save_pretrained(tmp_path / "dense")
    where = [*map(str, (tmp_path / "dense", tmp_path / "small")), "--reduction", "0.3"]
    assert run("compress", *where).exit_code == 0
    (tmp_path / "small" / "mine.json").write_text("{}")
    (tmp_path / "small" / "model.safetensors.index.json").write_text("{}")
    assert run("compress", *where, "--layout", "plain", "--overwrite").exit_code == 0
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names >= {"mine.json", "model.safetensors"}
    assert not names & {"comcat_ranks.json", "model.safetensors.index.json"}
    assert BertForMaskedLM.from_pretrained(tmp_path / "small").config.intermediate_size < 3072
    ignored = run("compress", *where, "--overwrite", "--samples", "9")
    assert ignored.exit_code == 1 and "--samples: expected an image classifier" in ignored.stderr


def test_a_text_model_in_the_plain_layout_loses_hidden_units(tmp_path):
    KINDS["text"]().save_pretrained(tmp_path / "dense")
    where = [*map(str, (tmp_path / "dense", tmp_path / "small")), "--reduction", "0.3", "--layout", "plain"]
    result = run("compress", *where)
    assert result.exit_code == 0, result.output
    assert "import comcat_hf" not in result.stdout
    assert BertForMaskedLM.from_pretrained(tmp_path / "small").config.intermediate_size < 3072


def test_a_budget_may_be_of_latency(digits_vit):
    assert "latency" in plain(run("compress", "--help").stdout)
    asked = ("--reduction", "0.99", "--metric", "latency")
    result = run("compress", str(digits_vit / "vit"), str(digits_vit / "out"), *asked)
    assert "latency is out of reach: " in result.stderr


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
KINDS = {
    "encoder": lambda: ViTModel(ViTConfig(**VISION)),
    "backbone": lambda: Dinov2Backbone(Dinov2Config(**VISION)),
    "masked images": lambda: ViTForMaskedImageModeling(ViTConfig(**VISION)),
    "text": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "two towers": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "unet": lambda: tiny_unet(attention_head_dim=4, use_linear_projection=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_any_kind_are_compressed(tmp_path, kind):
    dense = KINDS[kind]()
    subfolder = ("--subfolder", "unet") if kind == "unet" else ()
    dense.save_pretrained(tmp_path / "dense" / "/".join(subfolder[1:]))
    where = [*map(str, (tmp_path / "dense", tmp_path / "small")), "--scope", "attention", *subfolder]
    where += ["--reduction", "0.2"]
    result = run("compress", *where)
    assert result.exit_code == 0, result.output
    small = type(dense).from_pretrained(tmp_path / "small")
    assert 0.2 <= comcat_hf.plan_of(small).reached <= 0.205
    assert f"compressed  {comcat_hf.count_parameters(small):,}" in re.sub(" +", "  ", result.stdout)
    assert f"{type(dense).__name__}.from_pretrained" in result.stdout
    assert "`dense` compressed with ComCAT" in (tmp_path / "small" / "README.md").read_text()
    assert "expected a folder without a model" in run("compress", *where).stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--reduction", "0.4", "--data", "x"], "--data: expected an image classifier, found BertForMaskedLM"),
        (["--reduction", "0.4", "--refine", "3"], "--refine: expected an image classifier, found BertForMaskedLM"),
        (["--reduction", "0.4", "--strategy", "sensitivity"], "--strategy sensitivity: expected an image classifier"),
        ([], "Give one of --reduction and --plan, got neither"),
    ],
)
def test_what_needs_images_is_refused_for_other_kinds(tmp_path, options, says):
    KINDS["text"]().save_pretrained(tmp_path / "dense")
    result = run("compress", str(tmp_path / "dense"), str(tmp_path / "small"), *options)
    assert (result.exit_code, says in result.stderr, (tmp_path / "small").exists()) == (1, True, False)


def test_a_pipeline_is_compressed_by_its_parts(tmp_path):
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_json_atomic(tmp_path / "model_index.json", {"_class_name": "X", **index, "safety_checker": [None, None]})
    result = run("compress", str(tmp_path), str(tmp_path / "out"), "--reduction", "0.4")
    assert result.stderr.endswith("Give one of its parts with --subfolder: unet.\n")


def test_the_modules_that_are_meant_are_compressed(digits_vit):
    chosen = ("--reduction", "0.2", "--target-modules", "layers.0,layers.1", "--exclude-modules", "layers.0.attention")
    model = str(digits_vit / "vit")
    images = ("--data", str(digits_vit / "data"), "--samples", "16", "--sweep", "0.1")
    for out, further in ((digits_vit / "out", images), (digits_vit / "without", ())):
        result = run("compress", model, str(out), *chosen, *further)
        assert result.exit_code == 0, result.output
        plan = comcat_hf.RankPlan.from_pretrained(out)
        assert plan.target_modules == ["layers.0", "layers.1"]
        assert plan.ranks and not {"classifier", "vit.layers.0.attention"} & set(plan.ranks)
    result = run("compress", model, str(out), "--plan", str(out), *chosen[2:])
    assert "--plan names its modules: leave out --target-modules and --exclude-modules" in result.stderr
    wrong = ("--reduction", "0.2", "--target-modules", "tower")
    assert "target_modules: 'tower' names no module" in run("compress", model, str(digits_vit / "no"), *wrong).stderr


def test_weights_alone_will_do_and_errors_speak_of_this_commands_options(digits_vit):
    result = run("compress", str(digits_vit / "vit"), str(digits_vit / "out"), "--reduction", "0.4")
    assert result.exit_code == 0, result.output
    assert (digits_vit / "out" / "report.html").is_file()
    none = str(digits_vit / "none")
    result = run("compress", str(digits_vit / "vit"), str(digits_vit / "no"), "--reduction", "0.4", "--data", none)
    assert result.exit_code == 1
    assert f"comcat compress: --data {none}: expected a data set" in result.stderr
    result = run("compress", none, str(digits_vit / "no"), "--reduction", "0.4")
    assert f"comcat compress: MODEL {none}: expected a folder or Hub id" in result.stderr
    assert "Give one of --reduction and --plan" in run("compress", none, str(digits_vit / "no")).stderr
    result = run("compress", str(digits_vit / "vit"), str(digits_vit / "no"), "--reduction", "0.4", "--refine", "3")
    assert "--refine: expected images to train the factors on, found none. Give --data" in result.stderr
