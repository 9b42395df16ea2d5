"""A user's own attention class becomes known by describing it."""

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import BertConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from comcat_hf import AttentionFamily, ComCATConfig, RankPlan, compress
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, find_sites, known_attention_classes, register_attention_family, views
from tests.helpers import assert_close, attention_ranks, full_ranks, outputs, randomize


class OwnAttention(nn.Module):
    """What a user may bring: other names, and no eager function beside it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads, self.width, self.scale, self.drop = 3, 16, 0.2, 0.1
        self.wq, self.wk, self.wv = (nn.Linear(48, 48) for _ in range(3))
        self.wo = nn.Linear(48, 48, bias=False)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], self.heads, self.width)
        states = [w(hidden_states).view(shape).transpose(1, 2) for w in (self.wq, self.wk, self.wv)]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attend(self, *states, attention_mask, scaling=self.scale, is_causal=False)
        return self.wo(output.reshape(hidden_states.shape)), weights


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = BertConfig(num_labels=2)
        self.config._attn_implementation = "sdpa"
        self.blocks = nn.ModuleList([nn.ModuleDict({"attention": OwnAttention(self.config)}) for _ in range(2)])

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = hidden_states + block["attention"](hidden_states, is_causal=False)[0]
        return hidden_states


def own_family(**changes):
    names = {"query": "wq", "key": "wk", "value": "wv", "output": "wo", "num_heads": "heads", "head_dim": "width"}
    host = f"{OwnAttention.__module__}.OwnAttention"
    return AttentionFamily(host, **{**names, "scaling": "scale", "dropout": "drop", **changes})


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(views._registry, "families", dict(views._registry.families))


def test_unregistered_class_is_refused_with_advice():
    with pytest.raises(UnsupportedModuleError, match=r"^blocks\.0\.attention is a .*OwnAttention.*register_attention"):
        find_sites(OwnModel())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_registered_class_is_known(registry, implementation):
    register_attention_family(own_family())
    assert "OwnAttention" in known_attention_classes()
    model = randomize(OwnModel()).eval()
    inputs = {"hidden_states": torch.randn(2, 5, 48)}
    expected = outputs(model, inputs)
    model.config._attn_implementation = implementation
    apply_ranks(model, full_ranks(model))
    assert_close(outputs(model, inputs), expected)
    assert all(isinstance(block["attention"], OwnAttention) for block in model.blocks)
    apply_ranks(other := randomize(OwnModel()), attention_ranks(other, 3, 5))
    assert outputs(other, inputs)[0].shape == (2, 5, 48)


def test_registering_twice(registry):
    register_attention_family(own_family())
    register_attention_family(own_family())
    with pytest.raises(InvalidValueError, match="OwnAttention is registered already"):
        register_attention_family(own_family(scaling="other"))


def test_refusal_of_an_instance(registry):
    register_attention_family(own_family(refuse=_only_three_heads))
    assert len(find_sites(OwnModel(), "attention")) == 2
    model = OwnModel()
    model.blocks[1]["attention"].heads = 6
    with pytest.raises(UnsupportedModuleError, match=r"^blocks\.1\.attention is a .*: it has 6 heads"):
        find_sites(model, "attention")


def plain_scale(module):
    return (module.wq.out_features // module.heads) ** -0.5


class PlainAttention(nn.Module):
    """No configuration, no width of its own, and one tensor for an answer."""

    def __init__(self, width=48):
        super().__init__()
        self.heads = 3
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states):
        heads = (w(states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


PLAIN = {"head_dim": None, "dropout": None, "scale_of": plain_scale}


@pytest.mark.parametrize("ranks", [{"qk": 16, "vo": 16}, {"qk": 16}, {"vo": 16}])
@pytest.mark.parametrize("mode", [True, False])
def test_a_width_that_the_class_reads_off_its_projections(registry, ranks, mode):
    """Both ways of running: the kernel of the configuration, and the class's own forward."""
    register_attention_family(own_family(head_dim=None, dropout=None))
    register_attention_family(replace(own_family(**PLAIN), host=f"{__name__}.PlainAttention"))
    plain = nn.Sequential(PlainAttention(), PlainAttention())
    for model, name in ((OwnModel(), "hidden_states"), (plain, "input")):
        inputs = {name: torch.randn(2, 5, 48)}
        expected = outputs(randomize(model).train(mode), inputs)
        sites = find_sites(model, "attention")
        small = compress(model, plan=RankPlan(dict.fromkeys(sites, ranks))).train(mode)
        assert_close(outputs(small, inputs), expected)
        for reduction, batches in ((0.5, None), (0.3, [inputs])):
            small = compress(model, reduction, scope="attention", batches=batches)
            assert outputs(pickle.loads(pickle.dumps(small)), inputs)[0].isfinite().all()  # noqa: S301
    # What reads its width off its projections can be widened, too.
    adapted = get_peft_model(plain, ComCATConfig(mode="customize", qk_rank=2, vo_rank=2))
    assert_close(outputs(adapted, inputs), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": "nonesuch"}, "it has no nonesuch, which its AttentionFamily names"),
        ({"num_heads": "number"}, "it has no number"),
        ({"scaling": "factor"}, "it has no factor"),
    ],
)
def test_a_description_that_does_not_fit(registry, changes, words):
    register_attention_family(own_family(**changes))
    with pytest.raises(UnsupportedModuleError, match=rf"^blocks\.0\.attention is a .*{words}"):
        find_sites(OwnModel())


def test_a_kernel_that_cannot_be_found(registry):
    register_attention_family(
        replace(own_family(head_dim=None, dropout=None, scaling="heads"), host=f"{__name__}.PlainAttention")
    )
    with pytest.raises(UnsupportedModuleError, match=r"it has no config, which .*without hosted, needs"):
        compress(nn.Sequential(PlainAttention()), 0.5)


def _only_three_heads(module):
    return None if module.heads == 3 else f"it has {module.heads} heads"


def test_query_and_key_in_one_module_are_refused(registry):
    register_attention_family(own_family(key="wq"))
    with pytest.raises(UnsupportedModuleError, match="two of its projections are one module"):
        find_sites(OwnModel())


def test_registration_left_nothing_behind():
    assert "OwnAttention" not in known_attention_classes()
