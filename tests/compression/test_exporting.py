"""ONNX and torch.export programs of dense and compressed models."""

import json

import pytest
import torch
from torch import nn
from transformers.exporters import ExportedModel

from comcat_hf import ComCATConfig, compress, export_model
from comcat_hf.errors import ComCATError, InvalidValueError
from tests.helpers import MODELS, outputs, small_vit
from tests.native.test_native import narrowed


def ranked(family="vit"):
    """Ranks in attention, linear layers and the classifier, widths in MLPs."""
    model, inputs = MODELS[family]()
    return compress(model, 0.4), inputs


@pytest.mark.parametrize(
    ("build", "family", "format", "dtype"),
    [
        (narrowed, "vit", "onnx", torch.float16),
        (ranked, "bert", "torch", None),
        (ranked, "clip", "torch", None),
        (narrowed, "dinov2", "torch", torch.float16),
        (ranked, "videomae", "torch", None),
        (ranked, "siglip", "torch", torch.bfloat16),
    ],
)
def test_programs_answer_as_the_model(build, family, format, dtype, tmp_path):
    model, _ = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = export_model(model.train(), tmp_path / "out", format, dtype=dtype)
    assert found.difference < {None: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}[dtype]
    assert (found.opset is not None) == (format == "onnx")
    named = ("model.onnx", "model.onnx.data") if format == "onnx" else ("model.pt2",)
    assert found.bytes == sum((found.folder / name).stat().st_size for name in named)
    if format == "onnx":
        weights = sum(p.numel() for p in model.parameters()) * (2 if dtype else 4)
        assert weights * 0.9 < (found.folder / "model.onnx.data").stat().st_size < weights * 1.1
    assert not {"quantization_config", "auto_map"} & json.loads((found.folder / "config.json").read_text()).keys()
    # The model is left as it was, and keeps its plan.
    assert model.training and model.config.quantization_config is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_program_runs_alone_on_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = small_vit()
    small = compress(model, 0.4)
    pixels = inputs["pixel_values"]
    export = export_model(small, tmp_path / "onnx")
    folder = export.folder
    assert export.opset >= 18 and export.difference < 1e-5
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for images in (pixels, pixels[:1], torch.cat([pixels, pixels])):
        found = session.run(["logits"], {"pixel_values": images.numpy()})[0]
        expected = outputs(small, {"pixel_values": images})[0]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
    again = ExportedModel.from_pretrained(folder)
    torch.testing.assert_close(again(pixel_values=pixels).logits, outputs(small, inputs)[0], rtol=0, atol=1e-5)


def test_a_model_that_draws_at_random_cannot_be_checked(tmp_path):
    model, _ = MODELS["vit_mae"]()
    with pytest.raises(ComCATError, match=r"expected outputs within .* found a difference"):
        export_model(model, tmp_path / "out", "torch")


def test_inputs_of_ones_own(tmp_path):
    model, inputs = small_vit()
    export_model(compress(model, 0.4), tmp_path / "out", "torch", inputs=inputs)
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert program(pixel_values=inputs["pixel_values"][:1]).logits.shape[0] == 1
    with pytest.raises(InvalidValueError, match="inputs: expected two or more samples in every tensor, found"):
        export_model(model, tmp_path / "one", "torch", inputs={"pixel_values": inputs["pixel_values"][:1]})


class Stubborn(nn.Module):
    """A module whose result depends on values, which no exporter can trace."""

    def forward(self, hidden):
        return hidden if hidden.sum().item() > 0 else hidden + 1


def overflowing():
    model, _ = small_vit()
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e6
    return model


def untraceable():
    model, _ = small_vit()
    model.vit.layernorm = nn.Sequential(model.vit.layernorm, Stubborn())
    return model


def adapted():
    model, _ = small_vit()
    return nn.Sequential(model)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (overflowing, {"dtype": torch.float16}, InvalidValueError, r"classifier\.weight: expected finite.*bfloat16"),
        (
            overflowing,
            {"dtype": torch.int8},
            InvalidValueError,
            r"dtype: expected one of .*bfloat16, found torch\.int8",
        ),
        (overflowing, {"format": "tflite"}, InvalidValueError, "format: expected one of onnx, torch, found 'tflite'"),
        (untraceable, {"format": "torch"}, ComCATError, r"as torch in .*float32: transformers' exporter failed"),
        (adapted, {}, InvalidValueError, "expected a model of transformers, found Sequential"),
    ],
)
def test_an_error_writes_nothing(build, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_model(build(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_program_that_differs_is_refused(tmp_path, monkeypatch):
    model, _ = small_vit()
    small = compress(model, 0.4)
    call = ExportedModel.__call__

    def wrong(self, **inputs):
        found = call(self, **inputs)
        found.logits = found.logits * 1.01
        return found

    monkeypatch.setattr(ExportedModel, "__call__", wrong)
    with pytest.raises(ComCATError, match=r"as torch in torch\.float32: expected .* found a difference"):
        export_model(small, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [0, 1])
def test_a_program_with_nan_in_any_output_of_any_batch_is_refused(place, tmp_path, monkeypatch):
    model, _ = MODELS["clip"]()
    call = ExportedModel.__call__
    calls = []

    def wrong(self, **inputs):
        found = call(self, **inputs)
        calls.append(found)
        if len(calls) == 2:
            values = [value for value in found.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
            values[place].view(-1)[-1] = float("nan")
        return found

    monkeypatch.setattr(ExportedModel, "__call__", wrong)
    with pytest.raises(ComCATError, match="found a difference of nan"):
        export_model(model, tmp_path / "out", "torch")
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_a_program_that_does_not_run_is_refused(tmp_path, monkeypatch):
    def broken(self, **inputs):
        raise NotImplementedError("no kernel for Expand")

    monkeypatch.setattr(ExportedModel, "__call__", broken)
    with pytest.raises(ComCATError, match=r"as torch in torch\.bfloat16: .*no kernel for Expand.*in float32"):
        export_model(small_vit()[0].to(torch.bfloat16), tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_bfloat16_becomes_float32_in_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    model = small_vit()[0].to(torch.bfloat16)
    assert export_model(model, tmp_path / "out", "onnx").difference < 1e-5
    assert model.dtype == torch.bfloat16


def test_a_folder_with_files_is_left_alone(tmp_path):
    model, _ = small_vit()
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidValueError, match="expected an empty folder to write to, found files"):
        export_model(model, tmp_path, "torch")


def test_adapters_are_exported_with_the_model(tmp_path):
    model, inputs = small_vit()
    model.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2, init_weights=False))
    expected = outputs(model, inputs)[0]
    export_model(model, tmp_path / "out", "torch", inputs=inputs)
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(program(**inputs).logits, expected, rtol=0, atol=1e-5)
