"""The examples of the README and of docs/: Python runs, commands are ones that there are."""

import ast
import contextlib
import io
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import datasets
import pytest
import torch
import typer.main
from datasets import ClassLabel, Dataset, Features
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

import comcat_hf
from comcat_hf import cli
from comcat_hf.original import convert_original_adapter
from comcat_hf.training.classify.settings import CompressSettings
from tests.customization.flow_pipelines import tiny_flux
from tests.customization.pipelines import tiny_sd
from tests.helpers import small_clip
from tests.original.test_adapter import random_weights
from tests.training.classify.test_recipes import wrong_flags


ROOT = Path(__file__).resolve().parents[1]
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$|^## (.+?)$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """An example: the heading of its section, its language, its text, and what the page says that it prints."""

    section: str
    language: str
    text: str
    printed: str | None = None


def blocks(page: Path) -> list[Block]:
    found, section = [], ""
    for language, text, heading in FENCE.findall(page.read_text(encoding="utf-8")):
        if heading:
            section = heading
        elif language == "text":
            last = found.pop()
            assert last.language in ("python", "bash"), f"{page.name}: output that nothing stands above: {text}"
            found.append(Block(last.section, last.language, last.text, text))
        else:
            found.append(Block(section, language, text))
    return found


def commands() -> list[tuple[str, str]]:
    """Commands of all pages, a line each, with continued lines joined and comments gone."""
    lines = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                joined = re.sub(r"\\\n\s*", " ", block.text)
                lines += [(page.stem, re.sub(r"\s+#.*", "", line)) for line in joined.splitlines() if line.strip()]
    return lines


def python_pages() -> list[Path]:
    return [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def deit_small(**changes):
    """A model with the configuration of facebook/deit-small-patch16-224, or smaller, and random weights."""
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**(sizes | changes)))


# Where no size is printed.
SHORT = {"num_hidden_layers": 1, "image_size": 112, "num_labels": 10}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder in which the names of the examples are folders, as they may be in place of Hub ids."""
    monkeypatch.chdir(tmp_path)
    tiny_sd(tmp_path / SD)
    return tmp_path


def prepare(page, folder):
    """What a page takes for granted: models by their Hub ids, images, an adapter of somebody's."""

    dense = folder / "facebook" / "deit-small-patch16-224"
    deit_small(**SHORT).save_pretrained(dense)
    ViTImageProcessorPil(size={"height": SHORT["image_size"], "width": SHORT["image_size"]}).save_pretrained(dense)
    for index, image in enumerate(pictures(4, 40)):
        (folder / "photos").mkdir(exist_ok=True)
        image.save(folder / "photos" / f"{index}.png")
    tiny_flux(folder / "black-forest-labs" / "FLUX.1-dev")
    small_clip()[0].save_pretrained(folder / "openai" / "clip-vit-base-patch32")
    unet = UNet2DConditionModel.from_pretrained(SD, subfolder="unet")
    shutil.copytree(SD, folder / "runwayml" / "stable-diffusion-v1-5")
    torch.save(random_weights(unet), folder / "released.pt")
    convert_original_adapter(folder / "released.pt", folder / "goldendoodle-adapter", SD)
    # What the original release has built in, and classes enough for a classifier of low rank.
    comcat_hf.compress(deit_small(**SHORT | {"layer_norm_eps": 1e-6, "num_labels": 500}), 0.4).save_pretrained(
        folder / "small"
    )
    unet.add_adapter(comcat_hf.ComCATConfig(mode="customize", qk_rank=1, vo_rank=1), adapter_name="style")
    comcat_hf.save_comcat_weights({"unet": unet}, folder / "user" / "watercolour", "style")


def pictures(count, size):
    torch.manual_seed(2)
    return [
        Image.fromarray(pixels.numpy()) for pixels in torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    ]


