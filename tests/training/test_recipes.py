"""Recipes and flags: what the command line names displaces what the recipe says of it."""

import pytest

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.classify.evaluation_report import parse_evaluate_settings
from comcat_hf.training.classify.settings import parse_compress_settings
from comcat_hf.training.dreambooth.settings import parse_customize_settings


DATA = "dataset_name: a\ndataset_config_name: b\nvalidation_split_name: c\nimage_column_name: d\n"
FILES = "train_file: a\nvalidation_file: b\nlabel_column_name: c\nstreaming: true\n"
GIVEN = "model_name_or_path: vit\nreduction: 0.5\nmax_train_samples: 9\n"
NAMES = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "train_dir", "validation_dir")
COLUMNS = ("validation_split_name", "image_column_name", "label_column_name", "streaming")
PLAIN = {"image_column_name": "image", "label_column_name": "label", "streaming": False}


def written(path, content):
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize("recipe", [DATA, FILES], ids=["data_set", "files"])
@pytest.mark.parametrize(
    "flags",
    [
        {"train_file": "x"},
        {"train_file": "x", "validation_file": "y", "label_column_name": "z"},
        {"train_dir": "x", "validation_dir": "y"},
        {"dataset_name": "x", "streaming": "true"},
    ],
    ids=" ".join,
)
def test_a_source_displaces_that_of_the_recipe(tmp_path, recipe, flags):
    """In whatever way it is written, and wherever the recipe stands."""
    path = written(tmp_path / "recipe.yaml", GIVEN + recipe)
    joined = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    apart = [part for name, value in flags.items() for part in (f"--{name}", value)]
    for arguments in ([path, *apart], [*joined, "--config", path]):
        found = parse_compress_settings(arguments)
        found.check()
        expected = dict.fromkeys((*NAMES, *COLUMNS)) | PLAIN | flags
        expected["streaming"] = expected["streaming"] in (True, "true")
        assert {name: getattr(found, name) for name in expected} == expected
        assert (found.reduction, found.max_train_samples) == (0.5, 9)


def test_other_flags_leave_the_source_of_the_recipe(tmp_path):
    path = written(tmp_path / "recipe.yaml", GIVEN + DATA)
    found = parse_compress_settings([path, "--image_column_name", "x", "--max_train_samples", "3"])
    assert (found.dataset_name, found.dataset_config_name, found.image_column_name) == ("a", "b", "x")


def test_a_plan_displaces_a_reduction(tmp_path):
    found = parse_compress_settings([written(tmp_path / "recipe.yaml", GIVEN + DATA), "--plan", "x"])
    found.check()
    assert (found.reduction, found.plan) == (None, "x")


def test_the_other_scripts_do_alike(tmp_path):
    recipe = "dataset_name: a\nvalidation_split_name: b\n"
    found = parse_evaluate_settings([written(tmp_path / "evaluate.yaml", recipe), "--validation_dir", "x"])
    assert (found.dataset_name, found.validation_split_name, found.validation_dir) == (None, None, "x")
    recipe = "dataset_name: a\nimage_column: b\ncaption_column: c\nresolution: 64\n"
    found = parse_customize_settings([written(tmp_path / "customize.yaml", recipe), "--instance_data_dir", "x"])
    assert (found.dataset_name, found.image_column, found.caption_column) == (None, "image", None)
    assert (found.instance_data_dir, found.resolution) == ("x", 64)


def test_several_recipes_are_refused(tmp_path):
    one, two = (written(tmp_path / f"{name}.yaml", GIVEN + DATA) for name in ("one", "two"))
    for arguments in ([one, "--config", two], ["--config", one, "--config", two], [one, f"--config={two}"]):
        with pytest.raises(InvalidValueError, match=r"Expected one recipe, found .*one.yaml, .*two.yaml"):
            parse_compress_settings(arguments)


def test_values_are_what_is_written(tmp_path):
    """Not what YAML makes of `no` and of digits behind a zero."""
    recipe = "mixed_precision: no\nrevision: 0123456\nwith_prior_preservation: yes\ncenter_crop: off\n"
    found = parse_customize_settings([written(tmp_path / "recipe.yaml", recipe)])
    assert (found.mixed_precision, found.revision) == ("no", "0123456")
    assert (found.with_prior_preservation, found.center_crop) == (True, False)
