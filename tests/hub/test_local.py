import json
import os
import stat

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError
from comcat_hf.hub import (
    files,
    push_folder,
    read_json,
    readable_size,
    resolve_file,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from comcat_hf.hub.failures import without_secrets


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_survives_a_round_trip_and_creates_its_folder(tmp_path):
    payload = {"format": "x", "ranks": {"a.b": {"qk": 3}}, "note": "größer"}
    path = write_json_atomic(tmp_path / "new" / "ranks.json", payload)
    assert read_json(path) == payload
    assert names_in(path.parent) == ["ranks.json"]


def test_text_is_written_without_newline_translation(tmp_path):
    path = write_text_atomic(tmp_path / "ranks.txt", "3\n5\né\n")
    assert path.read_bytes() == "3\n5\né\n".encode()


def test_a_written_file_has_ordinary_permissions(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    written = write_bytes_atomic(tmp_path / "written", b"")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = write_text_atomic(tmp_path / "ranks.json", "old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="no space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["ranks.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused_before_the_old_file_is_touched(tmp_path, value):
    path = write_json_atomic(tmp_path / "ranks.json", {"a": 1})
    with pytest.raises(InvalidValueError, match=r"ranks\.json: expected JSON-serialisable content"):
        write_json_atomic(path, {"a": value})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("keep", [1, 7, 20])
def test_a_truncated_json_file_is_named_with_its_position(tmp_path, keep):
    path = write_json_atomic(tmp_path / "ranks.json", {"format": "x", "ranks": {"a": 1}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"ranks\.json: expected JSON.*line \d+, column \d+") as caught:
        read_json(path)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_json_that_is_no_object_names_what_was_found(tmp_path):
    path = write_text_atomic(tmp_path / "ranks.json", "[1, 2]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        read_json(path)


def test_a_binary_or_missing_file_is_a_clear_error(tmp_path):
    path = write_bytes_atomic(tmp_path / "ranks.json", b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"ranks\.json: expected UTF-8 JSON.*position 7"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"none\.json: expected a readable JSON file"):
        read_json(tmp_path / "none.json")


def test_a_file_is_found_in_a_folder_in_a_subfolder_and_by_its_own_path(tmp_path):
    path = write_text_atomic(tmp_path / "unet" / "ranks.json", "{}")
    assert resolve_file(tmp_path, "ranks.json", subfolder="unet") == path
    assert resolve_file(str(tmp_path / "unet"), "ranks.json") == path
    assert resolve_file(path, "ranks.json") == path


def test_a_relative_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    write_text_atomic(tmp_path / "user" / "repo" / "ranks.json", "{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_file("user/repo", "ranks.json").read_text() == "{}"


def test_a_folder_without_the_file_names_what_it_holds(tmp_path):
    write_text_atomic(tmp_path / "config.json", "{}")
    with pytest.raises(CheckpointError, match=r"expected the file ranks\.json, found config\.json") as caught:
        resolve_file(tmp_path, "ranks.json")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointError, match="no such folder; check `subfolder`"):
        resolve_file(tmp_path, "ranks.json", subfolder="unet")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c", "~/missing-comcat-folder"])
def test_a_path_that_does_not_exist_never_reaches_the_hub(name):
    with pytest.raises(CheckpointError, match="found no such file or folder") as caught:
        resolve_file(name, "ranks.json")
    assert caught.value.__cause__ is None


def test_a_hub_id_that_is_not_cached_is_one_clear_error_when_offline(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"user/repo: expected to find unet/ranks\.json \(revision v1\)"
    ) as caught:
        resolve_file("user/repo", "ranks.json", subfolder="unet", revision="v1", cache_dir=tmp_path)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert isinstance(caught.value, ComCATError)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)


def test_a_cached_hub_file_is_found_offline(tmp_path):
    commit = "0" * 40
    repo = tmp_path / "models--user--repo"
    write_text_atomic(repo / "refs" / "main", commit)
    path = write_text_atomic(repo / "snapshots" / commit / "ranks.json", "{}")
    assert resolve_file("user/repo", "ranks.json", cache_dir=tmp_path, local_files_only=True) == path


def test_a_name_that_is_neither_folder_nor_hub_id_is_said_to_be_so():
    with pytest.raises(CheckpointError, match="neither a local folder nor a Hub id") as caught:
        resolve_file("not a repo!", "ranks.json")
    assert isinstance(caught.value.__cause__, HFValidationError)


def test_nothing_to_upload_is_refused_before_the_hub_is_asked(tmp_path):
    write_text_atomic(tmp_path / ".cache" / "lock", "")
    with pytest.raises(InvalidValueError, match="user/repo: expected something to upload"):
        push_folder(tmp_path, "user/repo")
    with pytest.raises(InvalidValueError, match=r"no file at .*none\.json"):
        push_folder([tmp_path / "none.json"], "user/repo")
    twice = [write_text_atomic(tmp_path / part / "a.json", "{}") for part in ("x", "y")]
    with pytest.raises(InvalidValueError, match="a name twice"):
        push_folder(twice, "user/repo")


@pytest.mark.parametrize(
    ("repo_id", "reason"), [("user/repo", "user/repo: .* was not reached"), ("not a repo!", "not a repository name")]
)
def test_an_upload_that_fails(tmp_path, repo_id, reason):
    write_text_atomic(tmp_path / "a.json", "{}")
    with pytest.raises(ComCATError, match=reason):
        push_folder(tmp_path, repo_id)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("is it there? no: hf_internal_testing_tiny/x, https://hf.co/a?b", None),
        ("see https://me:hunter2@hf.co/x", "see https://***@hf.co/x"),
        ("'https://s3.co/a?X-Amz-Signature=abc&y=1'", "'https://s3.co/a?***'"),
        ("hf_abcdefghijklmnopqrst and mine", "*** and mine"),
    ],
)
def test_secrets_are_taken_out_of_errors_and_nothing_else(text, shown):
    assert without_secrets(text) == (shown or text)
    assert without_secrets(text + " token0") == (shown or text) + " token0"
    assert without_secrets(text + " token0", "token0") == (shown or text) + " ***"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (2432, "2.4 KB"),
        (999_960, "1.0 MB"),
        (3_300_000, "3.3 MB"),
        (1.2e12, "1,200.0 GB"),
    ],
)
def test_sizes_are_said_in_the_unit_that_fits(count, said):
    assert readable_size(count) == said


def test_the_tests_are_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