def given():
    """Names that every section of a page starts with: a model that an example may change in place, and images."""
    torch.manual_seed(1)
    images = [{"pixel_values": torch.randn(2, 3, SHORT["image_size"], SHORT["image_size"])} for _ in range(2)]
    return {"vit": deit_small(**SHORT).eval(), "loader": images}


@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.stem)
def test_python_runs_and_prints_what_the_page_says(page, hub):
    prepare(page, hub)
    names, section = {"__name__": "__main__"}, None
    for block in (block for block in blocks(page) if block.language == "python"):
        if block.section != section:
            names |= given()
            section = block.section
        said = io.StringIO()
        code = compile(ast.parse(block.text), f"{page.name}, {block.section}", "exec")
        with contextlib.redirect_stdout(said):
            exec(code, names)
        if block.printed is not None:
            assert said.getvalue() == block.printed, f"{page.name}, {block.section}"
        if page.stem == "README":
            # Its examples go on with models of their own.
            names |= given()


def test_the_readme_shows_what_is_printed():
    shown = {block.language for block in blocks(ROOT / "README.md") if block.printed}
    assert shown == {"python", "bash"}


def shape(text):
    """A command's output without its figures, which other weights change."""
    return re.sub(r"[-\d.,]*\d", "#", re.sub(r" +", " ", text)).strip()


def test_the_shell_prints_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks(ROOT / "README.md") if block.language == "bash" and block.printed)
    labels = ClassLabel(names=[f"class {number}" for number in range(10)])
    features = Features({"image": datasets.Image(), "label": labels})
    for split in ("train", "validation"):
        images = Dataset.from_dict({"image": pictures(20, 32), "label": [*range(10)] * 2}, features=features)
        images.to_parquet(tmp_path / "cifar10" / f"{split}.parquet")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    model = deit_small(**sizes, image_size=32, patch_size=8, num_labels=10)
    model.config.id2label = dict(enumerate(labels.names))
    model.save_pretrained(tmp_path / "vit-cifar10")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit-cifar10")
    result = CliRunner().invoke(cli.app, shlex.split(block.text)[1:])
    assert result.exit_code == 0, result.output
    # The page leaves lines out, where it says so.
    expected = re.escape(shape(block.printed)).replace("…", ".*")
    assert re.fullmatch(expected, shape(result.stdout), flags=re.DOTALL), shape(result.stdout)


def test_every_example_says_what_it_is():
    found = [(page.stem, b.language) for page in PAGES for b in blocks(page) if not b.text.startswith("comcat_hf/\n")]
    assert not [example for example in found if example[1] not in ("python", "bash")]


def test_commands_are_there_and_take_these_options():
    for page, line in commands():
        words = shlex.split(line)
        if words[0] == "comcat":
            parse(words[1:])
        elif words[:2] == ["accelerate", "launch"]:
            assert wrong_flags(line) == set(), f"{page}: {line}"
        elif words[0] in ("bash", "python"):
            program = (ROOT / words[1]).read_text(encoding="utf-8")
            options = [word for word in words[2:] if word.startswith("--")]
            # Some programs hand the flags of a training on.
            handed = {f"--{name}" for name in CompressSettings.__dataclass_fields__}
            assert all(f'"{option}"' in program or option in handed for option in options), f"{page}: {line}"
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
        else:
            assert words[:2] == ["pip", "install"], f"{page}: nobody knows how to check {line!r}"


def parse(words):
    """Read a command line without running it; what is wrong with it is raised."""
    command = typer.main.get_command(cli.app)
    context = click.Context(command, info_name="comcat")
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        assert command is not None, f"there is no command {name}"
    command.make_context("comcat", list(words))


@pytest.mark.parametrize("words", [["nonesuch"], ["compress", "a", "b", "--nonesuch", "1"], ["ranks", "plot", "a"]])
def test_the_reader_of_commands_sees_what_is_wrong(words):
    with pytest.raises(Exception, match=r"No such|[Mm]issing"):
        parse(words)
