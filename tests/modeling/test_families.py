"""Every known family: full rank is exact, low rank is exact where the weights are, attentions are still recorded."""

import pytest
import transformers
from torch import nn

from comcat_hf.errors import UnsupportedModuleError
from comcat_hf.modeling import (
    LowRankAttention,
    apply_ranks,
    attention_views,
    find_sites,
    known_attention_classes,
    known_sites,
    read_ranks,
)
from tests.architectures import ARCHITECTURES
from tests.helpers import (
    MODELS,
    assert_close,
    assert_unchanged,
    attention_ranks,
    classes_of,
    full_ranks,
    make_low_rank,
    outputs,
    randomize,
    small_vit,
    state_of,
)


FAMILIES = list(MODELS)
IMPLEMENTATIONS = ["sdpa", "eager"]
_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}

# name: model class, config class, settings, what the refusal says.
REFUSED = {
    "swinv2": ("Swinv2Model", "Swinv2Config", _SWIN, "cosine"),
    "roberta": ("RobertaModel", "RobertaConfig", {**_TINY, "vocab_size": 50}, "no family describes this class"),
    "bert_decoder": ("BertLMHeadModel", "BertConfig", {**_TINY, "vocab_size": 50, "is_decoder": True}, "decoder"),
}


def test_models_are_a_fair_test():
    # No bias at zero, and the mask excludes tokens: else what follows would pass without them.
    for build in (MODELS | ARCHITECTURES).values():
        model, inputs = build()
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        assert biases or build not in MODELS.values()
        assert all(bias.abs().min() > 0 for bias in biases if bias.numel() < 100)
        assert "attention_mask" not in inputs or 0 in inputs["attention_mask"]


@pytest.mark.parametrize("family", [*FAMILIES, *ARCHITECTURES])
def test_full_rank_reproduces_the_model(family):
    """With SDPA; the test of recorded attentions does the same with the eager kernel."""
    model, inputs = (MODELS | ARCHITECTURES)[family]()
    expected = outputs(model, inputs)
    ranks = {name: dict(site.choices) for name, site in known_sites(model, "attention").items()}
    if family in MODELS:
        assert {view.module.config._attn_implementation for view in attention_views(model).values()} == {"sdpa"}
        ranks = full_ranks(model, "model")
        assert sum(isinstance(entry, dict) for entry in ranks.values()) >= 2
    apply_ranks(model, ranks)
    assert read_ranks(model) == ranks
    assert family not in MODELS or not any(type(m).__name__ in known_attention_classes() for m in model.modules())
    assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize(
    ("family", "shares"),
    [
        *((family, (0.35, 0.7)) for family in FAMILIES),
        *((name, shares) for name in ARCHITECTURES for shares in ((0.35, 0.65), (0.25, 0.1))),
    ],
)
def test_low_rank_is_exact_where_the_weights_are(family, shares):
    # Full rank copies the weights; this goes through the factorisation, with unequal widths, and with narrow kernels.
    model, inputs = (MODELS | ARCHITECTURES)[family]()
    size = min(site.view.head_dim for site in known_sites(model, "attention").values())
    ranks = dict(zip(("qk", "vo"), (max(int(share * size), 1) for share in shares), strict=True))
    make_low_rank(model, **ranks)
    expected = outputs(model, inputs)
    apply_ranks(model, attention_ranks(model, **ranks))
    assert_close(outputs(model, inputs), expected)
    if family in MODELS:
        model.set_attn_implementation("eager")
        assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize("family", ["vit", "bert", "clip_text"])
@pytest.mark.parametrize("qk, vo", [(4, 11), (5, 10)])
def test_one_rank_less_is_not_exact(family, qk, vo):
    model, inputs = MODELS[family]()
    make_low_rank(model, qk=5, vo=11)
    expected = outputs(model, inputs)
    apply_ranks(model, attention_ranks(model, qk=qk, vo=vo))
    with pytest.raises(AssertionError, match="off by"):
        assert_close(outputs(model, inputs), expected, 1e-4)


