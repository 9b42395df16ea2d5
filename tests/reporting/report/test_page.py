"""The report: one file that holds everything, and says what it was given and no more."""

import base64
import re
from html.parser import HTMLParser

import pytest

from comcat_hf.errors import CheckpointError, InvalidValueError
from comcat_hf.reporting import Section, write_report
from comcat_hf.reporting.plots import plot_shares


class Reader(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data.strip())

    def named(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


def report(tmp_path, *sections, title="A title", summary="A summary."):
    return write_report(tmp_path / "report.html", title, summary, sections).read_text(encoding="utf-8")


def test_everything_stands_in_one_file(tmp_path):
    (tmp_path / "map.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "grid.PNG").write_bytes(b"\x89PNG")
    pictures = [("The ranks", tmp_path / "map.svg"), ("Images", tmp_path / "grid.PNG")]
    table = [("model", "top-1"), ("dense", "57.30%"), ("compressed", "57.20%")]
    text = report(
        tmp_path, Section("Result", table=table), Section("Pictures", "Look.", pictures=pictures, code="a:  1\nb: 22")
    )
    page = Reader(text)
    ranks, images = page.named("img")
    assert ranks["alt"] == "The ranks"
    assert base64.b64decode(ranks["src"].removeprefix("data:image/svg+xml;base64,")).startswith(b"<svg")
    assert base64.b64decode(images["src"].removeprefix("data:image/png;base64,")) == b"\x89PNG"
    assert [cell for cell in page.text if cell in ("model", "dense", "57.20%", "Look.", "The ranks")]
    assert "a:  1\nb: 22" in text
    assert len(page.named("tr")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.PNG", "map.svg", "report.html"]


def test_small_pictures_stand_side_by_side(tmp_path):
    (tmp_path / "one.png").write_bytes(b"\x89PNG")
    page = Reader(report(tmp_path, Section("Images", gallery=[("dense: cat\nlabel: dog", tmp_path / "one.png")])))
    assert [found["class"] for found in page.named("div") if found["class"] == "gallery"] == ["gallery"]
    assert page.named("img")[0]["src"].startswith("data:image/png") and "dense: cat\nlabel: dog" in page.text


def test_a_dark_page_has_the_paper_and_the_ink_of_dark_pictures(tmp_path):
    plot_shares({"parameters": 0.5}, tmp_path / "sizes.svg")
    page = report(tmp_path, Section("Sizes", pictures=[("Sizes", tmp_path / "sizes.svg")]))
    dark = page.partition("(prefers-color-scheme: dark)")[2]
    rules = (tmp_path / "sizes.svg").read_text().partition("(prefers-color-scheme: dark)")[2].partition("</style>")[0]
    for name, light in (("ink", "#000000"), ("paper", "#ffffff")):
        color = re.search(rf"--{name}: (#\w+)", dark)[1]
        assert f'[style*="fill: {light}"] {{fill: {color} !important}}' in rules


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    text = report(tmp_path, Section("Result", table=[("a",), ("b",)]))
    assert not re.search(r"https?:|<script|<link|<iframe|\bon\w+=|@import", text)
    (policy,) = [meta["content"] for meta in Reader(text).named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_what_it_is_given_is_text(tmp_path):
    wicked = "</title><script>alert(1)</script>{{ 7 * 7 }}&"
    section = Section(wicked, wicked, table=[(wicked, wicked), (wicked, wicked)], code=wicked)
    text = report(tmp_path, section, title=wicked, summary=wicked)
    page = Reader(text)
    assert not page.named("script")
    assert "49" not in text
    assert "".join(page.text).count(wicked) >= 8


def test_pictures_that_cannot_be_put_in_are_said(tmp_path):
    with pytest.raises(InvalidValueError, match=r"map.gif: expected a picture that ends in .svg or .png"):
        report(tmp_path, Section("a", pictures=[("b", tmp_path / "map.gif")]))
    with pytest.raises(CheckpointError, match=r"map.png: expected a picture for the report, found No such file"):
        report(tmp_path, Section("a", pictures=[("b", tmp_path / "map.png")]))
    assert not list(tmp_path.iterdir())
