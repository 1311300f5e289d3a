"""bitpress convert."""

from pathlib import Path
from typing import Annotated

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import Quiet, Verbose


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a compressed-tensors, AWQ or GPTQ checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Where the new one goes.")],
    format: Annotated[str, typer.Option(help="compressed-tensors, awq, gptq or gguf.")],  # noqa: A002
    max_shard_size: Annotated[str, typer.Option(help="Of a safetensors file.")] = "50GB",
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the destination.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the checkpoint SOURCE in another format; no weight is quantized again."""
    import bitpress as package

    with speaking(quiet=quiet, verbose=verbose):
        package.convert(source, destination, format=format, overwrite=overwrite, max_shard_size=max_shard_size)
    typer.echo(str(destination))
