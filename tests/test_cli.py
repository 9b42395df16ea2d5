"""The command line: help, errors without tracebacks, exit codes."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from comcat_hf import cli
from comcat_hf.errors import InvalidValueError


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

    monkeypatch.setattr(cli, "run_customize_demo", refuse)
    options = ("--steps", "7", "--base-steps", "8", "--samples", "9", "--seed", "3", "--threads", "1", "--no-progress")
    result = run("demo-customize", "--output", str(tmp_path), *options)
    assert (result.exit_code, result.stderr) == (1, "comcat demo-customize: enough\n")
    wanted = cli.CustomizeDemoSettings(steps=7, base_steps=8, samples=9, seed=3, threads=1)
    assert asked == [(tmp_path, wanted, False)]
    run("demo-customize")
    assert asked[1][1:] == (cli.CustomizeDemoSettings(), True)


def test_a_new_command_is_added_by_decorator_and_guarded(monkeypatch):
    monkeypatch.setattr(cli, "app", typer.Typer())
    cli.app.callback()(cli.commands)

    @cli.command
    def fail(times: int = 1) -> None:
        """Fails."""
        raise InvalidValueError(f"{times} times")

    @cli.command
    def crash() -> None:
        """A fault of ours, which is not hidden."""
        raise RuntimeError("a bug")

    result = run("fail", "--times", "3")
    assert (result.exit_code, result.stderr) == (1, "comcat fail: 3 times\n")
    assert isinstance(run("crash").exception, RuntimeError)


def test_columns_line_up():
    text = cli.table(("model", "n"), [("dense", "1,000"), ("a longer name", "7")])
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
