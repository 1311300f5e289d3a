"""bitpress compare."""

from pathlib import Path
from typing import Annotated

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Quiet, Verbose


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Directory of a checkpoint; the original, mostly.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Directory of another.")],
    shown: Annotated[int, typer.Option(help="Layers to show, of those that differ most.")] = 20,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which layers of two checkpoints differ in scheme, size and weights, and by how much. No model is built."""
    import json

    import bitpress as package
    from bitpress.console import stdout

    with speaking(quiet=quiet, verbose=verbose):
        found = package.compare(first, second, shown=shown)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        stdout().print(found, highlight=False)
