"""Compressing again and again, and adding and removing adapters, leaves nothing behind."""

import gc
from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel, get_peft_model

from comcat_hf import ComCATConfig, compress, load_comcat_weights, save_comcat_weights, unload_comcat_weights
from tests.customization.pipelines import tiny_sd
from tests.helpers import small_vit


def compressing(folder):
    model, inputs = small_vit()
    return lambda: compress(model, 0.4, batches=[inputs])


def in_a_pipeline(folder):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd(folder / "sd"))
    pipe.unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2), adapter_name="dog")
    save_comcat_weights(pipe, folder / "dog", adapter_name="dog")
    unload_comcat_weights(pipe)

    def cycle():
        for remove in (unload_comcat_weights, lambda pipe: pipe.delete_adapters("dog")):
            load_comcat_weights(pipe, folder / "dog", adapter_name="dog")
            pipe.fuse_lora()
            pipe.unfuse_lora()
            remove(pipe)

    return cycle


def in_a_model(folder):
    model, inputs = small_vit()
    get_peft_model(small_vit()[0], ComCATConfig(qk_rank=3, linear_rank=3)).save_pretrained(folder)

    def cycle():
        adapted = PeftModel.from_pretrained(model, folder)
        adapted(**inputs)
        adapted.unload()

    return cycle


@pytest.fixture(autouse=True)
def alone():
    """Leave out what other tests left in this process: to count it takes longer than the test."""
    gc.collect()
    gc.freeze()


def held():
    gc.collect()
    found = [type(one) for one in gc.get_objects()]
    return sum(issubclass(cls, torch.Tensor) for cls in found), len(found)


# pytest keeps every warning.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [compressing, in_a_pipeline, in_a_model])
def test_nothing_is_left(make, tmp_path):
    cycle = make(tmp_path)
    # The first ones import modules and fill caches.
    cycle(), cycle()
    counts = [held()]
    for _ in range(4):
        cycle()
        counts.append(held())
    assert counts[-1][0] == counts[0][0]
    # A leak adds objects in every cycle, a cache of Python or torch now and then.
    assert any(after <= before for (_, before), (_, after) in pairwise(counts)), counts
