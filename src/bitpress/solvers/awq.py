"""AWQ: activation-aware scales for the channels that quantization must not hurt.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023),
https://arxiv.org/abs/2306.00978, equations 4 and 5: find s that minimizes ``||Q(W diag(s)) (diag(s)^-1 X) - W X||``
over the one-parameter family ``s = s_X^r``; ``duo_scaling`` is the reference code's ``s_X^r / s_W^(1-r)``.

The error is taken from the Gram matrix ``H = X^T X`` as ``trace(dW H dW^T)`` with ``dW = Q(W s) / s - W``, so that a
candidate costs two matrix products with the weight and none with the activations. Most candidates are plainly bad on
a sample of the rows already, so the rows are dealt in rounds: all candidates on a first small part, the best few on
some more, and the winner, against leaving the layers alone, on all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from bitpress.quantization.grid import SEARCH_CHUNK, beside, block_shape, group_view, off_grid, spread
from bitpress.quantization.scales import affine_floats, global_scale_of, has_global_scale
from bitpress.ranks import ALONE, Ranks, Summing, in_step
from bitpress.solvers.ranges import weight_ranges

# (stop, keep): after the first stop / PARTS of the rows only the best `keep` candidates go on.
PARTS = 16
ROUNDS = ((1, 6), (3, 3), (8, 1), (PARTS, 1))
# Rows that the first round sees at least.
LEAST_ROWS = 32
# A channel that was all but dead in calibration may not be later: its magnitude counts as this share of the mean.
LEAST_MAGNITUDE = 0.01
# Candidates for each rank from which on they are shared out, not the rows.
MANY = 3
# Strategies whose rows have nothing in common.
ROWS_APART = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
# Candidates that are scored in one product, on as many rows as stay in the cache.
CANDIDATES = 8


@dataclass(frozen=True)
class BalanceWeight:
    """A weight whose input channels are multiplied by the scales.

    Attributes:
        weight: (out, in), any float dtype.
        args: the scheme it will be quantized with.
        dtype: what its quantization scales are stored in.
    """

    weight: Tensor
    args: QuantizationArgs
    dtype: torch.dtype


@dataclass(frozen=True)
class AWQ:
    """The scales that won.

    Attributes:
        scales: (channels,), float32, > 0: of the producer's channels up to the last that feeds an input; ones for those
            that feed none, and where nothing beats leaving the layers alone.
        ratio: the exponent r, or None for all ones.
        duo: whether the weight's magnitude had its share.
        error: squared output error of the quantized layers with the scales.
        error_before: the same without.
    """

    scales: Tensor
    ratio: float | None
    duo: bool
    error: float
    error_before: float


def search_scales(
    layers: Sequence[BalanceWeight],
    gram: Tensor,
    mean_magnitude: Tensor,
    *,
    channel_map: Tensor | None = None,
    n_grid: int = 20,
    duo_scaling: bool | Literal["both"] = True,
    ranks: Ranks = ALONE,
) -> AWQ:
    """The scales of AWQ's family with the least squared error at the outputs of ``layers``.

    Args:
        layers: weights (out_i, in) that share their input.
        gram: (in, in), float32, ``H`` of that input.
        mean_magnitude: (in,), float32, its mean magnitude.
        channel_map: (in,), int64: the channel of the producer that feeds each input, where several inputs share one
            (grouped-query attention); None if each has its own.
        n_grid: exponents that are tried, from 0 to 1 - 1/n_grid; 0 only measures.
        duo_scaling: also divide by the weight's magnitude to the power 1 - r; "both" tries with and without.
        ranks: those that share the search out, row by row; all of them are given the same and get the same.
    """
    search = scale_search(
        layers, gram, mean_magnitude, channel_map=channel_map, n_grid=n_grid, duo_scaling=duo_scaling, ranks=ranks
    )
    return in_step([search], ranks)[0]


def scale_search(
    layers: Sequence[BalanceWeight],
    gram: Tensor,
    mean_magnitude: Tensor,
    *,
    channel_map: Tensor | None = None,
    n_grid: int = 20,
    duo_scaling: bool | Literal["both"] = True,
    ranks: Ranks = ALONE,
) -> Summing[AWQ]:
    """:func:`search_scales` for :func:`bitpress.ranks.in_step`, so that several take as many exchanges as one."""
    if channel_map is None:
        channel_map = torch.arange(gram.shape[0], device=gram.device)
    # Only channels that feed an input have a scale to be found.
    feeding, channel = channel_map.to(gram.device).unique(return_inverse=True)
    magnitude = _pool(mean_magnitude, channel)
    magnitude = magnitude.clamp(min=LEAST_MAGNITUDE * float(magnitude.mean()))
    sizes = yield from _weight_magnitude(layers, ranks)
    ratios, duos, candidates = candidate_scales(magnitude, _pool(sizes, channel), n_grid, duo_scaling)
    best, errors = yield from _race(layers, gram, candidates[:, channel], ranks)
    scales = torch.ones(int(feeding[-1]) + 1, device=gram.device)
    scales[feeding] = candidates[best]
    return AWQ(scales, ratios[best], duos[best], errors[best], errors[0])


def candidate_scales(
    magnitude: Tensor, weight_magnitude: Tensor, n_grid: int, duo_scaling: bool | Literal["both"]
) -> tuple[list[float | None], list[bool], Tensor]:
    """Exponents, whether duo, and scales (candidates, channels). The first candidate leaves the layers alone."""
    exponents = [i / n_grid for i in range(n_grid)]
    ratios: list[float | None] = [None]
    duos = [False]
    scales = [torch.ones_like(magnitude).unsqueeze(0)]
    for duo in (False, True) if duo_scaling == "both" else (bool(duo_scaling),):
        r = torch.tensor(exponents, device=magnitude.device).unsqueeze(1)
        s = magnitude.pow(r)
        if duo:
            s = s / (weight_magnitude.pow(1 - r) + 1e-4)
        s = s.clamp_(min=1e-4)
        s = s / (s.amax(1, keepdim=True) * s.amin(1, keepdim=True)).sqrt()
        # A channel that is never active, or a weight that is all zero, gives no usable scale.
        scales.append(torch.where(s.isfinite() & (s > 0), s, 1.0))
        ratios += exponents
        duos += [duo] * n_grid
    return ratios, duos, torch.cat(scales)


def _pool(per_input: Tensor, channel: Tensor) -> Tensor:
    """The mean over the inputs that one producer channel feeds; by the CPU: a GPU adds in another order each time."""
    values, channel = per_input.cpu(), channel.cpu()
    count = torch.bincount(channel)
    return (torch.zeros(len(count), dtype=values.dtype).index_add_(0, channel, values) / count).to(per_input.device)


def _weight_magnitude(layers: Sequence[BalanceWeight], ranks: Ranks) -> Summing[Tensor]:
    """Mean over all rows of abs(W) relative to the greatest of its group: (in,), in [0, 1]."""
    total = layers[0].weight.new_zeros(layers[0].weight.shape[1], dtype=torch.float32)
    for layer in layers:
        mine, block = layer.weight[ranks.part(0, len(layer.weight), _height(layer))], block_shape(layer.args)
        if not mine.numel():
            continue
        absolute = mine.abs().float()
        if block is None:
            view = group_view(absolute, layer.args)
            greatest = view.amax(dim=-1, keepdim=True)
        else:
            view = absolute.unsqueeze(1)
            greatest = spread(weight_ranges(absolute, layer.args)[1], absolute.shape, block).unsqueeze(1)
        total += view.div_(greatest.clamp_(min=torch.finfo(torch.float32).tiny)).flatten(1).sum(0)
    yield total
    return total / sum(len(layer.weight) for layer in layers)


def _race(
    layers: Sequence[BalanceWeight], gram: Tensor, scales: Tensor, ranks: Ranks
) -> Summing[tuple[int, dict[int, float]]]:
    """The index of the best of ``scales`` (candidates, in), and the errors over all rows of it and of candidate 0."""
    weights = [layer.weight for layer in layers]
    peaks = column_peaks(layers, weights)
    rows = gram.new_zeros(sum(map(len, weights)))
    for layer, of_layer in zip(layers, rows.split([len(w) for w in weights]), strict=True):
        part = ranks.part(0, len(layer.weight), _height(layer))
        of_layer[part] = row_errors(layer, layer.weight, part, gram, scales[:1], peaks)[0]
    yield rows
    untouched = float(rows.double().sum())
    orders = [_order(layer, r) for layer, r in zip(layers, rows.split([len(w) for w in weights]), strict=True)]
    parts = max(1, min(PARTS, len(rows) // LEAST_ROWS))
    alive = list(range(1, len(scales)))
    errors = torch.zeros(len(scales), dtype=torch.float64)
    seen = 0
    for stop, keep in ROUNDS:
        until = -(-stop * parts // PARTS)
        if until == seen:
            continue  # few rows: no more is known than after the round before
        mine, chosen = _share(layers, orders, alive, [seen, until], parts, ranks)
        sums = torch.zeros_like(errors)
        sums[mine] = _errors(layers, chosen, gram, scales[mine], peaks)
        yield sums
        errors += sums
        seen = until
        alive = sorted(alive, key=lambda i: float(errors[i]))[:keep]
    best = alive[0] if alive else 0
    if not best or errors[best] >= untouched:
        return 0, {0: untouched}
    return best, {0: untouched, best: float(errors[best])}


def _share(
    layers: Sequence[BalanceWeight],
    orders: Sequence[Tensor],
    alive: list[int],
    bounds: Sequence[int],
    parts: int,
    ranks: Ranks,
) -> tuple[list[int], list[Tensor]]:
    """This rank's candidates and, of each layer, its rows between bounds of their order, in ``parts``.

    Many candidates are shared out, and the rows of few: a call for few rows costs nearly what one for many does.
    """
    by_candidate = len(alive) >= MANY * ranks.size
    chosen = []
    for layer, order in zip(layers, orders, strict=True):
        height = _height(layer)
        units = -(-len(order) // height)
        first, last = (min(height * (units * bound // parts), len(order)) for bound in bounds)
        chosen.append(order[slice(first, last) if by_candidate else ranks.part(first, last, height)])
    return alive[ranks.rank :: ranks.size] if by_candidate else alive, chosen


def _errors(
    layers: Sequence[BalanceWeight], rows: Sequence[Tensor], gram: Tensor, scales: Tensor, peaks: Tensor | None
) -> Tensor:
    """The sums of :func:`row_errors` over the rows of all layers: (candidates,), float64, on the CPU."""
    first = layers[0]
    alike = all(layer.args == first.args and layer.dtype == first.dtype for layer in layers)
    small = sum(map(len, rows)) * gram.shape[0] <= SEARCH_CHUNK
    parts: list[tuple[BalanceWeight, Tensor, slice | Tensor]]
    parts = [(layer, layer.weight, of_layer) for layer, of_layer in zip(layers, rows, strict=True)]
    if alike and small and first.args.strategy in ROWS_APART and not has_global_scale(first.args):
        # One call of the kernels for all.
        parts = [(first, torch.cat([weight[of_layer] for _, weight, of_layer in parts]), slice(None))]
    sums = [row_errors(*part, gram, scales, peaks).double().sum(1) for part in parts]
    return torch.stack(sums).sum(0).cpu()


def column_peaks(layers: Sequence[BalanceWeight], weights: Sequence[Tensor]) -> Tensor | None:
    """The greatest magnitude of each column over all layers, (in,), if any of them has a global scale."""
    if not any(has_global_scale(layer.args) for layer in layers):
        return None
    return torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)


def _height(layer: BalanceWeight) -> int:
    """Rows that share a range, and so are scored together; 1 where all do, or none."""
    block = block_shape(layer.args)
    return block[0] if block else 1


def _order(layer: BalanceWeight, errors: Tensor) -> Tensor:
    """The rows that hold most of the error first: they decide. Where rows share a range, every so many rows instead."""
    if layer.args.strategy == QuantizationStrategy.BLOCK:
        return torch.arange(len(errors), device=errors.device)
    if layer.args.strategy != QuantizationStrategy.TENSOR:
        return errors.argsort(descending=True)
    rows = torch.arange(len(errors), device=errors.device)
    return torch.cat([rows[i::PARTS] for i in range(PARTS)])


def row_errors(
    layer: BalanceWeight,
    weight: Tensor,
    rows: slice | Tensor,
    gram: Tensor,
    scales: Tensor,
    peaks: Tensor | None = None,
) -> Tensor:
    """The diagonal of ``dW H dW^T`` for some rows of a layer and each of ``scales``: (candidates, rows).

    ``peaks`` are those of :func:`column_peaks`, from which a candidate's global scale follows.
    """
    chosen_rows = weight[rows]
    errors = gram.new_empty(len(scales), len(chosen_rows))
    if not errors.numel():
        return errors
    whole = weight.float() if layer.args.strategy == QuantizationStrategy.TENSOR else None
    globals_ = [_global_scale(layer, s, peaks) for s in scales]
    height = _height(layer)
    done = 0
    for stored in chosen_rows.split(max(1, SEARCH_CHUNK // weight.shape[1] // height) * height):
        part = stored.float()
        buffer = part.new_empty(min(CANDIDATES, len(scales)), *part.shape)
        scratch = torch.empty_like(part)
        for first in range(0, len(scales), CANDIDATES):
            chosen = slice(first, first + CANDIDATES)
            delta = buffer[: len(scales[chosen])]
            for s, global_scale, out in zip(scales[chosen], globals_[chosen], delta, strict=True):
                _delta(layer, whole, part, s, global_scale, out, scratch)
            product = (delta.flatten(0, 1) @ gram).view_as(delta)
            errors[first : first + len(delta), done : done + len(part)] = product.mul_(delta).sum(-1)
        done += len(part)
    return errors


def _global_scale(layer: BalanceWeight, s: Tensor, peaks: Tensor | None) -> Tensor | None:
    if peaks is None or not has_global_scale(layer.args):
        return None
    return global_scale_of((s * peaks).amax().reshape(1), layer.args)


def _delta(
    layer: BalanceWeight,
    whole: Tensor | None,
    part: Tensor,
    s: Tensor,
    global_scale: Tensor | None,
    out: Tensor,
    scratch: Tensor,
) -> None:
    """Write ``Q(W s) / s - W`` of the rows ``part`` to ``out``; ``whole`` is the weight if all rows share a range."""
    args = layer.args
    torch.mul(part, s, out=out)
    ranges = weight_ranges(out if whole is None else whole * s, args)
    view, (step, zero_point) = beside(out, affine_floats(*ranges, args, layer.dtype, global_scale), args)
    off_grid(view, step, zero_point, args, out=view, scratch=scratch.view_as(view)).mul_(step)
    out.mul_(s.reciprocal())
