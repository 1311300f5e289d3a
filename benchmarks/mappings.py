"""The AWQ mappings that llm-compressor lists for each model family, beside those that bitpress discovers.

The list is asked of the peer's own package. Its mappings are resolved and proven on tiny random models of the families
that it names, and compared with what discovery finds there. What is alike counts once: blocks of one structure, and
the experts of a block. What came of each mapping:

found     discovery finds the same layers
superset  what the peer states fails its proof; discovery finds those layers and others that share their input
invalid   fails its proof
missed    valid, not found
untested  the block's output does not depend on its layers
no fit    some of its layers are not in a kind of block that has the others
no match  no block has it
beyond    found by discovery, not stated by the peer
"""

import argparse
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressed_tensors.utils import is_match
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
logging.disable(logging.WARNING)

from architectures import ARCHITECTURES, Architecture  # noqa: E402
from tiny import probed_blocks  # noqa: E402

from bitpress.models.blocks import Block  # noqa: E402
from bitpress.models.discovery import discover, structure  # noqa: E402
from bitpress.models.linears import has_columns, in_features  # noqa: E402
from bitpress.models.proofs import Claim, Prover  # noqa: E402
from bitpress.models.smoothing import out_channels  # noqa: E402
from bitpress.modifiers.mappings import AWQMapping, resolve_mapping  # noqa: E402
from bitpress.pipelines.calibrating import calibrating  # noqa: E402

# The peer lists some families, and works out the mappings of others from a model: it is given their configurations.
_ASK = """
import json, sys, torch, transformers
from llmcompressor.modifiers.transform.awq import dynamic_mappings as peer
configs, tables = json.load(sys.stdin), dict(peer.AWQ_MAPPING_REGISTRY)
for name in peer.AWQ_DYNAMIC_MAPPING_REGISTRY:
    tables[name] = []
    if name in configs:
        kind = getattr(transformers, name)
        with torch.device("meta"):
            tables[name] = peer.get_layer_mappings_from_model(kind(kind.config_class.from_dict(configs[name])))
print("LIST", json.dumps({name: [[m.smooth_layer, m.balance_layers] for m in t] for name, t in tables.items()}))
"""
# Of a pattern the first of these counts that is true of it in any kind of block.
_COLUMNS = ("invalid", "missed", "untested", "superset", "no fit", "found", "no match", "beyond")


@dataclass(frozen=True)
class Row:
    """What came of one of the peer's mappings in one kind of block, or a mapping that only discovery finds."""

    verdict: str
    pattern: str
    block: str = ""
    smooth: str = ""
    balance: tuple[str, ...] = ()
    note: str = ""
    difference: float | None = None
    grouped: bool = False  # of unequal widths, as for grouped queries: the peer passes over these


def ask(python: str, configs: dict[str, Any]) -> dict[str, list[AWQMapping]]:
    done = subprocess.run(
        [python, "-c", _ASK], input=json.dumps(configs), stdout=subprocess.PIPE, text=True, check=True
    )
    listed = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LIST"))[4:])
    return {name: [AWQMapping(smooth, balance) for smooth, balance in table] for name, table in listed.items()}


def local(block: Block, names: Iterable[str]) -> tuple[str, ...]:
    """The names below the block's, any expert's for all."""
    return tuple(sorted({re.sub(r"experts\.\d+", "experts.*", n.removeprefix(f"{block.name}.")) for n in names}))


