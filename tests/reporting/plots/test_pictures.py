"""The pictures: what they show, as numbers, and that real PNGs and SVGs come out."""

import builtins
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import matplotlib.figure
import pytest
import torch
from PIL import Image

import comcat_hf
from comcat_hf import RankPlan
from comcat_hf.errors import ComCATError, InvalidValueError
from comcat_hf.modeling import meta_copy
from comcat_hf.reporting.plots import (
    head_spectra,
    plot_compression,
    plot_image_grid,
    plot_ranks,
    plot_reductions,
    plot_shares,
    plot_spectra,
    plot_training,
    rank_table,
)
from tests.helpers import small_bert, small_clip, small_vit


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


def test_layers_of_the_same_name_have_columns_of_their_own():
    """Both layers of BERT's MLP are called `dense`."""
    model, _ = small_bert()
    plan = RankPlan({f"bert.encoder.layer.{number}.intermediate.dense": 3 for number in (0, 1)})
    table = rank_table(model, plan)
    assert {column for _, column in table} >= {"intermediate.dense", "output.dense"}
    assert table["0", "intermediate.dense"][0] == 3 and table["0", "output.dense"][0] is None


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


@pytest.mark.parametrize(("build", "scope"), [(small_clip, "model"), (small_vit, "attention"), (small_vit, "mlp")])
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


@pytest.fixture
def no_matplotlib(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


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


CURVES = {"width": [(0.5, 0.95), (0.3, 0.98)], "rank": [(0.3, 0.93), (0.5, 0.9)], "one": [(0.4, 0.9)]}
DRAW = {
    "plot_compression": lambda path: plot_compression(*vit_and_plan(), path),
    "plot_ranks": lambda path=None, **how: plot_ranks(*vit_and_plan(), path, **how),
    "plot_reductions": lambda path=None, **how: plot_reductions(CURVES, path, dense=0.99, **how),
    "plot_spectra": lambda path: plot_spectra(*vit_and_plan(), path),
    "plot_training": lambda path: plot_training([(1, 0.9), (2, 0.7)], [(2, 0.5)], path, dense=0.6),
    "plot_shares": lambda path=None, **how: plot_shares({"parameters": 0.5, "time of 1 image": 1.2}, path, **how),
    "plot_image_grid": lambda path=None, **how: plot_image_grid(grid_of("ab"), path, columns="xyz", **how),
}


def vit_and_plan():
    model, _ = small_vit()
    return model, comcat_hf.allocate_ranks(model, 0.4)


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_without_matplotlib_the_error_says_what_to_install(tmp_path, draw):
    with pytest.raises(ComCATError, match=r"pip install 'comcat_hf\[demo\]'"):
        draw(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", DRAW)
def test_every_picture_is_a_png_or_an_svg_by_its_name(tmp_path, name):
    with Image.open(DRAW[name](tmp_path / "picture.png")) as image:
        assert image.format == "PNG"
    once = DRAW[name](tmp_path / "picture.svg").read_bytes()
    root = ElementTree.fromstring(once)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter())) > 30
    again = DRAW[name](tmp_path / "PICTURE.SVG").read_bytes()
    # Singular values may differ in their last digits from one run to the next.
    assert again == once or (name in ("plot_compression", "plot_spectra") and len(again) == len(once))
    with pytest.raises(InvalidValueError, match=r"picture.jpg: expected a file name that ends in .png or .svg"):
        DRAW[name](tmp_path / "picture.jpg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["PICTURE.SVG", "picture.png", "picture.svg"]


def test_a_rank_map_needs_no_weights(tmp_path):
    model, plan = vit_and_plan()
    real = plot_ranks(model, plan, tmp_path / "real.svg").read_bytes()
    assert plot_ranks(meta_copy(model), plan, tmp_path / "meta.svg").read_bytes() == real


def test_curves_leave_the_frame_and_kept_ranks_stay_inside():
    model, _ = small_vit()
    with torch.no_grad():
        # Singular values that fall by more than the frame holds.
        model.vit.layers[0].attention.q_proj.weight *= torch.logspace(0, -5, 16).repeat(3)[:, None]
    figure = plot_spectra(model, RankPlan({"vit.layers.0.attention": {"qk": 13, "vo": 4}}))
    panel = figure.axes[0]
    curves = [line.get_ydata() for line in panel.lines if len(line.get_ydata()) > 1]
    bottom, top = panel.get_ylim()
    assert min(map(min, curves)) < bottom and max(map(max, curves)) < top
    assert all(min(abs(value / edge - 1) for edge in (bottom, top)) > 1e-3 for curve in curves for value in curve)
    assert all(bottom < line.get_ydata()[0] < top for line in panel.lines if len(line.get_ydata()) == 1)


def test_a_map_and_spectra_have_a_row_of_their_own():
    figure = plot_compression(*vit_and_plan(), title="A title")
    ranks, qk, vo = (axes for axes in figure.axes if axes.get_title())
    assert figure.get_suptitle() == "A title"
    figure.draw_without_rendering()
    places = [axes.get_window_extent() for axes in (ranks, qk, vo)]
    assert places[0].y0 > places[1].y1 and places[1].y0 == places[2].y0 and places[1].x1 < places[2].x0
    assert places[0].width > 0.7 * figure.bbox.width


@pytest.mark.parametrize("scene", ["light", "dark"])
def test_every_colour_of_an_svg_stands_out_from_its_paper(tmp_path, scene):
    """A contrast of 3 for lines, as matplotlib writes them, and of 4.5 for text beside the data."""
    for name in ("plot_spectra", "plot_training", "plot_reductions", "plot_shares"):
        text = DRAW[name](tmp_path / f"{name}.svg").read_text()
        rules = dict(re.findall(r'\[style\*="(?:fill|stroke): (#\w+)"\] \{(?:fill|stroke): (#\w+)', text))
        drawn = set(re.findall(r'style="[^"]*stroke: (#\w{6})', text.partition("</style>")[2]))
        seen = {rules.get(color, color) if scene == "dark" else color for color in drawn}
        paper = rules["#ffffff"] if scene == "dark" else "#ffffff"
        grid, muted = (rules.get(color, color) if scene == "dark" else color for color in ("#dddddd", "#595959"))
        assert {color: contrast(color, paper) for color in seen - {paper, grid} if contrast(color, paper) < 3} == {}
        assert contrast(muted, paper) > 4.5


def contrast(color, other):
    """As the accessibility guidelines of the web define it."""
    lights = []
    for code in (color, other):
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_training([], path=path), "needs losses, found none"),
        (lambda path: plot_shares({}, path), "needs shares above 0, found {}"),
        (lambda path: plot_shares({"a": 0.0}, path), "needs shares above 0"),
        (lambda path: plot_spectra(torch.nn.Linear(2, 2), RankPlan({}), path), "Linear: expected attention modules"),
        (lambda path: plot_reductions({}, path), "needs points, found none"),
        (lambda path: plot_reductions({"a": []}, path), "needs points"),
        (lambda path: plot_reductions({"a": [(30, 0.9)]}, path), "a: expected reductions"),
        (lambda path: plot_image_grid({"a": torch.zeros(2, 4, 8, 8)}, path, columns="ab"), r"or \(columns, 3, h, w\)"),
    ],
)
def test_pictures_of_nothing_or_nonsense_are_refused(tmp_path, draw, message):
    with pytest.raises(InvalidValueError, match=message):
        draw(tmp_path / "picture.svg")
    assert not list(tmp_path.iterdir())


