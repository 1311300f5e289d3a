"""bitpress recipes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, complete_recipe

recipes = typer.Typer(help="List the recipes that are shipped, or show one.")
app.add_typer(recipes, name="recipes", invoke_without_command=True)


@recipes.callback()
def every(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes that are shipped, with the arguments they take; or show one."""
    if context.invoked_subcommand is None:
        _list(as_json=as_json)


@recipes.command("list")
def list_them(as_json: AsJson = False) -> None:
    """List the recipes that are shipped, with the arguments they take."""
    _list(as_json=as_json)


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.", autocompletion=complete_recipe)],
) -> None:
    """Show the YAML of a recipe, to be changed and given to oneshot as a file."""
    from bitpress.errors import BitpressError
    from bitpress.modifiers.base import nearest
    from bitpress.session.recipe import shipped_recipes

    with speaking():
        shipped = shipped_recipes()
        if name not in shipped:
            raise BitpressError(f"no recipe is called {name!r}{nearest(name, list(shipped))}")
        typer.echo(shipped[name].read_text(encoding="utf-8"), nl=False)


def about(file: Path) -> list[str]:
    """What the comment at the top of a recipe says, line by line."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        found.append(line.lstrip("# "))
    return found


def _list(*, as_json: bool) -> None:
    import json

    from bitpress.session.recipe import arguments_of, shipped_recipes

    found: dict[str, Any] = {
        name: {"about": about(file), "args": arguments_of(file), "file": str(file)}
        for name, file in shipped_recipes().items()
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found), default=0)
    for name, each in found.items():
        typer.echo(f"{name:{width}}  {each['about'][0] if each['about'] else ''}")
        if each["args"]:
            given = (f"{key}={json.dumps(value)}" for key, value in each["args"].items())
            typer.echo(f"{'':{width}}  --recipe-arg {' '.join(given)}")