def compared(table: Sequence[AWQMapping], block: Block) -> Iterator[Row]:
    """The peer's mappings in one kind of block, then those that discovery finds beyond them."""
    prover, ours = Prover(block), {f.smooth: set(f.balance) for f in discover(block).found}
    beyond = {(local(block, [smooth]), local(block, balance)) for smooth, balance in ours.items()}
    linears = [(n, m) for n, m in block.named_modules() if has_columns(m)]
    seen = set()
    for mapping in table:
        here = [p for p in mapping.balance_layers if any(is_match(n, m, p) for n, m in linears)]
        lacks = ", ".join(p for p in mapping.balance_layers if p not in here)
        for m in resolve_mapping(AWQMapping(mapping.smooth_layer, here), block, "peer"):
            theirs, found = set(m.balance), ours.get(m.smooth_name, set())
            smooth, balance = key = local(block, [m.smooth_name]), local(block, theirs)
            if key in seen:
                continue
            seen.add(key)
            proof = prover.prove(Claim(m.smooth, list(m.balance.values())))
            note = f"ours: {', '.join(local(block, found - theirs))} too" if found - theirs else ""
            if lacks:
                verdict, note = "no fit", f"no linear layer here is {lacks}"
            elif found >= theirs:
                verdict = "found" if proof.holds else "superset"
                beyond.discard((smooth, local(block, found)))
            elif proof.holds:
                verdict = "missed"
            else:
                verdict = "untested" if proof.untested else "invalid"
            width = in_features(m.balance[min(theirs)]) * (3 if "qkv" in smooth[0] else 1)
            grouped = smooth[0].endswith("v_proj") and out_channels(m.smooth) != width
            yield Row(verdict, str(mapping), block.label, smooth[0], balance, note, proof.difference, grouped)
    for smooth, balance in sorted(beyond):
        yield Row("beyond", "", block.label, smooth[0], balance)


def family(architecture: Architecture, model: nn.Module, table: Sequence[AWQMapping]) -> list[Row]:
    with calibrating(model):
        blocks = [b for b in probed_blocks(model, architecture.inputs(2, 24, 1)) if b.calls]
        kinds = {structure(b): b for b in reversed(blocks)}
        rows = [row for block in reversed(kinds.values()) for row in compared(table, block)]
    for mapping in table:
        if not any(row.pattern == str(mapping) for row in rows):
            smooth = {type(m).__name__ for n, m in model.named_modules() if is_match(n, m, mapping.smooth_layer)}
            rows.append(Row("no match", str(mapping), note=f"its smooth layer is {', '.join(smooth) or 'not there'}"))
    return rows


def counted(rows: Sequence[Row]) -> tuple[Counter[str], Counter[str]]:
    """How often each verdict was given: to a pattern, and to a mapping in a kind of block."""
    verdicts: dict[str, list[str]] = {}
    for row in rows:
        verdicts.setdefault(row.pattern or f"{row.smooth} -> {row.balance}", []).append(row.verdict)
    return Counter(min(each, key=_COLUMNS.index) for each in verdicts.values()), Counter(row.verdict for row in rows)


def show(families: dict[str, list[Row]], without: Sequence[str]) -> None:
    console = Console(width=150, highlight=False)
    table = Table("family", "patterns", *_COLUMNS, title="The peer's patterns, and mappings in kinds of blocks")
    counts = {name: counted(rows) for name, rows in families.items()}
    total = tuple(sum((c[i] for c in counts.values()), Counter[str]()) for i in (0, 1))
    for name, (patterns, kinds) in {**counts, f"{len(families)} families": total}.items():
        cells = [f"{patterns[c]} ({kinds[c]})" if kinds[c] else "" for c in _COLUMNS]
        table.add_row(name, str(patterns.total() - patterns["beyond"]), *cells)
    console.print(table)
    for name, rows in families.items():
        for row in rows:
            if row.verdict not in ("found", "beyond"):
                moved = "" if row.difference is None else f" [moves by {row.difference:.2g}]"
                layers = f"{row.smooth} -> {', '.join(row.balance)}" if row.smooth else row.pattern
                console.print(f"{row.verdict}: {name} {row.block}: {layers}{moved} {row.note}", markup=False)
    grouped = sum(row.grouped for rows in families.values() for row in rows)
    console.print(f"Of unequal widths, which the peer passes over: {grouped}. No tiny model of: {', '.join(without)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="the interpreter of an environment with llmcompressor")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    args = parser.parse_args()

    listed = ask(args.peer_python, {})
    models: dict[str, tuple[Architecture, nn.Module]] = {}
    for architecture in ARCHITECTURES.values():
        model = architecture.build()
        if type(model).__name__ in listed:
            models.setdefault(type(model).__name__, (architecture, model))
    listed = ask(args.peer_python, {name: models[name][1].config.to_dict() for name in models if not listed[name]})
    families = {name: family(*models[name], listed[name]) for name in sorted(models)}
    show(families, sorted(listed.keys() - models.keys()))
    if args.json:
        args.json.write_text(json.dumps({name: [asdict(row) for row in rows] for name, rows in families.items()}))


if __name__ == "__main__":
    main()
