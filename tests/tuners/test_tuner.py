"""The PEFT surface: what `get_peft_model` and `PeftModel` do with the tuner, over models and configurations."""

import copy
import io
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from comcat_hf import initialize_comcat_weights
from comcat_hf.modeling import LowRankAttention, LowRankLinear, NarrowLinear
from tests.helpers import assert_close, assert_unchanged, classes_of, outputs, state_of
from tests.tuners.cases import Case, disturb, equal, every_case, layers_of


@every_case
class TestEveryCase:
    def test_only_the_adapter_can_be_trained(self, case: Case, capsys):
        base, _ = case.model()
        frozen = set(base.state_dict())
        model, _ = case.peft_model()
        assert layers_of(model)
        for name, parameter in model.named_parameters():
            adapter = "comcat_" in name or "modules_to_save" in name
            assert parameter.requires_grad == adapter, name
            assert parameter.ndim >= 1, name
        assert frozen <= {
            name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        } | {name.removeprefix("base_model.model.") for name, _ in model.named_buffers()}
        model.print_trainable_parameters()
        assert "trainable params" in capsys.readouterr().out

    def test_outputs_and_disabling(self, case: Case):
        base, inputs = case.model()
        expected = outputs(base, inputs)
        model, _ = case.peft_model()
        adapted = outputs(model, inputs)
        if case.exact:
            assert_close(adapted, expected)
        else:
            assert not equal(adapted, expected)
        disturb(model)
        adapted = outputs(model, inputs)
        with model.disable_adapter():
            assert equal(outputs(model, inputs), expected)
        assert equal(outputs(model, inputs), adapted)
        assert not equal(adapted, expected)

    @pytest.mark.filterwarnings("ignore:Adapter name 'cat' should not be contained")
    def test_a_saved_adapter_comes_back(self, case: Case, tmp_path):
        model, inputs = case.peft_model("mine")
        disturb(model)
        expected = outputs(model, inputs)
        model.save_pretrained(tmp_path)
        folder = tmp_path / "mine"
        assert not any("mine" in key for key in load_file(folder / "adapter_model.safetensors"))
        for adapter_name, low_cpu_mem_usage in (("default", True), ("cat", False), ("other", True)):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")
                loaded = PeftModel.from_pretrained(
                    case.model()[0], folder, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                )
            assert equal(outputs(loaded, inputs), expected)
            assert not any(parameter.is_meta for parameter in loaded.parameters())
            assert not any(parameter.requires_grad for parameter in loaded.parameters())

    def test_merging_for_a_while(self, case: Case):
        model, inputs = case.peft_model()
        disturb(model)
        expected = outputs(model, inputs)
        with model.disable_adapter():
            base = outputs(model, inputs)
        model.merge_adapter()
        assert all(layer.merged for layer in layers_of(model).values())
        assert equal(outputs(model, inputs), expected)
        model.unmerge_adapter()
        assert not any(layer.merged for layer in layers_of(model).values())
        assert equal(outputs(model, inputs), expected)
        with model.disable_adapter():
            assert equal(outputs(model, inputs), base)

    def test_merging_for_good(self, case: Case, tmp_path):
        model, inputs = case.peft_model()
        disturb(model)
        expected = outputs(model, inputs)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is type(case.model()[0])
        assert not layers_of(merged) and not hasattr(merged, "peft_config")
        assert not any("comcat_" in name or "modules_to_save" in name for name in merged.state_dict())
        kinds = (LowRankAttention, LowRankLinear, NarrowLinear)
        assert any(isinstance(module, kinds) for module in merged.modules()) or case.family == "bert"
        assert equal(outputs(merged, inputs), expected)
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path)
        assert equal(outputs(loaded, inputs), expected)
        assert list(loaded.state_dict()) == list(merged.state_dict())

    def test_unloading_gives_the_base_back(self, case: Case):
        base, inputs = case.model()
        state, classes, expected = state_of(base), classes_of(base), outputs(base, inputs)
        model = get_peft_model(base, case.make_config())
        if "modules_to_save" not in case.settings:  # PEFT leaves the trained copy there.
            disturb(model)
        unloaded = model.unload()
        assert unloaded is base
        assert equal(outputs(base, inputs), expected)
        assert_unchanged(base, state, classes)
        assert not hasattr(base, "peft_config")
        assert "save_pretrained" not in vars(base)

    def test_the_state_dict_by_hand(self, case: Case):
        model, inputs = case.peft_model()
        disturb(model)
        state = get_peft_model_state_dict(model)
        assert not any("default" in key for key in state)
        other, _ = case.peft_model("other")
        result = set_peft_model_state_dict(other, state, adapter_name="other")
        assert not result.unexpected_keys
        assert equal(outputs(other, inputs), outputs(model, inputs))

    def test_injecting_by_the_state_dict(self, case: Case):
        model, inputs = case.peft_model()
        disturb(model)
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "While injecting the PEFT adapters, an inconsistency")
            injected = inject_adapter_in_model(case.make_config(), case.model()[0], state_dict=state)
        result = set_peft_model_state_dict(injected, state)
        assert not result.unexpected_keys
        assert equal(outputs(injected, inputs), outputs(model, inputs))

    def test_training(self, case: Case):
        model, inputs = case.peft_model()
        before = state_of(model)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses = []
        for _ in range(3):
            loss = _first(model(**inputs)).square().mean()
            losses.append(loss.item())
            # By hand: an optimizer of torch imports its compiler first, which takes longer than all tests here.
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= 1e-2 * gradient
        assert losses[-1] < losses[0]
        for name, tensor in model.state_dict().items():
            changed = not torch.equal(tensor, before[name])
            adapter = "comcat_" in name or "modules_to_save" in name
            assert adapter or not changed, name

    def test_random_factors_and_their_closed_form(self, case: Case):
        closed, inputs = case.peft_model()
        model = get_peft_model(case.model()[0], case.make_config(init_weights=False))
        factors = {n: p for n, p in model.named_parameters() if "comcat_" in n}
        assert all(p.isfinite().all() for p in factors.values())
        assert all(p.abs().sum() > 0 for n, p in factors.items() if n.endswith("weight"))
        assert not equal(outputs(model, inputs), outputs(closed, inputs))
        initialize_comcat_weights(model)
        assert equal(outputs(model, inputs), outputs(closed, inputs))
        expected = closed.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    def test_copies(self, case: Case):
        model, inputs = case.peft_model()
        disturb(model)
        expected = outputs(model, inputs)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert equal(outputs(copied, inputs), expected)
            disturb(copied, seed=6)
            assert not equal(outputs(copied, inputs), expected)
            if "modules_to_save" not in case.settings:
                assert equal(outputs(copied.unload(), inputs), outputs(case.model()[0], inputs))
        assert equal(outputs(model, inputs), expected)

    def test_half_precision(self, case: Case):
        dtype = torch.bfloat16 if case.family in ("vit", "bert") else torch.float16
        base, inputs = case.model()
        base = base.to(dtype)
        half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        expected = outputs(base, half)
        model = get_peft_model(base, case.make_config())
        for name, parameter in model.named_parameters():
            trained = "comcat_" in name
            if trained:
                assert parameter.dtype == torch.float32, name
            elif "modules_to_save" not in name:
                assert parameter.dtype == dtype, name
        adapted = outputs(model, half)
        assert [t.dtype for t in adapted] == [t.dtype for t in expected]
        if case.exact:
            assert_close([t.float() for t in adapted], [t.float() for t in expected], 0.1)
        _first(model(**half)).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        merged = model.merge_and_unload()
        assert {p.dtype for n, p in merged.named_parameters() if "norm" not in n.lower()} == {dtype}
        assert_close([t.float() for t in outputs(merged, half)], [t.float() for t in adapted], 0.1)

    def test_autocast(self, case: Case):
        model, inputs = case.peft_model()
        expected = outputs(model, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = outputs(model, inputs)
            _first(model(**inputs)).float().square().mean().backward()
        assert_close([t.float() for t in found], expected, 0.1)


def _first(output) -> torch.Tensor:
    return next(value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
