"""The report in a real browser: wide and on a phone, on light and on dark pages."""

from io import BytesIO

import pytest
from PIL import Image

from comcat_hf.reporting import Section, write_report
from comcat_hf.reporting.plots import plot_shares, plot_training
from tests.browser import open_page


pytestmark = pytest.mark.processes


def test_a_report_fits_the_screen_and_follows_the_scheme(tmp_path):
    pictures = [("Sizes", plot_shares({"parameters": 0.5}, tmp_path / "sizes.svg"))]
    pictures.append(("Curves", plot_training([(1, 0.9), (2, 0.7)], [(2, 0.5)], tmp_path / "curves.svg", dense=0.6)))
    table = [[f"column {i}" for i in range(12)]] * 3
    sections = [Section("Result", table=table, pictures=pictures, code="x" * 300)]
    report = write_report(tmp_path / "report.html", "A title", "A summary.", sections)
    with open_page() as page:
        for width, scheme in ((1200, "light"), (390, "dark"), (1200, "dark"), (390, "light")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.goto(report.as_uri())
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}[scheme]
            for picture in page.locator("img").all():
                assert picture.evaluate("image => image.naturalWidth") > 300
                # Text of 10 points stays readable: a picture shrinks to 0.7 of its size at most.
                assert picture.evaluate("image => image.clientWidth / image.naturalWidth") > 0.7
                with Image.open(BytesIO(picture.screenshot())) as shot:
                    corner = shot.convert("RGB").getpixel((1, 1))
                assert f"rgb{corner}" == paper
