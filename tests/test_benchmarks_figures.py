"""The committed figures are those that `make figures` draws from the committed results."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def figures():
    path = ROOT / "benchmarks" / "_figures.py"
    spec = importlib.util.spec_from_file_location("_figures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(path):
    """An SVG without its numbers and names, and the numbers; the version of matplotlib does not count."""
    text = re.sub(r"<metadata>.*?</metadata>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r'(id="|#|url\(#)[\w-]+', r"\1", text)
    return NUMBER.sub("0", text), [float(number) for number in NUMBER.findall(text)]


def test_the_committed_figures_are_what_the_command_draws(figures, tmp_path):
    drawn = {path.name: path for path in figures.draw_all(tmp_path)}
    assert len(drawn) == len(figures.FIGURES) >= 5
    for name, path in drawn.items():
        (form, numbers), (committed, known) = shapes(path), shapes(figures.IMAGES / name)
        assert form == committed, f"{name} is not what the results give; run: make figures"
        assert numbers == pytest.approx(known, abs=0.01)


def test_figures_show_the_committed_values(figures):
    metric, curves = figures.quality_curves("minilm", "attention+mlp")
    assert metric == "cosine" and all(points[0] == (1.0, 1.0) for points in curves.values())
    committed = {
        row["method"]: row["metrics"]["cosine"]["mean"]
        for name in ("quality-minilm-both", "quality-curvature-both")
        for row in figures.read(name)["rows"]
        if row["reduction"] == 0.5
    }
    assert {method: points[-1][1] for method, points in curves.items()} == {m: committed[m] for m in curves}
    assert {"whitened", "original", "sensitivity + compensation"} <= curves.keys()


def test_every_figure_stands_on_a_page(figures):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"images/([\w-]+)\.svg", page.read_text(encoding="utf-8"))}
    assert figures.FIGURES.keys() <= shown


def test_single_runs_of_adapters_become_points(figures):
    runs = {"base 0, seed 0": [0.9, 1.0, 0.1], "base 0, seed 1": [0.7, 1.0, 0.1]}
    known = {"LoRA 1": {"runs": runs, "parameters": 10}, "base": {"runs": runs}, "none": {"runs": {}}}
    (row,) = figures.rows_of_runs({"UNet": known})
    assert (row["model"], row["method"], row["parameters"]) == ("UNet", "LoRA 1", 10)
    assert (row["new"], row["new_error"]) == pytest.approx((0.8, 0.1))
    figure = figures.adapters_figure([row])
    assert figure.axes[0].get_title("left") == "UNet"


def test_the_command_is_no_benchmark():
    shown = {
        target: subprocess.run(
            ["make", "-n", target, "ARGS="], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for target in ("bench", "figures")
    }
    assert "quality" in shown["bench"] and "_figures" not in shown["bench"]
    assert "benchmarks/_figures.py" in shown["figures"]
