"""Folders to the Hub and back through the real client: what is uploaded, what is refused, what an error says."""

import json
import os
from pathlib import Path

import pytest

from comcat_hf.reporting import Section, write_report
from tests.hub.client import ClientError
from tests.hub.folders import FILES, pull, push, read, write
from tests.hub.server import Fault


LEFT_BEHIND = (
    *("checkpoint-5/model.safetensors", "checkpoint-5/optimizer.bin", "optimizer.bin", "unet/checkpoint-7/x.json"),
    *("statistics/moments.safetensors", "runs/events.out.tfevents.1", "random_states_0.pkl", ".cache/x", "scaler.pt"),
    *("search_state.pt", "initial/model.safetensors", "comcat_stages.json", "training_log.jsonl", "rng_state_0.pth"),
    *("step5/rank_0_optim_states.pt", "optimizer_0/0.distcp", "wandb/run.json", "out.log", ".env"),
    "training_state.json",
)
PLAN = {"comcat_ranks.json": json.dumps({"format": "comcat_ranks", "format_version": 1, "ranks": {"a": 3}}).encode()}
PUSH_STEPS = [
    *(("POST", "/api/repos/create"), ("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/lfs/")),
    ("POST", "/commit/"),
]


def read_plan(client, tmp_path, repo="user/repo", **options):
    options = {"cache_dir": str(tmp_path)} | options
    return client(f"comcat_hf.RankPlan.from_pretrained({repo!r}, **{options!r}).ranks")


def held(hub, repo="user/repo", revision="main"):
    return {name: content for name, content in hub.files(repo, revision).items() if name != ".gitattributes"}


# To the Hub


def test_what_was_pushed_is_pulled_byte_for_byte_without_what_belongs_to_a_run(hub, client, folder, tmp_path):
    write(folder, dict.fromkeys(LEFT_BEHIND, b"not to be shared"))
    address = push(client, folder)
    assert address.startswith(f"{hub.endpoint}/user/repo/commit/")
    assert held(hub) == FILES
    pulled = read(pull(client, tmp_path))
    assert {name: content for name, content in pulled.items() if name != ".gitattributes"} == FILES


