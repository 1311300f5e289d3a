"""bitpress report."""

from pathlib import Path
from typing import Annotated

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Quiet, Verbose


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Of a checkpoint that oneshot wrote.")],
    worst: Annotated[int, typer.Option(help="Layers to show, of those that lost most.")] = 5,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a compression did: sizes, time, the layers that lost most. The JSON is these figures, in bytes."""
    import json

    from bitpress.console import stdout
    from bitpress.report.terminal import read_report, render, short

    with speaking(quiet=quiet, verbose=verbose):
        found = read_report(directory)
    if as_json:
        typer.echo(json.dumps(short(found, worst), indent=2))
    else:
        stdout().print(render(directory, found, worst), highlight=False)
