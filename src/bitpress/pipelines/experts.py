"""Experts that saw few tokens: they are solved from what all experts of their layer saw."""

from collections.abc import Mapping

from bitpress.models.blocks import Block
from bitpress.models.experts import fused_experts
from bitpress.statistics import InputStatistics, pooled

# Fewer rows than this say little of the channels' magnitudes.
MIN_TOKENS = 64


def share_among_experts(
    block: Block, statistics: Mapping[str, InputStatistics], minimum: int
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Statistics in which no expert stands on fewer rows than ``minimum``, where any expert has so many.

    Args:
        block: the block.
        statistics: by the layer's name; layers that share their input share the object.
        minimum: rows (tokens).

    Returns:
        The statistics by layer, and the rows that each layer which has been given all experts' had itself.
    """
    shared = dict(statistics)
    few: dict[str, int] = {}
    for owner, module in block.module.named_modules(prefix=block.name):
        experts = fused_experts(module)
        if experts is None:
            continue
        wholes: dict[frozenset[int], InputStatistics] = {}
        for projection in experts.projections:
            names = [
                f"{owner}.{local}" if owner else local
                for local, layer in experts.layers.items()
                if layer.projection is projection
            ]
            rows = {name: statistics[name].rows if name in statistics else 0 for name in names if name in block.layers}
            short = [name for name, count in rows.items() if count < min(minimum, max(rows.values()))]
            seen = {id(statistics[name]): statistics[name] for name in rows if name in statistics}
            if not short or not seen:
                continue
            # The gate and the up projection share their inputs, and so one whole.
            if frozenset(seen) not in wholes:
                parts = list(seen.values())
                wholes[frozenset(seen)] = pooled(parts) if len(parts) > 1 else parts[0].clone()
            whole = wholes[frozenset(seen)]
            # What an expert's own projections feed is scaled for each expert by itself.
            shared |= {name: whole if projection.first else whole.clone() for name in short}
            few |= {name: rows[name] for name in short}
    return shared, few
