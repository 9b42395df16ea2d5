"""`comcat push`, `comcat pull` and `comcat ranks`: results to the Hub and back, and what a plan says."""

from pathlib import Path
from typing import Annotated

import typer

from ..configs import RankPlan
from ..transport import pull_folder, push_folder
from .shell import app, command, table


_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")]
ranks = typer.Typer(name="ranks", help="Look at rank plans.", no_args_is_help=True)
app.add_typer(ranks)


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


@command(ranks)
def show(
    plan: Annotated[str, typer.Argument(help="Folder, file or Hub id.")],
    revision: _Revision = None,
) -> None:
    """Print the ranks and widths of a plan."""
    found = RankPlan.from_pretrained(plan, revision=revision)
    facts = {
        "architecture": found.architecture,
        "base": found.base_model_name_or_path,
        "strategy": found.strategy,
        f"{found.metric} of the {found.scope} removed": None if found.reached is None else f"{found.reached:.2%}",
    }
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name}: {value}")
    typer.echo()
    typer.echo(table(("site", "kept"), [(name, _entry(entry)) for name, entry in found.ranks.items()]))


@command(ranks)
def compare(
    first: Annotated[str, typer.Argument(help="Folder, file or Hub id.")],
    second: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Print where two plans differ."""
    plans = [RankPlan.from_pretrained(name).ranks for name in (first, second)]
    names = list(dict.fromkeys([*plans[0], *plans[1]]))
    lines = [
        (name, *(_entry(plan[name]) if name in plan else "dense" for plan in plans))
        for name in names
        if plans[0].get(name) != plans[1].get(name)
    ]
    if not lines:
        typer.echo(f"The same ranks for all {len(names)} sites.")
        return
    typer.echo(table(("site", "first", "second"), lines))
    typer.echo(f"\n{len(lines)} of {len(names)} sites differ.")


def _entry(entry: object) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items()) if isinstance(entry, dict) else f"rank {entry}"
