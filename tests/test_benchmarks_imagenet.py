"""The program for ImageNet: a rehearsal with few classes and a tiny DeiT, and the tables in the docs."""

import importlib
import os
import sys
import traceback
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from comcat_hf.training.classify import __main__ as classify
from comcat_hf.training.classify import evaluate


sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
imagenet = importlib.import_module("imagenet")

PROGRAMS = {imagenet.PROGRAM: classify.main, f"{imagenet.PROGRAM}.evaluate": evaluate.main}
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TINY |= {"image_size": 32, "patch_size": 16}


def forked(program, arguments, log):
    """The program in a process of its own, without importing the libraries anew."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        sys.argv = [program, *arguments]
        AcceleratorState._reset_state(reset_partial_state=True)
        code = PROGRAMS[program]()
    except BaseException:
        traceback.print_exc()
    finally:
        log.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    given = {"dataloader_num_workers": 0, "reduction": 0.3}
    return folder, imagenet.rehearse("base", forked, folder, 6, given, **TINY)


def test_a_rehearsal_runs_all_stages_of_the_recipe(rehearsal):
    folder, found = rehearsal
    assert list(found["stages"]) == ["start", *imagenet.TRAINED, "measure"]
    assert all(min(taken.values()) > 0 for taken in found["stages"].values())
    sizes = found["sizes"]
    assert 0.3 <= 1 - sizes["model"]["parameters"] / sizes["dense"]["parameters"] <= 0.305
    # Six images, each counted once, and the exported model is the one that was evaluated.
    assert found["metrics"]["final"]["samples"] == 6
    assert found["top1"] == {"model": found["metrics"]["final"]["top1"], "dense": found["metrics"]["dense"]["top1"]}
    assert "top-1" in (folder / "out" / "README.md").read_text()


def test_a_row_that_was_stopped_goes_on(rehearsal):
    folder, found = rehearsal
    flags = {**imagenet.SHORT, "dataloader_num_workers": 0, "reduction": 0.3, "model_name_or_path": folder / "model"}
    data = imagenet.data_flags(str(folder / "images"))
    again = imagenet.run_row(imagenet.ROWS["base"], forked, folder / "out", flags, data)
    # What was done is not done again, nor is its time lost.
    assert again == {key: value for key, value in found.items() if key in again} | {"flags": again["flags"]}
    with pytest.raises(imagenet.Failed, match="the stage calibrate was done with --seed 0"):
        imagenet.run_row(imagenet.ROWS["base"], forked, folder / "out", flags | {"seed": 1}, data)


def test_classes_of_imagenet_are_folders_with_wordnet_ids():
    names = imagenet.class_names(1000)
    assert len(names) == 1000 and list(names) == sorted(names)
    assert (names["n01440764"], names["n02123045"], names["n15075141"]) == ("tench", "tabby", "toilet tissue")


def test_flags_and_their_values_may_be_apart():
    assert imagenet.joined(["--a", "1", "--b=2"]) == ["--a=1", "--b=2"]
    for wrong in (["a"], ["--a"], ["--a", "1", "2"]):
        with pytest.raises(SystemExit, match="expected"):
            imagenet.joined(wrong)


def test_rows_that_were_run_fill_their_cells(rehearsal):
    head, *rows = imagenet.results_table({"base": rehearsal[1]})
    by_name = dict(zip(imagenet.ROWS, rows, strict=True))
    assert by_name["small"][2:] == [""] * 5 and len(head) == 7
    assert all(by_name["base"][2:]) and "COMCAT 82.26" in by_name["base"][1]
    assert rows[2][1] == "FLAR-SVD 78.4" and rows[4][1] == "CORP 80.80"


def test_the_tables_of_the_docs_are_those_of_the_results():
    text = imagenet.PAGE.read_text(encoding="utf-8")
    assert imagenet.filled(text) == text
