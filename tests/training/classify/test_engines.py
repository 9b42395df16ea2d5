"""What accelerate's engines are told of a model before they get it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model

import comcat_hf
from comcat_hf import ComCATConfig
from comcat_hf.errors import CheckpointError
from comcat_hf.training.classify.earlier import readable
from comcat_hf.training.classify.engines import blocks_of, prepare_engine
from comcat_hf.training.classify.settings import CompressSettings
from tests.helpers import MODELS, small_deit, small_dinov2, small_vit
from tests.training.classify import test_vit_loop
from tests.training.classify.test_vit_loop import ROOT, launched


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
    trainer = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=DistributedType[kind]))
    with pytest.raises(CheckpointError, match=says), readable(trainer, tmp_path, 1):
        pass


SHARDED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from comcat_hf.training.checkpoints import list_checkpoints
from tests.training.classify import test_vit_loop as test

folder, output, sharded = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "sharded"
accelerator = Accelerator(cpu=True)
if sharded:
    # accelerate takes FSDP on GPUs only; what it then does runs on a CPU as well.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = accelerator.state
    state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
index, count = accelerator.process_index, accelerator.num_processes
size = 8 // count
found = list_checkpoints(output)

def batches(start, number):
    for position in range(start, start + number):
        whole = test.batch_at(position, 8)
        yield {{name: value[index * size : (index + 1) * size] for name, value in whole.items()}}

run, result = test.train(
    folder, output, "dry", steps=8, accelerator=accelerator, batches=batches, ema_decay=0.9, checkpointing_steps="4",
    per_device_train_batch_size=size, gradient_accumulation_steps=1, checkpoint=found[0] if found else None,
)
if accelerator.is_main_process:
    torch.save(test.weights(run), output / f"weights-{{len(found)}}.pt")
accelerator.end_training()
"""


def test_sharded_like_whole_and_resumed(tmp_path):
    """FSDP2 over two processes without a GPU: the weights of one process with the same images, also after resuming."""
    dense = test_vit_loop.dense_vit(0.0)
    dense.save_pretrained(tmp_path / "dry" / "dense")
    comcat_hf.compress(dense, reduction=0.4, scope="attention").save_pretrained(tmp_path / "dry" / "small")
    script = tmp_path / "train.py"
    script.write_text(SHARDED.format(root=str(ROOT)))

    def run(output, way):
        launched(script, 2 if way == "sharded" else 1, tmp_path, output, way)

    run(tmp_path / "whole", "whole")
    run(tmp_path / "sharded", "sharded")
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-8")
    run(tmp_path / "sharded", "sharded")
    files = [tmp_path / "whole" / "weights-0.pt", *(tmp_path / "sharded" / f"weights-{n}.pt" for n in (0, 1))]
    whole, sharded, resumed = (torch.load(file, weights_only=True) for file in files)
    assert whole.keys() == sharded.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(resumed[name], sharded[name], atol=1e-6, rtol=1e-6)
