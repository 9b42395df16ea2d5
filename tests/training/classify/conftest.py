"""Small real ViTs, as models and as folders."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import comcat_hf


CLASSES, SIZE = 4, 16


def dense_vit(dropout=0.1):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIZE,
        patch_size=8,
        num_labels=CLASSES,
        initializer_range=0.1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A dense model and a small one, with and without dropout."""
    root = tmp_path_factory.mktemp("models")
    for name, dropout in (("wet", 0.1), ("dry", 0.0)):
        dense = dense_vit(dropout)
        dense.save_pretrained(root / name / "dense")
        comcat_hf.compress(dense, reduction=0.4, scope="attention").save_pretrained(root / name / "small")
    return root
