"""Processes of their own: without the import nothing wrong is loaded; with it, its place does not matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import ViTImageProcessorPil

from comcat_hf import ComCATConfig, RankPlan, compress, export_pipeline, plan_of
from tests.customization.pipelines import tiny_sd
from tests.customization.test_export import adapted
from tests.helpers import WITHOUT_PACKAGE, outputs, small_vit
from tests.modeling.test_diffusers import unet
from tests.tuners.cases import LOW, disturb


pytestmark = pytest.mark.processes
WITHOUT = """
import json, sys
import diffusers, transformers

found = {}
for folder in sys.argv[2:]:
    kind = json.loads(sys.argv[1])[folder]
    try:
        (getattr(diffusers, kind, None) or getattr(transformers, kind)).from_pretrained(folder)
        found[folder] = ""
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
assert "comcat_hf" not in sys.modules
print(json.dumps(found))
"""
# The package leaves its extras to whoever imports them.
FIRST = """
import comcat_hf, comcat_hf.cli
assert not {"diffusers", "sklearn", "matplotlib", "comcat_hf.app", "transformers.trainer"} & set(sys.modules)
assert "DistillationTrainer" in dir(comcat_hf)
assert comcat_hf.DistillationTrainer.__mro__[1].__name__ == "Trainer"
import comcat_hf.app
assert "gradio" not in sys.modules
import peft, transformers, diffusers
"""
LAST = "import diffusers, transformers, peft\nfrom peft import PeftModel, LoraConfig\nimport comcat_hf, comcat_hf"
WITH = """
import sys
{imports}
import torch
from diffusers import UNet2DConditionModel
from transformers import ViTForImageClassification
from peft import PeftConfig, PeftModel
from peft.utils import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
folder = sys.argv[1]
assert type(PeftConfig.from_pretrained(folder + "/adapter")).__name__ == "ComCATConfig"
assert PeftType("COMCAT") is PeftType.COMCAT and PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.COMCAT]
torch.set_num_threads(1)
inputs, expected = torch.load(folder + "/expected.pt", weights_only=True)
model = ViTForImageClassification.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(model, folder + "/adapter").eval()
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
assert comcat_hf.plan_of(UNet2DConditionModel.from_pretrained(folder + "/unet")).ranks
print("done")
"""

REMOTE = (
    WITHOUT_PACKAGE
    + """
from transformers import AutoModelForImageClassification, pipeline

folder = sys.argv[1]
try:
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print("comcat_hf" in str(error) and "pip install comcat_hf" in str(error))
sys.meta_path.pop(0)
assert "comcat_hf" not in sys.modules
import torch
from PIL import Image
torch.set_num_threads(1)
classify = pipeline("image-classification", folder, trust_remote_code=True)
inputs, expected = torch.load(folder + "/expected.pt", weights_only=True)
with torch.no_grad():
    print(torch.equal(classify.model(**inputs).logits, expected), len(classify(Image.new("RGB", (20, 20)))))
"""
)


def start(code, *arguments):
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_the_import_only_dense_models_open(tmp_path):
    model, _ = small_vit()
    plans = {scope: plan_of(compress(model, 0.4, scope=scope)) for scope in ("model", "attention", "mlp")}
    plans["vo"] = RankPlan({"vit.layers.1.attention": {"vo": 15}})
    plans["qk"] = RankPlan({"vit.layers.1.attention": {"qk": 15}})
    plans["classifier"] = RankPlan({"classifier": 2})
    plans["width"] = RankPlan({"vit.layers.1.mlp": {"width": 79}})
    for name, plan in plans.items():
        compress(model, plan=plan).save_pretrained(tmp_path / name)
    kinds = {str(tmp_path / name): "AutoModelForImageClassification" for name in plans}
    compress(unet(), 0.3, scope="attention").save_pretrained(tmp_path / "unet")
    kinds[str(tmp_path / "unet")] = "UNet2DConditionModel"
    base = tiny_sd(tmp_path / "sd")
    # Full factors make heads wider; cores and what is truncated do not.
    for name, options, truncate in (("full", {}, False), ("core", {"core": True}, False), ("cut", {}, True)):
        export_pipeline(adapted(base, **options), tmp_path / name, truncate=truncate)
        kinds[str(tmp_path / name)] = "StableDiffusionPipeline"
    process = start(WITHOUT, json.dumps(kinds), *kinds)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    found = {Path(folder).name: error for folder, error in json.loads(said.splitlines()[-1]).items()}
    assert [name for name, error in found.items() if not error] == ["core", "cut"]
    assert all(found[name].startswith("RuntimeError: You set `ignore_mismatched_sizes`") for name in plans)
    assert errors.count("MISMATCH") >= len(plans) and "size mismatch" in errors
    # What to import stands in the message.
    assert "Unknown quantization type, got comcat_hf" in errors
    assert "Unknown quantization type, got comcat_hf" in found["unet"]


def test_the_import_may_be_first_or_last(tmp_path):
    model, inputs = small_vit()
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, ComCATConfig(**LOW))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((inputs, outputs(model, inputs)[0]), tmp_path / "expected.pt")
    compress(unet(), 0.3, scope="attention").save_pretrained(tmp_path / "unet")
    running = {name: start(WITH.format(imports=code), tmp_path) for name, code in (("first", FIRST), ("last", LAST))}
    for name, process in running.items():
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and said.strip().endswith("done"), f"{name}: {errors[-2000:]}"


def test_remote_code_needs_the_package_and_no_import(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, inputs = small_vit()
    small = compress(model, 0.4)
    small.save_pretrained(tmp_path / "small", remote_code=True)
    ViTImageProcessorPil(size=model.config.image_size).save_pretrained(tmp_path / "small")
    torch.save((inputs, outputs(small, inputs)[0]), tmp_path / "small" / "expected.pt")
    process = start(REMOTE, tmp_path / "small")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and said.split() == ["True", "True", "5"], said + errors[-2000:]
