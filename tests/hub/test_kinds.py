"""What the project makes, pushed and pulled through the real client: every kind comes back byte for byte."""

import pytest

from tests.customization.pipelines import tiny_unet


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
from comcat_hf.transport import pull_folder, push_folder

pixels = torch.ones(1, 3, 32, 32)

def vit():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)).eval()
"""


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    tiny_unet(attention_head_dim=4, use_linear_projection=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MAKE)
def test_every_kind_comes_back_byte_for_byte_and_is_used(hub, client, tmp_path, unet_folder, kind):
    names = (
        f"folder, cache = {str(tmp_path / 'out')!r}, {str(tmp_path / 'cache')!r}\nunet_folder = {str(unet_folder)!r}"
    )
    client(START + names + MAKE[kind])
    client(f"pull_folder('user/repo', {str(tmp_path / 'pulled')!r}, cache_dir=cache)")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "pulled").rglob("*") if path.is_file()}
    pulled.pop(".gitattributes")
    assert written
    assert pulled == written
    assert client(USE[kind]) is True


def test_an_adapter_of_another_method_is_refused_by_name(hub, client, tmp_path, unet_folder):
    lora = b'{"peft_type": "LORA", "r": 4}'
    hub.put("user/lora", {"adapter_config.json": lora, "adapter_model.safetensors": b"x"})
    result = client(
        START
        + f"unet = UNet2DConditionModel.from_pretrained({str(unet_folder)!r})\n"
        + "try:\n"
        + f"    comcat_hf.load_comcat_weights({{'unet': unet}}, 'user/lora', cache_dir={str(tmp_path)!r})\n"
        + "    said = 'nothing'\n"
        + "except comcat_hf.ComCATError as error:\n"
        + "    said = str(error)\n"
        + "said"
    )
    assert "user/lora: expected to find comcat_adapter.json" in result
