"""The diffusion weights of the original release against its formulas, written out."""

import copy
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from comcat_hf import ComCATConfig, load_comcat_weights
from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError
from comcat_hf.original import convert_original_adapter, write_original_adapter
from tests.customization.pipelines import tiny_sd
from tests.helpers import assert_unchanged, classes_of, state_of


RANK, ALPHA = 3, 0.7


def released(unet):
    """The attention modules in the order of the release."""
    blocks = [*unet.down_blocks[:3], *unet.up_blocks[1:4], unet.mid_block]
    for block in blocks:
        for attention in getattr(block, "attentions", []):
            for transformer in attention.transformer_blocks:
                yield from (transformer.attn1, transformer.attn2)


def random_weights(unet):
    weights = []
    for module in released(unet):
        rows = RANK * module.heads
        for size in (module.to_q.in_features, module.to_k.in_features, module.to_v.in_features):
            weights.append(torch.randn(rows, size) / size**0.5)
        weights.append(torch.randn(module.to_out[0].out_features, rows) / rows**0.5)
    return weights


class ReleaseProcessor:
    """The release's attention: both factors of each pair times alpha."""

    def __init__(self, weights, alpha):
        self.q, self.k, self.v, self.out = weights
        self.alpha = alpha

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        scores = heads(attn.to_q(hidden_states)) @ heads(attn.to_k(context)).mT
        scores = scores + heads(self.alpha * hidden_states @ self.q.T) @ heads(self.alpha * context @ self.k.T).mT
        weights = (scores * attn.scale).softmax(-1)
        mixed = (weights @ heads(attn.to_v(context))).transpose(1, 2).flatten(2)
        added = (weights @ heads(self.alpha * context @ self.v.T)).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed) + self.alpha * added @ self.out.T


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def unet(base):
    return UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()


def inputs(unet):
    sample = torch.randn(2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    return sample, torch.tensor([3, 500]), torch.randn(2, 5, unet.config.cross_attention_dim)


@torch.no_grad()
@pytest.mark.parametrize("given", ["pipeline", "unet folder", "unet"])
def test_the_adapter_answers_as_the_formulas_do(tmp_path, base, unet, given):
    weights = random_weights(unet)
    torch.save([torch.nn.Parameter(weight) for weight in weights], tmp_path / "comcat_weight.pt")
    reference = copy.deepcopy(unet)
    for place, module in enumerate(released(reference)):
        module.set_processor(ReleaseProcessor(weights[4 * place : 4 * place + 4], ALPHA))
    what = {"pipeline": base, "unet folder": str(base / "unet"), "unet": unet}[given]
    before, batch = copy.deepcopy(unet), inputs(unet)
    folder = convert_original_adapter(tmp_path / "comcat_weight.pt", tmp_path / "adapter", what, alpha=ALPHA)
    assert torch.equal(unet(*batch).sample, before(*batch).sample)
    fresh = UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()
    load_comcat_weights({"unet": fresh}, folder)
    expected = reference(*batch).sample
    torch.testing.assert_close(fresh(*batch).sample, expected, rtol=0, atol=1e-5)
    assert (expected - before(*batch).sample).abs().max() > 1e-2
    # And back.
    alpha = write_original_adapter(fresh, tmp_path / "back.pt")
    assert alpha == pytest.approx(ALPHA)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(one, other) for one, other in zip(back, weights, strict=True))


def damaged(unet, change):
    weights = random_weights(unet)
    if change == "short":
        return weights[:-1]
    if change == "rows":
        weights[0] = weights[0][:-1]
    if change == "key":
        weights[1] = weights[1][:, :-1]
    if change == "swapped":
        weights[2], weights[3] = weights[3], weights[2]
    if change == "heads":
        weights[0], weights[1] = weights[0][:-1], weights[1][:-1]
    return {"a": weights} if change == "mapping" else weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("short", r"expected \d+ tensors, 4 for each of \d+ attention modules"),
        ("rows", "number 1 to be"),
        ("key", "number 1 to be"),
        ("swapped", r"number [23] to be"),
        ("heads", "number 0 to have as many rows for each of the"),
        ("mapping", "expected a list of tensors, found dict"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, unet, change, says):
    torch.save(damaged(unet, change), tmp_path / "comcat_weight.pt")
    with pytest.raises(CheckpointError, match=says):
        convert_original_adapter(tmp_path / "comcat_weight.pt", tmp_path / "adapter", unet)
    assert not (tmp_path / "adapter").exists()


