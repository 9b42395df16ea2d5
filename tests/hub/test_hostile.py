"""What should not happen on the way to the Hub and back: odd answers, odd folders, odd names, secrets in errors."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.hub.client import ClientError
from tests.hub.folders import FILES, pull, push, read, write
from tests.hub.server import Fault
from tests.hub.test_transfer import PUSH_STEPS


PLAN = {"comcat_ranks.json": json.dumps({"format": "comcat_ranks", "format_version": 1, "ranks": {"a": 3}}).encode()}


def read_plan(client, tmp_path, repo="user/repo", **options):
    options = {"cache_dir": str(tmp_path)} | options
    return client(f"comcat_hf.RankPlan.from_pretrained({repo!r}, **{options!r}).ranks")


# A single file


@pytest.mark.parametrize("action", [500, 429, "drop", "half", "stale"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_file_that_is_loaded_by_its_hub_id_is_asked_for_again(hub, client, tmp_path, method, action):
    hub.put("user/repo", PLAN)
    hub.faults.append(Fault(method, "/resolve", action, times=1 if action == "stale" else 2))
    assert read_plan(client, tmp_path) == {"a": 3}
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    ("action", "says"), [("stale", "found others in comcat_ranks.json"), ("page", "found others")]
)
def test_a_file_of_other_content_is_not_read(hub, client, tmp_path, action, says):
    hub.put("user/repo", PLAN)
    hub.faults.append(Fault("GET", "/resolve", action, times=1000))
    with pytest.raises(ClientError, match=says if action == "stale" else "user/repo: expected") as caught:
        read_plan(client, tmp_path)
    assert caught.value.kind == "CheckpointError"
    hub.faults.clear()
    assert read_plan(client, tmp_path) == {"a": 3}


@pytest.mark.parametrize(("size", "says"), [(2**60, "found 1,152,921"), (2**28, "to be a small file, found 268.4 M")])
def test_a_declared_size_that_cannot_be_true_is_refused_before_the_download(hub, client, tmp_path, size, says):
    hub.put("user/repo", PLAN)
    hub.sizes["comcat_ranks.json"] = size
    with pytest.raises(ClientError, match=rf"{says}.*B declared"):
        read_plan(client, tmp_path)
    assert not any(request.startswith("GET") for request in hub.requests)


def test_what_is_cached_and_damaged_is_fetched_again_and_an_error_while_offline(hub, client, tmp_path):
    hub.put("user/repo", PLAN)
    read_plan(client, tmp_path)
    (blob,) = (tmp_path / "models--user--repo" / "blobs").iterdir()
    content = blob.read_bytes()
    blob.write_bytes(content[::-1])
    assert read_plan(client, tmp_path) == {"a": 3}
    assert blob.read_bytes() == content
    blob.write_bytes(content[::-1])
    with pytest.raises(ClientError, match="not in the local cache"):
        read_plan(client, tmp_path, local_files_only=True)


# Answers that are none of the Hub's


@pytest.mark.parametrize("path", ["/api/models/user/repo$", "/tree/"])
def test_a_web_page_in_place_of_an_answer_is_one_error_on_the_way_here(hub, client, tmp_path, path):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault("GET", path, "page", times=1000))
    with pytest.raises(ClientError, match="does not speak as the Hub does; check HF_ENDPOINT") as caught:
        pull(client, tmp_path)
    assert caught.value.kind == "CheckpointError"
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(("method", "path"), PUSH_STEPS)
def test_a_web_page_in_place_of_an_answer_is_one_error_on_the_way_there(hub, client, folder, method, path):
    hub.put("user/repo", {"a.json": b"1"})
    hub.faults.append(Fault(method, path, "page", times=1000))
    with pytest.raises(ClientError, match="user/repo: expected to upload 4 files, but") as caught:
        push(client, folder)
    assert caught.value.kind == "ComCATError"
    assert hub.files("user/repo") == {"a.json": b"1"}


def test_a_failure_behind_a_damaged_download_is_got_over(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    failing = Fault("HEAD", "/resolve/.*config", 500, times=0)

    def fail():
        failing.times = 1

    hub.faults += [Fault("GET", "/resolve/.*config", "stale"), Fault("GET", "/resolve/.*safetensors", fail), failing]
    assert read(pull(client, tmp_path)) == FILES


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"window";"api";q=5;w=300'}]
)
@pytest.mark.parametrize(
    ("act", "method", "path"),
    [
        (push, "POST", "/api/repos/create"),
        (push, "POST", "/preupload/"),
        (push, "POST", "/commit/"),
        (pull, "GET", "/api/models/user/repo$"),
        (pull, "GET", "/tree/"),
    ],
)
def test_a_busy_hub_is_given_the_time_that_it_asks_for(hub, client, folder, tmp_path, act, method, path, headers):
    hub.put("user/repo", FILES if act is pull else {"a.json": b"1"})
    hub.faults.append(Fault(method, path, 429, headers=headers))
    client("waits.clear()")
    act(client, folder if act is push else tmp_path)
    assert 7 <= max(client("waits")) <= 8
    hub.faults.append(Fault(method, path, 429, headers={"Retry-After": "86400"}, times=1000))
    (folder / "config.json").write_bytes(b"new")
    with pytest.raises(ClientError, match="user/repo: expected"):
        act(
            client, folder if act is push else tmp_path, **({"cache_dir": str(tmp_path / "no")} if act is pull else {})
        )
    # Ours; for some requests the client waits as well, and as long as it is told.
    assert 300 in client("waits")


@pytest.mark.parametrize("action", [400, 413])
@pytest.mark.parametrize(("method", "path"), PUSH_STEPS)
def test_what_the_hub_does_not_take_is_said_in_its_words(hub, client, folder, method, path, action):
    hub.put("user/repo", {"a.json": b"1"})
    hub.faults.append(Fault(method, path, action, times=1000, message="A file is too large."))
    with pytest.raises(ClientError, match=r"user/repo: .*A file is too large\."):
        push(client, folder)
    assert hub.files("user/repo") == {"a.json": b"1"}
    # The client itself sends a large file twice.
    assert sum(path in request for request in hub.requests) == (2 if method == "PUT" else 1)


# Folders that change, or lead elsewhere


def test_a_file_that_goes_while_it_is_pushed_is_one_error(hub, client, folder):
    hub.put("user/repo", {"a.json": b"1"})
    hub.faults.append(Fault("POST", "/api/repos/create", (folder / "config.json").unlink))
    with pytest.raises(ClientError, match=r"a file cannot be sent as it is.*config\.json") as caught:
        push(client, folder)
    assert caught.value.kind == "ComCATError"
    assert hub.files("user/repo") == {"a.json": b"1"}


@pytest.mark.parametrize("content", [b"shorter", b"longer" * 9999, bytes(256 * 40)])
def test_a_file_that_is_replaced_while_it_is_pushed_arrives_whole_or_not(hub, client, folder, content):
    before = FILES["model.safetensors"]
    hub.faults.append(Fault("POST", "/preupload/", lambda: (folder / "model.safetensors").write_bytes(content)))
    try:
        push(client, folder)
        assert hub.files("user/repo")["model.safetensors"] in (before, content)
    except ClientError as error:
        assert error.kind == "ComCATError"
        assert "model.safetensors" not in hub.files("user/repo")


def test_links_out_of_a_folder_are_not_uploaded(hub, client, folder, tmp_path):
    write(tmp_path / "other", {"secret.json": b"{}", "unet/a.json": b"{}"})
    for name, target in (("a.json", "other/secret.json"), ("text_encoder", "other/unet"), ("b.json", "other/none")):
        link = folder / name
        link.symlink_to(tmp_path / target)
        with pytest.raises(ClientError, match=rf"{name}: expected a file inside .*found a link to .*nothing was up"):
            push(client, folder)
        assert hub.repositories == {}
        push(client, folder, ignore_patterns=name)
        assert name not in hub.files("user/repo")
        link.unlink()
        hub.repositories.clear()
    (folder / "c.json").symlink_to(folder / "config.json")
    push(client, folder)
    assert hub.files("user/repo")["c.json"] == FILES["config.json"]


def test_a_snapshot_of_the_cache_is_pushed_though_it_is_made_of_links(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    cache = str(tmp_path / "cache")
    snapshot = client(f"comcat_hf.transport.pull_folder('user/repo', cache_dir={cache!r}).as_posix()")
    assert Path(snapshot, "config.json").is_symlink()
    push(client, snapshot, repo="user/copy")
    assert {k: v for k, v in hub.files("user/copy").items() if k != ".gitattributes"} == FILES


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
        with pytest.raises(
            ClientError, match=r"found folders or files in the place of (model\.safetensors|unet/ranks)"
        ):
            pull(client, tmp_path, folder=name)
        assert read(target) == files
    assert {path.parent for path in tmp_path.rglob(".*")} <= {tmp_path / "cache"}


def test_a_commit_while_a_repository_is_pulled_does_not_mix_with_it(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault("GET", "/tree/", lambda: hub.put("user/repo", {"config.json": b"another"})))
    assert read(pull(client, tmp_path)) == FILES


def test_two_pulls_into_one_folder_at_once(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault("GET", "/resolve/", lambda: time.sleep(0.05), times=1000))
    client(
        "import threading\n"
        "from comcat_hf.transport import pull_folder\n"
        "failed = []\n"
        "def work():\n"
        "    try:\n"
        f"        pull_folder('user/repo', {str(tmp_path / 'in')!r}, cache_dir={str(tmp_path)!r})\n"
        "    except Exception as error:\n"
        "        failed.append(repr(error))\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]"
    )
    assert client("failed") == []
    assert read(tmp_path / "in") == FILES


# Names


@pytest.mark.parametrize("name", ["a\0b.json", ".git/config", "unet/.GIT/hooks/pre-commit", "a//b.json", "./a.json"])
def test_more_names_that_are_refused(hub, client, tmp_path, name):
    hub.put("user/repo", FILES | {name: b"evil"})
    with pytest.raises(ClientError, match="may lead out of it; nothing was downloaded"):
        pull(client, tmp_path)
    assert read(tmp_path) == {}


@pytest.mark.parametrize("name", ["~no-such-user-here/x", "x" * 5000, "a\0b"])
@pytest.mark.parametrize("act", ["comcat_hf.RankPlan.from_pretrained", "comcat_hf.transport.pull_folder"])
def test_text_that_is_neither_a_folder_nor_an_id_is_one_error(hub, client, name, act):
    with pytest.raises(ClientError) as caught:
        client(f"{act}({name!r})")
    assert caught.value.kind == "CheckpointError"
    assert len(caught.value.text) < 1000


# What is private stays so


def test_a_public_repository_is_not_taken_for_a_private_one(hub, client, folder):
    hub.put("user/repo", {"a.json": b"1"})
    with pytest.raises(ClientError, match="expected a private repository, found one that everybody can read"):
        push(client, folder, private=True)
    assert hub.files("user/repo") == {"a.json": b"1"}
    hub.put("user/mine", {"a.json": b"1"}, private=True)
    push(client, folder, repo="user/mine", private=True)
    assert hub.files("user/mine")["config.json"] == FILES["config.json"]


def test_a_pull_request_is_added_to_and_asked_for_once(hub, client, folder):
    push(client, folder)
    (folder / "config.json").write_bytes(b"1")
    hub.faults.append(Fault("POST", "/api/repos/create", 500))
    push(client, folder, create_pr=True)
    (folder / "config.json").write_bytes(b"2")
    push(client, folder, revision="refs/pr/1")
    assert hub.files("user/repo", "refs/pr/1")["config.json"] == b"2"
    (folder / "config.json").write_bytes(b"3")
    hub.faults.append(Fault("POST", "/commit/", "late"))
    with pytest.raises(ClientError, match="could not answer"):
        push(client, folder, create_pr=True)
    assert sorted(ref for ref in hub.repositories["user/repo"].refs if "pr" in ref) == ["refs/pr/1", "refs/pr/2"]


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
    assert not [secret for secret in secrets if secret in "".join(said)]
