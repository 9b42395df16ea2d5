"""The ways around `get_peft_model`: transformers' own adapter methods, the Auto classes, and fresh processes."""

import ast
import importlib
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import tuners_utils
from peft.utils import PeftType
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    CLIPVisionModelWithProjection,
)

import comcat_hf
from comcat_hf import ComCATConfig
from comcat_hf.errors import CheckpointError, InvalidValueError
from comcat_hf.tuners import model as tuner
from tests.helpers import MODELS, classes_of, outputs
from tests.tuners.cases import FAMILIES, LOW, disturb, equal, every_family, layers_of


AUTO = {
    "vit": AutoModelForImageClassification,
    "deit": AutoModelForImageClassification,
    "clip_vision": CLIPVisionModelWithProjection,
    "bert": AutoModelForSequenceClassification,
}


def edit_config(folder, change):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def by_hand(model, folder):
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), model)
    set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A saved base and one adapter saved by PEFT and by transformers: family, folders, inputs, outputs of both."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    model, inputs = MODELS[family]()
    model.save_pretrained(folder / "base")
    expected = {"base": outputs(model, inputs)}

    model = AUTO[family].from_pretrained(folder / "base")
    model.add_adapter(ComCATConfig(**LOW), "dog")
    disturb(model)
    expected["adapter"] = outputs(model, inputs)
    model.save_pretrained(folder / "transformers")

    model = get_peft_model(AUTO[family].from_pretrained(folder / "base"), ComCATConfig(**LOW))
    disturb(model)
    assert equal(outputs(model, inputs), expected["adapter"])
    model.save_pretrained(folder / "peft")
    return family, folder, inputs, expected


def _base(saved):
    return AUTO[saved[0]].from_pretrained(saved[1] / "base")


