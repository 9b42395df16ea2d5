"""Folders to the Hub and back through the real client, with everything that can go wrong on the way."""

import json

import pytest

from tests.hub.client import ClientError
from tests.hub.folders import FILES, pull, push, read, write
from tests.hub.server import Fault


LEFT_BEHIND = (
    *("checkpoint-5/model.safetensors", "checkpoint-5/optimizer.bin", "optimizer.bin", "unet/checkpoint-7/x.json"),
    *("statistics/moments.safetensors", "runs/events.out.tfevents.1", "random_states_0.pkl", ".cache/x", "scaler.pt"),
    *("search_state.pt", "initial/model.safetensors", "comcat_stages.json", "training_log.jsonl", "rng_state_0.pth"),
    *(
        "step5/rank_0_optim_states.pt",
        "optimizer_0/0.distcp",
        "wandb/run.json",
        "out.log",
        ".env",
        "training_state.json",
    ),
)


def test_what_was_pushed_is_pulled_byte_for_byte_without_what_belongs_to_a_run(hub, client, folder, tmp_path):
    write(folder, dict.fromkeys(LEFT_BEHIND, b"not to be shared"))
    address = push(client, folder)
    assert address.startswith(f"{hub.endpoint}/user/repo/commit/")
    held = {name: content for name, content in hub.files("user/repo").items() if name != ".gitattributes"}
    assert held == FILES
    pulled = read(pull(client, tmp_path))
    pulled.pop(".gitattributes")
    assert pulled == FILES


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


def test_a_second_push_of_the_same_files_makes_no_commit(hub, client, folder):
    push(client, folder)
    before = len(hub.repositories["user/repo"].commits)
    push(client, folder)
    assert len(hub.repositories["user/repo"].commits) == before


def test_private_a_branch_a_message_and_patterns(hub, client, folder):
    push(client, folder, private=True, revision="v1", commit_message="Try it", ignore_patterns="*.md")
    repository = hub.repositories["user/repo"]
    assert repository.private
    assert repository.messages[-1] == "Try it"
    assert set(hub.files("user/repo")) == {".gitattributes"}
    assert set(hub.files("user/repo", "v1")) == {".gitattributes", *FILES} - {"README.md"}


def test_a_pull_request(hub, client, folder):
    push(client, folder)
    (folder / "config.json").write_bytes(b"{}\n")
    assert push(client, folder, create_pr=True) == f"{hub.endpoint}/user/repo/discussions/1"
    assert hub.files("user/repo")["config.json"] == FILES["config.json"]
    assert hub.files("user/repo", "refs/pr/1")["config.json"] == b"{}\n"


def test_a_name_alone_is_a_repository_of_who_is_logged_in(hub, client, folder):
    push(client, folder, repo="repo")
    assert list(hub.repositories) == ["user/repo"]


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
    ("repo", "options", "says"),
    [
        ("user/none", {}, "no such repository on the Hub"),
        ("user/repo", {"revision": "v9"}, "no such revision"),
        ("user/repo", {"token": "hf_wrong"}, "user/repo: expected"),
    ],
)
def test_what_is_not_there_is_one_error_and_leaves_nothing(hub, client, tmp_path, repo, options, says):
    hub.put("user/repo", {"a.json": b"1"}, private=True)
    with pytest.raises(ClientError, match=says) as caught:
        pull(client, tmp_path, repo=repo, **options)
    assert caught.value.kind == "CheckpointError"
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("action", [500, 503, "drop", "half"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/user/repo$"),
        ("GET", "/tree/"),
        ("HEAD", "/resolve/.*safetensors"),
        ("GET", "/resolve/.*safetensors"),
    ],
)
def test_a_passing_fault_is_got_over(hub, client, tmp_path, method, action, path):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault(method, path, action))
    assert read(pull(client, tmp_path)) == FILES
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("action", ["drop", "half", "stale"])
def test_a_lasting_fault_is_an_error_that_leaves_nothing(hub, client, tmp_path, action):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault("GET", "/resolve/.*safetensors", action, times=1000))
    with pytest.raises(ClientError) as caught:
        pull(client, tmp_path)
    assert caught.value.kind == "CheckpointError"
    assert "user/repo" in caught.value.text
    assert not (tmp_path / "pulled").exists()
    # What the cache kept does no harm.
    hub.faults.clear()
    assert read(pull(client, tmp_path)) == FILES


