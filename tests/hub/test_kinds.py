"""What the project makes, pushed and pulled through the real client: every kind comes back byte for byte."""

import json

import pytest

from tests.customization.pipelines import tiny_unet
from tests.hub.client import ClientError
from tests.hub.folders import read, write


MAKE = {
    "plan": """
plan = comcat_hf.allocate_ranks(vit(), 0.4, strategy="uniform")
plan.save_pretrained(folder)
address = plan.push_to_hub("user/repo")
""",
    "model": """
small = comcat_hf.compress(vit(), 0.4)
small.save_pretrained(folder)
address = push_folder(folder, "user/repo")
""",
    "vit adapter": """
from peft import get_peft_model
model = get_peft_model(vit(), comcat_hf.ComCATConfig(qk_rank=4, vo_rank=4))
model.save_pretrained(folder)
address = push_folder(folder, "user/repo")
""",
    "pipeline adapter": """
unet = UNet2DConditionModel.from_pretrained(unet_folder)
unet.add_adapter(comcat_hf.ComCATConfig(mode="customize", qk_rank=2, vo_rank=2))
comcat_hf.save_comcat_weights({"unet": unet}, folder)
address = push_folder(folder, "user/repo")
""",
}
# What a user does with the Hub id, straight from there.
USE = {
    "plan": 'comcat_hf.RankPlan.from_pretrained("user/repo", cache_dir=cache).ranks == plan.ranks',
    "model": """
again = ViTForImageClassification.from_pretrained("user/repo", cache_dir=cache).eval()
held = small.state_dict()
same = all(torch.equal(value, held[key]) for key, value in again.state_dict().items())
same and (again(pixels).logits - small.eval()(pixels).logits).abs().max().item() < 1e-6
""",
    "vit adapter": """
from peft import PeftModel
again = PeftModel.from_pretrained(vit(), "user/repo", cache_dir=cache).eval()
torch.equal(again(pixels).logits, model.eval()(pixels).logits)
""",
    "pipeline adapter": """
again = UNet2DConditionModel.from_pretrained(unet_folder)
comcat_hf.load_comcat_weights({"unet": again}, "user/repo", cache_dir=cache)
path = "mid_block.attentions.0.transformer_blocks.0.attn1.comcat_factors.default.query.weight"
torch.equal(again.get_parameter(path), unet.get_parameter(path))
""",
}
START = """
import torch
from diffusers import UNet2DConditionModel
from transformers import ViTConfig, ViTForImageClassification
from comcat_hf.hub import pull_folder, push_folder

pixels = torch.ones(1, 3, 32, 32)

def vit():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)).eval()
"""


def start(**places):
    return START + "".join(f"{name} = {str(place)!r}\n" for name, place in places.items())


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    tiny_unet(attention_head_dim=4, use_linear_projection=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MAKE)
def test_every_kind_comes_back_byte_for_byte_and_is_used(hub, client, tmp_path, unet_folder, kind):
    client(start(folder=tmp_path / "out", cache=tmp_path / "cache", unet_folder=unet_folder) + MAKE[kind])
    client(f"pull_folder('user/repo', {str(tmp_path / 'pulled')!r}, cache_dir=cache)")
    written, pulled = read(tmp_path / "out"), read(tmp_path / "pulled")
    pulled.pop(".gitattributes")
    assert written
    assert pulled == written
    assert client(USE[kind]) is True


# As users of each library push, in place of a folder.
PUSH = {
    "plan": ('plan.push_to_hub("user/repo", private=True, revision="v1")', MAKE["plan"]),
    "model": ('small.push_to_hub("user/repo", private=True, revision="v1")', MAKE["model"]),
    "model, saving": (
        'small.save_pretrained(folder + "2", push_to_hub=True, repo_id="user/repo", private=True, revision="v1")',
        MAKE["model"],
    ),
    "vit adapter": ('model.push_to_hub("user/repo", private=True, revision="v1")', MAKE["vit adapter"]),
    "pipeline adapter": (
        'comcat_hf.save_comcat_weights({"unet": unet}, folder, push_to_hub=True, repo_id="user/repo", private=True)',
        MAKE["pipeline adapter"],
    ),
}


