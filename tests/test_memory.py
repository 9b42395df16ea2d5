"""Compressing again and again, and loading and taking away adapters, leaves nothing behind."""

import gc

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel, get_peft_model

from comcat_hf import (
    ComCATConfig,
    compress,
    load_comcat_weights,
    save_comcat_weights,
    unload_comcat_weights,
)
from tests.customization.pipelines import tiny_sd
from tests.helpers import image_inputs, outputs, small_vit


def compressing(folder):
    model, inputs = small_vit()
    return lambda: compress(model, 0.4, batches=[inputs])


def in_a_pipeline(folder):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd(folder / "sd"))
    pipe.unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2), adapter_name="dog")
    save_comcat_weights(pipe, folder / "dog", adapter_name="dog")
    unload_comcat_weights(pipe)

    def cycle():
        load_comcat_weights(pipe, folder / "dog", adapter_name="dog")
        pipe.fuse_lora()
        pipe.unfuse_lora()
        unload_comcat_weights(pipe)

    return cycle


def in_a_model(folder):
    model, _ = small_vit()
    get_peft_model(small_vit()[0], ComCATConfig(qk_rank=3, linear_rank=3)).save_pretrained(folder)

    def cycle():
        adapted = PeftModel.from_pretrained(model, folder)
        outputs(adapted, image_inputs())
        adapted.unload()

    return cycle


def held():
    gc.collect()
    found = gc.get_objects()
    return sum(isinstance(one, torch.Tensor) for one in found), len(found)


@pytest.mark.parametrize("make", [compressing, in_a_pipeline, in_a_model])
def test_nothing_is_left(make, tmp_path):
    cycle = make(tmp_path)
    cycle(), cycle()
    tensors, objects = held()
    for _ in range(8):
        cycle()
    after = held()
    assert after[0] == tensors and after[1] < objects + 40
