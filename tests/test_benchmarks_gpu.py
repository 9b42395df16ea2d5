"""The program for a GPU: its plan of at most eight minutes, and parts of its dry run on the CPU."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
gpu = importlib.import_module("gpu")

SLEEPS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def test_all_steps_fit_into_eight_minutes():
    steps = gpu.steps()
    assert sum(step.limit for step in steps) <= gpu.BUDGET
    (tests,) = (step for step in steps if step.name == "tests")
    files = {Path(word).name for word in tests.gpu if word.endswith(".py")}
    assert {"test_on_a_gpu.py", "test_attention.py", "test_latency.py"} <= files


@pytest.mark.parametrize(
    ("script", "limit", "status"),
    [("print('done')", 60, "passed"), ("raise SystemExit(3)", 60, "failed (3)"), (SLEEPS, 0.5, "over 0 s")],
)
def test_a_step_that_fails_or_hangs_is_a_line_of_the_table(tmp_path, script, limit, status):
    step = replace(gpu.steps()[0], name="step", tell=lambda found: "told")
    found = gpu.run(step, ["-S", "-c", script.replace("{", "{{").replace("}", "}}")], limit, tmp_path)
    assert (found["status"], found["told"], found["result"]) == (status, "", None)
    assert found["seconds"] < 30


@pytest.mark.processes
def test_a_dry_run_says_that_no_gpu_was_used(tmp_path, monkeypatch, capsys):
    written = tmp_path / "all.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--only", "widths", "--output", str(written)])
    assert gpu.main() == 0
    said = capsys.readouterr().out
    assert "no GPU was used" in said and "1 of 1 steps passed" in said and "32 flash_attention" in said
    found = json.loads(written.read_text())
    assert found["dry_run"] and list(found["steps"]) == ["widths of heads"]


def test_the_inputs_of_the_runs(tmp_path):
    from transformers import AutoModelForImageClassification

    gpu.make_inputs(tmp_path, dry=True)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    assert model.config.num_labels == gpu.CLASSES == len(list((tmp_path / "images" / "train").iterdir()))
    assert (tmp_path / "sd" / "model_index.json").is_file() and list((tmp_path / "photos").iterdir())
