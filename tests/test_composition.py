"""A compressed model goes on being a model, and an adapter one of several: with methods of other libraries."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F
from transformers import ViTForImageClassification

from comcat_hf import ComCATConfig, compress, plan_of
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling import read_ranks
from tests.helpers import image_inputs, outputs, small_bert, small_vit


@pytest.fixture
def small():
    return compress(small_vit()[0], 0.4)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["first_factor"], "all-linear"])
def test_a_lora_is_trained_saved_loaded_and_merged_on_a_compressed_vit(small, tmp_path, targets):
    pixels, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    small.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        before = small(pixels).logits
    model = get_peft_model(small, LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, before, rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    with torch.no_grad():
        trained = model(pixels).logits
        assert (trained - before).abs().max() > 1e-2
        with model.disable_adapter():
            torch.testing.assert_close(model(pixels).logits, before, rtol=0, atol=1e-6)
        model.save_pretrained(tmp_path / "lora")
        base = ViTForImageClassification.from_pretrained(tmp_path / "small").eval()
        again = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        torch.testing.assert_close(again(pixels).logits, trained, rtol=0, atol=1e-5)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(pixels).logits, trained, rtol=1e-4, atol=1e-4)


TORCHAO = """
import io, json, os, shutil, sys
import torch
import comcat_hf
from comcat_hf import ComCATConfig, RankPlan
from comcat_hf.errors import ComCATError
from peft import get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, quantize_
from transformers import AutoModelForImageClassification, TorchAoConfig, ViTConfig, ViTForImageClassification

torch.manual_seed(0)
folder = sys.argv[1]
config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
                   patch_size=8, num_labels=5)
dense = ViTForImageClassification(config).eval()
ranks = {f"vit.layers.{i}.attention": {"qk": 8, "vo": 12} for i in range(2)}
ranks |= {"vit.layers.0.mlp": {"width": 64}, "vit.layers.1.mlp.fc1": 24, "vit.layers.1.mlp.fc2": 24, "classifier": 3}
small = comcat_hf.compress(dense, plan=RankPlan(ranks)).eval()
small.save_pretrained(folder + "/small")
pixels = torch.randn(64, 3, 32, 32)
facts = {}

def size(model):
    payload = io.BytesIO()
    torch.save(model.state_dict(), payload)
    return payload

with torch.no_grad():
    expected = small(pixels).logits
    before = len(size(small).getvalue())
    quantize_(small, Int8WeightOnlyConfig())
    found = small(pixels).logits
    payload = size(small)
    facts["share"] = len(payload.getvalue()) / before
    linears = {name: module for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)}
    facts["kinds"] = sorted({type(module).__name__ for module in linears.values()})
    facts["floats"] = [n for n, m in linears.items() if type(m.weight) is torch.nn.Parameter]
    facts["error"] = ((found - expected).norm() / expected.norm()).item()
    facts["same"] = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    payload.seek(0)
    again = AutoModelForImageClassification.from_pretrained(folder + "/small").eval()
    again.load_state_dict(torch.load(payload, weights_only=True), assign=True)
    facts["reloaded"] = torch.equal(again(pixels).logits, found)
    small.save_pretrained(folder + "/quantised")
    loaded = AutoModelForImageClassification.from_pretrained(folder + "/quantised").eval()
    loaded.save_pretrained(folder + "/second")
    facts["loaded"] = torch.equal(loaded(pixels).logits, found) and not hasattr(loaded, "hf_quantizer")
    facts["plans"] = [comcat_hf.plan_of(model).to_dict() for model in (small, loaded)]
    four = AutoModelForImageClassification.from_pretrained(folder + "/small").eval()
    quantize_(four, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)))
    found = four(pixels).logits
    four.save_pretrained(folder + "/four")
    loaded = AutoModelForImageClassification.from_pretrained(folder + "/four").eval()
    facts["int4"] = [((found - expected).norm() / expected.norm()).item(), torch.equal(loaded(pixels).logits, found)]
    facts["sizes"] = [os.path.getsize(f"{folder}/{n}/model.safetensors") for n in ("quantised", "second", "small")]

def refused(action):
    try:
        action()
    except ValueError as error:
        return isinstance(error, ComCATError), str(error)

def load():
    return AutoModelForImageClassification.from_pretrained(
        folder + "/small", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))

def damaged():
    shutil.copytree(folder + "/quantised", folder + "/damaged")
    shutil.copy(folder + "/small/model.safetensors", folder + "/damaged")
    AutoModelForImageClassification.from_pretrained(folder + "/damaged")

