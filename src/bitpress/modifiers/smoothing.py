"""What modifiers that smooth share: finding their mappings, and moving scales over them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.linears import weight_matrix
from bitpress.models.smoothing import divide_outputs, multiply_inputs, out_channels
from bitpress.modifiers.mappings import AWQMapping, ResolvedMapping
from bitpress.modifiers.resolving import Considers, resolve_mappings
from bitpress.modifiers.state import State
from bitpress.solvers import BalanceWeight
from bitpress.statistics import InputStatistics

logger = logging.getLogger(__name__)

Mappings = dict[str, list[ResolvedMapping]]


def as_mappings(value: Any) -> Any:
    """The field ``mappings``: a mapping may also be written as a pair, as in YAML."""
    if not isinstance(value, list):
        return value
    return [AWQMapping(item[0], item[1]) if isinstance(item, (list, tuple)) else item for item in value]


def find_proven(state: State, considers: Considers, stated: Sequence[AWQMapping] | None, modifier: str) -> Mappings:
    """The mappings of every block, by the block's name; ``state.unmapped`` says why other layers have none.

    Raises:
        BitpressError: there is no data, no mapping fits, or one does not hold.
    """
    if not any(block.calls for block in state.blocks):
        raise BitpressError(f"{modifier} needs calibration data, but no dataset was given: give oneshot one.")
    resolution = resolve_mappings(state.model, state.blocks, considers, stated, state.seed)
    state.unmapped = {n: left.why for found in resolution.left.values() for left in found for n in left.layers}
    if not any(resolution.mappings.values()):
        raise BitpressError(
            f"no mapping fits {type(state.model).__name__}: state mappings=[AWQMapping(smooth, [balance, ...])], "
            "or use QuantizationModifier alone."
        )
    return resolution.mappings


def measured(state: State, mapping: ResolvedMapping) -> tuple[dict[str, nn.Module], list[InputStatistics]]:
    """The balance layers that will be quantized, and the statistics of their inputs, shared ones once.

    None of either where nothing is known of the inputs, or nothing proves the mapping; that is warned of.
    """
    targeted = {n: m for n, m in mapping.balance.items() if n in state.schemes}
    statistics = {id(s): s for s in (state.statistics.get(n) for n in targeted) if s is not None}
    if statistics and mapping.channel_map is not None:
        return targeted, list(statistics.values())
    logger.warning(
        "%s is left alone: %s did not run in %s. Give data that reaches it.",
        mapping.mapping,
        ", ".join(mapping.balance),
        "calibration" if not statistics else "the dry run, so that nothing proves the mapping",
    )
    return {}, []


def apart(state: State, mappings: Sequence[ResolvedMapping]) -> list[list[ResolvedMapping]]:
    """The mappings in as few parts as can be, so that each is in a later one than those before it that it meets.

    Two meet that have a layer, or statistics, in common.
    """
    found: list[list[ResolvedMapping]] = []
    seen: list[set[str | int]] = []
    for mapping in mappings:
        own: set[str | int] = {mapping.smooth_name, *mapping.balance}
        own |= {id(state.statistics[name]) for name in mapping.balance if name in state.statistics}
        part = 1 + max((i for i, others in enumerate(seen) if own & others), default=-1)
        if part == len(found):
            found.append([])
            seen.append(set())
        found[part].append(mapping)
        seen[part] |= own
    return found


def apply(state: State, mapping: ResolvedMapping, scales: Tensor) -> None:
    """Move ``scales`` (channels of the smooth layer,) over, and let the statistics follow.

    Raises:
        BitpressError: one of the layers has been quantized already.
    """
    assert mapping.channel_map is not None, "proven before it is applied"  # noqa: S101
    done = next((n for n in (mapping.smooth_name, *mapping.balance) if n in state.quantized), None)
    if done is not None:
        raise BitpressError(f"{done} is quantized before it is smoothed: put the modifier that smooths first.")
    # What follows is exact to the bit: ranks that start from the same scales stay the same.
    scales = state.ranks.from_first(scales)
    channel_map = mapping.channel_map.to(scales.device)
    at_inputs = scales[channel_map]
    # Channels that feed no balance layer (q and k of a fused projection) stay as they are.
    at_outputs = torch.ones(out_channels(mapping.smooth) or 0, device=scales.device)
    at_outputs[channel_map] = at_inputs if mapping.power == 1 else at_inputs.pow(1 / mapping.power)
    divide_outputs(mapping.smooth, at_outputs)
    for layer in mapping.balance.values():
        multiply_inputs(layer, at_inputs)
    shared = {id(s): s for s in (state.statistics.get(n) for n in mapping.balance) if s is not None}
    for statistics in shared.values():
        statistics.rescale(at_inputs)


def record(state: State, mapping: ResolvedMapping, **figures: Any) -> None:
    """Note for the report what was done with a mapping."""
    state.mapping_records.append({
        "smooth_layer": mapping.smooth_name,
        "balance_layers": list(mapping.balance),
        "source": mapping.source,
        "proof": mapping.difference,
        **figures,
    })  # fmt: skip


def balance_weights(state: State, layers: dict[str, nn.Module]) -> list[BalanceWeight]:
    """The layers' weights as a solver takes them."""
    matrices = {name: weight_matrix(layer) for name, layer in layers.items()}
    return [BalanceWeight(m, state.schemes[n].weights, m.dtype) for n, m in matrices.items()]
