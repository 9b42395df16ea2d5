"""English sentences from the docstrings of installed packages, for calibration and, apart from those, for testing."""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path


PACKAGES = ("sklearn", "scipy")
# Others with much text, for more of it to calibrate on.
FURTHER = ("torch", "sympy", "transformers", "pandas", "networkx", "matplotlib", "diffusers", "numpy")

_LONG_ENOUGH, _SHORT_ENOUGH = 40, 200
_STARTS_LIKE_PROSE = re.compile(r"[A-Z][a-z]+ ")
_MARKUP = re.compile(r"[`>_=\[\]|{}\\]|--|\*\*| : ")
_CUT_SHORT = ("e.g.", "i.e.", "etc.", "cf.", "vs.")


def split_sentences(packages: Iterable[str] = PACKAGES) -> tuple[list[str], list[str]]:
    """Sentences to calibrate on and sentences to test on, in an order that looks random and is always the same.

    Of near-duplicates one is kept. A hash of the sentence says on which side it lies and where, so that how many are
    taken of one side changes nothing on the other.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for digest, sentence in _in_order(packages):
        sides[digest[-1] % 2].append(sentence)
    return sides


def further_sentences(packages: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Sentences of other packages, in an order that is always the same, without near-duplicates of known ones."""
    return [sentence for _, sentence in _in_order(packages, {normal_form(sentence) for sentence in known})]


def _in_order(packages: Iterable[str], known: Set[str] = frozenset()) -> list[tuple[bytes, str]]:
    """The hashes of sentences, sorted, with the sentences; of near-duplicates one, of those of `known` none."""
    found: dict[str, str] = {}
    for package in packages:
        for sentence in sentences(package):
            found.setdefault(normal_form(sentence), sentence)
    forms = found.keys() - known
    return sorted((hashlib.sha256(form.encode()).digest(), found[form]) for form in forms)


def normal_form(sentence: str) -> str:
    """What near-duplicates have in common: the words in lower case, without digits and punctuation."""
    return " ".join(re.sub(r"[\W\d_]+", " ", sentence.lower()).split())


def sentences(package: str) -> Iterator[str]:
    """Sentences of prose in a package's docstrings. It is read, not imported; its tests are left out.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No package named {package!r} is installed.", name=package)
    root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        if "tests" not in path.relative_to(root).parts:
            yield from _sentences_in(path)


def _sentences_in(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                yield from filter(_is_prose, re.split(r"(?<=[.!?]) ", " ".join(paragraph.split())))


def _is_prose(sentence: str) -> bool:
    return (
        _LONG_ENOUGH < len(sentence) < _SHORT_ENOUGH
        and sentence.endswith(".")
        and not sentence.endswith(_CUT_SHORT)
        and _STARTS_LIKE_PROSE.match(sentence) is not None
        and _MARKUP.search(sentence) is None
    )
