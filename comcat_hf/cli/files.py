"""`comcat push`, `comcat pull` and `comcat info`: results to the Hub and back, and what a folder holds."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError, safe_open

from ..configs import RankPlan
from ..customization.pipelines import INDEX
from ..errors import CheckpointError
from ..native.current import QUANT_METHODS
from ..transport import kind_of, list_files, pull_folder, push_folder, read_json, sizes_in
from .shell import app, command, table


_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")]


@command(app)
def push(
    folder: Annotated[Path, typer.Argument(help="What to upload: a folder or a file.")],
    repo_id: Annotated[str, typer.Argument(help="user/name, or a name of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: _Revision = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    pull_request: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave out files that fit (*.png); repeat.")] = None,
) -> None:
    """Upload a plan, an adapter or a model. Checkpoints, optimizer states and statistics stay here.

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


@command(app)
def pull(
    repo_id: Annotated[str, typer.Argument(help="Hub id.")],
    folder: Annotated[Path, typer.Argument(help="Where the files should lie.")],
    revision: _Revision = None,
    include: Annotated[list[str] | None, typer.Option(help="Take only files that fit (*.json); repeat.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave out files that fit; repeat.")] = None,
) -> None:
    """Download everything that a repository holds, checked against what the Hub announces."""
    typer.echo(
        pull_folder(repo_id, folder, revision=revision, allow_patterns=include or None, ignore_patterns=ignore or None)
    )


@command(app)
def info(
    source: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    revision: _Revision = None,
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
    typer.echo(f"\n{len(sizes)} files, {sum(sizes.values()):,} bytes.")


def _sizes(source: str, folder: Path) -> tuple[dict[str, int], str]:
    """The files of a folder or a repository; of what the cache holds of it while the Hub is not reached."""
    if not Path(source).expanduser().is_dir():
        try:
            return list_files(source, revision=folder.name), ""
        except CheckpointError:
            return sizes_in(folder), " in the cache"
    return sizes_in(folder), ""


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
            with safe_open(file, framework="pt") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError:
            return f"unknown, as {file.name} cannot be read"
    return f"{count:,}" if files else None


def _facts(folder: Path) -> dict[str, object] | None:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        facts = {"kind": "pipeline adapter", "base": index.get("base_model_name_or_path")}
        return facts | {f"part {name}": _adapter(folder / name) for name in _part_names(folder, index)}
    adapter, model = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file() and (fields := read_json(adapter)).get("peft_type") == "COMCAT":
        base = fields.get("base_model_name_or_path")
        return {"kind": f"adapter, mode {fields.get('mode')}", "base": base, "ranks": _adapter(folder)}
    if model.is_file():
        config = read_json(model)
        recorded = dict(config.get("quantization_config") or {})
        if recorded.pop("quant_method", None) in QUANT_METHODS:
            names = ", ".join(config.get("architectures") or ())
            plan = RankPlan.from_dict(recorded, str(model))
            return {"kind": "compressed model", "architecture": names} | _of_plan(plan)
    try:
        return {"kind": "rank plan"} | _of_plan(RankPlan.from_pretrained(folder))
    except CheckpointError:
        return None


def _part_names(folder: Path, index: Mapping[str, Any]) -> list[str]:
    names = index.get("parts")
    if not isinstance(names, dict) or any(Path(name).name != name for name in names):
        raise CheckpointError(
            f"{folder / INDEX}: expected 'parts' by their names, found {names!r}. Download or save the adapter again."
        )
    return list(names)


def _adapter(folder: Path) -> str:
    fields = read_json(folder / "adapter_config.json")
    sizes = {name: fields.get(name) for name in ("qk_rank", "vo_rank", "linear_rank", "mlp_width")}
    said = [f"{name} {value}" for name, value in sizes.items() if value is not None]
    return ", ".join(said + (["core"] if fields.get("core") else []))


def _of_plan(plan: RankPlan) -> dict[str, object]:
    reached = None if plan.reached is None else f"{plan.reached:.2%} of the {plan.metric} of the {plan.scope}"
    return {"base": plan.base_model_name_or_path, "removed": reached, "sites": len(plan.ranks)}


def _other(folder: Path, names: Collection[str]) -> str:
    what, how = kind_of(names, lambda name: read_json(folder / name)) or (None, None)
    return f"{what}; load it with {how}" if what else "none of these; load it with the library that wrote it"
