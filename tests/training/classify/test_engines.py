"""What accelerate's engines are told of a model before they get it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import comcat_hf
from comcat_hf import ComCATConfig
from comcat_hf.errors import CheckpointError
from comcat_hf.training.checkpoints import list_checkpoints
from comcat_hf.training.classify.earlier import is_earlier
from comcat_hf.training.classify.loop import blocks_of, prepare_engine
from comcat_hf.training.classify.settings import CompressSettings
from tests.helpers import MODELS, small_deit, small_dinov2, small_vit
from tests.processes import in_processes
from tests.training.classify.test_vit_loop import batch_at, train, weights


@pytest.mark.parametrize("build", [small_vit, small_deit, small_dinov2])
def test_no_block_holds_the_embeddings(build):
    """accelerate shards the embeddings by themselves, and nothing can be sharded twice."""
    model, _ = build()
    (block,) = blocks_of(model)
    assert block.endswith("Layer") and block in model._no_split_modules
    assert blocks_of(comcat_hf.compress(model, 0.3)) == [block]
    wrapped = get_peft_model(model, ComCATConfig(qk_rank=4, vo_rank=4))
    assert blocks_of(wrapped) == [block]


@pytest.mark.parametrize("family", ["clip_vision", "siglip_vision", "videomae", "yolos"])
def test_blocks_are_of_the_model(family):
    model, _ = MODELS[family]()
    present = {type(module).__name__ for module in model.modules()}
    found = blocks_of(model)
    assert found and set(found) <= present and not any("Embeddings" in name for name in found)


def test_a_model_that_names_no_blocks():
    assert blocks_of(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("version", "given", "expected"), [(2, None, ["ViTLayer"]), (2, ["A"], ["A"]), (1, None, None)]
)
def test_fsdp2_is_told_unless_it_was(version, given, expected):
    plugin = SimpleNamespace(fsdp_version=version, transformer_cls_names_to_wrap=given)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    prepare_engine(accelerator, CompressSettings(), small_vit()[0])
    assert plugin.transformer_cls_names_to_wrap == expected


def test_plain_processes_need_nothing():
    prepare_engine(SimpleNamespace(distributed_type=DistributedType.NO), CompressSettings(), small_vit()[0])


@pytest.mark.parametrize(
    ("kind", "there", "says"),
    [
        ("NO", ["trainer_state.json", "pytorch_model_fsdp_0"], "under NO, found another"),
        ("FSDP", ["trainer_state.json", "optimizer.pt"], "under FSDP, found another"),
        ("DEEPSPEED", ["student.safetensors"], "expected trainer_state.json, found none. An earlier version"),
        ("NO", ["pytorch_model_fsdp_0"], "expected trainer_state.json, found none. An earlier version"),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused(tmp_path, kind, there, says):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=says):
        is_earlier(DistributedType[kind], tmp_path)


def train_in_shards(folder, output):
    """Half of the images per process, the weights shared out; in one process all of both."""
    accelerator = Accelerator(cpu=True)
    index, count = accelerator.process_index, accelerator.num_processes
    if count > 1:
        # accelerate takes FSDP on GPUs only; what it then does runs on a CPU as well.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP

    def share(start, number):
        for position in range(start, start + number):
            whole = batch_at(position, 8)
            yield {name: value[index * 8 // count : (index + 1) * 8 // count] for name, value in whole.items()}

    how = {"ema_decay": 0.9, "checkpointing_steps": "4", "per_device_train_batch_size": 8 // count}
    found = list_checkpoints(output)
    given = {"accelerator": accelerator, "batches": share, "checkpoint": found[0] if found else None}
    run, _ = train(folder, output, "dry", steps=8, **given, **how)
    if accelerator.is_main_process:
        save_file(weights(run), output / f"weights-{len(found)}.safetensors")


def test_sharded_like_whole_and_resumed(folder, tmp_path):
    """FSDP2 over two processes without a GPU: the weights of one process with the same images, also after resuming."""
    train_in_shards(folder, tmp_path / "whole")
    in_processes(train_in_shards, folder, tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-8")
    in_processes(train_in_shards, folder, tmp_path / "sharded")
    places = ("whole/weights-0", "sharded/weights-0", "sharded/weights-1")
    whole, sharded, resumed = (load_file(tmp_path / f"{place}.safetensors") for place in places)
    assert whole.keys() == sharded.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(resumed[name], sharded[name], atol=1e-6, rtol=1e-6)