def test_a_damaged_download_is_fetched_again(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    hub.faults.append(Fault("GET", "/resolve/.*config", "stale"))
    assert read(pull(client, tmp_path)) == FILES


def test_the_cache_helps_out_while_the_hub_is_down(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    pull(client, tmp_path)
    hub.faults.append(Fault("GET", "/api/models", 503, times=1000))
    assert read(pull(client, tmp_path, folder="again")) == FILES
    assert "the copy in the cache is used" in client.errors.read_text()
    with pytest.raises(ClientError, match="could not answer"):
        pull(client, tmp_path, cache_dir=str(tmp_path / "empty"))


PUSH_STEPS = [
    ("POST", "/api/repos/create"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize("action", [500, "drop", "late"])
@pytest.mark.parametrize(("method", "path"), PUSH_STEPS)
def test_a_push_gets_over_a_passing_fault_with_one_commit(hub, client, folder, method, path, action):
    hub.faults.append(Fault(method, path, action))
    push(client, folder)
    assert {k: v for k, v in hub.files("user/repo").items() if k != ".gitattributes"} == FILES
    assert len(hub.repositories["user/repo"].commits) == 2
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("action", [408, 409])
def test_a_conflict_with_another_commit_and_one_that_took_too_long_pass(hub, client, folder, action):
    hub.faults.append(Fault("POST", "/commit/", action))
    push(client, folder)
    assert hub.files("user/repo")["config.json"] == FILES["config.json"]


@pytest.mark.parametrize("action", [401, 403, 404])
@pytest.mark.parametrize(("method", "path"), PUSH_STEPS)
def test_a_push_that_is_refused_leaves_the_repository_as_it_was(hub, client, folder, method, path, action):
    before = dict(hub.files("user/repo")) if hub.put("user/repo", {"a.json": b"1"}) else {}
    hub.faults.append(Fault(method, path, action, times=1000))
    # The client asks whether the repository is there when it may not make one.
    hub.faults.append(Fault("GET", "/api/models/", action, times=1000))
    with pytest.raises(ClientError, match="user/repo: expected to upload 4 files, but") as caught:
        push(client, folder)
    assert caught.value.kind == "ComCATError"
    assert dict(hub.files("user/repo")) == before
    assert read(folder) == FILES


def test_a_lasting_failure_of_the_hub_is_one_error(hub, client, folder):
    hub.faults.append(Fault("POST", "/commit/", 500, times=1000))
    with pytest.raises(ClientError, match="could not answer"):
        push(client, folder)
    assert set(hub.files("user/repo")) == {".gitattributes"}


def test_others_may_not_write_here(hub, client, folder):
    hub.put("other/repo", {"a.json": b"1"})
    with pytest.raises(ClientError, match=r"other/repo: .*may write there"):
        push(client, folder, repo="other/repo")
    with pytest.raises(ClientError, match="no token"):
        client(
            "import os; token = os.environ.pop('HF_TOKEN')\n"
            "try:\n"
            f"    comcat_hf.transport.push_folder({str(folder)!r}, 'repo')\n"
            "finally:\n"
            "    os.environ['HF_TOKEN'] = token"
        )


@pytest.mark.parametrize(
    "name", ["../outside.json", "a/../../outside.json", "/tmp/outside.json", "..\\outside.json", "C:/outside.json"]
)
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_written(hub, client, tmp_path, name):
    hub.put("user/repo", FILES | {name: b"evil"})
    with pytest.raises(ClientError, match="may lead out of it; nothing was downloaded"):
        pull(client, tmp_path)
    assert read(tmp_path) == {}
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_size_that_does_not_fit_the_disk_is_refused_before_anything_is_written(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    hub.sizes["model.safetensors"] = 2**60
    with pytest.raises(ClientError, match=r"1,152,921,504\.6 GB declared \(model\.safetensors"):
        pull(client, tmp_path)
    assert read(tmp_path) == {}
    assert not any("/resolve/" in request for request in hub.requests)
    # Those that are not wanted do not count.
    assert set(read(pull(client, tmp_path, ignore_patterns=["*.safetensors"]))) == set(FILES) - {"model.safetensors"}


def test_a_smaller_size_than_declared_is_noticed(hub, client, tmp_path):
    hub.put("user/repo", FILES)
    hub.sizes["config.json"] = 5
    with pytest.raises(ClientError, match=r"expected the contents that the Hub announced|expected to find"):
        pull(client, tmp_path)
    assert not (tmp_path / "pulled").exists()


def test_tokens_are_never_shown(hub, client, folder, tmp_path):
    hub.faults.append(Fault("POST", "/commit/", 403, times=1000))
    texts = []
    for act in (lambda: push(client, folder), lambda: pull(client, tmp_path, repo="other/none")):
        with pytest.raises(ClientError) as caught:
            act()
        texts.append(caught.value.text + caught.value.trace)
    assert "hf_good" not in "".join(texts) + client.errors.read_text()
