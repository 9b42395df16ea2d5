"""The folder for a Space: its settings, its requirements, and the page that it serves."""

import configparser
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file

from tests.processes import free_port


ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "space"


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_space_asks_for_what_the_package_asks_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["app"]
    assert lines((SPACE / "requirements.txt").read_text()) == lines(wanted)
    settings = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert (settings["sdk"], (SPACE / settings["app_file"]).is_file()) == ("gradio", True)
    assert f"gradio=={settings['sdk_version']}" in lines((ROOT / "constraints.txt").read_text())
    # The Hub refuses longer ones.
    assert len(settings["short_description"]) <= 60


@pytest.mark.processes
def test_the_space_serves_the_models_of_its_variable(classifiers, image, tmp_path):
    image.save(tmp_path / "image.png")
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    options = f"--dense '{classifiers['dense']}' --compressed '{classifiers['compressed']}'"
    # Spaces give no --port; the address is this machine's only, for the test.
    environment = {"COMCAT_APP": f"{options} --host 127.0.0.1 --port {port}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "app.py"]
    with subprocess.Popen(command, cwd=SPACE, env=os.environ | environment, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(address, server)
            client = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / "downloads")
            dense, _, table = client.predict(handle_file(tmp_path / "image.png"), 1, api_name="/classify")
            client.close()
        finally:
            server.terminate()
    assert dense["label"] in {"crane (0)", "cat", "dog", "crane (3)", "newt"}
    assert re.search(r"parameters \| [\d,]+ \| [\d,]+ \| 0\.\d\d", table)


def wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(1800):
        assert server.poll() is None, "the server has ended"
        try:
            httpx.get(address).raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")
