"""Contents of a folder or a repository: files with sizes, and the kind of result that they make."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile


__all__ = ["kind_of", "readable_size", "sizes_in", "sizes_on_the_hub"]

# By a file that marks a kind, most specific first: its name, and the call that loads it.
_KINDS: Mapping[str, tuple[str, str]] = {
    "comcat_adapter.json": ("a pipeline adapter of ComCAT", "comcat_hf.load_comcat_weights(pipe, ...)"),
    "pytorch_lora_weights.safetensors": ("LoRA weights of diffusers", "pipe.load_lora_weights(...)"),
    "pytorch_lora_weights.bin": ("LoRA weights of diffusers", "pipe.load_lora_weights(...)"),
    "adapter_config.json": ("an adapter of PEFT", "PeftModel.from_pretrained(model, ...)"),
    "model_index.json": ("a whole pipeline", "DiffusionPipeline.from_pretrained(...)"),
    "comcat_ranks.json": ("a rank plan", "comcat_hf.RankPlan.from_pretrained(...)"),
    "config.json": ("a model", "the library that wrote it (AutoModel....from_pretrained)"),
}


def kind_of(names: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> tuple[str, str] | None:
    """The kind of a folder and the call that loads it; `None` for an unknown kind.

    Args:
        names: names of its files.
        read: reads a JSON file by its name.
    """
    mark = next((name for name in _KINDS if name in names), None)
    if mark is None:
        return None
    what, how = _KINDS[mark]
    if mark == "adapter_config.json":
        fields = read(mark)
        method = fields.get("peft_type")
        what = f"{what} of the method {method}" + (f", mode {fields.get('mode')}" if method == "COMCAT" else "")
        how += " or pipe.load_lora_weights(...)" if method == "LORA" else ""
    if mark == "comcat_ranks.json" and "config.json" in names:
        return "a compressed model", "AutoModel....from_pretrained after import comcat_hf"
    return what, how


def readable_size(count: int) -> str:
    """A number of bytes as readable text, in units of a thousand as on the Hub: `"2.4 KB"`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        # A number that rounds up to a thousand is shown as one of the next unit.
        if count >= 0.99995 * size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,} bytes"


def sizes_in(folder: Path) -> dict[str, int]:
    """The sizes of all files in a folder, by their names in it."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def sizes_on_the_hub(repo_id: str, revision: str | None, token: str | bool | None) -> dict[str, int]:
    """The sizes of all files of a repository by their names, as the Hub lists them."""
    tree = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
