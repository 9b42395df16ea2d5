"""The house rules that a machine can check: who may import whom, and what no module may hold."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "comcat_hf"

# A top-level module or folder of comcat_hf imports from itself and from lower floors only. Half floors stand above
# their whole number: native builds on attention/, the rest of floor 0 on errors.py, training and demos on plots.
FLOORS = {
    "errors": 0,
    "version": 0,
    "checks": 0.25,
    "core": 0.5,
    "factorization": 0.5,
    "transport": 0.5,
    "width": 0.75,
    "configs": 1,
    "cards": 1,
    "metrics": 1,
    "tensor_files": 1,
    "training": 1.5,
    "attention": 2,
    "native": 2.5,
    "plots": 2.75,
    "report": 2.9,
    "tuners": 3,
    "compression": 4,
    "customization": 4,
    "original": 4.5,
    "app": 5,
    "demo": 5.5,
    "demo_customize": 5.75,
    "cli": 6,
}
GROUND_FLOOR_LIBRARIES = {"torch", "huggingface_hub"}
MAX_LINES = 450
TEXT_FOLDERS = ("comcat_hf", "scripts", "benchmarks", "tests", "docs", "examples", ".ci")
OUTSIDE = b"../" + b"shared"


def unit_of(path: Path) -> str:
    """The top-level module or folder of the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts]


def floored_modules() -> list[Path]:
    return [path for path in modules() if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def absolute_base(path: Path, node: ast.ImportFrom) -> str:
    """The absolute name of what `from … import` reads from, with the dots of a relative import resolved."""
    if not node.level:
        return node.module or ""
    package = list(path.relative_to(ROOT).parent.parts)
    parents = package[: len(package) - node.level + 1]
    return ".".join(parents + ([node.module] if node.module else []))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every name that a file imports, wherever it stands: at the top, in a function or through import_module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(path, node)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) == "import_module" and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node.lineno, target.value


def called_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def calls_of(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def broken_imports(path: Path) -> list[str]:
    """What a file imports from its own floor's neighbours, from above, or by way of the package's public names."""
    own = unit_of(path)
    broken = []
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "comcat_hf" or parts[1:] == ["__version__"]:
            continue
        target = parts[1] if len(parts) > 1 else "the package's public names"
        if target not in FLOORS:
            broken.append(f"{name_of(path)}:{line}: imports {name}; import from the module that defines it")
        elif target != own and FLOORS[target] >= FLOORS[own]:
            broken.append(
                f"{name_of(path)}:{line}: {own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[target]}); "
                "move what both need to a lower floor"
            )
    return broken


@pytest.mark.parametrize("path", floored_modules(), ids=name_of)
def test_every_module_has_a_floor(path):
    assert unit_of(path) in FLOORS, (
        f"{name_of(path)}: {unit_of(path)!r} is on no floor; add it to FLOORS in tests/test_architecture.py and to "
        "the picture in docs/architecture.md"
    )


@pytest.mark.parametrize("path", floored_modules(), ids=name_of)
def test_floors_import_only_what_is_below(path):
    if unit_of(path) not in FLOORS:
        pytest.skip("on no floor: test_every_module_has_a_floor says so")
    assert not (broken := broken_imports(path)), "\n".join(broken)


@pytest.mark.parametrize("path", [path for path in modules() if FLOORS.get(unit_of(path), 1) < 1], ids=name_of)
def test_the_ground_floor_needs_only_torch_and_the_hub(path):
    allowed = GROUND_FLOOR_LIBRARIES | {"comcat_hf"} | sys.stdlib_module_names
    others = {name.split(".")[0] for _, name in imports_of(path)} - allowed
    assert not others, f"{name_of(path)}: imports {sorted(others)}; floor 0 uses torch and huggingface_hub only"


def test_the_imports_are_read_wherever_they_stand(tmp_path, monkeypatch):
    """The reader itself: relative, inside a function, by string, and through the package's public names."""
    module = tmp_path / "comcat_hf" / "configs" / "ranks.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from ..errors import ComCATError\n"
        "from . import adapter\n"
        "from comcat_hf import __version__\n"
        "def late():\n"
        "    from ..tuners.layer import Layer\n"
        "    importlib.import_module('comcat_hf.cli')\n"
        "    from comcat_hf import RankPlan\n"
        "    import comcat_hf.compression.search\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "comcat_hf")
    assert [message.split(":")[1] for message in sorted(broken_imports(module))] == ["5", "6", "7", "8"]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_module_is_too_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, (
        f"{name_of(path)}: {lines} lines, at most {MAX_LINES}; split it by what changes together"
    )


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_prints_exits_or_looks_away(path):
    found = []
    for call in calls_of(path):
        name = called_name(call)
        flags = {
            word.arg for word in call.keywords if isinstance(word.value, ast.Constant) and word.value.value is False
        }
        bare = isinstance(call.func, ast.Name)
        if unit_of(path) != "cli" and bare and name in {"print", "exit", "quit"}:
            found.append(f"{name}(): use the module's logger or raise a ComCATError")
        if "weights_only" in flags:
            found.append("weights_only=False: nothing is unpickled without weights_only=True")
        if "strict" in flags and name not in {"zip", "map"}:
            found.append("strict=False: name the keys that may be missing and raise for others")
        if ast.unparse(call.func) == "torch.load" and "weights_only" not in {word.arg for word in call.keywords}:
            found.append("torch.load without weights_only=True: say it")
    assert not found, f"{name_of(path)}: " + "; ".join(found)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_errors_say_all_themselves(path):
    """Who installed the package has neither docs/ nor scripts/ to look something up in."""
    raised = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    assert not [text for text in raised if "docs/" in text or "scripts/" in text or ".md" in text]


def test_no_file_names_a_place_outside_the_repository():
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in TEXT_FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found = [name_of(path) for path in files if OUTSIDE in path.read_bytes()]
    assert not found, f"{found} name a folder that a clone does not have; put what is needed into the repository"