def test_a_report_that_shows_images_of_a_data_set_is_pushed_by_its_own_name_only(hub, client, folder, tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    section = Section("Changed", gallery=[("dense: cat", tmp_path / "image.png")])
    report = write_report(folder / "runs of May" / "report.html", "A run", "", [section])
    pictures = Section("Ranks", pictures=[("Ranks", tmp_path / "image.png")])
    shown = write_report(folder / "ranks.html", "Ranks", "", [pictures])
    push(client, folder)
    assert held(hub) == FILES | {"ranks.html": shown.read_bytes()}
    assert f"{report} shows images of a data set and is not uploaded" in client.errors.read_text()
    push(client, report)
    assert held(hub)["report.html"] == report.read_bytes()


def test_folders_of_this_machine_are_not_pushed_as_bases(hub, client, tmp_path):
    """As PEFT and diffusers write them, which need them to load again from here."""
    ours, theirs = "  base_model: /home/me/vit  ", "user/dense"
    card = "---\nbase_model: {0}\ntags:\n- base_model:adapter:{0}\n- mine\n---\n\n# {1}\n"
    files = {
        "README.md": card.format("/home/me/vit", ours).encode(),
        "adapter_config.json": b'{"base_model_name_or_path": "/home/me/vit", "r": 4}',
        "unet/config.json": b'{"parts": [{"_name_or_path": "C:\\\\sd\\\\unet"}], "other": "/home/me"}',
        "vae/README.md": card.format(theirs, "mine").encode(),
        "vae/config.json": b'{"_name_or_path":"user/dense"}',
        "damaged.json": b'{"_name_or_path": "/home',
    }
    push(client, write(tmp_path / "out", files))
    pushed = hub.files("user/repo")
    assert json.loads(pushed["adapter_config.json"]) == {"base_model_name_or_path": None, "r": 4}
    assert json.loads(pushed["unet/config.json"]) == {"parts": [{"_name_or_path": None}], "other": "/home/me"}
    assert pushed["README.md"].decode() == f"---\ntags:\n- mine\n---\n\n# {ours}\n"
    kept = ("vae/README.md", "vae/config.json", "damaged.json")
    assert {name: pushed[name] for name in kept} == {name: files[name] for name in kept}


def test_private_a_branch_a_message_and_patterns(hub, client, folder):
    push(client, folder, private=True, revision="v1", commit_message="Try it", ignore_patterns="*.md")
    repository = hub.repositories["user/repo"]
    assert repository.private
    assert repository.messages[-1] == "Try it"
    assert held(hub) == {}
    assert set(held(hub, revision="v1")) == {*FILES} - {"README.md"}


def test_a_pull_request_and_an_addition_to_it(hub, client, folder):
    push(client, folder, repo="repo")
    (folder / "config.json").write_bytes(b"1")
    assert push(client, folder, create_pr=True) == f"{hub.endpoint}/user/repo/discussions/1"
    assert held(hub)["config.json"] == FILES["config.json"]
    (folder / "config.json").write_bytes(b"2")
    push(client, folder, revision="refs/pr/1")
    assert held(hub, revision="refs/pr/1")["config.json"] == b"2"


@pytest.mark.parametrize("action", [403, "page"])
@pytest.mark.parametrize(("method", "path"), PUSH_STEPS)
def test_a_push_that_is_refused_leaves_the_repository_as_it_was(hub, client, folder, method, path, action):
    hub.put("user/repo", {"a.json": b"1"})
    hub.faults.append(Fault(method, path, action, times=1000, message="A file is too large."))
    # The client asks whether the repository is there when it may not make one.
    hub.faults.append(Fault("GET", "/api/models/", action, times=1000))
    with pytest.raises(ClientError, match="user/repo: expected to upload 4 files, but") as caught:
        push(client, folder)
    assert caught.value.kind == "ComCATError"
    if action == 403 and method == "POST" and "create" not in path:
        assert "A file is too large." in caught.value.text
    assert hub.files("user/repo") == {"a.json": b"1"}
    assert read(folder) == FILES


def test_others_may_not_write_here(hub, client, folder):
    hub.put("other/repo", {"a.json": b"1"})
    with pytest.raises(ClientError, match=r"other/repo: .*may write there"):
        push(client, folder, repo="other/repo")
    with pytest.raises(ClientError, match="no token"):
        client(
            "import os; token = os.environ.pop('HF_TOKEN')\n"
            "try:\n"
            f"    comcat_hf.hub.push_folder({str(folder)!r}, 'repo')\n"
            "finally:\n"
            "    os.environ['HF_TOKEN'] = token"
        )


def test_a_public_repository_is_not_taken_for_a_private_one(hub, client, folder):
    hub.put("user/repo", {"a.json": b"1"})
    with pytest.raises(ClientError, match="expected a private repository, found one that everybody can read"):
        push(client, folder, private=True)
    assert hub.files("user/repo") == {"a.json": b"1"}
    hub.put("user/mine", {"a.json": b"1"}, private=True)
    push(client, folder, repo="user/mine", private=True)
    assert hub.files("user/mine")["config.json"] == FILES["config.json"]


def test_a_file_that_goes_while_it_is_pushed_is_one_error(hub, client, folder):
    hub.put("user/repo", {"a.json": b"1"})
    hub.faults.append(Fault("POST", "/api/repos/create", (folder / "config.json").unlink))
    with pytest.raises(ClientError, match=r"a file cannot be sent as it is.*config\.json") as caught:
        push(client, folder)
    assert caught.value.kind == "ComCATError"
    assert hub.files("user/repo") == {"a.json": b"1"}


def test_links_out_of_a_folder_are_not_uploaded(hub, client, folder, tmp_path):
    write(tmp_path / "other", {"secret.json": b"{}", "unet/a.json": b"{}"})
    for name, target in (("a.json", "other/secret.json"), ("text_encoder", "other/unet"), ("b.json", "other/none")):
        link = folder / name
        link.symlink_to(tmp_path / target)
        with pytest.raises(ClientError, match=rf"{name}: expected a file inside .*found a link to .*nothing was up"):
            push(client, folder)
        assert hub.repositories == {}
        link.unlink()
    (folder / "c.json").symlink_to(folder / "config.json")
    push(client, folder)
    assert hub.files("user/repo")["c.json"] == FILES["config.json"]


def test_a_snapshot_of_the_cache_is_pushed_though_it_is_made_of_links(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    cache = str(tmp_path / "cache")
    snapshot = client(f"comcat_hf.hub.pull_folder('user/repo', cache_dir={cache!r}).as_posix()")
    assert Path(snapshot, "config.json").is_symlink()
    push(client, snapshot, repo="user/copy")
    assert held(hub, "user/copy") == FILES


# From the Hub


def test_a_pinned_revision_and_the_cache_without_the_hub(hub, client, tmp_path):
    first = hub.put("user/repo", {"a.json": b"1"})
    hub.put("user/repo", {"a.json": b"2"})
    assert read(pull(client, tmp_path, folder="old", revision=first)) == {"a.json": b"1"}
    assert read(pull(client, tmp_path, folder="new")) == {"a.json": b"2"}
    asked = len(hub.requests)
    assert read(pull(client, tmp_path, folder="again", local_files_only=True)) == {"a.json": b"2"}
    assert read(pull(client, tmp_path, folder="pinned", local_files_only=True, revision=first)) == {"a.json": b"1"}
    assert len(hub.requests) == asked
    with pytest.raises(ClientError, match="not in the local cache"):
        pull(client, tmp_path, repo="user/none", local_files_only=True)


def test_the_cache_helps_out_while_the_hub_is_down(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    pull(client, tmp_path)
    hub.faults.append(Fault("GET", "/api/models", 503, times=1000))
    assert read(pull(client, tmp_path, folder="again")) == FILES
    assert "the copy in the cache is used" in client.errors.read_text()
    with pytest.raises(ClientError, match="could not answer") as caught:
        pull(client, tmp_path, cache_dir=str(tmp_path / "empty"))
    assert caught.value.kind == "CheckpointError"


def test_a_local_folder_stands_for_itself_and_other_files_stay(client, folder, tmp_path):
    write(tmp_path / "pulled", {"mine.txt": b"mine", "config.json": b"old"})
    pulled = pull(client, tmp_path, repo=str(folder), ignore_patterns=["*.md"])
    assert read(pulled) == {k: v for k, v in FILES.items() if k != "README.md"} | {"mine.txt": b"mine"}


def test_private_and_gated_repositories(hub, client, tmp_path):
    hub.put("other/private", {"a.json": b"1"}, private=True)
    hub.put("other/gated", {"a.json": b"1"}, gated=True)
    with pytest.raises(ClientError, match=r"other/private: .*no such repository on the Hub.*`token=`"):
        pull(client, tmp_path, repo="other/private")
    assert read(pull(client, tmp_path, repo="other/private", token="hf_other")) == {"a.json": b"1"}
    with pytest.raises(ClientError, match="gated; ask for access"):
        pull(client, tmp_path, repo="other/gated", token=False)
    assert read(pull(client, tmp_path, repo="other/gated")) == {"a.json": b"1"}


@pytest.mark.parametrize(
    ("repo", "options", "fault", "says"),
    [
        ("user/none", {}, None, "no such repository on the Hub"),
        ("user/repo", {"revision": "v9"}, None, "no such revision"),
        ("user/repo", {"token": "hf_wrong"}, None, "user/repo: expected"),
        ("user/repo", {}, ("GET", "/api/models/user/repo$", "page"), "does not answer as the Hub does"),
        ("user/repo", {}, ("GET", "/tree/", "page"), "does not answer as the Hub does"),
        ("user/repo", {}, ("GET", "/resolve/.*safetensors", "drop"), "user/repo: expected"),
    ],
)
def test_what_cannot_be_had_is_one_error_and_leaves_nothing(hub, client, tmp_path, repo, options, fault, says):
    hub.put("user/repo", FILES, private=True)
    if fault is not None:
        hub.faults.append(Fault(*fault, times=1000))
    with pytest.raises(ClientError, match=says) as caught:
        pull(client, tmp_path, repo=repo, **options)
    assert caught.value.kind == "CheckpointError"
    assert not (tmp_path / "pulled").exists()
    # What the cache kept does no harm.
    hub.faults.clear()
    assert read(pull(client, tmp_path)) == FILES


def test_a_single_file_and_an_odd_answer_in_its_place(hub, client, tmp_path):
    hub.put("user/repo", PLAN)
    hub.faults.append(Fault("HEAD", "/resolve", "page", times=1000))
    with pytest.raises(ClientError, match="user/repo: expected") as caught:
        read_plan(client, tmp_path)
    assert caught.value.kind == "CheckpointError"
    hub.faults.clear()
    assert read_plan(client, tmp_path) == {"a": 3}


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.json", "a/../../outside.json", "/tmp/outside.json", "..\\outside.json", "C:/outside.json"),
        *("a\0b.json", ".git/config", "unet/.GIT/hooks/pre-commit", "a//b.json", "./a.json"),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_written(hub, client, tmp_path, name):
    hub.put("user/repo", FILES | {name: b"evil"})
    with pytest.raises(ClientError, match="may lead out of it; nothing was downloaded"):
        pull(client, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "refs" not in path.parts]
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_commit_while_a_repository_is_pulled_does_not_mix_with_it(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault("GET", "/tree/", lambda: hub.put("user/repo", {"config.json": b"another"})))
    assert read(pull(client, tmp_path)) == FILES


def test_a_target_on_another_disk_and_one_where_something_is_in_the_way(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    other = Path("/dev/shm")
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
        disk = other / f"comcat-{os.getpid()}"
        disk.mkdir()
        try:
            (tmp_path / "linked").symlink_to(disk)
            assert read(pull(client, tmp_path, folder="linked")) == FILES
            assert sorted(path.name for path in disk.iterdir()) == sorted({name.split("/")[0] for name in FILES})
        finally:
            for path in sorted(disk.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            disk.rmdir()
    for name, files in (("one", {"model.safetensors/x": b"mine"}), ("two", {"unet": b"mine"})):
        target = write(tmp_path / name, files)
        with pytest.raises(ClientError, match=r"folders or files in the place of (model\.safetensors|unet/ranks)"):
            pull(client, tmp_path, folder=name)
        assert read(target) == files
    assert {path.parent for path in tmp_path.rglob(".*")} <= {tmp_path / "cache"}


@pytest.mark.parametrize("name", ["~no-such-user-here/x", "x" * 5000, "a\0b"])
@pytest.mark.parametrize("act", ["comcat_hf.RankPlan.from_pretrained", "comcat_hf.hub.pull_folder"])
def test_text_that_is_neither_a_folder_nor_an_id_is_one_error(hub, client, name, act):
    with pytest.raises(ClientError) as caught:
        client(f"{act}({name!r})")
    assert caught.value.kind == "CheckpointError"
    assert len(caught.value.text) < 1000


@pytest.mark.parametrize("act", [push, pull, read_plan])
def test_secrets_that_a_server_or_an_address_holds_are_not_repeated(hub, client, folder, tmp_path, act):
    secrets = ("hf_good", "hf_AbCdEfGhIjKlMnOp", "hunter2", "s1gn4ture")
    message = "Bearer hf_AbCdEfGhIjKlMnOp and hf_good at https://me:hunter2@x.co/a?Signature=s1gn4ture are no good."
    for method in ("GET", "HEAD", "POST"):
        hub.faults.append(Fault(method, "", 403, message=message, times=1000))
    said = []
    for repo in ("user/repo", "https://me:hunter2@huggingface.co/user/repo", "hf_AbCdEfGhIjKlMnOp/x y"):
        with pytest.raises(ClientError) as caught:
            act(client, folder if act is push else tmp_path, repo=repo)
        said.append(caught.value.text)
    assert not [secret for secret in secrets if secret in "".join(said) + client.errors.read_text()]
