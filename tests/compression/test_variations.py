"""Calibration texts with similar tokens in the place of some."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from comcat_hf import compress, vary_tokens
from tests.helpers import small_bert, small_clip, small_vit


SPECIAL = [0, 1, 2]


def texts(model, rows=40, length=16):
    """Two batches of tokens between two special ones, the second padded."""
    torch.manual_seed(0)
    ids = torch.randint(3, model.get_input_embeddings().num_embeddings, (2, rows, length))
    ids[:, :, 0], ids[:, :, -1] = 1, 2
    ids[1, :, 10:] = 0
    return [{"input_ids": one, "attention_mask": (one != 0).long()} for one in ids]


def test_the_texts_come_first_and_as_they_were():
    model, _ = small_bert()
    given = texts(model)
    kept = [batch["input_ids"].clone() for batch in given]
    found = vary_tokens(model, given, SPECIAL, copies=2)
    assert len(found) == 6
    for place, batch in enumerate(found):
        assert torch.equal(batch["attention_mask"], given[place % 2]["attention_mask"])
        assert torch.equal(batch["input_ids"], kept[place % 2]) == (place < 2)
    assert all(torch.equal(batch["input_ids"], ids) for batch, ids in zip(given, kept, strict=True))


def test_special_tokens_and_padding_stay_and_replace_none():
    model, _ = small_bert()
    given = texts(model)
    # Padding with a token that is not special.
    given[1]["input_ids"][:, 10:] = 7
    for index, batch in enumerate(vary_tokens(model, given, SPECIAL, share=1.0)[2:]):
        ids, before = batch["input_ids"], given[index % 2]["input_ids"]
        stay = torch.isin(before, torch.tensor(SPECIAL)) | (batch["attention_mask"] == 0)
        assert torch.equal(ids[stay], before[stay])
        assert (ids[~stay] != before[~stay]).all()
        assert not torch.isin(ids[~stay], torch.tensor(SPECIAL)).any()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_is_replaced(share):
    model, _ = small_bert()
    given = texts(model)
    differ = [
        (found["input_ids"] != batch["input_ids"])[batch["attention_mask"].bool()]
        for found, batch in zip(vary_tokens(model, given, SPECIAL, share=share, copies=1)[2:], given, strict=True)
    ]
    real = sum((~torch.isin(batch["input_ids"], torch.tensor(SPECIAL))).sum() for batch in given)
    assert torch.cat(differ).sum() / real == pytest.approx(share, abs=0.04)


def test_tokens_are_replaced_by_each_of_the_nearest():
    model, _ = small_bert()
    weight = model.get_input_embeddings().weight.detach()
    weight = weight - weight.mean(0)
    given = [{"input_ids": torch.full((50, 20), 9)}]
    found = vary_tokens(model, given, SPECIAL, share=1.0, neighbours=4)
    cosines = cosine_similarity(weight[9], weight)
    cosines[[9, *SPECIAL]] = -1
    assert set(torch.cat([b["input_ids"] for b in found[1:]]).unique().tolist()) == set(
        cosines.topk(4).indices.tolist()
    )


def test_draws_follow_the_seed_alone():
    model, _ = small_bert()
    torch.manual_seed(5)
    first = vary_tokens(model, texts(model), SPECIAL)
    drawn = torch.get_rng_state()
    second = vary_tokens(model, texts(model), SPECIAL)
    assert torch.equal(drawn, torch.get_rng_state())
    other = vary_tokens(model, texts(model), SPECIAL, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_compresses_with_them(dtype):
    model = small_bert()[0].to(dtype)
    batches = vary_tokens(model, texts(model, rows=8), SPECIAL, copies=1)
    small = compress(model, 0.5, batches=batches)
    assert small.num_parameters() < model.num_parameters()


def test_a_text_tower_takes_them():
    model, inputs = small_clip()
    found = vary_tokens(model.text_model, [{"input_ids": inputs["input_ids"]}], [0])
    assert len(found) == 4


def test_models_and_batches_without_tokens_are_refused():
    model, images = small_vit()
    with pytest.raises(ValueError, match=r"^model: expected one with token embeddings, found ViTForImageClass"):
        vary_tokens(model, [images], SPECIAL)
    model, _ = small_bert()
    with pytest.raises(ValueError, match=r"^Batch 0 has no tensor 'input_ids'"):
        vary_tokens(model, [{"attention_mask": torch.ones(2, 3)}], SPECIAL)
    with pytest.raises(ValueError, match=r"^Batch 0: expected whole numbers 'input_ids', found \['input_ids'\]"):
        vary_tokens(model, [{"input_ids": torch.rand(2, 3)}], SPECIAL)
    with pytest.raises(
        ValueError, match=r"^Batch 1: expected 'input_ids' from 0 to \d+, the tokens of Bert.*found 3 to 5"
    ):
        vary_tokens(model, [*texts(model)[:1], {"input_ids": torch.tensor([[3, 50000]])}], SPECIAL)
    with pytest.raises(ValueError, match=r"^Batch 0: expected an 'attention_mask' of the shape \(2, 3\)"):
        vary_tokens(model, [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)}], SPECIAL)
    with pytest.raises(ValueError, match="are empty"):
        vary_tokens(model, [], SPECIAL)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"copies": 0}, "copies: expected a whole number from 1"),
        ({"share": 1.5}, "share: expected a finite number from 0 to 1"),
        ({"neighbours": 0}, "neighbours: expected a whole number from 1 to"),
        ({"neighbours": 10**6}, "neighbours: expected a whole number from 1 to"),
        ({"special_ids": [-1]}, "special_ids: expected a list, each item a whole number from 0 to"),
        ({"special_ids": 0}, "special_ids: expected a list"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, said):
    model, _ = small_bert()
    with pytest.raises(ValueError, match=f"^{said}"):
        vary_tokens(model, texts(model), **{"special_ids": SPECIAL} | wrong)
