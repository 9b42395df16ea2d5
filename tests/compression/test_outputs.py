"""How far outputs moved: which output counts, in which measure, and which tokens."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoBackbone,
    BatchFeature,
    Dinov2Config,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from comcat_hf import allocate_ranks, compress, measure_sensitivities
from comcat_hf.compression.calibration.outputs import Movement, main_output
from comcat_hf.errors import InvalidValueError
from tests.compression.test_strategies import movement
from tests.helpers import MODELS, images, randomize, small_bert_mlm, small_vit
from tests.test_towers import captioner


TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("vit", ["logits"]),
        ("bert", ["logits"]),
        ("clip", ["text_embeds", "image_embeds"]),
        ("clip_vision", ["image_embeds"]),
        ("siglip_vision", ["last_hidden_state"]),
        ("yolos", ["logits"]),
    ],
)
def test_the_main_output_is_what_a_model_is_run_for(family, names):
    model, inputs = MODELS[family]()
    with torch.no_grad():
        assert sorted(main_output(model(**inputs))) == sorted(names)


def test_plain_tensors_and_tuples_count_too():
    tensor = torch.ones(2, 3)
    assert main_output(tensor) == {"output": tensor}
    assert list(main_output((torch.ones(2, dtype=torch.long), tensor, tensor))) == ["1"]
    with pytest.raises(InvalidValueError, match="no tensor of floats"):
        main_output({"ids": torch.ones(2, dtype=torch.long)})


@dataclass
class Detected:
    loss: torch.Tensor
    boxes: list


def test_what_is_nested_counts_and_a_loss_does_not():
    maps, loss = (torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)), torch.tensor(0.5)
    expected = {"0": maps[0], "1": maps[1]}
    for name, output in {
        "feature_maps": {"loss": loss, "feature_maps": maps, "hidden_states": (maps[0],)},
        "boxes": Detected(loss, list(maps)),
        "1": (loss, maps),
    }.items():
        found = main_output(output)
        assert list(found) == [f"{name}.{part}" for part in expected]
        assert all(found[f"{name}.{part}"] is tensor for part, tensor in expected.items())
    assert list(main_output([[{"a": maps[0]}, maps[1]], loss])) == ["0.0.a", "0.1"]
    with pytest.raises(InvalidValueError, match=r"no tensor of floats.*found loss"):
        main_output({"loss": loss})
    assert moved(nn.Identity(), torch.ones(4), torch.zeros(4), name="score") == 1


def backbone():
    model = AutoBackbone.from_config(Dinov2Config(**TINY, mlp_ratio=2, out_indices=[1, 2]))
    return randomize(model).eval(), {"pixel_values": images()}


def masked():
    model = ViTForMaskedImageModeling(ViTConfig(**TINY, intermediate_size=64, encoder_stride=8))
    return randomize(model).eval(), {
        "pixel_values": images(),
        "bool_masked_pos": torch.arange(32).view(2, 16) % 2 == 0,
    }


@pytest.mark.parametrize(
    ("build", "names", "targets"),
    [
        (backbone, ["feature_maps.0", "feature_maps.1"], {}),
        (masked, ["reconstruction"], {}),
        # A decoder's words: the vocabulary is in the configuration of a part.
        (captioner, ["logits"], {"target_modules": ["encoder"]}),
    ],
)
@pytest.mark.parametrize(
    "batch", [dict, lambda inputs: (BatchFeature(inputs), torch.ones(2)), lambda inputs: [inputs]]
)
def test_models_are_compressed_by_what_they_return(build, names, targets, batch):
    model, inputs = build()
    with torch.no_grad():
        assert list(main_output(model(**inputs))) == names
    plan = allocate_ranks(model, 0.2, batches=[batch(inputs)], **targets)
    assert plan == allocate_ranks(model, 0.2, batches=[inputs], **targets)
    measured = measure_sensitivities(model, [inputs], **targets)
    assert all(value > 0 for ranks in measured.values() for value in ranks.values())
    errors = []
    for options in ({"batches": [inputs]}, {}):
        small = compress(model, 0.2, **options, **targets)
        errors.append(movement(model, small, inputs))
    assert errors[0] < errors[1]


def test_words_are_a_distribution_wherever_the_vocabulary_stands():
    model, inputs = captioner()
    logits = model(**inputs).logits.detach()
    assert moved(model, logits, logits + 3) == pytest.approx(0, abs=1e-10)


def moved(model, expected, found, mask=None, name="logits"):
    total = Movement(model)
    for index in range(len(expected)):
        part = slice(index, index + 1)
        total.add({name: expected[part]}, {name: found[part]}, None if mask is None else mask[part])
    return total.total()


def test_logits_by_divergence_whatever_is_added_to_all_of_them():
    model, _ = small_vit()
    expected, found = torch.randn(6, 5), torch.randn(6, 5)
    target, log = F.log_softmax(expected.double(), -1), F.log_softmax(found.double(), -1)
    assert moved(model, expected, found) == pytest.approx(float((target.exp() * (target - log)).sum(-1).mean()))
    assert moved(model, expected, expected + 3) == pytest.approx(0, abs=1e-10)
    assert moved(model, expected, found + 3) == pytest.approx(moved(model, expected, found), rel=1e-4)


@pytest.mark.parametrize("task", ["regression", "multi_label_classification"])
def test_logits_that_are_no_distribution_by_squares(task):
    model, _ = small_vit(problem_type=task)
    expected, found = torch.randn(6, 5), torch.randn(6, 5)
    ratio = float((found - expected).square().sum() / expected.square().sum())
    assert moved(model, expected, found) == pytest.approx(ratio, rel=1e-5)
    assert moved(model, 9 * expected, 9 * found) == pytest.approx(ratio, rel=1e-5)
    single, _ = small_vit(num_labels=1)
    assert moved(single, expected[:, :1], found[:, :1]) > 0
    assert moved(small_vit()[0], expected, found, name="last_hidden_state") == pytest.approx(ratio, rel=1e-5)


def test_padded_tokens_do_not_count():
    model, inputs = small_bert_mlm()
    with torch.no_grad():
        expected = model(**inputs).logits
    mask = inputs["attention_mask"]
    found = torch.where(mask[..., None].bool(), expected, expected + torch.randn_like(expected))
    assert moved(model, expected, found) > 1e-3
    assert moved(model, expected, found, mask) == pytest.approx(0, abs=1e-10)
