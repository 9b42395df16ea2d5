"""A compressed model goes on being a model: adapters of other methods on it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import comcat_hf


@pytest.fixture
def small():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return comcat_hf.compress(ViTForImageClassification(config), 0.4).eval()


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
