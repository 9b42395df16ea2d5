"""What a training leaves behind: the adapter, a card, and a copy on the Hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...configs.index import INDEX
from ...customization.pipelines import save_comcat_weights
from ...reporting.cards import CardFacts, code_span, quoted, shown_base, write_card
from ..settings import push_result
from .planning import CustomizePlan
from .preparing import DTYPES
from .sampling import BEFORE_AFTER
from .settings import CustomizeSettings


__all__ = ["push_outputs", "save_adapter", "write_outputs"]

_SNIPPET = """
import comcat_hf
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base})
# Not load_lora_weights, which reads adapters of other kinds.
comcat_hf.load_comcat_weights(pipe, {repository})
image = pipe(prompt={prompt}).images[0]
"""


def save_adapter(settings: CustomizeSettings, pipeline: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapter into a folder, by default with its weights as they are."""
    save_comcat_weights(
        pipeline,
        folder,
        settings.adapter_name,
        dtype=dtype,
        base_model_name_or_path=settings.pretrained_model_name_or_path,
        revision=settings.revision,
    )


def remove_pictures(folder: Path) -> None:
    """Remove what an earlier training drew: the card would show it as this one's."""
    for path in (*folder.glob("validation/step-*.png"), folder / BEFORE_AFTER):
        path.unlink(missing_ok=True)


def write_outputs(settings: CustomizeSettings, pipeline: Any, plan: CustomizePlan) -> Path:
    """Write the adapter and its card into the output folder."""
    folder = settings.output_path
    save_adapter(settings, pipeline, folder, DTYPES[settings.save_precision])
    base, prompt = shown_base(settings.pretrained_model_name_or_path), settings.instance_prompt
    repository = settings.repository
    compared = folder / BEFORE_AFTER
    drawn = sorted(folder.glob("validation/*.png"))[-1:]
    write_card(
        folder,
        CardFacts(
            title=f"ComCAT adapter: {prompt}",
            summary=f"A ComCAT adapter for {code_span(base)}, trained DreamBooth style on {plan.images} images of the "
            f"subject. {sum(plan.parameters.values()):,} parameters.",
            base=settings.pretrained_model_name_or_path,
            relation="adapter",
            library="diffusers",
            task="text-to-image",
            snippet=_SNIPPET.format(base=quoted(base), repository=quoted(repository), prompt=quoted(prompt)),
            tags=("diffusers", "peft"),
            pictures=[("Without the adapter and with it, from the same noise", compared.name)]
            if compared.is_file()
            else [],
            gallery=[(settings.validation_prompt or prompt, path.relative_to(folder).as_posix()) for path in drawn],
            details=plan.describe(),
            extra={"instance_prompt": prompt},
        ),
    )
    return folder


def push_outputs(settings: CustomizeSettings, parts: Iterable[str]) -> str:
    """Upload what was trained, without checkpoints and logs.

    Returns:
        the commit's address.
    """
    folders = [f"{name}/*" for name in (*parts, "validation")]
    return push_result(settings, "Train with comcat_hf", ["README.md", INDEX, BEFORE_AFTER, *folders])
