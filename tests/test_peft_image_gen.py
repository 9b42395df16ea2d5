"""PEFT's comparison of image generation can be entered: its protocol stands, and its script finds our experiments."""

import json
import runpy
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "peft_image_gen"
EXPERIMENTS = sorted(path.name for path in (FOLDER / "experiments" / "comcat").iterdir())
# Notes what it was started with, in the way of the real one.
SCRIPT = """
import json, os, sys
from peft import PeftConfig
config = PeftConfig.from_pretrained(sys.argv[-1])
assert __name__ == "__main__" and os.path.exists("run.py") and len(sys.argv[-1].split("/")) == 3
with open("seen.json", "w") as file:
    json.dump([sys.argv[1:], config.peft_type, config.vo_rank], file)
"""


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(FOLDER / "run.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_protocol_stands(benchmark, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = benchmark["rehearse"](FOLDER / "experiments" / "comcat" / name, 8)
    torch.set_num_threads(threads)
    # Two double blocks with two streams of outputs and two single blocks, heads of 16 columns.
    assert found["last loss"] < found["first loss"] and found["parameters"] * 4 < found["bytes"]


def test_the_script_of_a_checkout_is_run_on_the_experiment(benchmark, tmp_path):
    place = Path.cwd()
    folder = tmp_path / "method_comparison" / "image-gen"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(SCRIPT)
    benchmark["compare"](folder, FOLDER / "experiments" / "comcat" / "flux2-klein-core8")
    seen = json.loads((folder / "seen.json").read_text())
    assert seen == [["-v", "experiments/comcat/flux2-klein-core8"], "COMCAT", 8] and Path.cwd() == place
