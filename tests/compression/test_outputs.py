"""How far outputs moved: which output counts, in which measure, and which tokens."""

import pytest
import torch
import torch.nn.functional as F

from comcat_hf.compression.outputs import Movement, main_output
from comcat_hf.errors import InvalidValueError
from tests.helpers import MODELS, small_bert_mlm, small_vit


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


def moved(model, expected, found, mask=None, name="logits"):
    movement = Movement(model)
    for index in range(len(expected)):
        part = slice(index, index + 1)
        movement.add({name: expected[part]}, {name: found[part]}, None if mask is None else mask[part])
    return movement.total()


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
