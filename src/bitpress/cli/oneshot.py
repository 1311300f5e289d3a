"""bitpress oneshot."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.cli.app import app, spoken_errors


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
    format: Annotated[  # noqa: A002
        str, typer.Option(help="Of the checkpoint: compressed-tensors, awq, gptq or gguf.")
    ] = "compressed-tensors",
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the output directory.")] = False,
    trust_remote_code_model: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Compress MODEL by a recipe into a checkpoint."""
    import bitpress as package
    from bitpress.session.arguments import parse_assignments

    arguments: dict[str, Any] = dict(locals())
    for name in ("package", "parse_assignments", "model", "dataset", "recipe", "arg"):
        arguments.pop(name)
    with spoken_errors():
        package.oneshot(model, dataset, recipe, recipe_args=parse_assignments(arg or []), **arguments)
    typer.echo(str(output_dir))
