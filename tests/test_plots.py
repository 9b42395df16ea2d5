"""The pictures: what they show, as numbers, and that real PNGs come out."""

import builtins

import matplotlib
import pytest
import torch
from PIL import Image

import comcat_hf
from comcat_hf import RankPlan
from comcat_hf.errors import ComCATError, InvalidValueError
from comcat_hf.plots import head_spectra, plot_compression, plot_image_grid, rank_table
from tests.helpers import small_clip, small_vit


def test_the_table_says_which_rank_each_site_keeps():
    model, _ = small_vit()
    plan = RankPlan({"vit.layers.1.attention": {"qk": 4}, "vit.layers.0.mlp.fc1": 10, "classifier": 2})
    table = rank_table(model, plan)
    classes = model.config.num_labels
    assert table == {
        ("0", "Q·K"): (None, 16),
        ("0", "V·O"): (None, 16),
        ("0", "fc1"): (10, 48),
        ("0", "fc2"): (None, 48),
        ("1", "Q·K"): (4, 16),
        ("1", "V·O"): (None, 16),
        ("1", "fc1"): (None, 48),
        ("1", "fc2"): (None, 48),
        ("classifier", ""): (2, min(classes, 48)),
    }


def test_the_layers_of_two_towers_are_told_apart():
    model, _ = small_clip()
    rows = {row for row, column in rank_table(model, RankPlan({})) if column}
    assert rows == {"text_model 0", "text_model 1", "vision_model 0", "vision_model 1"}


def test_spectra_are_those_of_the_products():
    model, inputs = small_vit()
    spectra = head_spectra(model)
    assert list(spectra) == ["vit.layers.0.attention", "vit.layers.1.attention"]
    attention = model.vit.layers[0].attention
    width = attention.head_dim
    rows = slice(width, 2 * width)
    with torch.no_grad():
        query = torch.cat([attention.q_proj.weight[rows], attention.q_proj.bias[rows, None]], 1).double()
        product = query.T @ attention.k_proj.weight[rows].double()
        expected = torch.linalg.svdvals(product)[:width]
        output = attention.v_proj.weight[rows].double().T @ attention.o_proj.weight[:, rows].double().T
    torch.testing.assert_close(
        spectra["vit.layers.0.attention"]["qk"][1].double(), expected / expected[0], atol=1e-5, rtol=0
    )
    expected = torch.linalg.svdvals(output)[:width]
    torch.testing.assert_close(
        spectra["vit.layers.0.attention"]["vo"][1].double(), expected / expected[0], atol=1e-5, rtol=0
    )

    seen = head_spectra(model, comcat_hf.collect_statistics(model, [inputs]))
    assert not torch.allclose(seen["vit.layers.0.attention"]["qk"], spectra["vit.layers.0.attention"]["qk"])


@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
@pytest.mark.parametrize("build", [small_vit, small_clip])
def test_a_png_is_written(tmp_path, build, scope):
    model, inputs = build()
    plan = comcat_hf.allocate_ranks(model, 0.2, scope=scope)
    statistics = comcat_hf.collect_statistics(model, [inputs])
    path = plot_compression(model, plan, tmp_path / "new" / "ranks.png", statistics=statistics, title="A title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000 and image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
    assert [file.name for file in path.parent.iterdir()] == ["ranks.png"]


def test_a_deep_model_fits_on_the_picture(tmp_path):
    model, _ = small_vit(num_hidden_layers=30)
    plan = comcat_hf.allocate_ranks(model, 0.4)
    with Image.open(plot_compression(model, plan, tmp_path / "ranks.png")) as image:
        assert image.height > 1000
        assert image.height < 2 * image.width


def test_the_users_own_backend_and_figures_are_left_alone(tmp_path):
    model, _ = small_vit()
    backend = matplotlib.rcParams._get_backend_or_none()
    plot_compression(model, comcat_hf.allocate_ranks(model, 0.4), tmp_path / "ranks.png")
    assert matplotlib.rcParams._get_backend_or_none() == backend
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    model, _ = small_vit()
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ComCATError, match=r"pip install 'comcat_hf\[demo\]'"):
        plot_compression(model, comcat_hf.allocate_ranks(model, 0.4), tmp_path / "ranks.png")
    assert not list(tmp_path.iterdir())


def grid_of(rows):
    return {name: torch.linspace(0, 1, 3 * 16).view(3, 4, 4) for name in rows}


def test_a_grid_of_images_is_written_with_frames_and_notes(tmp_path):
    rows, columns = ("base", "ComCAT"), ("V*", "one", "two")
    plain = plot_image_grid(grid_of(rows), tmp_path / "plain.png", columns=columns)
    path = plot_image_grid(
        grid_of(rows),
        tmp_path / "new" / "grid.png",
        columns=columns,
        notes=dict.fromkeys(rows, ("4", "1", "7")),
        right=dict.fromkeys(rows, (True, True, False)),
        title="A title",
    )

    def colors(file):
        with Image.open(file) as image:
            assert image.format == "PNG"
            return {color for _, color in image.convert("RGB").getcolors(1 << 24)}

    blue, vermilion = (0, 114, 178), (213, 94, 0)
    assert {blue, vermilion} <= colors(path)
    assert not {blue, vermilion} & colors(plain)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("what", "given"), [("images", {}), ("notes", {"notes": {"a": "4"}}), ("right", {"right": {"a": [True]}})]
)
def test_a_grid_needs_one_of_everything_for_each_column(tmp_path, what, given):
    columns = ("x", "y") if what == "images" else ("x", "y", "z")
    with pytest.raises(InvalidValueError, match=rf"{what} of the row 'a': expected {len(columns)}, found"):
        plot_image_grid(grid_of("a"), tmp_path / "grid.png", columns=columns, **given)
    assert not list(tmp_path.iterdir())


def test_a_grid_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ComCATError, match=r"pip install 'comcat_hf\[demo\]'"):
        plot_image_grid(grid_of("a"), tmp_path / "grid.png", columns=("x", "y", "z"))
