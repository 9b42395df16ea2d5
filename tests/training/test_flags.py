"""What stands on the fields of the settings: which values a flag takes, and what its value decides."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.classify.artefacts import Artefacts
from comcat_hf.training.classify.settings import STAGES, CompressSettings
from comcat_hf.training.dreambooth.settings import CustomizeSettings
from comcat_hf.training.flags import check_flags, fixed_flags, flag_of, values_deciding


KEPT = STAGES[:4]
RESULTS = {
    CompressSettings: {*KEPT, *(f"{stage} by search" for stage in KEPT)},
    CustomizeSettings: {"finetune", "images", "class images"},
}
# Where something lies, how fast, how often and what is said: no kept result depends on these.
NOTHING = {
    CompressSettings: "cache_dir token sweep stages validation_file validation_dir validation_split_name "
    "max_eval_samples max_broken_images dataloader_num_workers output_dir overwrite_output_dir "
    "per_device_eval_batch_size checkpointing_steps checkpoints_total_limit resume_from_checkpoint eval_steps "
    "logging_steps report_to logging_dir push_to_hub hub_model_id hub_token hub_private dry_run",
    CustomizeSettings: "cache_dir instance_token adapter_name output_dir overwrite_output_dir dataloader_num_workers "
    "save_precision checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompt "
    "num_validation_images validation_steps report_to logging_dir push_to_hub hub_model_id hub_token hub_private "
    "dry_run",
}


def test_every_flag_says_what_it_decides():
    for cls, results in RESULTS.items():
        said = {f.name: set(flag_of(cls, f.name).decides) for f in fields(cls)}
        assert set().union(*said.values()) == results
        assert {name for name, decided in said.items() if not decided} == set(NOTHING[cls].split())


@pytest.mark.parametrize("result", sorted(RESULTS[CompressSettings]))
def test_a_stage_is_not_reused_with_another_value(tmp_path: Path, result: str):
    stage, _, searched = result.partition(" by ")
    settings = CompressSettings(strategy="search" if searched else "uniform", output_dir="out")
    artefacts = Artefacts(tmp_path)
    artefacts.note(stage, settings.facts(stage, seed=0))
    assert artefacts.is_done(stage, settings.facts(stage, seed=0))
    for name in (f.name for f in fields(CompressSettings) if result in flag_of(CompressSettings, f.name).decides):
        changed = replace(settings, **{name: "another"})
        with pytest.raises(InvalidValueError, match=f"the stage {stage} was done with --{name} "):
            artefacts.is_done(stage, changed.facts(stage, seed=int(name == "seed")))


def test_what_the_search_alone_uses_counts_with_the_search_only(tmp_path: Path):
    uniform = CompressSettings(strategy="uniform", distillation_type="hard", search_share=0.2)
    assert uniform.facts("allocate", 0) == replace(uniform, distillation_type="soft").facts("allocate", 0)
    assert uniform.facts("finetune", 0) != replace(uniform, distillation_type="soft").facts("finetune", 0)
    # The search takes its images from those that the other stages used.
    artefacts = Artefacts(tmp_path)
    artefacts.note("calibrate", uniform.facts("calibrate", 0))
    with pytest.raises(InvalidValueError, match=r"calibrate was done with --search_share None, .* with 0\.2"):
        artefacts.is_done("calibrate", replace(uniform, strategy="search").facts("calibrate", 0))


def test_a_fact_that_an_older_version_did_not_write_is_taken_for_the_same(tmp_path: Path):
    artefacts, settings = Artefacts(tmp_path), CompressSettings()
    old = {"model_name_or_path": None, "learning_rate": 1e-4, "seed": 3}
    record = {"format": "comcat_stages", "version": 1, "seed": 3, "stages": {"finetune": old}}
    (tmp_path / "comcat_stages.json").write_text(json.dumps(record))
    assert artefacts.seed() == 3
    assert artefacts.is_done("finetune", replace(settings, label_smoothing=0.1).facts("finetune", 3))
    with pytest.raises(InvalidValueError, match=r"--learning_rate 0\.0001, and is asked for with 0\.1"):
        artefacts.is_done("finetune", replace(settings, learning_rate=0.1).facts("finetune", 3))


def test_what_a_checkpoint_cannot_change():
    assert fixed_flags(CompressSettings) == ("model_name_or_path", "route", "modules_to_save", "ema_decay")
    kinds = ("qk_rank", "vo_rank", "core", "gains", "head_gains", "train_text_encoder")
    assert fixed_flags(CustomizeSettings) == kinds
    assert {"adam_beta1", "lr_power", "variant"} <= values_deciding(CustomizeSettings(), "finetune").keys()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (CompressSettings(calibration_samples=0), "--calibration_samples must be a whole number from 1, got 0"),
        (CompressSettings(adam_epsilon=0.0), "--adam_epsilon must be a number above 0"),
        (CompressSettings(color_jitter=float("inf")), "--color_jitter must be a number from 0, got inf"),
        (CompressSettings(ema_decay=1.0), "--ema_decay must be a number from 0 to below 1"),
        (CompressSettings(rand_augment_magnitude=31), "--rand_augment_magnitude must be from 0 to 30, got 31"),
        (CompressSettings(mixup_prob=1.5), "--mixup_prob must be a number from 0 to 1"),
        (CompressSettings(eval_steps="0"), "--eval_steps must be a whole number from 1, epoch, or none"),
        (CustomizeSettings(lr_power=float("nan")), "--lr_power must be a number above 0, got nan"),
    ],
)
def test_a_value_out_of_range_is_named(settings, wanted):
    with pytest.raises(InvalidValueError, match=wanted):
        check_flags(settings)
