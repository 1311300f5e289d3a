"""bitpress plan."""

from typing import Annotated

import typer

from bitpress.cli.app import app, spoken_errors


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Path or hub id of a transformers model.")],
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of a shipped recipe.")],
    arg: Annotated[list[str] | None, typer.Option(help="An argument of the recipe: NAME=VALUE. Repeatable.")] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Sequences.")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    device: Annotated[str | None, typer.Option(help="Where it would be computed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    trust_remote_code_model: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Say what compressing MODEL would need: memory by what takes it, and disk. Nothing is run or written."""
    import json
    from dataclasses import asdict

    import bitpress as package
    from bitpress.session.arguments import parse_assignments

    with spoken_errors():
        needs = package.plan(
            model,
            recipe,
            recipe_args=parse_assignments(arg or []),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            device=device,
            trust_remote_code_model=trust_remote_code_model,
        )
    typer.echo(json.dumps({**asdict(needs), "peak": needs.peak}, indent=2) if as_json else "\n".join(needs.lines()))
