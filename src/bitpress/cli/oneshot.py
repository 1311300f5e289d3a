"""bitpress oneshot."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Device, Model, Quiet, RecipeArgs, RecipeName, TrustCode, Verbose


@app.command()
def oneshot(  # noqa: PLR0913, PLR0917
    model: Model,
    recipe: RecipeName,
    output_dir: Annotated[Path, typer.Option("--output", "--output-dir", help="Where the checkpoint goes.")],
    recipe_args: RecipeArgs = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration data: a .txt, .jsonl, .parquet, or hub name.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the dataset.")] = "text",
    splits: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option(help="Configuration of a dataset on the hub.")] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Sequences at most.")] = 512,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens per sequence at most.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences that run together.")] = 1,
    shuffle_calibration_samples: Annotated[
        bool, typer.Option(help="Draw the samples at random, or take the first.")
    ] = True,
    concatenate_data: Annotated[bool, typer.Option(help="Join texts and cut them to full sequences.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Path or hub id; by default the one beside MODEL.")] = None,
    processor: Annotated[str | None, typer.Option(help="Path or hub id, of a multimodal model.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 42,
    pipeline: Annotated[str | None, typer.Option(help="sequential, basic or datafree.")] = None,
    sequential_targets: Annotated[
        list[str] | None, typer.Option(help="Name, class or re: pattern of the blocks. Repeatable.")
    ] = None,
    moe_calibrate_all_experts: Annotated[
        bool, typer.Option(help="Show every expert all tokens, or those that it is sent.")
    ] = True,
    moe_min_tokens: Annotated[
        int | None, typer.Option(help="An expert that saw fewer is solved from what all of its layer saw.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Where waiting batches keep theirs: memory or disk; by default what fits.")
    ] = None,
    device: Device = None,
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
    trust_remote_code_model: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compress MODEL by a recipe into a checkpoint."""
    arguments: dict[str, Any] = dict(locals())
    for name in ("model", "dataset", "recipe", "recipe_args", "as_json", "quiet", "verbose"):
        arguments.pop(name)
    # Those that have no default of their own here.
    for name in ("tokenizer", "processor", "sequential_targets", "moe_min_tokens"):
        if arguments[name] is None:
            arguments.pop(name)

    import bitpress as package
    from bitpress.session.arguments import parse_assignments

    with speaking(quiet=quiet, verbose=verbose):
        given = parse_assignments(recipe_args or [])
        package.oneshot(model, dataset, recipe, recipe_args=given, progress=not quiet, **arguments)
        _tell(output_dir, as_json=as_json, quiet=quiet)


def _tell(output_dir: Path, *, as_json: bool, quiet: bool) -> None:
    """Where the checkpoint is, for whatever reads standard output; a summary, for people."""
    import json

    from bitpress.checkpoints.directory import REPORT_FILE
    from bitpress.console import stderr
    from bitpress.report.terminal import read_report, render, short

    report = read_report(output_dir) if (output_dir / REPORT_FILE).is_file() else {}
    if as_json:
        typer.echo(json.dumps({"output_dir": str(output_dir), **short(report)}, indent=2))
        return
    if report and not quiet:
        stderr().print(render(output_dir, report, worst=3), highlight=False)
    typer.echo(str(output_dir))
