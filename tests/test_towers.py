"""A part of a larger model: which modules are meant, what a reduction is of, and saving it within the whole."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from comcat_hf import (
    ComCATConfig,
    RankPlan,
    allocate_ranks,
    collect_statistics,
    compress,
    count_parameters,
    measure_sensitivities,
    plan_of,
    search_ranks,
)
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, read_ranks
from comcat_hf.tuners import ComCATLayer
from tests.helpers import (
    _TEXT,
    _VISION,
    MODELS,
    assert_close,
    full_ranks,
    images,
    outputs,
    randomize,
    small_clip,
    small_vit,
    text_inputs,
)
from tests.modeling.test_diffusers import batch, unet


def _vit():
    return transformers.ViTModel(transformers.ViTConfig(**_VISION))


def llava():
    """A CLIP tower below a language model whose attention is not known."""
    text = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=32)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)
    ids = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    ids[:, :16] = 59
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images()}
    return randomize(transformers.LlavaForConditionalGeneration(config)).eval(), inputs


def _decoder():
    return transformers.BertLMHeadModel(transformers.BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True))


def captioner():
    """A ViT before a decoder whose attention is refused."""
    model = transformers.VisionEncoderDecoderModel(encoder=_vit(), decoder=_decoder())
    inputs = {"pixel_values": images(), "decoder_input_ids": text_inputs()["input_ids"]}
    return randomize(model).eval(), inputs


def two_libraries():
    text = transformers.BertModel(transformers.BertConfig(**_TEXT))
    model = transformers.VisionTextDualEncoderModel(vision_model=_vit(), text_model=text)
    return randomize(model).eval(), {**text_inputs(), "pixel_values": images()}


# By name: the whole, path of the tower, and what loads the whole.
TOWERS = {
    "clip": (small_clip, "vision_model", transformers.AutoModel),
    "siglip": (MODELS["siglip"], "vision_model", transformers.AutoModel),
    "dual": (two_libraries, "vision_model", transformers.AutoModel),
    "captioner": (captioner, "encoder", transformers.VisionEncoderDecoderModel),
    "llava": (llava, "model.vision_tower", transformers.AutoModelForImageTextToText),
}


def put(model, path, tower):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, tower)
    return model


def assert_saved(model, inputs, auto, folder):
    model.save_pretrained(folder)
    loaded = auto.from_pretrained(folder)
    assert not loaded.training
    assert plan_of(loaded).ranks == plan_of(model).ranks == RankPlan.from_pretrained(folder).ranks
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(model, inputs)))
    return loaded


@pytest.mark.parametrize("name", TOWERS)
class TestATower:
    def test_it_is_compressed_within_the_whole_as_alone(self, name, tmp_path):
        build, path, auto = TOWERS[name]
        model, inputs = build()
        tower = model.get_submodule(path)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        small = compress(model, 0.4, target_modules=[path.rpartition(".")[2]])
        alone = compress(tower, 0.4)
        assert read_ranks(small) == {f"{path}.{n}": entry for n, entry in read_ranks(alone).items()}
        # The reduction of a tower is that of the tower alone.
        reached = 1 - count_parameters(small.get_submodule(path)) / count_parameters(tower)
        assert plan_of(small).reached == reached == plan_of(alone).reached
        assert plan_of(small).target_modules == [path.rpartition(".")[2]]
        assert all(torch.equal(t, state[n]) for n, t in small.state_dict().items() if not n.startswith(path))
        assert_saved(small, inputs, auto, tmp_path / "small")
        assert RankPlan.from_pretrained(tmp_path / "small") == plan_of(small)

    def test_it_is_put_back_and_saved(self, name, tmp_path):
        build, path, auto = TOWERS[name]
        model, inputs = build()
        small = put(model, path, compress(model.get_submodule(path), 0.4))
        # Two blocks, and of SigLIP the MLP of the pooler.
        assert len(read_ranks(small)) == 6 + 2 * (name == "siglip")
        loaded = assert_saved(small, inputs, auto, tmp_path / "once")
        assert_saved(loaded, inputs, auto, tmp_path / "twice")
        assert_saved(loaded.get_submodule(path), {"pixel_values": images()}, transformers.AutoModel, tmp_path / "part")

    def test_at_full_rank_it_is_the_dense_one(self, name):
        build, path, _ = TOWERS[name]
        model, inputs = build()
        expected, tower = outputs(model, inputs), model.get_submodule(path)
        plan = RankPlan({f"{path}.{n}": entry for n, entry in full_ranks(tower).items()})
        assert_close(outputs(compress(model, plan=plan), inputs), expected)
        apply_ranks(tower, full_ranks(tower))
        assert_close(outputs(model, inputs), expected)

    def test_batches_of_the_whole_serve_it(self, name):
        build, path, _ = TOWERS[name]
        model, inputs = build()
        first = next(n for n, _ in model.named_modules() if n.startswith(path) and n.endswith("layers.0"))
        targets = {"target_modules": [path], "exclude_modules": [first]}
        statistics = collect_statistics(model, [inputs], **targets)
        assert statistics and all(n.startswith(path) and ".0." not in n for n in statistics)
        measured = measure_sensitivities(model, [inputs], statistics=statistics, **targets)
        plan = allocate_ranks(model, 0.1, statistics=statistics, sensitivities=measured, **targets)
        assert plan == allocate_ranks(model, 0.1, batches=[inputs], strategy="sensitivity", **targets)
        assert all(n.startswith(path) and ".0." not in n for n in plan.ranks)
        small = compress(model, 0.1, batches=[inputs], strategy="sensitivity", **targets)
        assert plan_of(small).ranks == plan.ranks and 0.1 <= plan_of(small).reached <= 0.105
        fitted, again = (
            compress(model, plan=plan, batches=[inputs], compensate=False, statistics=given)
            for given in (None, statistics)
        )
        assert all(map(torch.equal, outputs(fitted, inputs), outputs(again, inputs)))

    @pytest.mark.parametrize("mode", ["compress", "customize"])
    def test_an_adapter_asks_nothing_of_the_rest(self, name, mode):
        build, path, _ = TOWERS[name]
        model, inputs = build()
        expected = outputs(model, inputs)
        targets = {"target_modules": [path]} if mode == "compress" else {"target_modules": rf"{path}\..*"}
        model = get_peft_model(model, ComCATConfig(mode=mode, qk_rank=4, vo_rank=4, **targets))
        layers = {n for n, m in model.named_modules() if isinstance(m, ComCATLayer)}
        assert len(layers) == 2 and all(n.startswith(f"base_model.model.{path}.") for n in layers)
        if mode == "customize":
            assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_are_loaded_alone_from_the_whole(kind, tmp_path):
    (model, inputs), (dense, _) = MODELS[kind](), MODELS[kind]()
    given = {"vision": {"pixel_values": inputs.pop("pixel_values")}, "text": inputs}
    classes = {part: type(getattr(model, f"{part}_model")) for part in given}

    def assert_loaded(folder, *small):
        model.save_pretrained(folder)
        for part, cls in classes.items():
            loaded = cls.from_pretrained(folder)
            assert torch.equal(
                loaded(**given[part]).last_hidden_state,
                getattr(model, f"{part}_model")(**given[part]).last_hidden_state,
            )
            assert bool(read_ranks(loaded)) == (part in small)
        assert (folder / "config.json").read_text().count("quantization_config") == len(small) + bool(small)

    with torch.no_grad():
        # One tower after the other, the second in what was loaded again, and dense ones in their place.
        model.vision_model = compress(model.vision_model, 0.4)
        assert_loaded(tmp_path / "vision", "vision")
        model = transformers.AutoModel.from_pretrained(tmp_path / "vision")
        model.text_model = compress(model.text_model, 0.2)
        assert_loaded(tmp_path / "both", "vision", "text")
        model.vision_model = dense.vision_model
        assert_loaded(tmp_path / "text", "text")
        model.text_model = dense.text_model
        assert_loaded(tmp_path / "dense")


def test_two_towers_in_one_model(tmp_path):
    model, inputs = small_clip()
    model.vision_model, model.text_model = compress(model.vision_model, 0.4), compress(model.text_model, 0.2)
    loaded = assert_saved(model, inputs, transformers.AutoModel, tmp_path)
    assert {n.partition(".")[0] for n in plan_of(loaded).ranks} == {"vision_model", "text_model"}


def test_a_model_is_built_around_a_compressed_tower(tmp_path):
    encoder = compress(randomize(_vit()), 0.4)
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=randomize(_decoder())).eval()
    inputs = {"pixel_values": images(), "decoder_input_ids": text_inputs()["input_ids"]}
    assert_saved(model, inputs, transformers.VisionEncoderDecoderModel, tmp_path / "compressed")
    model.encoder = randomize(_vit())
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_tower_in_a_model_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = small_vit()[0]

        def forward(self, pixel_values):
            return self.vit(pixel_values).logits

    model = Own().eval()
    small = compress(model, 0.3, batches=[images()])
    assert 0.3 <= 1 - count_parameters(small) / count_parameters(model) <= 0.305
    assert small(images()).shape == (2, 5)
    with pytest.raises(InvalidValueError, match=r"Own has no configuration.*inputs="):
        compress(model, 0.3, metric="macs")
    assert read_ranks(compress(model, 0.3, metric="macs", inputs={"pixel_values": images(1)}))


LOAD = """
import sys, torch, comcat_hf, transformers
torch.manual_seed(0)
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[1] + "/inputs.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[1] + "/logits.pt")
"""


def test_another_process_loads_the_whole(tmp_path):
    model, inputs = llava()
    small = put(model, "model.vision_tower", compress(model.model.vision_tower, 0.4))
    small.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), small(**inputs).logits)


def test_a_part_of_a_unet_is_put_back_and_saved(tmp_path):
    model = unet()
    model.mid_block.attentions[0] = compress(model.mid_block.attentions[0], 0.3)
    loaded = assert_saved(model, batch(), type(model), tmp_path)
    assert all(name.startswith("mid_block.attentions.0.") for name in plan_of(loaded).ranks)


# --- what is meant


def test_what_is_meant_and_not_known_is_refused():
    model, _ = llava()
    with pytest.raises(
        UnsupportedModuleError, match=r"language_model\.layers\.0\.self_attn is a .*exclude_modules.*ta"
    ):
        compress(model, 0.3)
    plan = RankPlan({"model.language_model.layers.1.self_attn": {"vo": 3}})
    with pytest.raises(UnsupportedModuleError, match=r"^model\.language_model\.layers\.1\.self_attn is a "):
        compress(model, plan=plan)
    for config in ({"qk_rank": 3}, {"rank_pattern": dict(plan.ranks)}, {"mode": "customize", "vo_rank": 2}):
        with pytest.raises(UnsupportedModuleError, match=r"^model\.language_model\.layers\.\d\.self_attn is a "):
            get_peft_model(llava()[0], ComCATConfig(**config))
    assert compress(model, 0.1, exclude_modules=["language_model"]).num_parameters() < model.num_parameters()
    small = compress(model, plan=RankPlan({"model.vision_tower.encoder.layers.1.self_attn": {"vo": 3}}))
    assert get_peft_model(model, ComCATConfig.from_plan(plan_of(small)))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["layers.1"]},
        {"target_modules": r".*layers\.1\..*"},
        {"target_modules": {"vit.layers.1"}},
        {"exclude_modules": ["layers.0", "classifier"]},
        {"exclude_modules": r"(vit\.layers\.0|classifier).*"},
    ],
)
def test_lists_and_patterns(targets):
    model, inputs = small_vit()
    plan = allocate_ranks(model, 0.1, **targets)
    meant = {f"vit.layers.1.{n}" for n in ("attention", "mlp.fc1", "mlp.fc2")}
    assert set() < set(plan.ranks) <= meant
    whole = count_parameters(model.vit.layers[1] if "target_modules" in targets else model)
    assert plan.reached == pytest.approx(
        (count_parameters(model) - count_parameters(compress(model, plan=plan))) / whole
    )
    macs = allocate_ranks(model, 0.1, metric="macs", **targets)
    assert set(macs.ranks) <= meant
    searched = search_ranks(model, [{**inputs, "labels": torch.tensor([0, 1])}], 0.1, steps=1, **targets)
    assert set(searched.ranks) <= meant
    assert RankPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("call", [compress, allocate_ranks])
@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            {"target_modules": ["vision_tower", "layers.1"]},
            "target_modules: 'vision_tower' names no module.*vit.layers",
        ),
        ({"exclude_modules": ["text_model"]}, "exclude_modules: 'text_model' names no module"),
        ({"target_modules": r"layers\.1"}, "target_modules: .* names no module"),
        ({"target_modules": 7}, "target_modules must be a list.*7"),
        ({"exclude_modules": "("}, "exclude_modules: .* is no regular expression"),
        ({"target_modules": ["embeddings"]}, r"nothing to factorise.*target modules \['embeddings'\]"),
        ({"target_modules": ["layers.1"], "exclude_modules": ["layers"]}, r"nothing.*excluded: \['layers'\]"),
    ],
)
def test_targets_that_cannot_be_used(call, targets, words):
    with pytest.raises(ValueError, match=words):
        call(small_vit()[0], 0.1, **targets)


def test_attention_alone_cannot_be_exchanged():
    attention = small_vit()[0].vit.layers[0].attention
    for how in ({"reduction": 0.4}, {"plan": RankPlan({"": {"qk": 3}})}):
        with pytest.raises(UnsupportedModuleError, match=r"ViTAttention is attention itself.*Give a model that holds"):
            compress(attention, **how)


def test_a_plan_has_its_targets_already():
    model, _ = small_vit()
    with pytest.raises(InvalidValueError, match="plan: expected modules and their ranks, found none"):
        compress(model, plan=RankPlan({}))
    with pytest.raises(InvalidValueError, match=r"With a plan.*target_modules, step cannot be used"):
        compress(model, plan=RankPlan({"classifier": 2}), target_modules=["classifier"], step=2)
    for how in ({"strategy": "bogus"}, {"scope": "attention"}, {"metric": "macs"}):
        with pytest.raises(InvalidValueError, match=rf"With a plan.*{next(iter(how))} cannot be used"):
            compress(model, plan=RankPlan({"classifier": 2}), **how)
    own = RankPlan({"classifier": 2}, scope="mlp", metric="macs")
    compress(model, plan=own, scope="mlp", metric="macs")
    # A plan may reach further than the scope that its ranks were chosen in.
    further = RankPlan({"classifier": 2, "vit.layers.0.mlp": {"width": 40}}, scope="attention")
    for plan in (own, further):
        small = compress(model, plan=plan, batches=[images(4)], progress=False)
        assert read_ranks(small) == plan.ranks


@pytest.mark.parametrize("how", [{}, {"mlp": "rank", "strategy": "spectrum"}])
def test_ranks_for_mlps_as_wholes(how):
    model, _ = small_vit()
    with pytest.raises(InvalidValueError, match=r"mlp='rank' gives ranks .*MLPs as wholes, vit\.layers\.0\.mlp"):
        compress(model, 0.1, target_modules=r".*\.mlp", **how)
    assert plan_of(compress(model, 0.103, target_modules=r".*\.mlp", mlp="width")).reached >= 0.103


def test_poolers_are_no_reason_to_refuse():
    """The reason is the class of the attention in the blocks."""
    model = diffusers.MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2)
    pooler = next(n for n, m in model.named_modules() if "Pool" in type(m).__name__)
    with pytest.raises(UnsupportedModuleError, match="MochiAttention") as caught:
        get_peft_model(model, ComCATConfig(mode="customize", vo_rank=2))
    assert pooler not in str(caught.value)
