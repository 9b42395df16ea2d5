"""An elastic model on the Hub: all of it in one repository, and of one revision."""

import pytest

from .client import ClientError


START = """
import torch
from transformers import ViTConfig, ViTForImageClassification
import comcat_hf
from comcat_hf import Elastic

def elastic(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)).eval()
    return comcat_hf.compress(model, batches=[torch.randn(8, 3, 32, 32)], elastic=(0.2, 0.5), progress=False)

def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())

first, second = elastic(0), elastic(1)
"""
PUSHES = {
    "by the object": """
first.push_to_hub("user/elastic", revision="v1")
second.push_to_hub("user/elastic", commit_message="Second")
""",
    "while it is saved": """
first.save_pretrained(folder, push_to_hub=True, repo_id="user/elastic", revision="v1")
second.save_pretrained(folder, push_to_hub=True, repo_id="user/elastic", commit_message="Second")
""",
}


@pytest.mark.parametrize("push", PUSHES)
def test_all_of_a_revision_comes_back(hub, client, tmp_path, push):
    client(f"folder, cache = {str(tmp_path / 'folder')!r}, {str(tmp_path / 'cache')!r}\n{START}{PUSHES[push]}")
    assert client('same(Elastic.from_pretrained("user/elastic", cache_dir=cache).dense, second.dense)')
    client('old = Elastic.from_pretrained("user/elastic", 0.3, revision="v1", cache_dir=cache)')
    assert client("same(old.dense, first.dense) and same(old.model, first.set_reduction(0.3))")


def test_a_repository_that_is_private_needs_the_token(hub, client, tmp_path):
    client(f"cache = {str(tmp_path / 'cache')!r}\n{START}first.push_to_hub('user/secret', private=True)")
    read = "Elastic.from_pretrained('user/secret', token={token!r}, cache_dir=cache)"
    with pytest.raises(ClientError, match="user/secret"):
        client(read.format(token=False))
    assert client(f"same({read.format(token='hf_good')}.dense, first.dense)")