@pytest.mark.parametrize("kind", PUSH)
def test_every_kind_is_pushed_as_its_library_does_it(hub, client, tmp_path, unet_folder, kind):
    push, make = PUSH[kind]
    client(start(folder=tmp_path / "out", cache=tmp_path / "cache", unet_folder=unet_folder) + make)
    hub.repositories.clear()
    client(push)
    assert hub.repositories["user/repo"].private
    revision = "main" if kind == "pipeline adapter" else "v1"
    written, pushed = read(tmp_path / "out"), hub.files("user/repo", revision)
    # PEFT's own card is written anew.
    written.pop("README.md", None)
    assert written and {name: pushed[name] for name in written} == written
    use = USE[kind.split(",")[0]].replace("cache_dir=cache", f"cache_dir=cache, revision={revision!r}")
    assert client(use) is True


def test_a_push_while_saving_uploads_what_was_saved(hub, client, tmp_path):
    folder = write(tmp_path / "out", {"old.json": b"{}", "checkpoint-1/mine.json": b"{}"})
    client(start(folder=folder, cache=tmp_path / "cache") + MAKE["model"].replace("address", "small.train(); address"))
    hub.repositories.clear()
    client("state = {name: value / 2 for name, value in small.state_dict().items()}")
    how = 'state_dict=state, max_shard_size="20kB", commit_message="Halves", private=True, revision="v1", tags=["x"]'
    client(f'small.save_pretrained(folder, False, push_to_hub=True, repo_id="user/other", {how})')
    assert "user/other" not in hub.repositories
    (folder / "model.safetensors").unlink()
    client(f'small.save_pretrained(folder, push_to_hub=True, repo_id="user/repo", {how})')
    pushed, written = hub.files("user/repo", "v1"), read(folder)
    assert len([name for name in pushed if name.endswith(".safetensors")]) > 1
    assert {"comcat_ranks.json", "config.json"} < pushed.keys() and b"- x" in pushed["README.md"]
    pushed.pop(".gitattributes")
    assert pushed == {name: written[name] for name in pushed}
    assert "old.json" not in pushed and "checkpoint-1/mine.json" not in pushed
    repository = hub.repositories["user/repo"]
    assert repository.private and repository.messages[-1] == "Halves" and "config.json" not in hub.files("user/repo")
    client('again = ViTForImageClassification.from_pretrained("user/repo", cache_dir=cache, revision="v1")')
    assert client("all(torch.equal(value, state[name]) for name, value in again.state_dict().items())")
    # By the name of the folder.
    card = (folder / "README.md").read_bytes()
    client("small.save_pretrained(folder, push_to_hub=True)")
    # Words written on the Hub stay.
    hub.put("user/out", {**hub.files("user/out"), "README.md": b"Written there."})
    client("small.save_pretrained(folder, push_to_hub=True)")
    assert hub.files("user/out")["README.md"] == b"Written there." and (folder / "README.md").read_bytes() == card
    client('small.save_pretrained(folder, push_to_hub=True, tags="more")')
    assert "comcat_ranks.json" in hub.files("user/out")
    assert b"- x" in hub.files("user/out")["README.md"] and b"- more" in hub.files("user/out")["README.md"]


# An adapter on a base that was read from a folder: calls that make it, save it and upload it.
LOCAL_BASE = {
    "PEFT": (
        'model = get_peft_model(base, config, adapter_name="cat")',
        "model.save_pretrained(folder)",
        'model.push_to_hub("user/repo")',
    ),
    "transformers": ("base.add_adapter(config)", "base.save_pretrained(folder)", 'base.push_to_hub("user/repo")'),
    "saving": ("base.add_adapter(config)", 'base.save_pretrained(folder, push_to_hub=True, repo_id="user/repo")', ""),
    "configuration": (
        "config.base_model_name_or_path = base.name_or_path",
        "config.save_pretrained(folder)",
        'config.push_to_hub("user/repo")',
    ),
}


