import copy
import dataclasses
import json
import pickle

import pytest

from comcat_hf import RankPlan
from comcat_hf.configs import RANKS_NAME
from comcat_hf.errors import CheckpointError, RankPlanError


def _plan() -> RankPlan:
    return RankPlan(
        {
            "layers.0.attention": {"qk": 4, "vo": 6},
            "layers.1.attention": {"vo": 2},
            "layers.0.fc1": 8,
            "layers.1.mlp": {"width": 30},
        },
        architecture="ViTForImageClassification",
        base_model_name_or_path="user/base",
        revision="abc",
        scope="attention",
        metric="macs",
        strategy="sensitivity",
        reduction=0.5,
        reached=0.502,
    )


def _edited(**changes) -> dict:
    return {**_plan().to_dict(), **changes}


def test_a_dictionary_holds_the_whole_plan():
    content = _plan().to_dict()
    assert RankPlan.from_dict(content) == _plan()
    assert RankPlan.from_dict(json.loads(json.dumps(content))) == _plan()
    assert (content["format"], content["format_version"]) == ("comcat_ranks", 1)


def test_a_folder_and_a_file_hold_the_whole_plan(tmp_path):
    _plan().save_pretrained(tmp_path / "new" / "folder")
    assert RankPlan.from_pretrained(tmp_path / "new" / "folder") == _plan()
    assert RankPlan.from_pretrained(str(tmp_path / "new" / "folder" / RANKS_NAME)) == _plan()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [RANKS_NAME]


@pytest.mark.parametrize(
    "base", ["./vit", "/models/vit", "~/vit", "C:\\models\\vit", "C:/vit", "a/b/c", "models/vit", "vit"]
)
def test_a_folder_of_this_machine_is_not_written_down(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/vit", "vit"):
        (tmp_path / folder).mkdir(parents=True)
    plan = dataclasses.replace(_plan(), base_model_name_or_path=base)
    content = plan.to_dict()
    assert (content["base_model_name_or_path"], content["revision"]) == (None, None)
    assert plan.base_model_name_or_path == base
    assert _plan().to_dict()["base_model_name_or_path"] == "user/base"


def test_saving_again_replaces_the_file(tmp_path):
    RankPlan({"layers.9.fc1": 3}).save_pretrained(tmp_path)
    _plan().save_pretrained(tmp_path)
    assert RankPlan.from_pretrained(tmp_path) == _plan()


def test_only_ranks_are_needed():
    content = {"format": "comcat_ranks", "format_version": 1, "ranks": {"fc1": 2}}
    assert RankPlan.from_dict(content) == RankPlan({"fc1": 2})


def test_reading_does_not_change_what_is_read():
    content = _plan().to_dict()
    before = copy.deepcopy(content)
    RankPlan.from_dict(content)
    assert content == before


def test_a_plan_is_its_own():
    ranks = {"layers.0.attention": {"qk": 4}}
    plan = RankPlan(ranks)
    ranks["layers.0.attention"]["qk"] = 9
    plan.to_dict()["ranks"]["layers.0.attention"]["qk"] = 9
    assert plan.ranks == {"layers.0.attention": {"qk": 4}}


def test_a_plan_is_frozen():
    plan = _plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.scope = "mlp"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.ranks = {}


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])  # noqa: S301
def test_a_plan_can_be_copied(how):
    assert how(_plan()) == _plan()


