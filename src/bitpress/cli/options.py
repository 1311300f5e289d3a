"""Options that several commands have."""

from typing import Annotated

import typer


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Names of the recipes that are shipped, and what they are, for the shell's completion."""
    from bitpress.cli.recipes import about
    from bitpress.session.recipe import shipped_recipes

    found = shipped_recipes().items()
    return [(name, "".join(about(file)[:1])) for name, file in found if name.startswith(incomplete)]


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the result, warnings and errors: no progress, no summary.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is done and why.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code-model", help="Run code that comes with the checkpoint.")]
Model = Annotated[str, typer.Argument(help="Path or hub id of a transformers model.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="YAML file, or the name of a shipped recipe.",
        autocompletion=complete_recipe,
        metavar="NAME|FILE",
    ),
]
RecipeArgs = Annotated[
    list[str] | None,
    typer.Option("--recipe-arg", "--arg", help="An argument of the recipe. Repeatable.", metavar="NAME=VALUE"),
]
Device = Annotated[
    str | None, typer.Option(help="Where it is computed: cpu, cuda, cuda:1; by default a GPU if there is one.")
]
