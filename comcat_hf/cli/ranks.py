"""`comcat ranks`: what a plan says, where two differ, and a picture."""

from pathlib import Path
from typing import Annotated

import typer

from ..configs import RankPlan
from ..errors import CheckpointError
from ..hub import resolve_file
from .shell import Revision, app, command, table


ranks = typer.Typer(name="ranks", help="Look at rank plans.", no_args_is_help=True)
app.add_typer(ranks)


@command(ranks, light=True)
def show(
    plan: Annotated[str, typer.Argument(help="Folder, file or Hub id.")],
    revision: Revision = None,
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


@command(ranks, light=True)
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


@command(ranks)
def plot(
    plan: Annotated[str, typer.Argument(help="Folder, file or Hub id.")],
    out: Annotated[Path, typer.Argument(help="File to write: .png or .svg.")],
    base: Annotated[
        str | None,
        typer.Option(help="Model that the plan is for: folder or Hub id.", show_default="what the plan names"),
    ] = None,
    revision: Revision = None,
) -> None:
    """Draw which ranks and widths a plan keeps, layer by layer. Of the model only the configuration is read."""
    from ..native import dense_skeleton
    from ..reporting.plots import plot_ranks

    found = RankPlan.from_pretrained(plan, revision=revision)
    own = None if base else _with_config(plan, revision)
    model = dense_skeleton(found, base or own, revision=revision if own else None)
    typer.echo(plot_ranks(model, found, out))


def _with_config(plan: str, revision: str | None) -> str | None:
    """Where the plan lies, if a model lies there, too."""
    place = str(Path(plan).parent) if Path(plan).is_file() else plan
    try:
        resolve_file(place, "config.json", revision=revision)
    except CheckpointError:
        return None
    return place


def _entry(entry: object) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items()) if isinstance(entry, dict) else f"rank {entry}"
