"""The programs of training, as modules and as scripts: one line for an error, its exit code, and who speaks."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import are_progress_bars_disabled, enable_progress_bars

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.programs import ending, run_program


SCRIPTS = Path(__file__).parents[2] / "scripts"
PROGRAMS = {
    "comcat_hf.training.classify": "compress_vit",
    "comcat_hf.training.classify.evaluate": "evaluate_vit",
    "comcat_hf.training.dreambooth": "customize_diffusion",
}

# Imports modules of the package without torch, as the program `comcat` does.
LIGHT = "import sys; from importlib.util import *; sys.modules['comcat_hf'] = module_from_spec(find_spec('comcat_hf'))"


@pytest.fixture
def start(monkeypatch, capsys):
    """Starts a program: its exit code, and what it wrote to standard output and error."""

    def run(place, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        # A script may have imported it as a module.
        monkeypatch.delitem(sys.modules, f"{place}.__main__", raising=False)
        with pytest.raises(SystemExit) as caught:
            if place.endswith(".py"):
                runpy.run_path(place, run_name="__main__")
            else:
                runpy.run_module(place, run_name="__main__", alter_sys=True)
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("module", "script"), PROGRAMS.items())
def test_module_and_script_are_one_program(module, script, start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for place in (module, str(SCRIPTS / f"{script}.py")):
        code, out, said = start(place, "--fly")
        assert (code, out) == (2, "")
        assert said.startswith("error: The command line cannot be read: ") and said.count("\n") == 1


def test_the_error_line_holds_no_token(start, tmp_path):
    code, _, said = start("comcat_hf.training.classify", str(tmp_path / "hf_aVeryLongSecretOfATest"))
    assert code == 2 and "hf_aVeryLong" not in said and "***" in said


def test_help_names_the_command(start):
    code, out, _ = start("comcat_hf.training.dreambooth", "--help")
    assert code == 0 and out.startswith("usage: python -m comcat_hf.training.dreambooth [-h]")


def test_only_the_main_process_speaks(monkeypatch, capsys):
    def work(settings, report):
        report("at work")
        if "fail" in settings:
            raise InvalidValueError("bad")
        return 7

    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        for arguments, code, out, said in (
            ([], 0, "done 7\n", "at work\n"),
            (["fail"], 2, "", "at work\nerror: bad\n"),
        ):
            monkeypatch.setattr(sys, "argv", ["program", *arguments])
            assert run_program(list, work, "done {}".format, ("datasets",), sys.stdout) == code
            assert tuple(capsys.readouterr()) == ((out, said) if rank == "0" else ("", ""))
        assert are_progress_bars_disabled() == (rank == "1")
    enable_progress_bars()
    logging.getLogger("comcat_hf").setLevel(logging.NOTSET)


def test_an_error_is_repeated_as_soon_as_the_launcher_has_ended():
    """Also where nobody has read the launcher's exit code yet, as those do not who read its output to the end."""
    fails = f"{LIGHT}; from comcat_hf.training.programs import _repeat; _repeat('error: bad')"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {fails!r}]); sys.exit('its own report')"
    environment = os.environ | {"ACCELERATE_DYNAMO_MODE": "default"}
    done = subprocess.run(
        [sys.executable, "-c", launcher], capture_output=True, text=True, env=environment, timeout=19, check=False
    )
    assert done.stderr.splitlines()[-3:] == ["its own report", "", "error: bad"]


def result(**changes):
    given = {"interrupted": None, "step": 0, "checkpoint": None, "output_dir": "out", "commit": None}
    plan = SimpleNamespace(settings=SimpleNamespace(dry_run=changes.pop("dry_run", False)))
    return SimpleNamespace(**(given | {"plan": plan} | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The model is in out."),
        ({"commit": "https://hub"}, "The model is in out, and at https://hub."),
        ({"dry_run": True}, None),
        ({"interrupted": "SIGTERM", "plan": None}, "Stopped by SIGTERM. Go on with"),
        ({"interrupted": "SIGINT", "step": 3, "checkpoint": "c"}, "Stopped by SIGINT after step 3 and saved in c. Go"),
    ],
)
def test_how_a_training_ended(changes, said):
    text = ending(result(**changes), "The model")
    assert text is said if said is None else text.startswith(said)
