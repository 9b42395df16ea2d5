"""Builds the API reference by pdoc: a page for each module below, with all of its public names.

A warning is an error, and so is a name without documentation.
"""

import inspect
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import peft.config
from jinja2 import pass_context
from jinja2.runtime import Context
from pdoc import doc, render

from comcat_hf.configs import adapter


MODULES = (
    "comcat_hf",
    "comcat_hf.compression",
    "comcat_hf.plots",
    "comcat_hf.reporting",
    "comcat_hf.original",
    "comcat_hf.hub",
    "comcat_hf.app",
    "comcat_hf.errors",
    "comcat_hf.metrics",
    "comcat_hf.training.classify",
    "comcat_hf.training.classify.callbacks",
    "comcat_hf.training.dreambooth",
)
_TO_MARKDOWN = render.env.filters["to_markdown"]


@pass_context
def to_markdown(context: Context, docstring: str) -> str:
    """Docstrings name other functions as [`name`], which pdoc links as `name`."""
    return re.sub(r"\[(`[^`]+`)\]", r"\1", _TO_MARKDOWN(context, docstring))


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or what it defines and takes from modules of the package."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("comcat_hf")
    ]
    return sorted(names)


def read(name: str) -> doc.Module:
    """A module as pdoc sees it, with its public names alone; raises ValueError where one lacks documentation."""
    module = import_module(name)
    names = public_names(module)
    for member in names:
        # What a module gives on first use is not among its variables.
        setattr(module, member, getattr(module, member))
    module.__all__ = names
    page = doc.Module(module)
    bare = [member for member in names if not page.members[member].docstring]
    bare = [member for member in bare if inspect.isroutine(getattr(module, member))]
    if bare:
        raise ValueError(f"{name}: expected documentation of every public name, found none of {', '.join(bare)}.")
    return page


def build(folder: Path) -> None:
    """Write all pages, an index and what its search needs.

    Args:
        folder: where to; it is made if it is missing.
    """
    # Fields that come from PEFT are annotated in the words of its module.
    vars(adapter).update({name: value for name, value in vars(peft.config).items() if name not in vars(adapter)})
    render.configure(docformat="google", footer_text="comcat_hf", show_source=False)
    render.env.filters["to_markdown"] = to_markdown
    pages = {name: read(name) for name in MODULES}
    for name, page in pages.items():
        file = folder / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render.html_module(page, pages), encoding="utf-8")
    (folder / "index.html").write_text(render.html_index(pages), encoding="utf-8")
    (folder / "search.js").write_text(render.search_index(pages), encoding="utf-8")


if __name__ == "__main__":
    # The libraries warn about things that are theirs; what is built here warns of nothing.
    for name in MODULES:
        import_module(name)
    warnings.simplefilter("error")
    build(Path(sys.argv[1]))
