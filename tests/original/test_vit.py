"""The ViT files of the original release against its formulas, written out."""

import argparse

import pytest
import torch
from torch.nn import functional as F

import comcat_hf
from comcat_hf.configs import RankPlan
from comcat_hf.errors import CheckpointError, InvalidValueError, RankPlanError
from comcat_hf.original import read_original_ranks, read_original_vit, write_original_ranks, write_original_vit


WIDTH, HEADS, INNER, CLASSES, LAYERS, PATCH, SIDE = 32, 4, 48, 7, 2, 4, 3
RANKS = [(8, 12, 10, 9), (4, 16, 11, 8)]
HEAD_RANK = 5
BIASES = ("attn", "first_factor")


def release_files(folder, biases=BIASES, changes=(), distilled=False):
    """Random weights under the names of the release; `changes` go over them, `None` takes away."""

    def rand(*shape):
        return torch.randn(*shape) / shape[-1] ** 0.5

    tensors = {
        "cls_token": rand(1, 1, WIDTH),
        "pos_embed": rand(1, SIDE**2 + 1 + distilled, WIDTH),
        "patch_embed.proj.weight": rand(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": rand(WIDTH),
        "norm.weight": 1 + rand(WIDTH),
        "norm.bias": rand(WIDTH),
    }

    def linear(name, rows, columns, rank):
        name += ".selected_rank_layer"
        tensors[f"{name}.first_factor.weight"] = rand(rank, columns)
        tensors[f"{name}.last_factor.weight"] = rand(rows, rank)
        tensors[f"{name}.last_factor.bias"] = rand(rows)
        if "first_factor" in biases:
            tensors[f"{name}.first_factor.bias"] = rand(rank)

    for i, (qk, vo, fc1, fc2) in enumerate(RANKS):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            tensors |= {f"{block}.{norm}.weight": 1 + rand(WIDTH), f"{block}.{norm}.bias": rand(WIDTH)}
        low = f"{block}.attn.selected_rank_layer"
        for name, rows, columns in (
            ("w_qs", qk, WIDTH),
            ("w_ks", qk, WIDTH),
            ("w_vs", vo, WIDTH),
            ("proj", WIDTH, vo),
        ):
            tensors[f"{low}.{name}.weight"] = rand(rows, columns)
            if "attn" in biases:
                tensors[f"{low}.{name}.bias"] = rand(rows)
        linear(f"{block}.mlp.fc1", INNER, WIDTH, fc1)
        linear(f"{block}.mlp.fc2", WIDTH, INNER, fc2)
    linear("head", CLASSES, WIDTH, HEAD_RANK)
    if distilled:
        tensors["dist_token"] = rand(1, 1, WIDTH)
        linear("head_dist", CLASSES, WIDTH, HEAD_RANK - 2)
    tensors |= dict(changes)
    folder.mkdir(exist_ok=True)
    content = {"model": {k: v for k, v in tensors.items() if v is not None}, "epoch": 3}
    torch.save(content | {"args": argparse.Namespace(lr=1e-4)}, folder / "checkpoint.pth")
    (folder / "ranks.txt").write_text(",".join(str(r) for block in RANKS for r in block) + f",{HEAD_RANK}")
    return content["model"]


def release_logits(t, images):
    """The release's forward, in its own names."""

    def linear(x, name):
        if f"{name}.weight" in t:
            return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])
        name += ".selected_rank_layer"
        x = F.linear(x, t[f"{name}.first_factor.weight"], t.get(f"{name}.first_factor.bias"))
        return F.linear(x, t[f"{name}.last_factor.weight"], t[f"{name}.last_factor.bias"])

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    x = F.conv2d(images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    tokens = [t[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in t]
    x = torch.cat([*tokens, x], 1) + t["pos_embed"]
    for i in range(LAYERS):
        y = norm(x, f"blocks.{i}.norm1")
        low = f"blocks.{i}.attn.selected_rank_layer"
        q, k, v = (
            F.linear(y, t[f"{low}.{n}.weight"], t.get(f"{low}.{n}.bias")).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n in ("w_qs", "w_ks", "w_vs")
        )
        scores = (q @ k.mT) * (WIDTH // HEADS) ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, t[f"{low}.proj.weight"], t.get(f"{low}.proj.bias"))
        y = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(F.gelu(y), f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    if "dist_token" in t:
        return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2
    return linear(x[:, 0], "head")


@pytest.fixture
def images():
    return torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)


@torch.no_grad()
@pytest.mark.parametrize("biases", [(), ("attn",), ("first_factor",), BIASES])
def test_the_model_answers_as_the_formulas_do(tmp_path, images, biases):
    tensors = release_files(tmp_path, biases)
    model = read_original_vit(tmp_path, heads=HEADS)
    torch.testing.assert_close(model(images).logits, release_logits(tensors, images), rtol=0, atol=1e-5)
    plan = comcat_hf.plan_of(model)
    assert plan.ranks["vit.layers.0.attention"] == {"qk": 2, "vo": 3}
    assert plan.ranks["vit.layers.1.mlp.fc2"] == 8
    model.save_pretrained(tmp_path / "native")
    again = type(model).from_pretrained(tmp_path / "native")
    assert torch.equal(again(images).logits, model(images).logits)
    write_original_vit(again, tmp_path / "back")
    assert_back(tmp_path, model, images)


def assert_back(folder, model, images):
    """What was written is the release's own format again, and reads as the same model."""
    assert (folder / "back" / "ranks.txt").read_text().strip() == (folder / "ranks.txt").read_text()
    written = torch.load(folder / "back" / "checkpoint.pth", weights_only=False)["model"]
    torch.testing.assert_close(release_logits(written, images), model(images).logits, rtol=0, atol=1e-5)
    assert torch.equal(read_original_vit(folder / "back", heads=HEADS)(images).logits, model(images).logits)


@torch.no_grad()
def test_layers_may_be_dense(tmp_path, images):
    low = "blocks.1.attn.selected_rank_layer"
    gone = {f"{low}.{n}.{e}": None for n in ("w_qs", "w_ks", "w_vs", "proj") for e in ("weight", "bias")}
    gone |= {
        f"head.selected_rank_layer.{n}.{e}": None for n in ("first_factor", "last_factor") for e in ("weight", "bias")
    }
    dense = {
        "blocks.1.attn.qkv.weight": torch.randn(3 * WIDTH, WIDTH) / 6,
        "blocks.1.attn.qkv.bias": torch.randn(3 * WIDTH),
    }
    dense |= {
        "blocks.1.attn.proj.weight": torch.randn(WIDTH, WIDTH) / 6,
        "blocks.1.attn.proj.bias": torch.randn(WIDTH),
    }
    dense |= {"head.weight": torch.randn(CLASSES, WIDTH), "head.bias": torch.randn(CLASSES)}
    tensors = release_files(tmp_path, changes=gone | dense)
    q, k, v = dense["blocks.1.attn.qkv.weight"].chunk(3)
    bq, bk, bv = dense["blocks.1.attn.qkv.bias"].chunk(3)
    same = {"w_qs.weight": q, "w_ks.weight": k, "w_vs.weight": v, "w_qs.bias": bq, "w_ks.bias": bk, "w_vs.bias": bv}
    same |= {f"proj.{e}": dense[f"blocks.1.attn.proj.{e}"] for e in ("weight", "bias")}
    tensors = tensors | {f"{low}.{name}": value for name, value in same.items()}
    model = read_original_vit(tmp_path, heads=HEADS)
    torch.testing.assert_close(model(images).logits, release_logits(tensors, images), rtol=0, atol=1e-5)
    assert set(comcat_hf.plan_of(model).ranks) == {
        *("vit.layers.0.attention", "vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"),
        *("vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"),
    }


@torch.no_grad()
def test_one_bias_of_attention_may_be_missing(tmp_path, images):
    for gone in ("w_qs", "w_ks", "w_vs", "proj"):
        tensors = release_files(tmp_path, changes={f"blocks.0.attn.selected_rank_layer.{gone}.bias": None})
        found = read_original_vit(tmp_path, heads=HEADS)(images).logits
        torch.testing.assert_close(found, release_logits(tensors, images), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dense", [False, True])
def test_a_distillation_token(tmp_path, images, dense):
    low = "head_dist.selected_rank_layer"
    names = ("first_factor.weight", "first_factor.bias", "last_factor.weight", "last_factor.bias")
    changes = {f"{low}.{name}": None for name in names} if dense else {}
    changes |= (
        {"head_dist.weight": torch.randn(CLASSES, WIDTH), "head_dist.bias": torch.ones(CLASSES)} if dense else {}
    )
    tensors = release_files(tmp_path, changes=changes, distilled=True)
    model = read_original_vit(tmp_path, heads=HEADS)
    assert type(model).__name__ == "DeiTForImageClassificationWithTeacher"
    torch.testing.assert_close(model(images).logits, release_logits(tensors, images), rtol=0, atol=1e-5)
    assert comcat_hf.plan_of(model).ranks.get("distillation_classifier") == (None if dense else HEAD_RANK - 2)
    model.save_pretrained(tmp_path / "native")
    again = type(model).from_pretrained(tmp_path / "native")
    write_original_vit(again, tmp_path / "back")
    assert_back(tmp_path, model, images)


@pytest.mark.parametrize("setting", [{"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}])
def test_settings_that_the_format_cannot_say_are_refused(tmp_path, setting):
    release_files(tmp_path / "a")
    model = read_original_vit(tmp_path / "a", heads=HEADS)
    model.config.update(setting)
    with pytest.raises(InvalidValueError, match=next(iter(setting))):
        write_original_vit(model, tmp_path / "b")
    with pytest.raises(InvalidValueError, match=r"expected a ViTForImageClassification .*found Linear"):
        write_original_vit(torch.nn.Linear(1, 1), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_plans_that_the_format_cannot_say_are_refused(tmp_path):
    plan = RankPlan(architecture="ViTForImageClassification", ranks={"vit.layers.0.attention": {"qk": 2, "vo": 3}})
    with pytest.raises(RankPlanError, match=r"vit\.layers\.0\.mlp\.fc1: expected rank, found no entry"):
        write_original_ranks(plan, tmp_path / "ranks.txt", heads=2)
    assert not (tmp_path / "ranks.txt").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cls_token": None}, "expected the tensor cls_token .*found none"),
        ({"norm.bias": torch.zeros(3)}, r"expected norm\.bias to be 32 .*found 3"),
        ({"norm.bias": torch.zeros(WIDTH, dtype=torch.long)}, r"norm\.bias.*int64"),
        ({"norm.bias": "text"}, r"norm\.bias.*found str"),
        ({"head_dist.weight": torch.zeros(1)}, r"found besides head_dist\.weight; the file is of another model"),
        ({"dist_token": torch.zeros(1, 1, WIDTH)}, "found 8 patches"),
        ({"pos_embed": torch.zeros(1, 9, WIDTH)}, "found 8 patches"),
        ({"pos_embed": torch.zeros(1, 1, WIDTH)}, "found 0 patches"),
        ({"pos_embed": torch.zeros(1, 0, WIDTH)}, "found -1 patches"),
        ({"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 0, 0)}, "patches of 0 × 0"),
        ({"patch_embed.proj.weight": torch.zeros(WIDTH, 0, 4, 4)}, "expected square patches"),
        ({"blocks.7.norm1.weight": torch.zeros(WIDTH)}, r"the blocks \[0, 1, 7\]"),
        ({f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(WIDTH)}, "found besides blocks.99999"),
        ({3: torch.zeros(1)}, "expected tensors by their names"),
        ({"blocks.0.attn.selected_rank_layer.w_ks.weight": torch.zeros(4, WIDTH)}, "w_ks.weight to be 8"),
        ({"blocks.0.attn.selected_rank_layer.w_qs.weight": torch.zeros(6, WIDTH)}, "same rows for each of 4 heads"),
        ({"blocks.0.mlp.fc1.selected_rank_layer.first_factor.weight": torch.zeros(3, WIDTH)}, "last_factor.weight"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, says):
    release_files(tmp_path, changes=changes)
    with pytest.raises(CheckpointError, match=says):
        read_original_vit(tmp_path, heads=HEADS)


def test_heads_that_do_not_fit_the_width(tmp_path):
    release_files(tmp_path)
    for heads in (None, 5):
        with pytest.raises(InvalidValueError, match="expected a divisor of the width 32"):
            read_original_vit(tmp_path, heads=heads)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8,12,10,9,4,16,11,8", "expected 9 ranks for 2 blocks .*found 8"),
        ("8,12,10,9,4,16,11,8,x", "found 'x' at position 8"),
        ("8,12,10,9,4,16,11,-8,5", "found '-8' at position 7"),
        ("8,12,10,9,4,16,12,8,5", "block 1, fc1 the rank 12 of ranks.txt, found 11"),
        ("8,12,10,9,4,16,11,8,6", "in the head the rank 6 of ranks.txt, found 5"),
        ("", "found '' at position 0"),
        ("8,,12", "found '' at position 1"),
        ("0,12", "found '0' at position 0"),
        ("²,12", "found '²' at position 0"),
        ("[8, 12]", r"found '\[8' at position 0"),
        (f"{'8' * 5000},12", f"found '{'8' * 20}' at position 0"),
    ],
)
def test_ranks_that_are_not_the_models(tmp_path, text, says):
    release_files(tmp_path)
    (tmp_path / "ranks.txt").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        read_original_vit(tmp_path, heads=HEADS)


@pytest.mark.parametrize(
    "text", ["8, 12,10 ,9,4,16,11,8,5\n", "8,12,10,9,4,16,11,8,5,", " 8,12,10,9,4,16,11,8,5 ,\r\n"]
)
def test_ranks_may_have_blanks_and_a_last_comma(tmp_path, text):
    (tmp_path / "ranks.txt").write_text(text)
    assert read_original_ranks(tmp_path / "ranks.txt", LAYERS) == [8, 12, 10, 9, 4, 16, 11, 8, 5]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: expected tensors that torch\.save wrote"):
        read_original_vit(tmp_path)
    with pytest.raises(CheckpointError, match="readable line of ranks"):
        read_original_ranks(tmp_path / "none.txt", 2)
