"""One artefact from which a model of any reduction is made without images."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from comcat_hf import Elastic, Statistics, collect_statistics, compress, plan_of
from comcat_hf.compression.elastic import ELASTIC_NAME
from comcat_hf.errors import BudgetError, CheckpointError, InvalidValueError
from tests.helpers import assert_close, images, outputs, small_vit


def made(**how):
    dense, inputs = small_vit(intermediate_size=400)
    return compress(dense, batches=[images(8)] * 2, elastic=(0.2, 0.6), progress=False, **how), dense, inputs


@pytest.mark.parametrize("how", [{}, {"metric": "macs"}, {"scope": "mlp"}, {"layout": "plain"}], ids=str)
def test_any_reduction_is_made_from_what_was_saved(how, tmp_path):
    elastic, dense, inputs = made(**how)
    elastic.save_pretrained(tmp_path / "elastic")
    loaded = Elastic.from_pretrained(tmp_path / "elastic", reduction=0.45)
    small = loaded.model
    plan = plan_of(small)
    assert 0.45 <= plan.reached <= 0.455 and plan.layout == how.get("layout", "free")
    assert_close(outputs(small, inputs), outputs(elastic.set_reduction(0.45), inputs))
    # The same as the slow way, from the same moments.
    slow = compress(dense, plan=plan, statistics=elastic.statistics, progress=False)
    assert_close(outputs(small, inputs), outputs(slow, inputs))
    again = loaded.set_reduction(0.2)
    assert again.num_parameters() > small.num_parameters() and loaded.model is again
    small.save_pretrained(tmp_path / "small")
    assert_close(
        outputs(AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval(), inputs),
        outputs(small, inputs),
    )
    # The folder is also that of the dense model.
    assert_close(
        outputs(AutoModelForImageClassification.from_pretrained(tmp_path / "elastic").eval(), inputs),
        outputs(dense, inputs),
    )


class Bare(nn.Module):
    """A model of neither library."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values):
        return self.vit(pixel_values).logits


def test_a_model_of_neither_library_is_made_and_not_saved(tmp_path):
    bare = Bare(small_vit()[0])
    elastic = compress(bare, batches=[images(8)], elastic=(0.2, 0.5), progress=False)
    found, expected = elastic.set_reduction(0.3), compress(bare, 0.3, statistics=elastic.statistics)
    torch.testing.assert_close(found(images(2)), expected(images(2)), rtol=0, atol=1e-5)
    with pytest.raises(InvalidValueError, match=r"expected a model of transformers or diffusers.* found Bare"):
        elastic.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_serve_in_place_of_images():
    dense, inputs = small_vit()
    statistics = collect_statistics(dense, [images(8)], curvature=True, mlp="width")
    first = compress(dense, statistics=statistics, elastic=[0.2, 0.5]).set_reduction(0.3)
    assert_close(outputs(first, inputs), outputs(compress(dense, 0.3, statistics=statistics), inputs))


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ({"elastic": (0.6, 0.2)}, InvalidValueError, "the smaller first"),
        ({"elastic": 0.5}, InvalidValueError, "expected two shares"),
        ({"elastic": (0.3, "0.7")}, InvalidValueError, "expected two shares"),
        ({"elastic": (0.3, 0.99)}, BudgetError, "out of reach"),
        ({"elastic": (0.3, 0.5), "reduction": 0.4}, InvalidValueError, "reduction cannot be used"),
        ({"elastic": (0.3, 0.5), "metric": "latency"}, InvalidValueError, "metric must be one of .*got 'latency'"),
        ({"elastic": (0.3, 0.5), "batches": None}, InvalidValueError, "expected batches"),
    ],
)
def test_a_range_that_cannot_be_is_said(how, kind, says):
    dense, _ = small_vit()

    def unread():
        pytest.fail("The batches were read first.")
        yield

    with pytest.raises(kind, match=says):
        compress(dense, **{"batches": unread(), "progress": False, **how})


def test_the_curvature_alone_is_gathered_where_moments_are_given():
    dense, inputs = small_vit()
    statistics = collect_statistics(dense, [images(8)])
    made = compress(dense, statistics=statistics, batches=[images(8)], elastic=(0.2, 0.5), progress=False)
    whole = collect_statistics(dense, [images(8)], curvature=True, mlp="width")
    assert_close(outputs(made.set_reduction(0.3), inputs), outputs(compress(dense, 0.3, statistics=whole), inputs))


def test_a_folder_that_is_written_half_is_none(tmp_path, monkeypatch):
    elastic, _, _ = made()
    elastic.save_pretrained(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Statistics, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        elastic.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=ELASTIC_NAME):
        Elastic.from_pretrained(tmp_path)


def test_a_reduction_outside_of_the_range_is_said(tmp_path):
    elastic, dense, _ = made()
    for reduction in (0.1, 0.7, float("nan"), "0.3"):
        with pytest.raises(InvalidValueError, match="reduction"):
            elastic.set_reduction(reduction)
    elastic.save_pretrained(tmp_path)
    file = tmp_path / ELASTIC_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"high": 0.9}))
    with pytest.raises(CheckpointError, match=ELASTIC_NAME):
        Elastic.from_pretrained(tmp_path)
    statistics = collect_statistics(dense, [images(4)])
    with pytest.raises(InvalidValueError, match="with curvature"):
        compress(dense, statistics=statistics, elastic=(0.2, 0.5))
