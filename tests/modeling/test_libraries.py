"""Every attention class and processor of the installed libraries has a row, a refusal, or a line in a list.

`tests/data/attention_without_a_row.txt` names those without. A release that brings another one, or takes one away,
fails here: describe the class in `comcat_hf/modeling/hosts/`, refuse it with a reason, or edit the list.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import diffusers
import transformers

from comcat_hf.modeling.hosts import diffusers as of_diffusers
from comcat_hf.modeling.hosts import timm as of_timm
from comcat_hf.modeling.hosts import transformers as of_transformers


_DOCUMENTED = Path(__file__).parents[2] / "docs" / "models.md"
_PRODUCTS = {
    None: "`qk`, `vo`",
    "_refuse_rotary": "`vo`",
    "_refuse_norm": "`vo`; without a norm of queries and keys also `qk`",
    "_refuse_bias_of_queries": "`vo`; without relative positions also `qk`",
    "_refuse_pooled_queries": "`vo`; where queries are not pooled also `qk`",
    "_refuse_qk": "`vo`; without a norm of queries and keys also `qk`",
}

LISTED = Path(__file__).parents[1] / "data" / "attention_without_a_row.txt"
_CLASS = re.compile(r"^class (\w*(?:Attention|Attn)\w*)\(.*?(?=^\S)", re.MULTILINE | re.DOTALL)
# Names of what holds attention and is none, of outputs, and of what models share.
_NO_ATTENTION = re.compile(r"Output|Block|Layer\b|Layer\d|Mixin|Config|PreTrained|ForCausalLM|Model$|Mask")


def _classes(library, folder: str, name: str) -> Iterator[str]:
    root = Path(library.__file__).parent
    for path in sorted((root / folder).rglob(name)):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        # With a line behind the last class.
        for match in _CLASS.finditer(f"{path.read_text()}\n#"):
            processor = "Processor" in match[1]
            if not _NO_ATTENTION.search(match[1]) and (processor or "nn.Linear(" in match[0]):
                yield match[1] if processor else f"{module}.{match[1]}"


def _without_a_row() -> set[str]:
    found = {*_classes(transformers, "models", "modeling_*.py"), *_classes(diffusers, "models", "*.py")}
    described = (*of_transformers.FAMILIES, *of_transformers.ADAPTED, *of_diffusers.FAMILIES)
    forms = {name for family in described for name in family.processors}
    return found - {family.host for family in described} - dict(of_transformers.REFUSED).keys() - forms


def test_what_has_no_row_is_listed():
    listed, found = set(LISTED.read_text().split()), _without_a_row()
    assert sorted(found - listed) == [], "new attention: give it a row, a refusal, or a line in the list"
    assert sorted(listed - found) == [], "take these out of the list"


def _table() -> str:
    """The documented table, from the rows."""
    widths = defaultdict(list)
    for row in (*of_transformers.MLPS, *of_timm.MLPS):
        widths[row.host.rpartition(".")[0]].append(row.host.rpartition(".")[2])
    lines = ["| module | attention | compress | MLPs with a width |", "| --- | --- | --- | --- |"]
    for row in sorted((*of_transformers.FAMILIES, *of_timm.FAMILIES), key=lambda row: row.host):
        module, _, name = row.host.rpartition(".")
        products = _PRODUCTS[None if row.refuse_qk is None else row.refuse_qk.__name__]
        known = ", ".join(f"`{width}`" for width in sorted(widths[module]))
        lines.append(f"| `{module.removeprefix('transformers.models.')}` | `{name}` | {products} | {known} |")
    return "\n".join(lines)


def test_the_documented_models_are_those_with_rows():
    """Written anew by `python -m tests.modeling.test_libraries`."""
    assert "| module |" + _DOCUMENTED.read_text().partition("| module |")[2] == f"{_table()}\n"


if __name__ == "__main__":
    before, _, _ = _DOCUMENTED.read_text().partition("| module |")
    _DOCUMENTED.write_text(f"{before}{_table()}\n")
    sys.stdout.write(f"{_DOCUMENTED} is written.\n")
