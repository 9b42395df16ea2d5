"""Compressing again and again, and adding and removing adapters, leaves nothing behind."""

import gc

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


def a_pipeline(folder, remove):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd(folder / "sd"))
    pipe.unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2), adapter_name="dog")
    save_comcat_weights(pipe, folder / "dog", adapter_name="dog")
    unload_comcat_weights(pipe)

    def cycle():
        load_comcat_weights(pipe, folder / "dog", adapter_name="dog")
        pipe.fuse_lora()
        pipe.unfuse_lora()
        remove(pipe)

    return cycle


def unloading(folder):
    return a_pipeline(folder, unload_comcat_weights)


def deleting(folder):
    return a_pipeline(folder, lambda pipe: pipe.delete_adapters("dog"))


def wrapping(folder):
    model, inputs = small_vit()
    get_peft_model(small_vit()[0], ComCATConfig(qk_rank=3, linear_rank=3)).save_pretrained(folder)

    def cycle():
        adapted = PeftModel.from_pretrained(model, folder)
        adapted(**inputs)
        adapted.unload()

    return cycle


def held():
    gc.collect()
    found = gc.get_objects()
    # By type, since to ask an object for its class may run its code.
    return sum(issubclass(type(one), torch.Tensor) for one in found), len(found)


@pytest.mark.parametrize("make", [compressing, unloading, deleting, wrapping])
def test_nothing_is_left(make, tmp_path):
    cycle = make(tmp_path)
    cycle(), cycle()
    tensors, objects = held()
    for _ in range(8):
        cycle()
    after = held()
    # No tensor, and not one object in every cycle: caches of Python and torch may still grow by single ones.
    assert after[0] == tensors and after[1] < objects + 8
