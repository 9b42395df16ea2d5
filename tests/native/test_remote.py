"""Remote code: compressed models that load with `trust_remote_code=True`."""

import json
import shutil

import pytest
import transformers
from transformers import AutoModel, AutoModelForImageClassification, CLIPVisionModel, ViTForImageClassification

from comcat_hf import ComCATConfig, compress, plan_of
from comcat_hf.errors import InvalidValueError
from comcat_hf.native.remote import host_class
from tests.helpers import MODELS, small_vit
from tests.native.test_native import CLASSES, assert_identical


MODULE = "modeling_comcat.py"


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """A cache of remote modules of its own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


def auto_map(folder):
    return json.loads((folder / "config.json").read_text()).get("auto_map", {})


@pytest.mark.parametrize("family", list(CLASSES))
def test_an_auto_class_loads_it_by_its_own_code(family, tmp_path):
    model, inputs = MODELS[family]()
    model = compress(model, 0.4)
    model.save_pretrained(tmp_path / "one", remote_code=True)
    assert auto_map(tmp_path / "one")[CLASSES[family].__name__] == f"modeling_comcat.{type(model).__name__}"
    loaded = CLASSES[family].from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert_identical(model, loaded, inputs)
    # As remote code its class would keep old tensor names, here and for other models.
    assert type(loaded)._auto_class is None
    # It stays with the model, until it is taken out.
    loaded.save_pretrained(tmp_path / "two")
    assert auto_map(tmp_path / "one") == auto_map(tmp_path / "two")
    for name in (MODULE, "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    loaded.save_pretrained(tmp_path / "three", remote_code=False)
    assert not auto_map(tmp_path / "three") and not (tmp_path / "three" / MODULE).exists()
    assert_identical(model, CLASSES[family].from_pretrained(tmp_path / "three"), inputs)


def test_the_backbone_too(tmp_path):
    model, _ = small_vit()
    compress(model, 0.4).save_pretrained(tmp_path, remote_code=True)
    backbone = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(backbone).__name__ == "ViTModel" and plan_of(backbone).ranks


def test_the_address_of_a_repository_becomes_local(tmp_path):
    model, _ = small_vit()
    model = compress(model, 0.4)
    # As the library reads it from the Hub, beside an entry of somebody else.
    model.config.auto_map = {
        "AutoModelForImageClassification": "user/name--modeling_comcat.ViTForImageClassification",
        "AutoConfig": "other--configuration.Config",
    }
    model.save_pretrained(tmp_path)
    found = auto_map(tmp_path)
    assert found["AutoModelForImageClassification"] == "modeling_comcat.ViTForImageClassification"
    assert found["AutoConfig"] == "other--configuration.Config" and (tmp_path / MODULE).is_file()


def test_a_model_that_is_dense_again_does_not_ask_for_it(tmp_path):
    model, _ = small_vit()
    small = compress(model, 0.4, scope="mlp")
    small.save_pretrained(tmp_path / "small", remote_code=True)
    for small_layer, layer in zip(small.vit.layers, model.vit.layers, strict=True):
        small_layer.mlp = layer.mlp
    small.save_pretrained(tmp_path / "dense")
    assert not auto_map(tmp_path / "dense") and not (tmp_path / "dense" / MODULE).exists()


def test_models_without_code_are_refused_before_anything_is_written(tmp_path):
    model, _ = small_vit()
    folder = tmp_path / "out"
    with pytest.raises(InvalidValueError, match="remote_code: expected a compressed model, found a dense one"):
        model.save_pretrained(folder, remote_code=True)
    model.add_adapter(ComCATConfig(mode="customize", vo_rank=2))
    with pytest.raises(InvalidValueError, match=r"found one with adapters; call merge_and_unload"):
        model.save_pretrained(folder, remote_code=True)

    class Unknown(ViTForImageClassification):
        pass

    small = compress(Unknown(model.config).eval(), 0.4)
    with pytest.raises(InvalidValueError, match=r"expected a model that an auto class .* loads, found Unk"):
        small.save_pretrained(folder, remote_code=True)
    assert not folder.exists()


def test_dense_models_keep_their_own_class(tmp_path):
    model, _ = small_vit()
    compress(model, 0.4).save_pretrained(tmp_path / "small", remote_code=True)
    AutoModelForImageClassification.from_pretrained(tmp_path / "small", trust_remote_code=True)
    model.save_pretrained(tmp_path / "dense")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert type(dense) is type(model) and type(AutoModelForImageClassification.from_config(model.config)) is type(
        model
    )


def test_a_configuration_builds_the_library_class():
    model, _ = small_vit()
    assert type(host_class("ViTForImageClassification")._from_config(model.config)) is ViTForImageClassification
    assert host_class("CLIPVisionModel").from_pretrained == CLIPVisionModel.from_pretrained


def test_a_lost_module_is_an_error(tmp_path):
    model, _ = small_vit()
    compress(model, 0.4).save_pretrained(tmp_path / "small", remote_code=True)
    shutil.copytree(tmp_path / "small", tmp_path / "lost", ignore=shutil.ignore_patterns(MODULE))
    with pytest.raises(OSError, match=r"modeling_comcat\.py"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "lost", trust_remote_code=True)