@pytest.mark.parametrize("kind", LOCAL_BASE)
def test_a_local_base_is_kept_in_the_folder_and_not_uploaded(hub, client, tmp_path, kind):
    base, folder = tmp_path / "base", write(tmp_path / "out", {"old/mine.json": b"{}"})
    make, save, push = LOCAL_BASE[kind]
    client(
        start(base_folder=base, folder=folder) + "from peft import get_peft_model\n"
        "vit().save_pretrained(base_folder)\nbase = ViTForImageClassification.from_pretrained(base_folder)\n"
        f"config = comcat_hf.ComCATConfig(qk_rank=4, vo_rank=4)\n{make}\n{save}\n{push}"
    )
    uploaded = {name.removeprefix("cat/"): content for name, content in hub.files("user/repo").items()}
    saved = {path.name: path.read_bytes() for path in (folder / "cat" if kind == "PEFT" else folder).glob("adapter*")}
    configs = [json.loads(files.pop("adapter_config.json")) for files in (saved, uploaded)]
    assert configs[0]["base_model_name_or_path"] == str(base)
    assert configs[1] == configs[0] | {"base_model_name_or_path": None}
    assert not any(bytes(base) in content for content in uploaded.values())
    # Besides, what was saved and nothing else.
    assert uploaded.keys() - {"README.md", ".gitattributes"} == saved.keys()
    assert all(uploaded[name] == content for name, content in saved.items())


# Models and pipelines whose configurations name where their parts were read from.
PARTS = {
    "captioner": """
from tests.test_towers import captioner
from transformers import VisionEncoderDecoderModel
parts = captioner()[0]
parts.encoder.save_pretrained(folder + "/encoder"), parts.decoder.save_pretrained(folder + "/decoder")
model = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(folder + "/encoder", folder + "/decoder")
model.encoder = comcat_hf.compress(model.encoder, 0.4)
""",
    "pipeline": """
from pathlib import Path
from diffusers import DiffusionPipeline
from tests.customization.pipelines import tiny_sd
model = DiffusionPipeline.from_pretrained(tiny_sd(Path(folder)))
model.text_encoder = comcat_hf.compress(model.text_encoder, 0.2)
""",
}


@pytest.mark.parametrize(
    "push", ["model.push_to_hub(name)", "model.save_pretrained(saved, push_to_hub=True, repo_id=name)"]
)
@pytest.mark.parametrize("kind", PARTS)
def test_folders_of_parts_are_not_uploaded(hub, client, tmp_path, kind, push):
    client(start(folder=tmp_path / "base", saved=tmp_path / "saved", name="user/repo") + PARTS[kind] + push)
    uploaded = hub.files("user/repo")
    assert any(name.endswith("comcat_ranks.json") for name in uploaded)
    assert not [name for name, content in uploaded.items() if bytes(tmp_path) in content]


def test_only_the_adapter_is_pushed_from_a_folder_that_holds_more(hub, client, tmp_path, unet_folder):
    write(tmp_path / "out", {"optimizer.pt": b"x", "m.txt": b"x", "old/adapter_config.json": b"{}", "README.md": b"m"})
    client(start(folder=tmp_path / "out", unet_folder=unet_folder) + MAKE["pipeline adapter"])
    hub.repositories.clear()
    save = 'comcat_hf.save_comcat_weights({"unet": unet}, folder, push_to_hub=True, '
    client(f'{save}commit_message="Mine")')
    adapter = {"comcat_adapter.json", "unet/adapter_config.json", "unet/adapter_model.safetensors"}
    assert set(hub.files("user/out")) == adapter | {"README.md", ".gitattributes"}
    assert hub.repositories["user/out"].messages[-1] == "Mine"
    with pytest.raises(ClientError, match="has no argument privat; for an upload it takes private"):
        client(f"{save}privat=True)")
    with pytest.raises(ClientError, match=r"other/dog: expected to upload 4 files, but"):
        client(f"{save}repo_id='other/dog')")


