"""What users meet is documented: every public function with its arguments and errors, every setting."""

import dataclasses
import inspect
import re

import pytest

import comcat_hf
from comcat_hf import app, original
from comcat_hf import reporting as report
from comcat_hf.hub import pull_folder, push_folder
from comcat_hf.reporting import plots
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.dreambooth.settings import CustomizeSettings


def public():
    for module in (comcat_hf, original, plots, report, app):
        for name, value in ((name, getattr(module, name)) for name in dir(module)):
            own = getattr(value, "__module__", "").startswith("comcat_hf")
            if not name.startswith("_") and own and not inspect.ismodule(value):
                yield name, value
    yield from (("pull_folder", pull_folder), ("push_folder", push_folder))


PUBLIC = dict(public())
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def test_there_is_something_to_look_at():
    assert {"compress", "DistillationTrainer", "RankPlan", "read_original_vit", "push_folder"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring_of_their_own(name):
    text = PUBLIC[name].__doc__ or ""
    assert len(text.strip()) > 20
    # What dataclasses write by themselves.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_results_and_errors_are_said(name):
    function = FUNCTIONS[name]
    text, signature = function.__doc__, inspect.signature(function)
    named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    missing = [argument for argument in named if not re.search(rf"\b{argument}\b", text)]
    assert not missing, f"{name}: the docstring says nothing of {', '.join(missing)}"
    if named:
        assert "Args:" in text
    if signature.return_annotation not in (None, "None", inspect.Signature.empty):
        assert re.search(r"\breturns?\b|\bgive\b", text, re.IGNORECASE), f"{name}: the docstring says no result"
    if re.search(r"^\s+raise \w+Error\(", inspect.getsource(function), re.MULTILINE):
        assert "Raises:" in text, f"{name}: it raises, and its docstring does not say what"


@pytest.mark.parametrize("config", [comcat_hf.ComCATConfig, CompressSettings, CustomizeSettings])
def test_fields_of_configurations_have_help(config):
    bases = [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    bare = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in inherited and field.init and len(field.metadata.get("help", "")) < 8
    ]
    assert not bare, f"{config.__name__}: no help for {', '.join(bare)}"


def test_fields_of_plans_are_in_the_docstring():
    for field in dataclasses.fields(comcat_hf.RankPlan):
        assert field.name.startswith("_") or re.search(rf"\b{field.name}\b", comcat_hf.RankPlan.__doc__), field.name
