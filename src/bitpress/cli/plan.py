"""bitpress plan."""

from typing import Annotated

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Device, Model, Quiet, RecipeArgs, RecipeName, TrustCode, Verbose


@app.command()
def plan(  # noqa: PLR0913, PLR0917
    model: Model,
    recipe: RecipeName,
    recipe_args: RecipeArgs = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Sequences.")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    device: Device = None,
    trust_remote_code_model: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what compressing MODEL would need: memory by what takes it, and disk. Nothing is run or written.

    The JSON is in bytes.
    """
    import json
    from dataclasses import asdict

    import bitpress as package
    from bitpress.session.arguments import parse_assignments

    with speaking(quiet=quiet, verbose=verbose):
        needs = package.plan(
            model,
            recipe,
            recipe_args=parse_assignments(recipe_args or []),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            device=device,
            trust_remote_code_model=trust_remote_code_model,
        )
    typer.echo(json.dumps({**asdict(needs), "peak": needs.peak}, indent=2) if as_json else "\n".join(needs.lines()))