def test_a_unet_is_left_as_it_was(tmp_path, base, unet):
    torch.save(random_weights(unet), tmp_path / "w.pt")
    unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"], init_lora_weights=False), "style")
    unet.add_adapter(ComCATConfig(mode="customize", qk_rank=1, vo_rank=1, init_weights=False), "original")
    unet.set_adapter(["style", "original"])
    batch, state, classes = inputs(unet), state_of(unet), classes_of(unet)
    expected = unet(*batch).sample
    convert_original_adapter(tmp_path / "w.pt", tmp_path / "adapter", unet)
    assert_unchanged(unet, state, classes)
    assert torch.equal(unet(*batch).sample, expected)
    assert list(unet.peft_config) == ["style", "original"]
    fresh = UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()
    classes = classes_of(fresh)
    convert_original_adapter(tmp_path / "w.pt", tmp_path / "other", fresh)
    assert classes_of(fresh) == classes and not hasattr(fresh, "peft_config")


def damage_base(folder, change):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if change == "weights":
        weights.unlink()
    if change == "a weight":
        state = load_file(weights)
        del state["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    if change == "half":
        weights.write_bytes(weights.read_bytes()[:1000])
    if change == "config":
        (folder / "unet" / "config.json").write_text("{")
    return folder / "vae" if change == "vae" else folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("weights", "expected the folder or Hub id of a pipeline or of its UNet"),
        ("a weight", r"expected all weights of its UNet, found none of mid_block\.attentions"),
        ("half", "expected the folder or Hub id of a pipeline or of its UNet"),
        ("config", "expected the folder or Hub id of a pipeline or of its UNet.*not a valid JSON"),
        ("vae", "found the class AutoencoderKL"),
    ],
)
def test_bases_that_cannot_be(tmp_path, base, unet, change, says):
    torch.save(random_weights(unet), tmp_path / "w.pt")
    folder = damage_base(shutil.copytree(base, tmp_path / "base"), change)
    with pytest.raises(ComCATError, match=says):
        convert_original_adapter(tmp_path / "w.pt", tmp_path / "adapter", folder)
    with pytest.raises(ComCATError, match="expected the folder or Hub id of a pipeline or of its UNet"):
        convert_original_adapter(tmp_path / "w.pt", tmp_path / "adapter", tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -0.7, 1e200, 1e-200])
def test_alphas_that_cannot_be(tmp_path, unet, alpha):
    torch.save(random_weights(unet), tmp_path / "w.pt")
    with pytest.raises(InvalidValueError, match="alpha: expected a positive number"):
        convert_original_adapter(tmp_path / "w.pt", tmp_path / "adapter", unet, alpha=alpha)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"qk_rank": 2, "vo_rank": 2, "core": True}, "cores or one pair only"),
        ({"qk_rank": 2}, "cores or one pair only"),
        ({"qk_rank": 2, "vo_rank": 2, "target_modules": ["attn1"]}, r"attn2: expected full factors.*found none"),
        ({"qk_rank": 2, "vo_rank": 3}, "expected one rank"),
        ({"qk_rank": 2, "vo_rank": 2, "exclude_modules": r"up_blocks\.0\..*attn.", "gains": True}, r"besides .*\.ff"),
        ({"qk_rank": 2, "vo_rank": 2, "exclude_modules": r"up_blocks\.0\..*", "head_gains": True}, r", head_gains;"),
        ({"qk_rank": 2, "vo_rank": 2}, r"besides up_blocks\.0"),
        ({"qk_rank": 2, "vo_rank": 2, "scale": 0.0, "exclude_modules": r"up_blocks\.0\..*"}, r"the scale 0\.0"),
    ],
)
def test_adapters_that_the_format_cannot_say_are_refused(tmp_path, unet, options, says):
    unet.add_adapter(ComCATConfig(mode="customize", **options))
    with pytest.raises(InvalidValueError, match=says):
        write_original_adapter(unet, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


def test_without_an_adapter_there_is_nothing_to_write(tmp_path, unet):
    with pytest.raises(InvalidValueError, match="expected a ComCAT adapter 'default', found none"):
        write_original_adapter(unet, tmp_path / "w.pt")
