"""Attention of today's models: the asked reduction, reloaded exactly, refused by name."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from comcat_hf import (
    ComCATConfig,
    Statistics,
    allocate_ranks,
    cli,
    collect_statistics,
    compress,
    count_macs,
    measure_latency,
    plan_of,
    search_ranks,
)
from comcat_hf.compression.budget.strategies import STRATEGIES
from comcat_hf.errors import RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, known_attention_classes, known_sites, read_ranks
from comcat_hf.modeling.hosts import diffusers, timm
from comcat_hf.plots import plot_compression
from tests.architectures import ARCHITECTURES, MEANT
from tests.helpers import MODELS, assert_close, attention_ranks, outputs


every = pytest.mark.parametrize("name", ARCHITECTURES)


def attention(model):
    return known_sites(model, "attention")


def test_every_known_class_of_transformers_is_covered():
    built = [build()[0] for build in (*MODELS.values(), *ARCHITECTURES.values())]
    covered = {type(site.view.module).__name__ for model in built for site in attention(model).values()}
    # Those of diffusers and timm have tests of their own.
    others = {row.host.rpartition(".")[2] for row in (*diffusers.FAMILIES, *timm.FAMILIES)}
    assert covered | others == set(known_attention_classes())
    assert len({type(model) for model in built}) >= 45


@every
def test_is_compressed_saved_and_loaded(name, tmp_path):
    model, inputs = ARCHITECTURES[name]()
    small = compress(model, 0.3, **MEANT.get(name, {}))
    assert 0.3 <= plan_of(small).reached <= 0.305
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert read_ranks(loaded) == read_ranks(small)
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(small, inputs)))


@every
def test_batches_serve_it(name):
    model, inputs = ARCHITECTURES[name]()
    small = compress(model, 0.3, batches=[inputs], **MEANT.get(name, {}))
    assert 0.3 <= plan_of(small).reached <= 0.305
    assert all(tensor.isfinite().all() for tensor in outputs(small, inputs))


@every
@pytest.mark.parametrize("core", [False, True])
def test_customize_adapters_start_at_zero_or_are_refused_by_name(name, core):
    model, inputs = ARCHITECTURES[name]()
    expected = outputs(model, inputs)
    try:
        model = get_peft_model(model, ComCATConfig(mode="customize", qk_rank=3, vo_rank=2, core=core)).base_model.model
    except UnsupportedModuleError as refusal:
        assert any(str(refusal).startswith(path) for path, _ in model.named_modules() if path)
    else:
        assert_close(outputs(model, inputs), expected)
        added = [p for n, p in model.named_parameters() if "comcat_" in n]
        with torch.no_grad():
            for parameter in added:
                parameter.fill_(0.1)
        assert not all(map(torch.equal, outputs(model, inputs), expected))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dinov3", "rotates queries and keys"),
        ("mlcd", "rotates queries and keys"),
        ("vjepa2", "rotates queries and keys"),
        ("internvl_vision_norm", "normalises queries and keys"),
        ("janus_vision_norm", "normalises queries and keys"),
    ],
)
def test_queries_and_keys_stay_dense_behind_a_norm_or_a_rotation(name, reason):
    model, _ = ARCHITECTURES[name]()
    path, site = next(iter(attention(model).items()))
    assert set(site.choices) == {"vo"}
    with pytest.raises(RankPlanError, match=rf"^{path} is a .*query/key product cannot be compressed: .*{reason}"):
        apply_ranks(model, {path: {"qk": 2, "vo": 4}})
    assert read_ranks(model) == {}
    apply_ranks(model, {path: {"vo": 4}})
    assert read_ranks(model) == {path: {"vo": 4}}


@pytest.mark.parametrize(
    "name", ["swin", "data2vec_vision", "dinov3", "qwen2_5_vl_vision", "sam_vision", "modernbert"]
)
class TestTheWholeWay:
    def test_as_an_adapter(self, name, tmp_path):
        model, inputs = ARCHITECTURES[name]()
        expected = outputs(model, inputs)
        ranks = attention_ranks(model, qk=5, vo=6)
        direct = copy.deepcopy(model)
        apply_ranks(direct, ranks)
        wanted = outputs(direct, inputs)
        adapted = get_peft_model(model, ComCATConfig(qk_rank=5, vo_rank=6))
        assert_close(outputs(adapted, inputs), wanted)
        with adapted.disable_adapter():
            assert all(map(torch.equal, outputs(adapted, inputs), expected))
        adapted.save_pretrained(tmp_path / "adapter")
        fresh = PeftModel.from_pretrained(ARCHITECTURES[name]()[0], tmp_path / "adapter").eval()
        assert all(map(torch.equal, outputs(fresh, inputs), outputs(adapted, inputs)))
        merged = fresh.merge_and_unload()
        assert read_ranks(merged) == ranks
        merged.save_pretrained(tmp_path / "merged")
        loaded = type(merged).from_pretrained(tmp_path / "merged")
        assert all(map(torch.equal, outputs(loaded, inputs), wanted))

    @pytest.mark.parametrize("strategy", sorted(STRATEGIES))
    def test_every_strategy(self, name, strategy):
        model, inputs = ARCHITECTURES[name]()
        small = compress(model, 0.2, strategy=strategy, batches=[inputs])
        assert 0.2 <= plan_of(small).reached <= 0.205
        choices = {path: set(site.choices) for path, site in attention(model).items()}
        assert all(set(entry) <= choices[path] for path, entry in read_ranks(small).items() if path in choices)

    def test_by_time(self, name):
        model, inputs = ARCHITECTURES[name]()
        table = measure_latency(model, inputs, repeats=1, progress=False)
        pairs = {choice for shape in table.shapes.values() for choice in shape.choices}
        assert pairs >= {"+".join(site.choices) for site in attention(model).values()}

    def test_statistics_are_kept_and_plots_drawn(self, name, tmp_path):
        model, inputs = ARCHITECTURES[name]()
        found = collect_statistics(model, [inputs], curvature=True)
        found.save_pretrained(tmp_path)
        kept = Statistics.from_pretrained(tmp_path)
        assert all(kept.sums[n].values.keys() == sums.values.keys() for n, sums in found.sums.items())
        plan = allocate_ranks(model, 0.2, statistics=kept + kept, strategy="curvature")
        plot_compression(model, plan, tmp_path / "plan.svg", statistics=kept)
        plan.save_pretrained(tmp_path)
        assert CliRunner().invoke(cli.app, ["ranks", "show", str(tmp_path)]).exit_code == 0


@pytest.mark.parametrize("name", ["swin", "data2vec_vision", "modernbert", "hiera"])
def test_ranks_are_searched(name):
    model, inputs = ARCHITECTURES[name]()
    plan = search_ranks(model, [{**inputs, "labels": torch.tensor([1, 3])}], 0.2, steps=2)
    assert read_ranks(compress(model, plan=plan)) == plan.ranks


@pytest.mark.parametrize("name", ["swin", "segformer", "dinov3", "sam_vision_plain", "modernbert"])
def test_macs_are_counted(name):
    model, inputs = ARCHITECTURES[name]()
    small = compress(model, 0.2, metric="macs", inputs=inputs)
    reached = 1 - count_macs(small, inputs=inputs) / count_macs(model, inputs=inputs)
    assert 0.2 <= reached <= 0.205 and reached == plan_of(small).reached