def test_the_files_of_both_libraries_are_the_same(saved):
    _, folder, _, _ = saved
    one, other = (load_file(folder / library / "adapter_model.safetensors") for library in ("peft", "transformers"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    for library in ("peft", "transformers"):
        assert PeftConfig.from_pretrained(str(folder / library)).base_model_name_or_path == str(folder / "base")


@pytest.mark.parametrize("library", ["peft", "transformers"])
class TestLoading:
    @pytest.mark.filterwarnings("ignore:Adapter name 'cat' should not be contained")
    @pytest.mark.parametrize("adapter_name", ["default", "cat"])
    def test_peft(self, saved, library, adapter_name):
        _, folder, inputs, expected = saved
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(_base(saved), folder / library, adapter_name=adapter_name)
        assert equal(outputs(model, inputs), expected["adapter"])

    @pytest.mark.parametrize("adapter_name", [None, "cat", "c", "factors"])
    def test_load_adapter_of_transformers(self, saved, library, adapter_name):
        _, folder, inputs, expected = saved
        model = _base(saved)
        report = model.load_adapter(str(folder / library), adapter_name)
        assert not report.unexpected_keys and not report.mismatched_keys
        # transformers filters by substring: it lists what it did not look for where a key contains a "c".
        assert not report.missing_keys or adapter_name == "c"
        assert equal(outputs(model, inputs), expected["adapter"])
        model.disable_adapters()
        assert equal(outputs(model, inputs), expected["base"])
        model.enable_adapters()
        assert equal(outputs(model, inputs), expected["adapter"])

    def test_an_adapter_folder_as_a_model(self, saved, library):
        family, folder, inputs, expected = saved
        model = AUTO[family].from_pretrained(folder / library)
        assert layers_of(model)
        assert equal(outputs(model, inputs), expected["adapter"])

    def test_the_auto_classes_of_peft(self, saved, library):
        family, folder, inputs, expected = saved
        if library == "transformers":
            # As for LoRA: transformers does not write the class that AutoPeftModel reads from auto_mapping.
            model = PeftModel.from_pretrained(_base(saved), folder / library)
        else:
            model = AutoPeftModel.from_pretrained(str(folder / library))
        assert type(model) is PeftModel
        assert equal(outputs(model, inputs), expected["adapter"])
        merged = model.merge_and_unload()
        assert type(merged).__name__ == type(MODELS[family]()[0]).__name__
        assert equal(outputs(merged, inputs), expected["adapter"])


def test_auto_class_of_a_task(tmp_path):
    model, inputs = MODELS["bert"]()
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, ComCATConfig(**LOW, task_type="SEQ_CLS"))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"), num_labels=5)
    assert equal(outputs(loaded, inputs), outputs(model, inputs))


def test_an_adapter_of_a_backbone(tmp_path):
    MODELS["vit"]()[0].save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    _, inputs = MODELS["vit"]()
    model.add_adapter(ComCATConfig(**LOW))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    # The pooler is not in the file of a classifier: it is random in both.
    assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


class TestTransformersAdapters:
    @every_family
    def test_life_of_two_adapters(self, family, tmp_path):
        model, inputs = MODELS[family]()
        base = outputs(model, inputs)
        model.add_adapter(ComCATConfig(**LOW), "dog")
        disturb(model)
        first = outputs(model, inputs)
        model.add_adapter(ComCATConfig(qk_rank=3, init_weights=False), "style")
        second = outputs(model, inputs)
        assert model.active_adapters() == ["style"]
        assert not equal(first, second)
        model.set_adapter("dog")
        assert equal(outputs(model, inputs), first)
        with pytest.raises(InvalidValueError, match="only one"):
            model.set_adapter(["dog", "style"])
        assert equal(outputs(model, inputs), first)
        model.set_adapter("style")
        model.delete_adapter("dog")
        assert equal(outputs(model, inputs), second)
        model.delete_adapter("style")
        assert equal(outputs(model, inputs), base)
        assert not hasattr(model, "peft_config")

    @pytest.mark.parametrize("name", ["cat", "default", "com"])
    def test_loading_a_second_adapter_leaves_the_first_alone(self, name, tmp_path):
        model, inputs = MODELS["vit"]()
        model.add_adapter(ComCATConfig(**LOW, init_weights=False))
        disturb(model)
        loaded = outputs(model, inputs)
        model.save_pretrained(tmp_path)
        model, _ = MODELS["vit"]()
        model.add_adapter(ComCATConfig(**LOW), "dog")
        disturb(model, seed=9)
        first = outputs(model, inputs)
        model.load_adapter(str(tmp_path), name)
        model.set_adapter("dog")
        assert equal(outputs(model, inputs), first)
        model.set_adapter(name)
        assert equal(outputs(model, inputs), loaded)

    def test_a_name_of_a_module_is_refused(self):
        model, inputs = MODELS["bert"]()
        base = outputs(model, inputs)
        with pytest.raises(InvalidValueError, match="'query'"):
            model.add_adapter(ComCATConfig(**LOW), "query")
        assert equal(outputs(model, inputs), base)
        model.add_adapter(ComCATConfig(**LOW), "dog")

    def test_a_trained_adapter_can_be_trained_on(self, tmp_path):
        model, _ = MODELS["vit"]()
        model.add_adapter(ComCATConfig(**LOW))
        model.save_pretrained(tmp_path)
        for trainable in (False, True):
            model, _ = MODELS["vit"]()
            model.load_adapter(str(tmp_path), is_trainable=trainable)
            found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert found == (
                {name for name, _ in model.named_parameters() if "comcat_" in name} if trainable else set()
            )

    def test_weights_given_by_hand(self, tmp_path):
        model, inputs = MODELS["bert"]()
        model.add_adapter(ComCATConfig(**LOW))
        disturb(model)
        state = model.get_adapter_state_dict()
        other, _ = MODELS["bert"]()
        other.load_adapter(peft_config=ComCATConfig(**LOW), adapter_state_dict=state, adapter_name="dog")
        assert equal(outputs(other, inputs), outputs(model, inputs))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"qk_rank": 3}, r"k_proj.weight of shape \(9, 48\), found \(12, 48\)"),
            ({"qk_rank": None}, "k_proj.weight of shape None, found"),
            ({"exclude_modules": ["layers.1.attention"]}, "layers.1.attention.* of shape None, found"),
            ({"mlp_width": 40}, r"mlp.* of shape \(.*\), found None"),
        ],
    )
    @pytest.mark.parametrize("load", [PeftModel.from_pretrained, lambda m, f: m.load_adapter(str(f)), by_hand])
    def test_tensors_of_another_configuration_are_refused(self, tmp_path, load, change, says):
        model, inputs = MODELS["vit"]()
        get_peft_model(model, ComCATConfig(qk_rank=4, vo_rank=5)).save_pretrained(tmp_path)
        edit_config(tmp_path, change)
        model = MODELS["vit"]()[0]
        expected, classes = outputs(model, inputs), classes_of(model)
        with pytest.raises(CheckpointError, match=f"The adapter 'default', by its configuration: expected .*{says}"):
            load(model, tmp_path)
        assert equal(outputs(model, inputs), expected) and classes_of(model) == classes

    @pytest.mark.parametrize("load", [PeftModel.from_pretrained, lambda m, f: m.load_adapter(str(f))])
    def test_modules_saved_beside_an_adapter_are_not_put_into_the_base(self, tmp_path, load):
        config = ComCATConfig(qk_rank=4, modules_to_save=["classifier"])
        get_peft_model(MODELS["vit"]()[0], config).save_pretrained(tmp_path)
        load(MODELS["vit"]()[0], tmp_path)
        edit_config(tmp_path, {"modules_to_save": None})
        with pytest.raises(CheckpointError, match=r"expected .*classifier\.bias of shape None, found"):
            load(MODELS["vit"]()[0], tmp_path)

    def test_a_half_precision_base(self, tmp_path):
        model, inputs = MODELS["vit"]()
        model.add_adapter(ComCATConfig(qk_rank=4))
        model.save_pretrained(tmp_path)
        model = MODELS["vit"]()[0].to(torch.bfloat16)
        model.load_adapter(str(tmp_path))
        half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        assert outputs(model, half)[0].dtype == torch.bfloat16


def test_the_private_names_of_peft_that_the_tuner_needs_are_there():
    """Those that its docstring lists, which are all that the package uses."""
    owners = {
        "BaseTuner": tuners_utils.BaseTuner,
        "BaseTunerLayer": tuners_utils.BaseTunerLayer,
        "PeftModel": PeftModel,
        "tuners_utils": tuners_utils,
    }
    listed = dict(re.findall(r"^- `(\w+)`: ((?:`\w+`,?\s+)+)", tuner.__doc__, re.MULTILINE))
    listed = {owner: re.findall(r"`(\w+)`", names) for owner, names in listed.items()}
    assert listed.keys() == owners.keys()
    assert not [(owner, name) for owner, names in listed.items() for name in names if not hasattr(owners[owner], name)]
    used = set()
    for path in Path(tuner.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            used.add(getattr(node, "attr", None) or getattr(node, "name", None) or getattr(node, "id", None))
    theirs = {name for owner in owners.values() for name in vars(owner) if re.match("_[^_]", name)}
    assert {name for names in listed.values() for name in names} == used & theirs


def test_registering_again_changes_nothing():
    before = PeftType.COMCAT, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.COMCAT], len(PeftType)
    importlib.reload(comcat_hf)
    assert (PeftType.COMCAT, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.COMCAT], len(PeftType)) == before
    assert comcat_hf.ComCATConfig is ComCATConfig
