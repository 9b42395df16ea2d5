"""The two ways to fine-tune: the stand-alone small model, or only the factors, beside one copy of the dense model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ...compression.counting import example_inputs
from ...compression.distillation import DistillationLoss
from ...configs import RankPlan
from ...configs.adapter import ComCATConfig
from ...errors import CheckpointError, InvalidValueError, brief
from ...modeling import eval_mode
from ...native import plan_of
from ...tensor_files import check_shapes
from .models import load_classifier, load_teacher
from .settings import CompressSettings


__all__ = ["Student", "finished", "freeze_unreached", "gathered", "make_loss", "make_student", "prepare_student"]

_ADAPTER = "default"
# What PEFT puts into the paths of a model that it wraps.
_WRAPPINGS = (f".comcat_factors.{_ADAPTER}.", f".modules_to_save.{_ADAPTER}.", ".original_module.", ".base_layer.")


@dataclass
class Student:
    """What is trained, and what it learns from.

    Attributes:
        model: the small model, or on route `"peft"` the PEFT model. After a training that shards it, a whole copy.
        teacher: in eval mode, without gradients. `None` where the loss needs none, and where a PEFT model is its own:
            its base, adapters switched off.
    """

    model: nn.Module
    teacher: nn.Module | None


def make_student(settings: CompressSettings, dense: nn.Module, initialized: Path) -> Student:
    """Open what is to be trained.

    Args:
        settings: route, teacher and loss.
        dense: the dense model. Route `"peft"` puts the factors into this very model, so that there is one copy of it;
            on route `"full"` it is the teacher.
        initialized: folder of the small model before training; factors come from there on both routes.

    Raises:
        CheckpointError: the small model or the teacher cannot be read, or has other weights than the route needs.
        InvalidValueError: `modules_to_save` that the dense model does not have.
    """
    small = load_classifier(initialized, "--output_dir")
    teacher = load_teacher(settings, dense) if make_loss(settings).needs_teacher else None
    if settings.route == "full":
        return Student(small.requires_grad_(True), teacher)
    model = _with_factors(settings, dense, small, initialized)
    return Student(model, None if teacher is dense else teacher)


def make_loss(settings: CompressSettings, **changes: Any) -> DistillationLoss:
    """The loss that the settings describe, but for changes of its arguments."""
    taught = settings.distillation_type != "none"
    given = {
        "alpha": settings.distillation_alpha if taught else 0.0,
        "kind": settings.distillation_type if taught else "soft",
        "temperature": settings.distillation_temperature,
        "alignment": settings.alignment,
        "blocks": settings.alignment_blocks,
        "without_token": settings.distillation_without_token,
    }
    return DistillationLoss(**given | changes)


def finished(model: nn.Module) -> nn.Module:
    """The stand-alone small model of a trained student, in eval mode."""
    small = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return small.requires_grad_(True).eval()


def freeze_unreached(model: nn.Module, loss: DistillationLoss) -> list[str]:
    """Freeze the parameters that no gradient reaches, such as mask tokens; several processes cannot train with them.

    Found by one pass over an empty image, in eval mode: nothing random is drawn.

    Returns:
        names of what was frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    try:
        inputs = {name: torch.zeros(value.shape, device=device) for name, value in example_inputs(plain).items()}
    # Its size is not known: then all is left as it is.
    except InvalidValueError:
        return []
    with eval_mode(model):
        output = model(**inputs, output_hidden_states=loss.needs_hidden_states)
        loss(output, output, torch.zeros(1, dtype=torch.long, device=device)).total.backward()
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if name in frozen:
            parameter.requires_grad_(False)
    return frozen


