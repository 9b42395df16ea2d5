"""The adapter benchmark's own parts: its runs, which continue where they were stopped, and its verdicts."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comcat_hf.demos.customize import judge


# A benchmark is a script: its folder is on the path when it runs.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
adapters, digits = map(importlib.import_module, ("adapters", "_digits"))

TINY = {"base_steps": 2, "adapter_steps": 2, "vae_steps": 2, "sampling_steps": 2, "samples": 3, "caption_samples": 1}
FEW = ["LoRA 1", "ComCAT core VO 5", "TinyLoRA 25"]


@pytest.fixture
def tiny(monkeypatch):
    kinds = {name: replace(kind, settings=digits.Settings(**TINY)) for name, kind in digits.KINDS.items()}
    monkeypatch.setattr(adapters, "KINDS", kinds)
    monkeypatch.setattr(adapters, "train_judge", lambda data, epochs, bar: judge.train_judge(data, 1, bar))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_continues_where_it_was_stopped(tiny, tmp_path, capsys, monkeypatch):
    file, picture = tmp_path / "found.json", tmp_path / "found.svg"
    given = ["--json", str(file), "--cache", str(tmp_path), "--bases", "1", "--models", "UNet", "SD3"]
    adapters.main([*given, "--methods", *FEW[:2], "--seeds", "1"])
    first = json.loads(file.read_text())["models"]
    adapters.main([*given, "--methods", *FEW, "ComCAT core 16", "--seeds", "2", "--plot", str(picture)])
    models = json.loads(file.read_text())["models"]
    assert set(models) == {"UNet", "SD3"} and picture.stat().st_size > 1000
    for model, methods in models.items():
        assert set(methods) == {"base", *FEW, "ComCAT core 16"}
        for name, known in first[model].items():
            kept = {run: methods[name]["runs"][run] for run in known["runs"]}
            assert {**methods[name], "runs": kept} == known
        for name in FEW:
            assert list(methods[name]["runs"]) == ["base 0, seed 0", "base 0, seed 1"]
            assert 3 <= len(methods[name]["tried"]) <= 4 and f"{methods[name]['rate']:g}" in methods[name]["tried"]
            assert all(
                0 <= new <= 1 and 0 <= old <= 1 and spent > 0 for new, old, spent in methods[name]["runs"].values()
            )
            assert 4 * methods[name]["parameters"] < methods[name]["bytes"]
    assert "from 1 to 8 (the head dimension)" in models["UNet"]["ComCAT core 16"]["cannot"]
    said = capsys.readouterr().out
    assert "SD3, at most 30% of LoRA 1: ComCAT core VO 5" in said and "| UNet  | LoRA 1" in said
    # All is there, so nothing is trained again; other settings are another measurement.
    monkeypatch.setattr(adapters.Studio, "teach", None)
    adapters.main([*given, "--methods", *FEW, "--seeds", "2"])
    monkeypatch.setitem(adapters.KINDS, "SD3", digits.KINDS["SD3"])
    with pytest.raises(SystemExit, match="other settings of SD3"):
        adapters.main(given)


def test_a_base_and_a_lesson_hang_on_their_seeds_alone(tiny, tmp_path):
    data, kind = adapters.load_digits(), adapters.KINDS["UNet"]
    reader = adapters.train_judge(data, 1, digits.Steps())
    cached = tmp_path / "base.safetensors"
    studios = [digits.Studio(kind, 0, data, reader, path) for path in (None, cached, cached)]
    attach = adapters.METHODS["LoRA 1"][0]
    for studio in studios[1:]:
        for name, tensor in studios[0].base.state_dict().items():
            assert torch.equal(tensor, studio.base.state_dict()[name])
    one, same, other = (
        studio.teach(attach, 1e-1, seed).model.state_dict() for studio, seed in zip(studios, (3, 3, 4), strict=True)
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("model", digits.KINDS)
def test_every_method_trains_something_of_every_model(model):
    torch.manual_seed(0)
    base = digits.KINDS[model].build(digits.build_pipeline()).requires_grad_(False)
    for name, (attach, _) in adapters.METHODS.items():
        if name != "ComCAT core 16":  # wider than the UNet's heads
            attached = digits.get_peft_model(digits.copy.deepcopy(base), attach(base), adapter_name=digits.ADAPTER)
            assert any(parameter.requires_grad for parameter in attached.parameters()), name


def test_one_rate_more_is_tried_where_the_best_is_at_an_edge():
    for best, tried, edge in ((1e-1, 3, False), (3e-1, 4, False), (1.0, 4, True), (1e-2, 4, True)):
        known = {"tried": {}}
        adapters.choose_rate(known, 1e-1, lambda rate, best=best: [1 - abs(rate - best), 0.0])
        assert (known["rate"], len(known["tried"]), known["edge"]) == (best, tried, edge)


def test_a_verdict_takes_differences_of_the_same_seeds():
    def known(parameters, *new):
        return {"tried": {}, "parameters": parameters, "runs": {str(i): [v, 1.0, 1.0] for i, v in enumerate(new)}}

    methods = {
        "LoRA 1": known(100, 0.5, 0.9),
        "ComCAT core 4 + gains": known(60, 0.49, 0.89),
        "IA3": known(30, 0.5, 0.7),
    }
    methods |= {"ComCAT core 4": known(20, 0.6, 0.8), "ComCAT core 6 + gains": known(70, 1.0, 1.0)}

    def verdict():
        return adapters.verdict(methods, adapters.rows_of({"models": {"SD3": methods}}))

    said = verdict()
    # Always 0.01 behind: the seeds' own spread does not excuse it.
    assert said["near"]["ours"] == "ComCAT core 4 + gains" and not said["near"]["holds"]
    assert said["near"]["new"] == pytest.approx((-0.01, 0.0), abs=1e-12)
    assert said["low"]["ours"] == "ComCAT core 4" and said["low"]["holds"]
    assert said["low"]["ahead of"] == {"IA3": pytest.approx((0.1, 0.0))}
    methods["ComCAT core 4 + gains"] = known(60, 0.5, 0.88)
    assert verdict()["near"]["holds"]
