"""Compressed models as ordinary checkpoints: `save_pretrained` and `AutoModelFor….from_pretrained`.

transformers lets a package name a `quant_method` in `config.json`; its quantizer may then rebuild the model's skeleton
before the weights are read. We use that door to put low-rank modules in, and close it again afterwards: a compressed
model holds ordinary floating point parameters, and casting and training it are allowed.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import PushToHubMixin
from transformers.utils.hub import create_and_tag_model_card
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checks import check, listed, some_of
from ..configs.ranks import RankPlan
from ..errors import CheckpointError, InvalidValueError
from ..modeling import LowRankAttention, LowRankLinear, NarrowLinear, apply_ranks, fit_names
from ..tensor_files import open_safetensors
from .current import QUANT_METHODS, check_not_wider, check_saveable, current_plan, teach_saving, teach_uploading
from .quantised import TORCHAO, flat_state, is_torchao, read_metadata, torchao_quantizer
from .remote import forget_remote_code, note_remote_code, write_remote_code


__all__ = ["ComCATQuantizationConfig", "ComCATQuantizer", "attach", "recorded"]

# Arguments of save_pretrained that are meant for the upload.
_OF_THE_HUB = ("commit_message", "commit_description", "create_pr", "private", "revision", "tags", "token")


@register_quantization_config(QUANT_METHODS[1])
@register_quantization_config(QUANT_METHODS[0])
class ComCATQuantizationConfig(QuantizationConfigMixin):
    """The rank plan as it stands in `config.json`, under `quantization_config`.

    Args:
        weights: library of the tensors in the files: `"torchao"`, or `None` for floating point numbers.
        **plan: the fields of a rank file.
    """

    def __init__(self, quant_method: str = QUANT_METHODS[0], weights: str | None = None, **plan: Any) -> None:
        self.quant_method = QUANT_METHODS[0]
        if weights is not None:
            check(weights, listed(TORCHAO), "config.json, quantization_config: weights", error=CheckpointError)
        self.weights = weights
        self.plan = RankPlan.from_dict(plan, source="config.json, quantization_config")

    def to_dict(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"quant_method": self.quant_method, **weights, **self.plan.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHODS[0])
class ComCATQuantizer(HfQuantizer):
    """Rebuilds the compressed skeleton before the weights are read, then withdraws."""

    requires_calibration = False

    def __init__(self, quantization_config: ComCATQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InvalidValueError(
                "A dense checkpoint cannot be loaded with a ComCAT quantization_config: the factors are not in it. "
                "Load the dense model, then call comcat_hf.compress(model, plan=plan)."
            )
        # Reads the tensors of torchao.
        self.inner = torchao_quantizer() if quantization_config.weights == TORCHAO else None

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return self.inner.serialized_names if self.inner else {}

    def get_load_operations(self) -> dict[str, Any]:
        return self.inner.get_load_operations() if self.inner else {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        _check_files(checkpoint_files or ())
        if self.inner:
            self.metadata = read_metadata(self.inner, checkpoint_files)
        self.quantization_config.plan.check_model(model)
        apply_ranks(model, _fit_plan(self.quantization_config.plan, model), initialize=False)
        for module in model.modules():
            if isinstance(module, LowRankAttention):
                # What is missing is an error, and transformers' initialisation expects every bias of the host.
                module._is_hf_initialized = True
        # transformers shows what did not fit to this method of the model, and not to quantizers.
        model.mark_tied_weights_as_initialized = functools.partial(_check_factors, model)
        return model

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del model.mark_tied_weights_as_initialized
        # What the base class marks as quantized would forbid `.half()`, `.float()` and training.
        del model.hf_quantizer, model.is_quantized, model.quantization_method
        attach(model, current_plan(model, self.quantization_config.plan))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        return flat_state(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def recorded(model: nn.Module) -> RankPlan | None:
    """The plan in a model's configuration."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.plan if isinstance(config, ComCATQuantizationConfig) else None


def attach(model: PreTrainedModel, plan: RankPlan | None) -> None:
    """Put a plan into the model's configuration; `None` takes it away."""
    _note(model.config, plan)
    ranks = {} if plan is None else plan.ranks
    for path, part in _towers(model):
        own = {name.removeprefix(f"{path}."): entry for name, entry in ranks.items() if name.startswith(f"{path}.")}
        facts: dict[str, Any] = {
            "architecture": type(model.get_submodule(path)).__name__,
            "reached": None,
            "target_modules": None,
        }
        _note(part, replace(plan, ranks=own, **facts) if own else None)


