"""The command line: help, errors without tracebacks, exit codes."""

import copy
import subprocess
import sys

import pytest
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, pipeline
from typer.testing import CliRunner

import comcat_hf
from comcat_hf import ComCATConfig, RankPlan, cli
from comcat_hf.cli import demo as demo_commands
from comcat_hf.cli import shell
from comcat_hf.errors import InvalidValueError
from tests.customization.pipelines import tiny_unet
from tests.original.test_vit import HEADS, release_files


def run(*arguments):
    return CliRunner().invoke(cli.app, arguments)


def plain(text):
    """Help as one line of words, without the frame."""
    return " ".join(text.replace("│", " ").split())


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.stdout
    assert "low-rank" in result.stdout
    assert "demo" in run().output


def test_the_demos_help_names_its_options():
    result = run("demo", "--help")
    assert result.exit_code == 0
    for option in ("--output", "--reduction", "--epochs", "--finetune-epochs", "--seed", "--threads", "--no-progress"):
        assert option in result.stdout
    assert "comcat_demo" in plain(result.stdout)


def test_the_help_of_the_demo_of_customizing_names_its_options():
    assert "demo-customize" in run("--help").stdout
    result = run("demo-customize", "--help")
    assert result.exit_code == 0
    for option in ("--output", "--steps", "--base-steps", "--samples", "--seed", "--threads", "--no-progress"):
        assert option in result.stdout
    assert "comcat_demo/customize" in plain(result.stdout)


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


def test_an_output_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    result = run("demo", "--output", str(file))
    assert result.exit_code == 1
    assert "found a file" in result.stderr
    assert file.read_text() == "mine"


@pytest.mark.parametrize("arguments", [("--epochs", "0"), ("--seed", "-1"), ("--threads", "0"), ("--nonsense",)])
def test_typer_refuses_what_the_options_do_not_allow(arguments):
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--base-steps", "1"), ("--samples", "5"), ("--seed", "-1")])
def test_typer_refuses_what_the_demo_of_customizing_does_not_allow(arguments):
    result = run("demo-customize", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_the_demo_of_customizing_is_run_with_its_options(tmp_path, monkeypatch):
    asked = []

    def refuse(output, settings, *, report, progress):
        asked.append((output, settings, progress))
        raise InvalidValueError("enough")

    monkeypatch.setattr(demo_commands, "run_customize_demo", refuse)
    options = ("--steps", "7", "--base-steps", "8", "--samples", "9", "--seed", "3", "--threads", "1", "--no-progress")
    result = run("demo-customize", "--output", str(tmp_path), *options)
    assert (result.exit_code, result.stderr) == (1, "comcat demo-customize: enough\n")
    wanted = demo_commands.CustomizeDemoSettings(steps=7, base_steps=8, samples=9, seed=3, threads=1)
    assert asked == [(tmp_path, wanted, False)]
    run("demo-customize")
    assert asked[1][1:] == (demo_commands.CustomizeDemoSettings(), True)


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


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "comcat_hf.cli", "demo", "--reduction", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "comcat demo: reduction must be a share between 0 and 1, got 2.0.\n"
    assert done.stdout == ""


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
    image = Image.new("RGB", (20, 30))
    assert len(pipeline("image-classification", str(tmp_path / "out"))(image)) == 5
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
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    comcat_hf.compress(vit, 0.4).save_pretrained(tmp_path / "model")
    result = run("info", str(tmp_path / "model"))
    assert result.exit_code == 0, result.output
    for words in (
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
    unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, core=True))
    comcat_hf.save_comcat_weights({"unet": unet}, tmp_path / "pipeline")
    result = run("info", str(tmp_path / "pipeline"))
    assert "kind: pipeline adapter" in result.stdout
    assert "part unet: qk_rank 2, core" in result.stdout


def test_info_refuses_what_is_not_ours_by_name(tmp_path):
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    get_peft_model(vit, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    result = run("info", str(tmp_path / "lora"))
    assert result.exit_code == 1
    assert "found an adapter of the method LORA" in result.stderr
    (tmp_path / "empty").mkdir()
    assert "found a model or folder of another kind" in run("info", str(tmp_path / "empty")).stderr
