"""`comcat push`, `pull` and `info` with a Hub: what they say, and what they fetch."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from comcat_hf import save_as_lora, save_comcat_weights
from comcat_hf.customization.lora import LORA_NAME
from tests.customization.pipelines import tiny_sd
from tests.customization.test_export import adapted
from tests.hub.folders import read
from tests.hub.server import Fault
from tests.hub.test_kinds import START


RUN = """
from typer.testing import CliRunner
from comcat_hf import cli

def run(*arguments):
    result = CliRunner().invoke(cli.app, arguments)
    return [result.exit_code, result.stdout, result.stderr]
"""


@pytest.fixture
def run(client, monkeypatch):
    client(RUN)
    return lambda *arguments: client(f"run(*{arguments!r})")


@pytest.fixture
def repository(hub, client, tmp_path):
    """A compressed model on the Hub; returns the size of its weights."""
    client(f"{START}comcat_hf.compress(vit(), 0.4).save_pretrained({str(tmp_path / 'out')!r})")
    hub.put("user/small", {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    return (tmp_path / "out" / "model.safetensors").stat().st_size


def test_info_lists_the_weights_of_a_repository_without_fetching_them(hub, run, repository):
    code, said, _ = run("info", "user/small")
    assert code == 0
    assert "kind: compressed model" in said and f"{repository:,}" in said and "3 files, " in said
    assert not [request for request in hub.requests if request.endswith("model.safetensors")]


def test_info_says_what_the_cache_holds_while_the_hub_is_down(hub, run, repository):
    run("info", "user/small")
    hub.faults.append(Fault("GET", "/api/models", 503, times=1000))
    code, said, _ = run("info", "user/small")
    assert code == 0
    assert "file in the cache" in said and "config.json" in said and "model.safetensors" not in said


def test_info_of_nothing_and_of_something_else_is_one_line(hub, run):
    hub.put("user/lora", {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"x"})
    hub.put("user/loose", {"pytorch_lora_weights.safetensors": b"x"})
    for source, says in (
        ("user/none", "no such repository"),
        ("user/lora", "of the method LORA; load it with Peft"),
        ("user/loose", "LoRA weights of diffusers; load it with pipe.load_lora_weights"),
    ):
        code, said, failed = run("info", source)
        assert (code, said) == (1, "")
        # Above it stands the bar of the download.
        assert failed.splitlines()[-1].startswith(f"comcat info: {source}: ") and says in failed
    assert not [request for request in hub.requests if request.endswith(".safetensors")]


def test_push_and_pull(hub, client, run, folder, tmp_path):
    code, said, _ = run("push", str(folder), "user/repo", "--private", "--message", "Mine", "--ignore", "*.md")
    assert code == 0 and said.startswith(f"{hub.endpoint}/user/repo/commit/")
    assert hub.repositories["user/repo"].private and hub.repositories["user/repo"].messages[-1] == "Mine"
    assert "README.md" not in hub.files("user/repo")
    code, said, _ = run("pull", "user/repo", str(tmp_path / "in"), "--include", "*.json")
    assert (code, said) == (0, f"{tmp_path / 'in'}\n")
    assert sorted(path.name for path in (tmp_path / "in").rglob("*.*")) == ["config.json", "ranks.json"]
    code, _, failed = run("pull", "user/none", str(tmp_path / "no"))
    assert code == 1 and failed.startswith("comcat pull: user/none: ") and not (tmp_path / "no").exists()


def test_a_lora_is_made_with_the_revision_of_the_base_that_the_adapter_names(hub, run, tmp_path):
    base = tiny_sd(tmp_path / "base")
    hub.put("user/base", read(base), "v1")
    pipeline = adapted(base, core=True)
    save_comcat_weights(pipeline, tmp_path / "adapter", "dog", base_model_name_or_path="user/base", revision="v1")
    save_as_lora(pipeline, tmp_path / "wanted")
    # A model trained on from it, for which the adapter was not made.
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.02 for name, value in load_file(weights).items()}, weights)
    hub.put("user/base", read(base))
    code, said, failed = run("convert", "lora", str(tmp_path / "adapter"), str(tmp_path / "found"))
    assert code == 0 and "a LoRA of user/base, revision v1" in said, failed
    found, wanted = (load_file(tmp_path / name / LORA_NAME) for name in ("found", "wanted"))
    assert found.keys() == wanted.keys()
    assert all((found[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)
    shutil.rmtree(tmp_path / "found")
    code, _, failed = run("convert", "lora", str(tmp_path / "adapter"), str(tmp_path / "found"), "--base", "user/none")
    assert code == 1 and "user/none: expected a folder or Hub id of a pipeline of diffusers" in failed.splitlines()[-1]
