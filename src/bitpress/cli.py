"""The command ``bitpress``."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def bitpress() -> None:
    """Compress models by a recipe."""


@app.command()
def oneshot(  # noqa: PLR0913, PLR0917
    model: Annotated[str, typer.Argument(help="Path or hub id of a transformers model.")],
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of a shipped recipe.")],
    output_dir: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    arg: Annotated[list[str] | None, typer.Option(help="An argument of the recipe: NAME=VALUE. Repeatable.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration data: a .txt, .jsonl, .parquet, or hub name.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the dataset.")] = "text",
    splits: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Sequences at most.")] = 512,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens per sequence at most.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    concatenate_data: Annotated[bool, typer.Option(help="Join texts and cut them to full sequences.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 42,
    pipeline: Annotated[str | None, typer.Option(help="sequential, basic or datafree.")] = None,
    moe_calibrate_all_experts: Annotated[
        bool, typer.Option(help="Show every expert all tokens, or those that it is sent.")
    ] = True,
    activations: Annotated[
        str | None, typer.Option(help="Where waiting batches keep theirs: memory or disk; by default what fits.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where it is computed: cpu, cuda, cuda:1; by default a GPU if there is one.")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option(help="Never hold the model; by default wherever the recipe allows it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run was, or start over.")] = True,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of the checkpoint.")] = "50GB",
    save_compressed: Annotated[bool, typer.Option(help="Packed weights, or dense ones.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the output directory.")] = False,
    trust_remote_code_model: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Compress MODEL by a recipe into a checkpoint."""
    import bitpress as package
    from bitpress.session.arguments import parse_assignments

    arguments: dict[str, Any] = dict(locals())
    for name in ("package", "parse_assignments", "model", "dataset", "recipe", "arg"):
        arguments.pop(name)
    try:
        package.oneshot(model, dataset, recipe, recipe_args=parse_assignments(arg or []), **arguments)
    except package.BitpressError as error:
        typer.echo(f"bitpress: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(str(output_dir))


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

    try:
        needs = package.plan(
            model,
            recipe,
            recipe_args=parse_assignments(arg or []),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            device=device,
            trust_remote_code_model=trust_remote_code_model,
        )
    except package.BitpressError as error:
        typer.echo(f"bitpress: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps({**asdict(needs), "peak": needs.peak}, indent=2) if as_json else "\n".join(needs.lines()))


@app.command()
def mappings(
    model: Annotated[str, typer.Argument(help="Path or hub id of a transformers model.")],
    dataset: Annotated[
        str | None, typer.Option(help="A .txt, .jsonl, .parquet, or hub name; random tokens by default.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers that are not to be quantized.")] = None,
    as_code: Annotated[bool, typer.Option("--as-code", help="Print an AWQMapping list to paste.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code_model: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Show which layers of MODEL scale which, with the proofs, and which have no mapping and why."""
    import json

    import rich
    import transformers

    import bitpress as package

    try:
        tokenizer = None
        if dataset is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code_model)
        report = package.find_mappings(
            model,
            dataset,
            ignore=ignore or [],
            tokenizer=tokenizer,
            trust_remote_code_model=trust_remote_code_model,
        )
    except (package.BitpressError, OSError) as error:
        typer.echo(f"bitpress: {error}", err=True)
        raise typer.Exit(2) from error
    if as_code:
        typer.echo(report.as_code(), nl=False)
    elif as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        rich.print(report)


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