def prepare_student(student: Student, settings: CompressSettings, loss: DistillationLoss) -> None:
    """Make a student ready to train: freeze what no gradient reaches, and do what the settings ask of its passes.

    Raises:
        InvalidValueError: nothing to train, or a model that cannot do without its activations.
    """
    model = student.model
    freeze_unreached(model, loss)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidValueError(f"{type(model).__name__}: expected parameters to train, found that all are frozen.")
    if settings.gradient_checkpointing:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            plain.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InvalidValueError(
                f"--gradient_checkpointing: expected a model that can do it, found {type(plain).__name__} "
                f"({brief(error)}). Leave the flag out."
            ) from error
    if settings.torch_compile:
        # In place: names, and what accelerate unwraps, stay as they are.
        model.compile()


def gathered(accelerator: Accelerator, model: nn.Module, empty: nn.Module) -> nn.Module:
    """A whole copy, on the CPU of every process, of a model that was trained in shards."""
    state: dict[str, Tensor] = accelerator.get_state_dict(model)
    content = [{name: value.cpu() for name, value in state.items()} if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        content = broadcast_object_list(content)
    # Names of a compiled or sharded model are those of the plain one; a miss is an error.
    empty.load_state_dict(content[0], assign=True)
    # Buffers that belong to no state dict are the same on all processes.
    buffers = dict(model.named_buffers())
    for name, buffer in list(empty.named_buffers()):
        if buffer.is_meta:
            path, _, last = name.rpartition(".")
            setattr(empty.get_submodule(path), last, buffers[name].cpu())
    return empty


def _with_factors(settings: CompressSettings, dense: nn.Module, small: nn.Module, folder: Path) -> PeftModel:
    plan = plan_of(small)
    # Empty until they are copied: a closed form would be computed for nothing.
    config = ComCATConfig.from_plan(plan, init_weights=False, modules_to_save=_modules_to_save(settings, dense, plan))
    model = get_peft_model(dense, config)
    _copy_weights(small, model.get_base_model(), folder)
    return model


def _modules_to_save(settings: CompressSettings, dense: nn.Module, plan: RankPlan) -> list[str] | None:
    """The modules that are trained as they are; what the plan replaces is trained as factors."""
    asked = [name.strip() for name in (settings.modules_to_save or "").split(",") if name.strip()]
    paths = [path for path, _ in dense.named_modules()]
    wanted = []
    for name in asked:
        meant = [path for path in paths if path == name or path.endswith(name)]
        if not meant:
            raise InvalidValueError(
                f"--modules_to_save {name}: expected the end of a module's path in {type(dense).__name__}, found none "
                f"that ends so; there are {', '.join(name for name, _ in dense.named_children())} and what they hold. "
                "Name one, or none."
            )
        if not all(path in plan.ranks for path in meant):
            wanted.append(name)
    return wanted or None


@torch.no_grad()
def _copy_weights(small: nn.Module, base: nn.Module, folder: Path) -> None:
    """Copy the weights of a small model into the factors and saved modules of an adapted one, by their names.

    Raises:
        CheckpointError: a name or shape is missing on either side, or frozen weights differ.
    """
    # Adapted weights hide the dense ones of the same name.
    named = sorted(base.named_parameters(remove_duplicate=False), key=lambda pair: pair[1].requires_grad)
    own = {_plain_name(name): parameter for name, parameter in named}
    trained = {_plain_name(name) for name, parameter in named if parameter.requires_grad}
    found = dict(small.named_parameters(remove_duplicate=False))
    meant = {name: own[name] for name in own.keys() & (found.keys() | trained)}
    again = "Make the model again: the stage initialize, with --overwrite_output_dir or another --output_dir."
    check_shapes(found, meant, folder, again)
    for name, value in found.items():
        if name in trained:
            own[name].copy_(value)
        elif not torch.equal(own[name].cpu(), value.cpu()):
            raise CheckpointError(
                f"{folder}: expected the dense model's {name}, which route peft leaves as it is, found other values. "
                "Add its module to --modules_to_save, or take --route full."
            )


def _plain_name(name: str) -> str:
    for wrapping in _WRAPPINGS:
        name = name.replace(wrapping, ".")
    return name