def _towers(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Paths and configurations of the towers that their own class loads from the folder of the whole."""
    for key in model.config.sub_configs:
        part = getattr(model.config, key, None)
        for path, module in model.named_modules():
            if path and isinstance(module, PreTrainedModel) and type(module.config) is type(part):
                if type(part).base_config_key == key:
                    yield path, part
                break


def _note(config: PreTrainedConfig, plan: RankPlan | None) -> None:
    if plan is not None:
        config.quantization_config = ComCATQuantizationConfig(**plan.to_dict())
        # In memory it may name a folder of this machine as base.
        config.quantization_config.plan = plan
    elif getattr(config, "quantization_config", None) is not None and _is_ours(config.quantization_config):
        # A backbone of which only the head was compressed, or every low-rank module was replaced since.
        del config.quantization_config


def _is_ours(found: Any) -> bool:
    # In the configuration of a tower the library leaves it a mapping.
    return isinstance(found, ComCATQuantizationConfig) or (
        isinstance(found, Mapping) and found.get("quant_method") in QUANT_METHODS
    )


def _save_pretrained(
    dense: Callable[..., None],
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    remote_code: bool | None = None,
    **kwargs: Any,
) -> None:
    save = functools.partial(dense, save_directory, is_main_process, state_dict)
    known, adapted = recorded(model), getattr(model, "_hf_peft_config_loaded", False)
    plan = current_plan(model, known)
    if not adapted:
        check_not_wider(model)
    if not adapted and (plan or known) is not None:
        # Modules may have been replaced since; what is written must say what is there.
        attach(model, plan)
    if adapted or plan is None:
        if remote_code:
            raise InvalidValueError(
                "remote_code: expected a compressed model, found "
                f"{'one with adapters; call merge_and_unload() first' if adapted else 'a dense one; save it without'}."
            )
        if plan is None:
            forget_remote_code(model.config)
        save(push_to_hub, *args, **kwargs)
        return
    if state_dict is None:
        check_saveable(model, TORCHAO)
    remote_code = note_remote_code(model, remote_code)
    hub = {key: kwargs.pop(key) for key in _OF_THE_HUB if key in kwargs}
    repo_id = kwargs.pop("repo_id", Path(save_directory).name)
    # Joined tensors cannot be taken apart by rank: such models are written under the names of their modules.
    # Nor what torchao splits a tensor into.
    quantised = state_dict is None and is_torchao(model)
    kwargs.setdefault("save_original_format", not quantised and not _joins_tensors(model))
    with _pushed(model, save_directory, repo_id, **hub) if push_to_hub and is_main_process else nullcontext():
        with _quantised(model) if quantised else nullcontext():
            save(False, *args, **kwargs)
        if is_main_process:
            plan.save_pretrained(save_directory)
            if remote_code:
                write_remote_code(model.config, save_directory)


@contextmanager
def _pushed(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    tags: str | Sequence[str] | None = None,
    **commit: Any,
) -> Iterator[None]:
    """Upload what is written to a folder in here: the library itself uploads what it wrote alone, so no rank file."""
    listed_tags = [tags] if isinstance(tags, str) else tags or ()
    repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    os.makedirs(folder, exist_ok=True)
    before = model._get_files_timestamps(folder)
    yield
    _write_card(Path(folder, "README.md"), repo_id, [*(model.model_tags or ()), *listed_tags], token)
    model._upload_modified_files(folder, repo_id, before, token=token, **commit)


def _write_card(path: Path, repo_id: str, tags: Sequence[str], token: str | bool | None) -> None:
    """Write a card, or tag the one that is there; one that is as it was is uploaded where the repository has none."""
    if not path.exists():
        create_and_tag_model_card(repo_id, [*tags], token=token).save(path)
        return
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    found = card.data.tags or []
    if missing := [tag for tag in dict.fromkeys(tags) if tag not in found]:
        card.data.tags = [*found, *missing]
        card.save(path)
    elif not HfApi().file_exists(repo_id, path.name, token=token):
        path.touch()


@contextmanager
def _quantised(model: PreTrainedModel) -> Iterator[None]:
    """For a while, let the library ask our quantizer for the tensors of torchao that it writes."""
    model.config.quantization_config.weights = TORCHAO
    model.hf_quantizer = ComCATQuantizer(model.config.quantization_config, pre_quantized=True)
    try:
        yield
    finally:
        del model.hf_quantizer


teach_saving(PreTrainedModel, _save_pretrained)
# PEFT's mixin, too.
teach_uploading(PushToHubMixin, "_upload_modified_files")


def _joins_tensors(model: PreTrainedModel) -> bool:
    return any(isinstance(change, WeightConverter) for change in get_model_conversion_mapping(model))


def _check_files(files: Iterable[str]) -> None:
    for file in files:
        if str(file).endswith(".safetensors"):
            with open_safetensors(file):
                pass


def _fit_plan(plan: RankPlan, model: PreTrainedModel) -> dict[str, Any]:
    """The ranks by the names of this model, less those of a head of another task or for too few other labels."""
    heads = dict(model.named_children())
    ranks = fit_names({name: rank for name, rank in plan.ranks.items() if "." in name or name in heads}, model)
    room = {n: min(m.in_features, m.out_features) for n, m in heads.items() if type(m) is nn.Linear}
    return {n: rank for n, rank in ranks.items() if not (n in room and isinstance(rank, int) and rank > room[n])}


def _check_factors(model: PreTrainedModel, loading_info: Any) -> None:
    kinds = (LowRankAttention, LowRankLinear, NarrowLinear)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    misfits = {key: (tuple(want), tuple(have)) for key, have, want in loading_info.mismatched_keys}
    # A head for other labels: whether that is meant, transformers' ignore_mismatched_sizes says.
    relabelled = [n for n in modules if "." not in n and {f"{n}.weight", f"{n}.bias"} <= set(misfits)]
    new = {f"{name}.{tensor}" for name in relabelled for tensor in ("weight", "bias")}

    def is_factor(key: str) -> bool:
        return key not in new and any(key.startswith(f"{name}.") for name in modules)

    problems = [f"{key}, found none" for key in sorted(filter(is_factor, loading_info.missing_keys))]
    problems += [
        f"{key} of shape {want}, found {have}" for key, (want, have) in sorted(misfits.items()) if is_factor(key)
    ]
    if problems:
        # Else transformers raises its own error over this one.
        loading_info.mismatched_keys.clear()
        raise CheckpointError(
            f"{model.name_or_path}: by the rank plan in config.json expected {some_of(problems, comma='; ')}. "
            "The files do not belong together or were damaged; download or save the model again."
        )
    for name in relabelled:
        # Dense, so that transformers initialises it as it does any new head.
        head = model.get_submodule(name)
        dense = nn.Linear(head.in_features, head.out_features, device="meta", dtype=head.weight.dtype)
        setattr(model, name, dense)
    type(model).mark_tied_weights_as_initialized(model, loading_info)
