"""The house rules that a machine can check: who may import whom, and what no module may hold."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "comcat_hf"

# A top-level module or folder of comcat_hf imports from itself and from lower floors only. Half floors stand above
# their whole number.
FLOORS = {
    "errors": 0,
    "version": 0,
    "checks": 0.25,
    "closed_forms": 0.5,
    "hub": 0.5,
    "configs": 1,
    "metrics": 1,
    "progress": 1,
    "tensor_files": 1,
    "modeling": 2,
    "native": 2.5,
    "tuners": 3,
    "compression": 4,
    "customization": 4,
    "reporting": 4.5,
    "plots": 4.75,
    "training": 5,
    "original": 5.5,
    "app": 6,
    "demos": 6,
    "cli": 7,
}
GROUND_FLOOR_LIBRARIES = {"torch", "huggingface_hub"}
MAX_LINES = 400
TEXT_FOLDERS = ("comcat_hf", "scripts", "benchmarks", "tests", "docs", "space", "notebooks", ".ci")
OUTSIDE = b"../" + b"shared"


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted names."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts)
    return {dotted(path): path for path in paths}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(name: str) -> str:
    """The top-level module or folder of the package that a dotted name lies in."""
    return [*name.split("."), ""][1]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every name that a file imports, wherever it stands: at the top, in a function or through import_module."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) == "import_module" and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node.lineno, target.value


def called_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def broken_imports(path: Path) -> list[str]:
    """What a file imports from its own floor's neighbours, from above, or by way of the package's public names."""
    own = unit_of(dotted(path))
    broken = []
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "comcat_hf" or parts[1:] == ["__version__"]:
            continue
        target = parts[1] if len(parts) > 1 else "the package's public names"
        place = f"{path.relative_to(ROOT).as_posix()}:{line}"
        if target not in FLOORS:
            broken.append(f"{place}: imports {name}; import from the module that defines it")
        elif target != own and FLOORS[target] >= FLOORS[own]:
            broken.append(f"{place}: {own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[target]})")
    return broken


def circles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = imported[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reach = {name: reached(name) for name in imported}
    found = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in imported}
    return [list(circle) for circle in sorted(found) if circle]


def test_every_module_has_a_floor_and_imports_only_what_is_below():
    named = {name: path for name, path in modules().items() if name != "comcat_hf"}
    unknown = [name for name in named if unit_of(name) not in FLOORS]
    assert not unknown, f"{unknown}: on no floor; add them to FLOORS and to the picture in docs/architecture.md"
    broken = [line for path in named.values() for line in broken_imports(path)]
    assert not broken, "\n".join([*broken, "Move what both need to a lower floor."])


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    imported = {name: set() for name in known}
    for name, path in known.items():
        for _, target in imports_of(path):
            # A name may be a module, or something in one.
            target = target if target in known else target.rpartition(".")[0]
            if target in known and target not in (name, "comcat_hf"):
                imported[name].add(target)
    # A folder's __init__ names what its modules define; they do not import it.
    assert not (found := circles(imported)), f"Circles of imports: {found}"


def test_the_ground_floor_needs_only_torch_and_the_hub():
    allowed = GROUND_FLOOR_LIBRARIES | {"comcat_hf"} | sys.stdlib_module_names
    found = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if FLOORS.get(unit_of(name), 1) < 1
        for _, target in imports_of(path)
        if target.split(".")[0] not in allowed
    ]
    assert not found, f"{found}: floor 0 uses {sorted(GROUND_FLOOR_LIBRARIES)} only"


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
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]


def test_no_module_is_too_long():
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    long = {name: lines for name, lines in long.items() if lines > MAX_LINES}
    assert not long, f"{long}: at most {MAX_LINES} lines; split them by what changes together"


def test_nothing_prints_exits_or_looks_away():
    found = []
    for module, path in modules().items():
        calls = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))
        for call in calls:
            name = called_name(call)
            words = {word.arg: word.value for word in call.keywords}
            no = {k for k, value in words.items() if isinstance(value, ast.Constant) and value.value is False}
            if unit_of(module) != "cli" and isinstance(call.func, ast.Name) and name in {"print", "exit", "quit"}:
                found.append(f"{module}: {name}(): use the module's logger or raise a ComCATError")
            if "weights_only" in no or (ast.unparse(call.func) == "torch.load" and "weights_only" not in words):
                found.append(f"{module}: nothing is unpickled without weights_only=True")
            if "strict" in no and name not in {"zip", "map"}:
                found.append(f"{module}: strict=False: name the keys that may be missing and raise for others")
    assert not found, "\n".join(found)


def test_errors_say_all_themselves():
    """Who installed the package has neither docs/ nor scripts/ to look something up in."""
    found = [
        f"{module}: {text}"
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and any(place in (text := ast.unparse(node)) for place in ("docs/", "scripts/", ".md"))
    ]
    assert not found, "\n".join(found)


def test_no_file_names_a_place_outside_the_repository():
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in TEXT_FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    found = [path.relative_to(ROOT).as_posix() for path in files if OUTSIDE in path.read_bytes()]
    assert not found, f"{found} name a folder that a clone does not have; put what is needed into the repository"