def test_a_changed_plan_is_checked_again():
    assert dataclasses.replace(_plan(), reached=0.6).reached == 0.6
    with pytest.raises(RankPlanError, match=r"fc1.*from 1"):
        dataclasses.replace(_plan(), ranks={"fc1": 0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": {"fc1": 0}}, "fc1: expected a whole number from 1.*got 0"),
        ({"ranks": {"fc1": "8"}}, "fc1.*'8'"),
        ({"ranks": {"fc1": True}}, "fc1.*True"),
        ({"ranks": {"fc1": 2.0}}, "fc1.*2.0"),
        ({"ranks": {"fc1": None}}, "fc1.*None"),
        ({"ranks": {"attention": {}}}, r"attention.*\{\}"),
        ({"ranks": {"attention": {"qk": 2, "vo": 0}}}, "attention.*'vo': 0"),
        ({"ranks": {"attention": {"qk": None}}}, "attention.*'qk': None"),
        ({"ranks": {"mlp": {"width": 0}}}, r"mlp: expected .*\{'width': k\} for an MLP, got \{'width': 0\}"),
        ({"ranks": {"attention": [2, 3]}}, r"attention.*\[2, 3\]"),
        ({"ranks": {"attention": {"qk": 2, "width": 3}}}, "attention.*'width': 3"),
        ({"ranks": [["fc1", 2]]}, "ranks: expected a mapping"),
        ({"ranks": None}, "ranks: expected a mapping"),
        ({"rank": 3}, "unknown 'rank'"),
        ({"format": "safetensors"}, "expected format 'comcat_ranks'.*'safetensors'"),
        ({"format": None}, "expected format 'comcat_ranks'.*None"),
        ({"format_version": 2}, "expected.*format_version 1.*format_version 2.*Update"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"reached": "x"}, "reached: expected a finite number to 1 or nothing, found 'x'"),
        ({"reached": 1.5}, "reached.*1.5"),
        ({"reduction": True}, "reduction.*True"),
        ({"reduction": -0.1}, "reduction.*-0.1"),
        ({"reduction": 10**400}, "reduction.*from 0 to 1"),
        ({"architecture": ["ViTModel"]}, "architecture: expected a text"),
        ({"revision": 7}, "revision.*7"),
        ({"base_model_name_or_path": {}}, "base_model_name_or_path"),
        ({"scope": "all"}, "scope: expected one of model, attention, mlp, found 'all'"),
        ({"metric": None}, "metric: expected one of params, macs, latency"),
        ({"strategy": 3}, "strategy"),
    ],
)
def test_an_edited_file_is_refused_by_name(changes, words, tmp_path):
    file = tmp_path / RANKS_NAME
    file.write_text(json.dumps(_edited(**changes)))
    with pytest.raises(RankPlanError, match=words) as caught:
        RankPlan.from_pretrained(tmp_path)
    assert isinstance(caught.value, ValueError)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("field", ["ranks", "format", "format_version"])
def test_a_missing_field_is_named(field, tmp_path):
    content = _plan().to_dict()
    del content[field]
    (tmp_path / RANKS_NAME).write_text(json.dumps(content))
    with pytest.raises(RankPlanError, match=field):
        RankPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_that_json_lacks_is_read(value, tmp_path):
    (tmp_path / RANKS_NAME).write_text(json.dumps(_edited(reached=value)))
    with pytest.raises(CheckpointError, match="which is no number of JSON"):
        RankPlan.from_pretrained(tmp_path)
    with pytest.raises(RankPlanError, match="reached: expected a finite number"):
        dataclasses.replace(_plan(), reached=value)


def test_an_edited_plan_is_taken_and_said_to_be_edited(tmp_path, caplog):
    _plan().save_pretrained(tmp_path)
    file = tmp_path / RANKS_NAME
    RankPlan.from_pretrained(tmp_path)
    assert not caplog.records
    file.write_text(file.read_text().replace("0.502", "0.702"))
    assert RankPlan.from_pretrained(tmp_path).reached == 0.702
    assert str(file) in caplog.text and "edited by hand, or damaged" in caplog.text


def test_a_truncated_file_is_named(tmp_path):
    _plan().save_pretrained(tmp_path)
    file = tmp_path / RANKS_NAME
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CheckpointError, match=f"{RANKS_NAME}.*truncated"):
        RankPlan.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=RANKS_NAME):
        RankPlan.from_pretrained(tmp_path)


def test_an_error_outside_a_file_names_no_file():
    with pytest.raises(RankPlanError, match=r"^this plan: fc1"):
        RankPlan({"fc1": 0})


def test_an_edited_plan_has_reached_nothing_yet():
    plan = _plan()
    edited = plan.with_ranks({"layers.0.attention": {"qk": 3}, "layers.0.fc1": None, "layers.2.fc1": 5})
    assert edited.ranks == {
        "layers.0.attention": {"qk": 3},
        "layers.1.attention": {"vo": 2},
        "layers.1.mlp": {"width": 30},
        "layers.2.fc1": 5,
    }
    assert edited == dataclasses.replace(plan, ranks=edited.ranks, reached=None)
    assert plan == _plan()


@pytest.mark.parametrize(
    "ranks", [{"layers.0.fc1": 0}, {"layers.0.fc1": "8"}, {"layers.0.fc1": {"qk": -1}}, [8], None]
)
def test_edits_that_are_no_ranks_are_refused(ranks):
    with pytest.raises(RankPlanError, match=r"layers\.0\.fc1: expected a whole|takes a mapping"):
        _plan().with_ranks(ranks)
