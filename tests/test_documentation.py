"""What users meet is documented: every public function with its arguments and errors, every setting."""

import dataclasses
import inspect
import re

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


def test_public_names_have_a_docstring_of_their_own():
    # Dataclasses that have none write their signature.
    texts = {name: (value.__doc__ or "").strip() for name, value in PUBLIC.items()}
    assert not [name for name, text in texts.items() if len(text) <= 20 or text.startswith(f"{name}(")]


def test_arguments_results_and_errors_are_said():
    found = []
    for name, function in FUNCTIONS.items():
        text, signature = function.__doc__ or "", inspect.signature(function)
        named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        found += [f"{name}: {argument}" for argument in named if not re.search(rf"\b{argument}\b", text)]
        if named and "Args:" not in text:
            found.append(f"{name}: no Args")
        returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
        if returns and not re.search(r"\breturns?\b|\bgive\b", text, re.IGNORECASE):
            found.append(f"{name}: no result")
        if re.search(r"^\s+raise \w+Error\(", inspect.getsource(function), re.MULTILINE) and "Raises:" not in text:
            found.append(f"{name}: it raises, and does not say what")
    assert not found, "Docstrings do not say: " + "; ".join(found)


def test_fields_of_configurations_have_help():
    bare = []
    for config in (comcat_hf.ComCATConfig, CompressSettings, CustomizeSettings):
        bases = [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]
        inherited = {field.name for base in bases for field in dataclasses.fields(base)}
        own = (field for field in dataclasses.fields(config) if field.init and field.name not in inherited)
        bare += [f"{config.__name__}.{f.name}" for f in own if len(f.metadata.get("help", "")) < 8]
    assert not bare, f"No help for {', '.join(bare)}"


def test_fields_of_plans_are_in_the_docstring():
    for field in dataclasses.fields(comcat_hf.RankPlan):
        assert field.name.startswith("_") or re.search(rf"\b{field.name}\b", comcat_hf.RankPlan.__doc__), field.name
