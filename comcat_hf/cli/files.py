"""`comcat push`, `comcat pull` and `comcat info`: results to the Hub and back, and what a folder holds."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError, safe_open

from ..checks import FLAG, TEXT, check, check_fields, list_of, optional, whole
from ..configs.index import INDEX, read_index
from ..configs.ranks import RANKS_FORMAT, RANKS_NAME, RankPlan
from ..errors import CheckpointError
from ..hub import kind_of, list_files, pull_folder, push_folder, read_json, readable_size, sizes_in
from .shell import Revision, app, command, table


_CONFIG = "adapter_config.json"
_SIZES = ("qk_rank", "vo_rank", "linear_rank", "mlp_width")
_FLAGS = ("core", "gains", "head_gains")
# The fields of an adapter's configuration that are shown; PEFT's class for all of them would import torch.
_ADAPTER = {
    **dict.fromkeys(("mode", "base_model_name_or_path"), optional(TEXT)),
    **dict.fromkeys(_SIZES, optional(whole(1))),
    **dict.fromkeys(_FLAGS, optional(FLAG)),
}


@command(app, light=True)
def push(
    folder: Annotated[Path, typer.Argument(help="What to upload: a folder or a file.")],
    repo_id: Annotated[str, typer.Argument(help="user/name, or a name of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Revision = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    pull_request: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave out files that fit (*.png); repeat.")] = None,
) -> None:
    """Upload a plan, an adapter or a model.

    Checkpoints, optimizer states, statistics and reports that show images of a data set stay here.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    address = push_folder(
        folder,
        repo_id,
        private=private or None,
        revision=revision,
        commit_message=message,
        create_pr=pull_request,
        ignore_patterns=ignore,
    )
    typer.echo(address)


@command(app, light=True)
def pull(
    repo_id: Annotated[str, typer.Argument(help="Hub id.")],
    folder: Annotated[Path, typer.Argument(help="Where the files should lie.")],
    revision: Revision = None,
    include: Annotated[list[str] | None, typer.Option(help="Take only files that fit (*.json); repeat.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave out files that fit; repeat.")] = None,
) -> None:
    """Download everything that a repository holds, checked against what the Hub announces."""
    typer.echo(
        pull_folder(repo_id, folder, revision=revision, allow_patterns=include or None, ignore_patterns=ignore or None)
    )


@command(app, light=True)
def info(
    source: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    revision: Revision = None,
) -> None:
    """Say what a folder or a repository holds: its kind, base and ranks, and its files; no weights are downloaded."""
    folder = pull_folder(source, revision=revision, allow_patterns="*.json")
    facts = _facts(folder)
    sizes, place = _sizes(source, folder)
    if facts is None:
        raise CheckpointError(
            f"{source}: expected a rank plan, a compressed model or a ComCAT adapter, found {_other(folder, sizes)}"
        )
    for name, value in (facts | {"parameters": _parameters(folder)}).items():
        if value is not None:
            typer.echo(f"{name}: {value}")
    typer.echo()
    typer.echo(table((f"file{place}", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()]))
    typer.echo(f"\n{len(sizes)} files, {readable_size(sum(sizes.values()))}.")


def _sizes(source: str, folder: Path) -> tuple[dict[str, int], str]:
    """The files of a folder or a repository; of what the cache holds of it while the Hub is not reached."""
    try:
        return list_files(source, folder.name), ""
    except CheckpointError:
        return sizes_in(folder), " in the cache"


def _parameters(folder: Path) -> str | None:
    """Numbers in the weights of a folder, by the heads of its files."""
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    files = files or [
        *folder.glob("*/adapter_model.safetensors"),
        *folder.glob("diffusion_pytorch_model*.safetensors"),
    ]
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return f"unknown, as {file.name} cannot be read"
    return f"{count:,}" if files else None


def _facts(folder: Path) -> dict[str, object] | None:
    if (folder / INDEX).is_file():
        index = read_index(folder / INDEX)
        facts = {"kind": "pipeline adapter", "base": index["base_model_name_or_path"]}
        return facts | {f"part {name}": _ranks(_adapter(folder / name)) for name in index["parts"]}
    model = folder / "config.json"
    if (folder / _CONFIG).is_file() and read_json(folder / _CONFIG).get("peft_type") == "COMCAT":
        fields = _adapter(folder)
        kind = f"adapter, mode {fields['mode']}"
        return {"kind": kind, "base": fields["base_model_name_or_path"], "ranks": _ranks(fields)}
    if model.is_file():
        found = read_json(model)
        recorded = found.get("quantization_config")
        # Its own mark, which tells it from the methods of others.
        if isinstance(recorded, Mapping) and recorded.get("format") == RANKS_FORMAT:
            names = found.get("architectures") or ()
            check(names, list_of(TEXT), f"{model}: architectures", error=CheckpointError)
            plan = RankPlan.from_dict({k: v for k, v in recorded.items() if k != "quant_method"}, str(model))
            return {"kind": "compressed model", "architecture": ", ".join(names)} | _of_plan(plan)
    if not (folder / RANKS_NAME).is_file():
        return None
    return {"kind": "rank plan"} | _of_plan(RankPlan.from_pretrained(folder))


def _adapter(folder: Path) -> dict[str, Any]:
    found = read_json(folder / _CONFIG)
    fields = {name: found.get(name) for name in _ADAPTER}
    check_fields(fields, _ADAPTER, str(folder / _CONFIG), error=CheckpointError)
    return fields


def _ranks(fields: Mapping[str, Any]) -> str:
    said = [f"{name} {fields[name]}" for name in _SIZES if fields[name] is not None]
    return ", ".join(said + [name for name in _FLAGS if fields[name]])


def _of_plan(plan: RankPlan) -> dict[str, object]:
    reached = None if plan.reached is None else f"{plan.reached:.2%} of the {plan.metric} of the {plan.scope}"
    return {"base": plan.base_model_name_or_path, "removed": reached, "sites": len(plan.ranks)}


def _other(folder: Path, names: Collection[str]) -> str:
    what, how = kind_of(names, lambda name: read_json(folder / name)) or (None, None)
    return f"{what}; load it with {how}" if what else "none of these; load it with the library that wrote it"