def test_curves_are_told_apart_without_colour_and_drawn_in_order(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = {}, Axes.plot

    def plot(self, x, y, **style):
        drawn[style["label"]] = (x, y, style["marker"], style["color"], style["linestyle"])
        return real(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", plot)
    plot_reductions(CURVES, tmp_path / "curves.png")
    assert drawn["width"][:2] == ([0.3, 0.5], [0.98, 0.95])
    assert drawn["one"][4] == "none"
    assert len({style[2] for style in drawn.values()}) == len({style[3] for style in drawn.values()}) == 3


def test_images_in_colour_keep_their_colours(tmp_path):
    pure = torch.zeros(2, 3, 8, 8)
    pure[0, 0], pure[1, 2] = 1, 1
    path = plot_image_grid({"before": pure, "after": pure.flip(0)}, tmp_path / "grid.png", columns=("a", "b"), size=2)
    with Image.open(path) as image:
        colors = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert colors[255, 0, 0] > 10_000
    assert colors[0, 0, 255] > 10_000


@pytest.mark.parametrize("name", ["plot_ranks", "plot_reductions", "plot_shares", "plot_image_grid"])
def test_a_notebook_gets_a_figure_or_draws_on_axes_of_its_own(name, tmp_path):
    draw = DRAW[name]
    figure = draw(title="A title")
    assert isinstance(figure, matplotlib.figure.Figure) and figure.get_suptitle() == "A title"
    figure.savefig(tmp_path / "figure.png")
    own = matplotlib.figure.Figure()
    left, right = own.subplots(1, 2)
    assert draw(ax=left, title="A title") is own
    assert left.get_title() == "A title" and left.has_data() and not right.has_data() and not own.get_suptitle()
    own.savefig(tmp_path / "own.png")
    with pytest.raises(InvalidValueError, match="both"):
        draw(tmp_path / "both.png", ax=left)