quantize_(dense, Int8WeightOnlyConfig())
facts["refused"] = {
    "damaged": refused(damaged),
    "compress": refused(lambda: comcat_hf.compress(dense, 0.4)),
    "mlp": refused(lambda: comcat_hf.compress(dense, 0.4, scope="mlp")),
    "again": refused(lambda: comcat_hf.compress(small, 0.1)),
    "attention": refused(lambda: get_peft_model(dense, ComCATConfig(qk_rank=4, vo_rank=4))),
    "linear": refused(lambda: get_peft_model(dense, ComCATConfig(linear_rank=4))),
    "width": refused(lambda: get_peft_model(dense, ComCATConfig(mlp_width=64))),
}
facts["from_pretrained"] = refused(load)
with torch.no_grad():
    base = dense(pixels).logits
    for core in (False, True):
        kind = dict.fromkeys(("core", "gains", "head_gains"), core)
        options = ComCATConfig(mode="customize", qk_rank=2, vo_rank=2, **kind, init_weights=False)
        model = get_peft_model(dense, options).eval()
        adapted = model(pixels).logits
        model.merge_adapter()
        facts[f"customize {core}"] = [(adapted - base).norm().item(), (model(pixels).logits - adapted).norm().item()]
        dense = model.unload()
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def torchao(tmp_path_factory):
    beside = Path(sys.prefix) / "torchao"
    if importlib.util.find_spec("torchao") is None and not (beside / "torchao").is_dir():
        pytest.skip(f"torchao is neither installed nor in {beside}: pip install --target {beside} torchao")
    root = Path(__file__).parents[1]
    # Behind everything else: only what is nowhere else comes from there.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")]), str(beside)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folder = tmp_path_factory.mktemp("torchao")
    done = subprocess.run(
        [sys.executable, "-c", TORCHAO, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.processes
def test_a_compressed_vit_in_int8_and_int4_answers_as_before(torchao):
    _, facts = torchao
    # Eight bits per row round by at most 1/254 of the largest weight: under two percent after a few layers.
    assert 0 < facts["error"] < 0.02
    assert facts["same"] > 0.9
    # Every linear layer, those of attention, of narrow MLPs and first factors; second factors stay as they are.
    assert facts["floats"] == [] and facts["kinds"] == ["Linear", "NarrowLinear"]
    assert facts["share"] < 0.65
    assert facts["reloaded"]
    assert facts["loaded"] and facts["plans"][0] == facts["plans"][1]
    first, second, floats = facts["sizes"]
    assert first == second < 0.65 * floats
    # Four bits round by at most 1/14.
    error, same = facts["int4"]
    assert 0.02 < error < 0.3 and same


@pytest.mark.processes
def test_what_int8_weights_cannot_do_is_refused_by_name(torchao):
    _, facts = torchao
    ours, message = facts["refused"].pop("damaged")
    assert ours and "expected weights quantised by torchao, as config.json says, found none" in message
    for what, (ours, message) in facts["refused"].items():
        assert ours and "torchao.quantization.Int8Tensor" in message, what
        assert "Dequantise the model first" in message
    assert re.search("quantized with ComCATQuantizationConfig.*TorchAoConfig", facts["from_pretrained"][1])


ADAPTERS = {
    "compress": {"qk_rank": 4, "vo_rank": 4, "linear_rank": 8},
    "one pair": {"qk_rank": 4},
    "width": {"mlp_width": 20},
    "full factors": {"mode": "customize", "qk_rank": 2, "vo_rank": 2, "init_weights": False},
    "cores": {"mode": "customize", "qk_rank": 2, "vo_rank": 2, "core": True, "init_weights": False},
    "gains": {"mode": "customize", "gains": True, "head_gains": True, "init_weights": False},
}


def _adapted(settings):
    return get_peft_model(small_vit()[0], ComCATConfig(**settings)).eval()


QUANTISED = {
    "compressed": lambda: compress(small_vit()[0], 0.4),
    "compressed bert": lambda: compress(small_bert()[0], 0.4),
    "narrowed": lambda: compress(small_vit()[0], 0.4, batches=[image_inputs()]),
    **{name: partial(_adapted, settings) for name, settings in ADAPTERS.items()},
    **{f"{name}, merged": lambda s=settings: _adapted(s).merge_and_unload() for name, settings in ADAPTERS.items()},
}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("build", QUANTISED.values(), ids=QUANTISED)
def test_dynamic_quantisation_of_torch_answers_as_before(build, tmp_path):
    model = build()
    inputs = small_bert()[1] if model.config.model_type == "bert" else image_inputs()
    found = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    (before, *_), (after, *_) = outputs(model, inputs), outputs(found, inputs)
    assert any(isinstance(module, nn.quantized.dynamic.Linear) for module in found.modules())
    # Eight bits for weights and for inputs.
    assert 0 < (after - before).norm() < 0.15 * before.norm()
    if read_ranks(found) and not hasattr(found, "peft_config"):
        assert plan_of(found).ranks == plan_of(model).ranks
        with pytest.raises(InvalidValueError, match=r"expected a floating point weight, found a torch.*Save that one"):
            found.save_pretrained(tmp_path / "quantised")
        assert not (tmp_path / "quantised").exists()


@pytest.mark.processes
def test_adapters_customize_int8_weights(torchao):
    for core in (False, True):
        effect, error = torchao[1][f"customize {core}"]
        assert effect > 1e-2 and error < 1e-3 * effect, core


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
def test_adapters_come_before_dynamic_quantisation():
    model = quantize_dynamic(small_vit()[0], {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        UnsupportedModuleError, match=r"attention\.\w+: .*dynamic.*Put the adapter in before you quantise"
    ):
        get_peft_model(model, ComCATConfig(mode="customize", qk_rank=2))
