"""The accelerator of trainings and evaluations: precision, tracker and folders, and what the machine lacks."""

import pytest
import torch
from accelerate.state import AcceleratorState

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.machine import make_accelerator
from comcat_hf.training.settings import RunSettings


def test_the_folders_and_the_precision_are_those_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = make_accelerator(RunSettings(output_dir=str(tmp_path), mixed_precision="no"))
    assert (accelerator.project_dir, accelerator.logging_dir) == (str(tmp_path), str(tmp_path / "logs"))
    assert (accelerator.mixed_precision, accelerator.log_with) == ("no", [])
    AcceleratorState._reset_state(True)
    assert make_accelerator(RunSettings()).mixed_precision == "bf16"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has half precision")
@pytest.mark.parametrize(("given", "place"), [("fp16", "--mixed_precision fp16"), (None, "The accelerate config")])
def test_a_precision_that_the_machine_lacks_is_named_by_where_it_stands(monkeypatch, given, place):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InvalidValueError, match=f"{place}.*: expected a precision that this machine has, found"):
        make_accelerator(RunSettings(mixed_precision=given))


def test_an_unknown_tracker_is_not_taken_for_a_precision():
    with pytest.raises(InvalidValueError, match="--report_to must be one of"):
        make_accelerator(RunSettings(report_to="paper"))
