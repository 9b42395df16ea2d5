"""The sdist and the wheel made from it hold all that the package needs, and work away from the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parent.parent
NOT_CODE = ("__pycache__", "*.egg-info", "build")


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package, installed from a wheel that was built from an sdist."""
    source, made, site = (tmp_path_factory.mktemp(name) for name in ("source", "made", "site"))
    shutil.copy(ROOT / "comcat_cli.py", source)
    shutil.copytree(ROOT / "comcat_hf", source / "comcat_hf", ignore=shutil.ignore_patterns(*NOT_CODE))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("setup.py", "-q", "sdist", "-d", made, cwd=source)
    pip = ("-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", made, *made.glob("*.gz"), cwd=made)
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, *made.glob("*.whl"), cwd=made)
    return site


def test_every_file_of_the_package_is_there(installed):
    wanted = {
        path.relative_to(ROOT)
        for path in (ROOT / "comcat_hf").rglob("*.*")
        if path.suffix in (".py", ".typed", ".yaml", ".html")
    }
    missing = [str(path) for path in sorted(wanted) if not (installed / path).is_file()]
    assert not missing


def test_it_runs_from_there(installed, tmp_path):
    code = "import comcat_hf, comcat_hf.original; print(comcat_hf.__file__)"
    assert run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).strip().startswith(str(installed))
    shown = run("-m", "comcat_cli", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "convert" in shown
    assert "comcat" in os.listdir(installed / "bin")