# The classes of CLIP, SigLIP and BERT have no option to leave the biases out.
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith(("clip", "siglip", "bert"))])
def test_without_biases(family):
    model, inputs = MODELS[family](**{"qv_bias" if family == "videomae" else "qkv_bias": False})
    assert all(view.query.bias is None for view in attention_views(model).values())
    expected = outputs(model, inputs)
    apply_ranks(model, full_ranks(model))
    assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize(
    ("family", "seen_before"), [*((family, False) for family in FAMILIES), ("vit", True), ("bert", True)]
)
def test_attentions_are_recorded_as_in_the_host(family, seen_before):
    model, inputs = MODELS[family](attn_implementation="eager")
    host, _ = MODELS[family](attn_implementation="eager")
    if seen_before:
        # transformers installs its hooks at the first such call, once per model.
        outputs(model, inputs, output_attentions=True)
    apply_ranks(model, full_ranks(model))
    for _ in range(2):
        expected = outputs(host, inputs, output_attentions=True)
        assert len(expected) >= len(outputs(host, inputs)) + len(attention_views(host)) - _unrecorded(family)
        assert_close(outputs(model, inputs, output_attentions=True), expected)
    assert len(outputs(model, inputs)) == len(outputs(host, inputs))


def _unrecorded(family: str) -> int:
    # The output of ViTMAEForPreTraining has no place for the decoder's two.
    return 2 if family == "vit_mae" else 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_states_are_recorded_as_in_the_host(implementation):
    model, inputs = MODELS["vit"](attn_implementation=implementation)
    expected = outputs(model, inputs, output_hidden_states=True)
    apply_ranks(model, full_ranks(model, "model"))
    assert_close(outputs(model, inputs, output_hidden_states=True), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_attention_by_name_and_factorises_mlps(name):
    model_class, config_class, settings, reason = REFUSED[name]
    model = randomize(getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)))
    state, classes = state_of(model), classes_of(model)
    path = next(n for n, m in model.named_modules() if type(m).__name__.endswith("Attention"))
    for scope in ("model", "attention"):
        with pytest.raises(UnsupportedModuleError, match=reason) as refusal:
            find_sites(model, scope)
        message = str(refusal.value)
        assert message.startswith(path)
        assert f"transformers.models.{type(model).__module__.split('.')[2]}." in message
        assert all(known in message for known in known_attention_classes())
        # Describing a class does not help where its scores are no product.
        assert ("register_attention_family" in message) == (name == "roberta")
    with pytest.raises(UnsupportedModuleError, match=reason):
        apply_ranks(model, {path: {"qk": 2}})
    assert_unchanged(model, state, classes)
    sites = find_sites(model, "mlp")
    assert len(sites) in (4, 6, 8)
    assert not any("attention" in site or "downsample" in site for site in sites)
    apply_ranks(model, dict.fromkeys(sites, 3))
    assert read_ranks(model) == dict.fromkeys(sites, 3)


def test_a_model_without_attention_is_refused():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    with pytest.raises(UnsupportedModuleError, match="ResNetModel has nothing to factorise in scope 'attention'"):
        find_sites(transformers.ResNetModel(config), "attention")


def test_a_subclass_of_a_known_class_is_refused():
    class RotaryViTAttention(transformers.models.vit.modeling_vit.ViTAttention):
        pass

    model, _ = small_vit()
    model.vit.layers[1].attention.__class__ = RotaryViTAttention
    with pytest.raises(UnsupportedModuleError, match=r"^vit.layers.1.attention is a .*RotaryViTAttention"):
        find_sites(model)


@pytest.mark.parametrize("family", ["siglip_vision", "siglip"])
def test_multihead_attention_poolers_stay_dense(family):
    model, inputs = MODELS[family]()
    poolers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(poolers) == 1
    name, pooler = poolers[0]
    state = state_of(pooler)
    assert not any(site.startswith(name) for site in find_sites(model))
    apply_ranks(
        model, {site: 4 if s.kind == "linear" else {"qk": 4, "vo": 4} for site, s in find_sites(model).items()}
    )
    assert_unchanged(pooler, state, classes_of(pooler))
    assert all(tensor.isfinite().all() for tensor in outputs(model, inputs))
    assert any(isinstance(m, LowRankAttention) for m in model.modules())
