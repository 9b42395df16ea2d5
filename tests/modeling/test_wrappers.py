"""Models that are compiled or wrapped for parallel training, and what is no model at all."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import comcat_hf
from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import read_ranks
from comcat_hf.reporting.plots import plot_ranks
from tests.helpers import images, outputs, small_vit


WRAPPERS = {
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "compiled in place": lambda model: (model.compile(), model)[1],
}


def _load(folder):
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_model_is_taken_out_of_what_wraps_it(wrap, tmp_path):
    model, inputs = small_vit()
    wrapped, batches = wrap(copy.deepcopy(model)), [images()]
    statistics = comcat_hf.collect_statistics(wrapped, batches)
    plan = comcat_hf.allocate_ranks(wrapped, 0.3, statistics=statistics, batches=batches)
    assert plan == comcat_hf.allocate_ranks(model, 0.3, statistics=statistics, batches=batches)
    assert comcat_hf.measure_sensitivities(wrapped, batches, statistics=statistics)
    labelled = [{"pixel_values": images(), "labels": torch.tensor([0, 1])}]
    assert comcat_hf.search_ranks(wrapped, labelled, 0.3, steps=1).ranks
    for count in (comcat_hf.count_parameters, comcat_hf.count_macs):
        assert count(wrapped) == count(model)
    small = comcat_hf.compress(wrapped, 0.3, batches=batches)
    assert type(small) is type(model)
    assert all(
        map(
            torch.equal, outputs(small, inputs), outputs(comcat_hf.compress(model, plan=plan, batches=batches), inputs)
        )
    )
    # A compressed model that is wrapped later.
    again = wrap(copy.deepcopy(small))
    assert comcat_hf.plan_of(again) == comcat_hf.plan_of(small)
    getattr(again, "module", again).save_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(_load(tmp_path), inputs), outputs(small, inputs)))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, checkpoint_wrapper])
def test_a_wrapped_part_is_refused_by_name(wrap, tmp_path):
    model, _ = small_vit()
    small = comcat_hf.compress(model, 0.3)
    for whole in (model, small):
        whole.vit.layers[1] = wrap(whole.vit.layers[1])
    for action in (lambda: comcat_hf.compress(model, 0.3), lambda: small.save_pretrained(tmp_path / "small")):
        with pytest.raises(InvalidValueError, match=r"^vit\.layers\.1 is compiled or wrapped"):
            action()
    assert not (tmp_path / "small").exists()
    if wrap is not nn.DataParallel:
        # What a library gathers for saving has the names without wrappers; so has the plan.
        assert read_ranks(small) == comcat_hf.plan_of(comcat_hf.compress(small_vit()[0], 0.3)).ranks


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_an_adapter_is_for_the_model_within(wrap):
    model, _ = small_vit()
    assert comcat_hf.allocate_ranks(wrap(model), 0.3) == comcat_hf.allocate_ranks(model, 0.3)
    with pytest.raises(InvalidValueError, match="the model within"):
        get_peft_model(wrap(model), ComCATConfig(qk_rank=4))
    assert get_peft_model(model, ComCATConfig(qk_rank=4))


PLAN = RankPlan({"classifier": 2})
ENTRIES = {
    "compress": lambda model: comcat_hf.compress(model, 0.3),
    "compress_plan": lambda model: comcat_hf.compress(model, plan=PLAN),
    "allocate_ranks": lambda model: comcat_hf.allocate_ranks(model, 0.3),
    "collect_statistics": lambda model: comcat_hf.collect_statistics(model, [images()]),
    "measure_sensitivities": lambda model: comcat_hf.measure_sensitivities(model, [images()]),
    "measure_latency": comcat_hf.measure_latency,
    "search_ranks": lambda model: comcat_hf.search_ranks(model, [], 0.3),
    "count_parameters": comcat_hf.count_parameters,
    "count_macs": comcat_hf.count_macs,
    "plan_of": comcat_hf.plan_of,
    "initialize_comcat_weights": comcat_hf.initialize_comcat_weights,
    "plot_ranks": lambda model: plot_ranks(model, PLAN, "map.png"),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_what_is_no_model_is_one_clear_line(entry):
    for model in ("facebook/deit-small-patch16-224", None, nn.Linear):
        with pytest.raises(InvalidValueError, match=r"^model: expected a torch.nn.Module, found .*from_pretrained"):
            entry(model)
