"""bitpress mappings."""

from typing import Annotated

import typer

from bitpress.cli.app import app, speaking
from bitpress.cli.options import AsJson, Model, Quiet, TrustCode, Verbose


@app.command()
def mappings(
    model: Model,
    dataset: Annotated[
        str | None, typer.Option(help="A .txt, .jsonl, .parquet, or hub name; random tokens by default.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers that are not to be quantized. Repeatable.")] = None,
    as_code: Annotated[bool, typer.Option("--as-code", help="Print an AWQMapping list to paste.")] = False,
    trust_remote_code_model: TrustCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which layers of MODEL scale which, with the proofs, and which have no mapping and why."""
    import json

    import transformers

    import bitpress as package
    from bitpress.console import stdout

    with speaking(quiet=quiet, verbose=verbose):
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
        stdout().print(report)
