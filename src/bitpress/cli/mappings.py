"""bitpress mappings."""

from typing import Annotated

import typer

from bitpress.cli.app import app, spoken_errors


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

    with spoken_errors():
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
    if as_code:
        typer.echo(report.as_code(), nl=False)
    elif as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        rich.print(report)
