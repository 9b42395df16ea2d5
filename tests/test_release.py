"""What a release consists of beside the package: its changelog, its citation."""

import re
from pathlib import Path

import yaml

import comcat_hf


ROOT = Path(__file__).resolve().parent.parent


def test_changelog_and_citation_are_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(\d[^\]]*)\] - (.+)$", text, flags=re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (version, date) == (citation["version"], str(citation["date-released"]))
    assert version == comcat_hf.__version__
