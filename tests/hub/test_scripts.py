"""Both training scripts push what they made: what arrives, what it says, and no token anywhere."""

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Images
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.customization.pipelines import tiny_sd, write_digits
from tests.hub.client import ROOT


TOKEN = "hf_aVeryLongSecretOfATest"
TRACKER = "tensorboard" if find_spec("tensorboard") else "none"
SHARED = {
    "output_dir": "out",
    "push_to_hub": True,
    "hub_model_id": "user/made",
    "hub_token": TOKEN,
    "hub_private": True,
}
SHARED |= {"report_to": TRACKER, "seed": 1, "max_train_steps": 2, "checkpointing_steps": 1}
COMPRESS = {
    "model_name_or_path": "user/dense",
    "train_file": "private-place/train.parquet",
    "validation_file": "private-place/train.parquet",
    "token": TOKEN,
    "reduction": 0.4,
    "rank_step": 2,
    "calibration_samples": 8,
    "calibration_batch_size": 8,
    "per_device_train_batch_size": 8,
    "eval_steps": "none",
}
CUSTOMIZE = {
    "pretrained_model_name_or_path": "private-place/sd",
    "instance_data_dir": "private-place/three",
    "instance_prompt": "a sks 3",
    "validation_prompt": "sks",
    "num_validation_images": 1,
    "num_inference_steps": 2,
    "resolution": 16,
    "train_batch_size": 1,
}


@pytest.fixture
def place(tmp_path):
    """A folder with models and data, under absolute paths that nobody else needs to know."""
    return tmp_path / "home-of-me"


RUN = """
import contextlib, io, os, runpy, sys
from accelerate.state import AcceleratorState

def run_script(path, arguments, place):
    out, err, argv, sys.argv, before = io.StringIO(), io.StringIO(), sys.argv, [path, *arguments], os.getcwd()
    token, code = os.environ.pop("HF_TOKEN"), 0
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        os.environ["HF_TOKEN"], sys.argv = token, argv
        os.chdir(before)
        AcceleratorState._reset_state(reset_partial_state=True)
    return [code, out.getvalue(), err.getvalue()]
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(hub, client, place):
    """Runs a script in the client's process, which asks the server and has no token but the flag's."""

    def run(script, given):
        hub.users[TOKEN] = "user"
        paths = {name: place / value for name, value in given.items() if str(value).startswith("private")}
        flags = SHARED | given | paths | {"output_dir": place / "out"}
        arguments = [
            str(ROOT / "scripts" / script),
            [f"--{name}={value}" for name, value in flags.items()],
            str(place),
        ]
        client(RUN)
        done = Done(*client(f"run_script(*{arguments!r})"))
        del hub.users[TOKEN]
        assert TOKEN not in done.stdout + done.stderr + client.errors.read_text()
        return done

    return run


def check(hub, place, done, files):
    """What holds for either script; returns the metadata and the text of the card."""
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.endpoint}/user/made/commit/" in done.stderr
    assert hub.repositories["user/made"].private
    uploaded = hub.files("user/made")
    assert set(uploaded) == files | {".gitattributes"}
    local = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert any("checkpoint-1" in path.parts for path in local)
    assert any("tfevents" in path.name for path in local) == (TRACKER != "none")
    secret = TOKEN.encode()
    assert not [path for path, content in local.items() if secret in content]
    assert not [name for name, content in uploaded.items() if secret in content or b"home-of-me" in content]
    card = uploaded["README.md"].decode()
    assert card == (place / "out" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert text.split("```python\n")[1].startswith("import comcat_hf\n")
    return yaml.safe_load(head), text


def test_a_compressed_model(hub, client, place, run):
    names = {i: str(i) for i in range(10)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, id2label=names, label2id={n: i for i, n in names.items()}, **sizes)
    ViTForImageClassification(config).save_pretrained(place / "private-place" / "vit")
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(place / "private-place" / "vit")
    dense = {path.name: path.read_bytes() for path in (place / "private-place" / "vit").iterdir()}
    hub.put("user/dense", dense, private=True)
    digits = load_digits()
    images = [Images.fromarray((image * 15).astype("uint8")).convert("RGB") for image in digits.images[:24]]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names.values()))})
    table = {"image": images, "label": digits.target[:24].tolist()}
    Dataset.from_dict(table, features=features).to_parquet(place / "private-place" / "train.parquet")

    files = {"README.md", "comcat_ranks.json", "config.json", "eval_results.json", "model.safetensors"}
    files |= {"ranks.png", "report.html"}
    head, text = check(hub, place, run("compress_vit.py", COMPRESS), files | {"preprocessor_config.json"})
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "image-classification"
    assert head["tags"] == ["image-classification", "comcat", "model-compression"]
    assert (head["base_model"], head["base_model_relation"]) == ("user/dense", "finetune")
    assert "`user/dense` compressed with ComCAT" in text and "| dense |" in text and "| compressed |" in text
    client(
        "from transformers import AutoModelForImageClassification as Auto\n"
        "from comcat_hf.hub import pull_folder\n"
        f"pulled = pull_folder('user/made', {str(place / 'pulled')!r})\n"
        "again = Auto.from_pretrained(pulled)"
    )
    assert client("comcat_hf.plan_of(again).ranks == comcat_hf.RankPlan.from_pretrained('user/made').ranks") is True


def test_an_adapter_of_a_pipeline(hub, client, place, run):
    tiny_sd(place / "private-place" / "sd")
    write_digits(place / "private-place" / "three", count=2)
    parts = {"comcat_adapter.json", "unet/adapter_config.json", "unet/adapter_model.safetensors"}
    head, text = check(
        hub,
        place,
        run("customize_diffusion.py", CUSTOMIZE),
        parts | {"README.md", "before_after.png", "validation/step-000002.png"},
    )
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image"
    assert head["tags"] == ["text-to-image", "comcat", "diffusers", "peft"]
    assert head["instance_prompt"] == "a sks 3" and "base_model" not in head
    assert head["widget"] == [{"text": "sks", "output": {"url": "validation/step-000002.png"}}]
    assert "adapter for `sd`" in text and "<Gallery />" in text
    client(
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(place / 'private-place' / 'sd')!r})\n"
        "comcat_hf.load_comcat_weights(pipe, 'user/made', adapter_name='made')"
    )
    assert client("pipe.get_active_adapters()") == ["made"]


def test_a_push_that_is_refused_ends_the_script_in_one_line(hub, place, run):
    hub.put("user/made", {"a.json": b"1"})
    tiny_sd(place / "private-place" / "sd")
    write_digits(place / "private-place" / "three", count=2)
    given = CUSTOMIZE | {"hub_private": True, "validation_steps": 99}
    done = run("customize_diffusion.py", {key: given[key] for key in given if "valid" not in key})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: user/made: expected a private repository, found one that everybody can read" in done.stderr
    assert hub.files("user/made") == {"a.json": b"1"}
    # The work is not lost.
    assert (place / "out" / "comcat_adapter.json").is_file()
