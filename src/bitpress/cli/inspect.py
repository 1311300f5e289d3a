"""bitpress inspect."""

from pathlib import Path
from typing import Annotated

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Quiet, Verbose


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Of a compressed-tensors, AWQ, GPTQ or dense checkpoint.")],
    layers: Annotated[
        list[str] | None, typer.Option(help="Look at these only: a name, with * for anything. Repeatable.")
    ] = None,
    each: Annotated[bool | None, typer.Option(help="Layer by layer, or those together that are alike.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint holds: layers, schemes, bytes, and how its scales are spread. No model is built."""
    import json

    import bitpress as package
    from bitpress.console import stdout

    with speaking(quiet=quiet, verbose=verbose):
        found = package.inspect(directory, layers or None, each=each)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        stdout().print(found, highlight=False)
