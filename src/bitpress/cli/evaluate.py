"""bitpress evaluate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Device, Quiet, TrustCode, Verbose


@app.command()
def evaluate(  # noqa: PLR0913, PLR0917
    model: Annotated[str, typer.Argument(help="Path or hub id of a model, compressed or not.")],
    dataset: Annotated[
        str | None, typer.Option(help="Text to be surprised by: a .txt, .jsonl, .parquet, or hub name.")
    ] = None,
    original: Annotated[str | None, typer.Option(help="Path or hub id of what MODEL is compared with.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Questions: a .jsonl with question, choices, answer in each line.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="A task of lm-eval, or its YAML file. Repeatable.")] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="A text that the models go on from. Repeatable.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Add what is found to MODEL's report.json, report.html and card.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Path or hub id; by default the one beside MODEL.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens of a window at most.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next; by default they are disjoint.")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Windows, questions, and documents of a task at most.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or choices, that run together.")] = 1,
    text_column: Annotated[str, typer.Option(help="Column of the dataset.")] = "text",
    splits: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    concatenate_data: Annotated[
        bool | None, typer.Option(help="Join what the dataset holds before it is cut; by default texts are joined.")
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin every window with the beginning-of-sequence token.")
    ] = False,
    worst: Annotated[int, typer.Option(help="Tokens to show of those that differ most from the original.")] = 10,
    per_token: Annotated[
        Path | None, typer.Option(help="Write the figures of every token there: .safetensors or .json.")
    ] = None,
    device: Device = None,
    trust_remote_code_model: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how good MODEL is: perplexity on a text, accuracy on questions, agreement with the original."""
    import json

    import bitpress as package
    from bitpress.evaluation.tokens import check_file

    arguments: dict[str, Any] = dict(locals())
    for name in ("package", "json", "check_file", "model", "dataset", "per_token", "as_json", "quiet", "verbose"):
        arguments.pop(name)
    with speaking(quiet=quiet, verbose=verbose):
        if per_token is not None:
            check_file(per_token)
        found = package.evaluate(model, dataset, progress=False if quiet else None, **arguments)
        if per_token is not None:
            if found.tokens is None:
                raise package.BitpressError("--per-token: no tokens were scored; give --dataset, a text.")
            found.tokens.save(per_token)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