OTHERS = {
    "lora": (
        {"adapter_config.json": b'{"peft_type": "LORA"}'},
        "an adapter of PEFT of the method LORA; load it with Peft",
    ),
    "vit": ({"adapter_config.json": b'{"peft_type": "COMCAT", "mode": "compress"}'}, "method COMCAT, mode compress;"),
    "diffusers": (
        {"pytorch_lora_weights.safetensors": b"x", "README.md": b""},
        r"LoRA weights of diffusers; load it with pipe\.load_lora_weights",
    ),
    "model": ({"config.json": b"{}", "comcat_ranks.json": b"{}"}, "a compressed model; load it with AutoModel"),
    "plan": ({"comcat_ranks.json": b"{}"}, r"a rank plan; load it with comcat_hf\.RankPlan"),
    "dense": ({"config.json": b"{}", "model.safetensors": b"x"}, "a model; load it with the library that wrote it"),
    "pipeline": ({"model_index.json": b"{}", "unet/config.json": b"{}"}, "a whole pipeline; load it with Diffusion"),
    "adapter": ({"comcat_adapter.json": b"{}"}, r"a pipeline adapter of ComCAT; load it with comcat_hf\.load_comcat"),
    "damaged": ({"adapter_config.json": b"{"}, r"expected"),
    "unknown": ({"x.json": b"{}"}, "comcat_adapter.json|comcat_ranks.json"),
}


@pytest.mark.parametrize("place", ["hub", "folder"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_of_another_kind_is_said_by_name(hub, client, tmp_path, place, kind):
    files, says = OTHERS[kind]
    hub.put("user/other", files)
    write(tmp_path / "other", files)
    source = "user/other" if place == "hub" else str(tmp_path / "other")
    acts = {"load_comcat_weights({'unet': torch.nn.Linear(1, 1)}, ": kind != "adapter"}
    acts["RankPlan.from_pretrained("] = kind not in ("model", "plan")
    for act in (act for act, wrong in acts.items() if wrong):
        hub.requests.clear()
        with pytest.raises(ClientError, match=says) as caught:
            client(f"import torch\ncomcat_hf.{act}{source!r}, cache_dir={str(tmp_path / 'cache')!r})")
        assert caught.value.kind == "CheckpointError"
        assert source in caught.value.text
        assert not [request for request in hub.requests if "GET" in request and request.endswith(".safetensors")]


def test_weights_alone_are_said_to_be_so(client, tmp_path):
    write(tmp_path, {"dog.safetensors": b"x"})
    with pytest.raises(ClientError, match=r"dog\.safetensors: expected comcat_adapter\.json or the folder"):
        client(f"comcat_hf.load_comcat_weights({{}}, {str(tmp_path / 'dog.safetensors')!r})")


def test_in_a_subfolder_of_a_repository_too(hub, client, tmp_path):
    hub.put("user/other", {"comcat_adapter.json": b"{}", "dog/pytorch_lora_weights.safetensors": b"x"})
    with pytest.raises(ClientError, match=r"expected to find dog/comcat_adapter\.json, found LoRA weights"):
        client(f"comcat_hf.load_comcat_weights({{}}, 'user/other', subfolder='dog', cache_dir={str(tmp_path)!r})")
    hub.put("user/empty", {"README.md": b""})
    with pytest.raises(ClientError, match=r"user/empty: .*the repository has no such file"):
        client(f"comcat_hf.load_comcat_weights({{}}, 'user/empty', cache_dir={str(tmp_path)!r})")
