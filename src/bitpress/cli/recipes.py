"""bitpress recipes."""

import typer

from bitpress.cli.app import app


@app.command()
def recipes() -> None:
    """List the recipes that are shipped, with the arguments they take."""
    import json

    from bitpress.session.recipe import arguments_of, shipped_recipes

    for name, file in shipped_recipes().items():
        lines = file.read_text(encoding="utf-8").splitlines()
        about = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
        typer.echo(f"{name:24} {about}")
        arguments = [f"{key}={json.dumps(value)}" for key, value in arguments_of(file).items()]
        if arguments:
            typer.echo(f"{'':24} --arg {' '.join(arguments)}")
