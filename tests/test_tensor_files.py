"""Files of tensors: equal content gives equal bytes, and a failed write leaves the old file."""

import pytest
import torch
from safetensors.torch import load_file

from comcat_hf.tensor_files import read_safetensors, write_safetensors


TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(3, dtype=torch.bfloat16)}
TEXTS = {"z": 'quote " and back\\slash', "ä": "Grüße\n\t\x00", "format": "pt", "empty": "", "json": '{"k": [1]}'}


def test_equal_content_gives_equal_bytes(tmp_path):
    # The library draws a new order of the texts for every file.
    for i in range(12):
        write_safetensors(tmp_path / str(i), dict(sorted(TENSORS.items(), reverse=i % 2)), TEXTS)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(12)}) == 1
    tensors, texts = read_safetensors(tmp_path / "0")
    assert texts == TEXTS and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert load_file(tmp_path / "0").keys() == TENSORS.keys()


def test_texts_are_optional(tmp_path):
    write_safetensors(tmp_path / "plain", TENSORS)
    tensors, texts = read_safetensors(tmp_path / "plain")
    assert not texts and torch.equal(tensors["b"], TENSORS["b"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "weights"
    write_safetensors(file, TENSORS, TEXTS)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_safetensors(file, TENSORS, {"text": 1})
    with pytest.raises((RuntimeError, ValueError)):
        write_safetensors(file, {"sparse": torch.eye(3).to_sparse()})
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["weights"]
