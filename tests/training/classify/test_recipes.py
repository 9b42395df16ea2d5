"""The packaged recipes, accelerate's configuration files, and the flags that the docs name."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.classify.evaluation_report import EvaluateSettings
from comcat_hf.training.classify.settings import CompressSettings, parse_compress_settings
from comcat_hf.training.dreambooth.settings import CustomizeSettings
from comcat_hf.training.recipes import recipe_names


ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))
DOCS = [ROOT / "docs" / "from_original.md", ROOT / "docs" / "train.md"]

# What the user names for a recipe that leaves it open.
OWN = {"cifar10": ["--model_name_or_path=vit", "--train_file=train.parquet", "--validation_file=validation.parquet"]}

# Settings of the paper, by the command lines of the release.
PAPER = {
    "strategy": "search",
    "mlp": "rank",
    "weights_only": True,
    "search_epochs": 30,
    "search_learning_rate": 1e-2,
    "search_beta": 1.5,
    "distillation_type": "hard",
    "distillation_alpha": 0.5,
    "distillation_without_token": True,
    "teacher": None,
    # Each image three times: as many steps as DeiT's 300 epochs, in each of which a third of the images occur.
    "num_train_epochs": 100,
    "per_device_train_batch_size": 256,
    "learning_rate": 1e-4,
    "warmup_steps": 0,
    "warmup_ratio": 0,
    "ema_decay": None,
    "rand_augment_num_ops": 2,
    "rand_augment_magnitude": 9,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "mixup_prob": 1.0,
    "random_erasing": 0.25,
    "label_smoothing": 0.1,
    "repeated_augmentation": 3,
}
SMALL = {"reduction": 0.5, "search_batch_size": 64, "min_learning_rate": 5e-6, "weight_decay": 5e-3, "scale_lr": True}
BASE = {"reduction": 0.6, "search_batch_size": 16, "min_learning_rate": 1e-6, "weight_decay": 0.05, "scale_lr": False}
SMALL_MODEL = {"model_name_or_path": "facebook/deit-small-patch16-224"}
BASE_MODEL = {"model_name_or_path": "facebook/deit-base-patch16-224"}
OURS = {"strategy": "curvature", "mlp": "width", "compensate": True, "weights_only": False}
OURS |= {"distillation_type": "soft"}
EXPECTED = {
    "deit_small_paper": PAPER | SMALL | SMALL_MODEL | {"alignment": 1.0, "alignment_blocks": 2},
    "deit_base_paper": PAPER | BASE | BASE_MODEL | {"alignment": 0.0},
    "deit_small": OURS | SMALL_MODEL | {"reduction": 0.5},
    "deit_base": OURS | BASE_MODEL | {"reduction": 0.6},
    "cifar10": OURS | {"reduction": 0.5},
}

# Every flag in the command lines of the original's README.
OF_THE_RELEASE = {
    *("--model", "--data-path", "--batch-size", "--load", "--output_dir", "--epochs", "--warmup-epochs"),
    *("--search-rank", "--distillation-type", "--teacher-model", "--teacher-path", "--with-align", "--eval"),
    *("--distillation-without-token", "--batch-size-search", "--target-params-reduction", "--nproc_per_node"),
    *("--use_env", "--finetune-rank-dir", "--attn2-with-bias", "--lr", "--min-lr", "--weight-decay", "--unscale-lr"),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def test_every_recipe_is_expected():
    assert set(recipe_names("compress")) == set(EXPECTED)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hub_tokn", "s3cret"], r"unrecognized arguments: --hub_tokn \(did you mean hub_token"),
        (["--hubtoken=s3cret"], "unrecognized arguments: --hubtoken"),
        (["--seed", "1", "s3cret"], "unrecognized arguments: a value without a flag"),
        (["--seed", "hf_s3cretabcdefghijklmno"], r"--seed: invalid .*\*\*\*"),
        (["r.yaml"], "r.yaml: .*line 1, column 18: mapping values are not allowed here"),
        (["l.yaml"], "l.yaml: hub_token: expected one value, found a sequence"),
    ],
)
def test_what_may_be_a_token_is_not_repeated(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("hub_token: s3cret: x")
    (tmp_path / "l.yaml").write_text("hub_token: [s3cret]")
    with pytest.raises(InvalidValueError, match=says) as caught:
        parse_compress_settings(words)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", recipe_names("compress"))
def test_recipes_are_read_and_can_be_used(name):
    settings = parse_compress_settings([name, *OWN.get(name, [])])
    settings.check()
    found = {key: getattr(settings, key) for key in EXPECTED[name]}
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("deit")])
def test_deit_recipes_name_imagenet_and_how_a_batch_comes_about(name):
    settings = parse_compress_settings([name, "--output_dir=elsewhere", "--num_train_epochs=1"])
    assert settings.dataset_name == "ILSVRC/imagenet-1k" and settings.validation_split_name == "validation"
    assert (settings.output_dir, settings.num_train_epochs) == ("elsewhere", 1)
    assert settings.per_device_train_batch_size == 256 and settings.gradient_accumulation_steps == 1
    # Images of a folder take the place of the recipe's data set.
    local = parse_compress_settings([name, "--dataset_name=", "--train_dir=train", "--validation_dir=val"])
    local.check()


def test_ours_train_shorter_than_the_paper():
    epochs = {name: parse_compress_settings([name]).num_train_epochs for name in EXPECTED if name != "cifar10"}
    assert epochs["deit_small"] < epochs["deit_small_paper"] and epochs["deit_base"] < epochs["deit_base_paper"]
    assert all(parse_compress_settings([name]).ema_decay for name in ("deit_small", "deit_base"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration_files(path):
    config = load_config_from_file(str(path))
    expected = {
        "ddp": ("MULTI_GPU", 1),
        "multi_node": ("MULTI_GPU", 2),
        "fsdp2": ("FSDP", 1),
        "deepspeed_zero2": ("DEEPSPEED", 1),
        "cpu": ("MULTI_GPU", 1),
    }[path.stem]
    assert (config.distributed_type.value, config.num_machines) == expected
    assert config.num_processes > config.num_machines
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")


def test_every_configuration_file_is_there():
    assert [path.stem for path in CONFIGS] == ["cpu", "ddp", "deepspeed_zero2", "fsdp2", "multi_node"]


# The docs


def flags_of(*classes):
    return {f"--{field.name}" for cls in classes for field in fields(cls)} | {"--config", "--help"}


def launcher_flags():
    actions = launch_command_parser()._actions
    return {option for action in actions for option in action.option_strings if option.startswith("--")}


def known_flags():
    return flags_of(CompressSettings, EvaluateSettings, CustomizeSettings) | launcher_flags()


# A command that starts a program: to the end of its code block or code span.
COMMAND = re.compile(r"(accelerate launch[^`]*? )(-m comcat_hf\.training\.[\w.]+|scripts/\w+\.py)([^`]*)")
PROGRAMS = {
    "-m comcat_hf.training.classify": CompressSettings,
    "-m comcat_hf.training.classify.evaluate": EvaluateSettings,
    "-m comcat_hf.training.dreambooth": CustomizeSettings,
    "scripts/compress_vit.py": CompressSettings,
    "scripts/evaluate_vit.py": EvaluateSettings,
    "scripts/customize_diffusion.py": CustomizeSettings,
}


def wrong_flags(text):
    """Flags in commands that the program of the command does not have."""
    wrong = set()
    for launcher, program, own in COMMAND.findall(text):
        wrong |= set(FLAG.findall(launcher)) - launcher_flags()
        wrong |= set(FLAG.findall(own)) - flags_of(PROGRAMS[program])
    return wrong


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_commands_in_the_docs_name_flags_of_their_programs(path):
    text = path.read_text(encoding="utf-8")
    assert len(COMMAND.findall(text)) >= 3
    assert wrong_flags(text) == set()


def test_the_page_on_training_names_only_flags_that_are_there():
    named = set(FLAG.findall(DOCS[1].read_text(encoding="utf-8")))
    imagenet = set(re.findall(r'"(--\w+)"', (ROOT / "benchmarks" / "imagenet.py").read_text(encoding="utf-8")))
    assert named - known_flags() - imagenet == set()
    assert len(named) > 60


def test_every_flag_of_the_release_has_its_line():
    rows = [line.split(" | ") for line in DOCS[0].read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    there = {flag for row in rows for flag in FLAG.findall(row[0])}
    assert there >= OF_THE_RELEASE
    here = {flag for row in rows for flag in FLAG.findall(row[1])}
    # In the second column the release's own names may stand in none of our commands; `comcat convert` has two flags.
    assert here - known_flags() - {"--unscale-lr", "--base", "--alpha"} == set()


def test_the_checker_of_flags_sees_what_is_wrong():
    said = "`accelerate launch --num_processes 2 -m comcat_hf.training.classify deit_small --reduction 0.5 --use_env`"
    assert wrong_flags(said) == {"--use_env"}
    assert wrong_flags(
        "```\naccelerate launch --reduction 1 scripts/evaluate_vit.py \\\n  --dense x --plan y\n```"
    ) == {
        "--reduction",
        "--plan",
    }


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_files_and_recipes_that_the_docs_name_are_there(path):
    text = path.read_text(encoding="utf-8")
    for name in set(re.findall(r"scripts/[\w/]+\.(?:py|yaml)", text)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"\]\((\w+\.md)\)", text)):
        assert (ROOT / "docs" / name).is_file(), name
    for name in set(re.findall(r"`((?:deit|cifar|sd15)\w+)`", text)):
        assert name in {*recipe_names("compress"), *recipe_names("customize")}, name


# What the stages leave, as a run's folder has it; docs/train.md says so.
def test_the_stages_in_the_docs_are_those_of_the_script():
    from comcat_hf.training.classify.settings import STAGES

    table = re.findall(r"^\| `(\w+)` \|.*\|.*\|$", DOCS[1].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert tuple(name for name in table if name in STAGES) == STAGES
