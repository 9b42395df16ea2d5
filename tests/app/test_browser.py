"""The app as a visitor uses it: in a real browser."""

import re

import pytest

from comcat_hf.app import AppSettings, start_app
from tests.browser import open_page


pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore:Already found a `peft_config`")]


@pytest.fixture
def visit():
    """Opens the app with some models loaded first."""
    started = []

    def visit(page, **models):
        blocks, address = start_app(AppSettings(**models, port=None))
        started.append(blocks)
        page.goto(address)
        return page

    yield visit
    for blocks in started:
        blocks.close()


def field(page, label):
    """The text field with a label; the label's element holds the explanation, too."""
    return page.locator("label").filter(has=page.get_by_text(label, exact=True)).locator("input, textarea")


def test_a_prompt_of_the_card_is_drawn_without_and_with_the_adapter(visit, base, adapters):
    with open_page() as page:
        visit(page, pipeline=str(base))
        field(page, "Adapter").fill(str(adapters["dog"]))
        page.get_by_role("button", name="Add the adapter").click()
        page.get_by_text("a sks dog on a beach").click()
        prompt = field(page, "Prompt")
        page.wait_for_function("field => field.value == 'a sks dog on a beach'", arg=prompt.element_handle())
        page.get_by_label("number input for Steps").fill("2")
        page.get_by_role("button", name="Draw").click()
        page.get_by_text(re.compile("Seed 0: .* s before, .* s after")).wait_for()
        images = page.locator(".shown img")
        assert images.count() == 2
        assert images.nth(0).evaluate("image => image.naturalWidth") == 16
        page.get_by_role("button", name="Remove").click()
        page.get_by_text("a sks dog on a beach", exact=True).wait_for(state="hidden")


def test_an_elastic_model_follows_its_slider(visit, elastic, image, tmp_path):
    image.save(tmp_path / "image.png")
    with open_page() as page:
        visit(page)
        page.get_by_role("tab", name="Compress").click()
        number = page.get_by_label("number input for Reduction: the share removed")
        assert not number.is_visible()
        field(page, "Compressed model").fill(str(elastic))
        page.get_by_role("button", name="Load both").click()
        page.get_by_text(re.compile(r"4\d\.\d% of its parameters removed")).wait_for()
        assert float(number.input_value()) == 0.4
        page.locator("input[type=file]").last.set_input_files(tmp_path / "image.png")
        page.get_by_role("cell", name="latency").wait_for()
        number.fill("0.6")
        number.blur()
        page.get_by_text(re.compile(r"60\.\d% of its parameters removed")).wait_for()
        dense, small, left = (
            page.get_by_role("row", name=re.compile("^parameters")).get_by_role("cell").all_inner_texts()[1:]
        )
        assert float(left) == pytest.approx(0.4, abs=0.011)
        assert int(small.replace(",", "")) < int(dense.replace(",", ""))


def test_an_error_is_shown_and_changes_nothing(visit, classifiers, tmp_path):
    with open_page() as page:
        visit(page, dense=str(classifiers["dense"]), compressed=str(classifiers["compressed"]))
        page.get_by_role("tab", name="Compress").click()
        field(page, "Compressed model").fill(str(tmp_path / "nowhere"))
        page.get_by_role("button", name="Load both").click()
        page.get_by_text("expected a folder or Hub id of an image classifier").wait_for()
        assert page.get_by_text("% of its parameters removed").is_visible()
