"""Blocks of a model are recorded once and run again alone."""

import pytest
import torch

from comcat_hf.compression.fitting.calls import blocks_between, record_calls
from comcat_hf.modeling import find_sites
from comcat_hf.modeling.sites import block_of
from tests.compression.test_compensation import batches_for
from tests.helpers import _VISION, MODELS


def paths_of(model):
    return blocks_between(model, {block_of(site.moments_path) for site in find_sites(model).values()} - {None, ""})


def runs_of(model, path):
    """How often a module is run to its end."""
    count = []
    model.get_submodule(path).register_forward_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2", "clip", "deit_distilled"])
@torch.no_grad()
def test_blocks_give_again_what_they_gave(name):
    model, inputs = MODELS[name]()
    model.eval()
    paths, batches = paths_of(model), batches_for(model, inputs, 3)
    wanted = {path: [] for path in paths}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda m, a, y, path=path: wanted[path].append(y[0] if isinstance(y, tuple) else y)
        )
    for batch in batches:
        model(**batch)
    found = {path: list(outputs) for path, outputs in wanted.items()}
    calls, before = record_calls(model, paths, batches), None
    for path in paths:
        calls[path].follow(before)
        for index, states in enumerate(calls[path].dense_in):
            calls[path].dense_out.append(calls[path].run(model.get_submodule(path), states, index))
            assert torch.equal(calls[path].dense_out[-1], found[path][index])
        assert len(calls[path].masks) == len(batches)
        before = calls[path]


@torch.no_grad()
def test_later_batches_run_up_to_the_first_block():
    model, inputs = MODELS["vit"]()
    paths = paths_of(model.eval())
    count = runs_of(model, paths[0])
    record_calls(model, paths, batches_for(model, inputs, 4))
    assert len(count) == 1
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_without_blocks_nothing_is_recorded():
    model, inputs = MODELS["vit"]()
    assert record_calls(model.eval(), [], batches_for(model, inputs, 2)) == {}


def extra(args, kwargs):
    return (*args, torch.zeros(1)), kwargs


def named(args, kwargs):
    return args, {**kwargs, "more": 1}


def other_value(args, kwargs):
    return args, {**kwargs, "scale": torch.ones(1)}


def moved(args, kwargs):
    return (args[0] * 1.5, *args[1:]), kwargs


@pytest.mark.parametrize("change", [extra, named, other_value, moved])
@torch.no_grad()
def test_blocks_that_are_called_in_another_way_run_whole(change):
    model, inputs = MODELS["vit"]()
    paths = paths_of(model.eval())
    count = runs_of(model, paths[0])
    for path in paths:
        block = model.get_submodule(path)
        block.forward = lambda states, *args, forward=block.forward, **kwargs: forward(states)
        # The first block gets a value of the same name.
        own = change if path == paths[-1] else lambda args, kwargs: (args, kwargs)
        if change is other_value:
            own = other_value
        block.register_forward_pre_hook(lambda m, args, kwargs, own=own: own(args, kwargs), with_kwargs=True)
    calls = record_calls(model, paths, batches_for(model, inputs, 4))
    assert len(count) == 4
    last = calls[paths[-1]]
    assert len(last.arguments) == 4
    assert len(last.dense_in) == (4 if change is moved else 0)


@torch.no_grad()
def test_a_mask_is_of_its_own_tower():
    model, inputs = MODELS["clip"](vision_config={**_VISION, "image_size": 24})
    inputs["pixel_values"], length = inputs["pixel_values"][..., :24, :24], inputs["input_ids"].shape[1]
    inputs["attention_mask"][:, -1] = 0
    paths = paths_of(model)
    vision, text = (next(path for path in paths if path.startswith(name)) for name in ("vision", "text"))
    calls = record_calls(model, paths, [inputs, inputs])
    # As many patches as there are tokens of a text.
    assert calls[vision].dense_in[0].shape[1] == calls[text].dense_in[0].shape[1] == length
    assert calls[vision].masks == [None, None]
    assert all(torch.equal(mask, inputs["attention_mask"]) for mask in calls[text].masks)
